"""Which pages a run attends, recorded from its ops; and how many of them any number of slots would have to fetch, to
the page. (`placement.Slots`, on paper.)"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import ops
from .ops import Mask
from .placement import share
from .resident import parts


@dataclasses.dataclass
class Wants:
    """The pages that a call of attention wants.

    Args:
        forward: of the model, counted from 0.
        layer: of the model.
        pages: [B, H, M] int32, ascending, -1 padded.
        needs: [B][H] how many.
        is_same: a decode step, or the look at its weights, that wants what the layer's last one did, by the same
            tensors.
        is_step: of decode.
    """

    forward: int
    layer: int
    pages: Tensor
    needs: list[list[int]]
    is_same: bool
    is_step: bool


class Moved(NamedTuple):
    """Pages of a forward pass."""

    wanted: int
    fetched: int


class Trace(TorchDispatchMode):
    """Records what attention wants while it is entered: all forward passes of one cache without `device_bytes`, from
    the first on. Lists name pages; sequences are not reordered.

    Args:
        layers: of the model.

    Example:
        with Trace(layers=30) as trace:
            model.generate(..., past_key_values=cache)
        trace.replay(slots=1000)  # of each forward pass, pages that are wanted and pages that are fetched
    """

    def __init__(self, layers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self.wants: list[Wants] = []
        self._calls = 0  # of prefill and decode
        self._last: dict[int, tuple[Any, ...]] = {}  # of each layer, what its last step followed from

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__ if func.namespace == "lserve_ext" else ""
        if name in ("prefill", "decode", "attention_mass"):
            self._record(name, {a.name: x for a, x in zip(func._schema.arguments, args, strict=True)})
        return func(*args, **(kwargs or {}))

    def _record(self, op: str, a: dict[str, Any]) -> None:
        self._calls += op != "attention_mass"
        call = self._calls - 1
        layer, table = call % self.layers, a["block_table"]
        if op == "prefill":
            mask, first, P = Mask(a["windows"], None, None, a["sink"]), a["context_lens"], a["page_size"]
        else:
            mask = Mask(a["windows"], a["lists"], a["local_start"], a["sink"], a["unit"])
            rows, P = 1 if op == "decode" else a["q"].shape[1], a["k_pool"].shape[1]
            first = (a["seq_lens"] - rows).clamp(min=-1)
        if mask.unit not in (None, P):
            raise ValueError(f"unit: expected lists of pages, {P} tokens each, got {mask.unit}")
        is_step, is_same = op == "decode" or (op == "attention_mass" and rows == 1), False
        if is_step:
            key = (*mask, a["sealed"], table)
            last = self._last.get(layer, ())
            is_same = len(last) == len(key) and all(x is y for x, y in zip(last, key, strict=True))
            self._last[layer] = key
        pages, counts = ops.wanted_pages(mask, table, a["sealed"], first, P)
        self.wants.append(Wants(call // self.layers, layer, pages.cpu(), counts.tolist(), is_same, is_step))

    def replay(self, slots: int) -> list[Moved]:
        """Of every forward pass, with so many slots.

        Raises:
            ValueError: a head wants more pages at once.
        """
        widest = max((wants.pages.shape for wants in self.wants), default=(0, 0, 0))
        device = _Slots(slots, (self.layers, *widest))
        found: list[Moved] = []
        for wants in self.wants:
            before = device.moved
            device.attend(wants)
            wanted, fetched = (now - then for now, then in zip(device.moved, before, strict=True))
            if wants.forward == len(found):
                found.append(Moved(0, 0))
            found[-1] = Moved(found[-1].wanted + wanted, found[-1].fetched + fetched)
        return found


class _Slots:
    """`placement.Slots` and the rounds of `resident.Resident`, without pages. Shape: [layers, B, H, M]."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.layers = count, shape[0]
        self.moved = Moved(0, 0)
        self._block_table = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
        self._slot_table = torch.full_like(self._block_table, -1)
        blocks = torch.full((count,), -1, dtype=torch.int32)
        self._state = blocks, torch.zeros_like(blocks), torch.zeros(1, dtype=torch.int32)
        self._generation = 0
        self._complete: dict[int, int] = {}  # of a layer, the generation in which all that it wants was there

    def attend(self, wants: Wants) -> None:
        needs, H = wants.needs, wants.pages.shape[1]
        total, most = sum(map(sum, needs)), max(map(max, needs), default=0)
        if most > self.count:
            raise ValueError(f"slots: expected at least the {most} pages that a head attends, got {self.count}")
        keep = int(share(self.count, total, self.layers))
        if total <= self.count:
            is_there = wants.is_same and self._complete.get(wants.layer) == self._generation
            self._fetch(wants, slice(None), slice(None), 0 if is_there else total, keep)
            self.moved = Moved(self.moved.wanted + total, self.moved.fetched)
            if wants.is_step:
                self._complete[wants.layer] = self._generation
            return
        if wants.is_step and not wants.is_same:
            self._complete.pop(wants.layer, None)
        for b, h in parts(needs, H, self.count, H):
            count = sum(sum(need[h]) for need in needs[b])
            self._fetch(wants, b, h, count, keep)
            self.moved = Moved(self.moved.wanted + count, self.moved.fetched)
            keep = max(0, keep - count)

    def _fetch(self, wants: Wants, b: slice, h: slice, count: int, keep: int) -> None:
        if not count:
            return
        pages, M = wants.pages[b, h], wants.pages.shape[2]
        blocks, slots = (table[wants.layer, b, h, :M] for table in (self._block_table, self._slot_table))
        src, _ = ops.resolve_pages(pages, blocks, slots, *self._state, keep)
        fetched = int((src >= 0).sum())
        self._generation += bool(fetched)
        self.moved = Moved(self.moved.wanted, self.moved.fetched + fetched)


def moved_bytes(moved: Sequence[Moved], page_bytes: int) -> float:
    """Bytes that are fetched, of a forward pass on average."""
    return sum(m.fetched for m in moved) * page_bytes / max(1, len(moved))
