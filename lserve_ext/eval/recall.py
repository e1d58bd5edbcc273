"""How much of dense attention's softmax mass a decode step attends, and how much the best lists as long would."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import ops
from ..ops import DENSE, LISTED, Mask, PagedKV


class Share(NamedTuple):
    """Of the mass that dense attention over the same keys gives, on average over sequences and query heads."""

    attended: float
    oracle: float
    """By lists of the same length of those units that have most of it."""


class Recall(TorchDispatchMode):
    """Measures decode steps while it is entered, of layers that all lie on the device. Each is attended once more,
    densely, so steps are slow.

    Heads that follow no list are left out: they have lost pages, or attend all.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[Share | None] = []
        """Of each call of `decode`; None: no head followed a list."""
        self.calls: Counter[str] = Counter()
        """Of this package's ops, by name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "lserve_ext":
            name = func.overloadpacket.__name__
            self.calls[name] += 1
            if name == "decode":
                given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=True)}
                self.layers.append(_share(given, found[1]))
        return found


def _share(a: dict[str, Any], lse: Tensor) -> Share | None:
    """Of a decode call with these arguments and this lse [B, Hq]."""
    q, windows, lists, local_start = a["q"], a["windows"], a["lists"], a["local_start"]
    (B, Hq), H = q.shape[:2], len(windows)
    listed = windows == LISTED
    if lists is None or not listed.any():
        return None
    kv = PagedKV(*(a[name] for name in PagedKV._fields[:-1]))
    P = kv.k_pool.shape[1]
    unit = P if a["unit"] is None else a["unit"]
    mask = Mask(torch.where(listed, DENSE, windows), sink=a["sink"])
    _, dense = ops.decode(q, mask, kv, a["seq_lens"], scale=a["scale"])
    attended = (lse - dense).exp().view(B, H, Hq // H)[:, listed]

    mass = ops.attention_mass(q[:, None], dense[:, None], mask, kv, a["seq_lens"], scale=a["scale"])[:, listed]
    units = mass.unflatten(2, (-1, unit)).sum(3)  # [B, heads, units]
    at = torch.arange(units.shape[2], device=q.device)
    free = (at >= a["sink"] * P // unit) & (at < local_start[:, None])  # [B, units]: neither sink nor local
    counts = (lists[:, listed] >= 0).sum(2)
    best = units.masked_fill(~free[:, None], 0).sort(2, descending=True).values
    picked = torch.where(at < counts[..., None], best, 0).sum(2)
    oracle = (units.masked_fill(free[:, None], 0).sum(2) + picked) * H / Hq
    return Share(float(attended.mean()), float(oracle.mean()))
