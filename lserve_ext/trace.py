"""Which pages a run attends, recorded from its ops; and how many of them any number of slots would have to fetch, to
the page. (`placement.Slots`, on paper.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from . import ops
from .ops import Mask
from .resident import parts


@dataclasses.dataclass
class Wants:
    """The pages that a call of attention wants.

    Args:
        forward: of the model, counted from 0.
        layer: of the model.
        pages: [B][H] ascending, as numbers that no other page of the run has.
        is_same: a decode step, or the look at its weights, that wants what the layer's last one did, by the same
            tensors.
        is_step: of decode.
    """

    forward: int
    layer: int
    pages: list[list[np.ndarray]]
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
        found, counts = ops.wanted_pages(mask, table, a["sealed"], first, P)
        B, H, _ = table.shape
        pages = found.cpu().numpy().astype(np.int64)
        place = (np.arange(B)[:, None] * H + np.arange(H)) * self.layers + layer
        names = pages * (B * H * self.layers) + place[..., None]
        listed = [[names[b, h, :n] for h, n in enumerate(row)] for b, row in enumerate(counts.tolist())]
        self.wants.append(Wants(call // self.layers, layer, listed, is_same, is_step))

    def replay(self, slots: int) -> list[Moved]:
        """Of every forward pass, with so many slots.

        Raises:
            ValueError: a head wants more pages at once.
        """
        device = _Slots(slots, self.layers)
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
    """`placement.Slots` and the rounds of `resident.Resident`, without pages."""

    def __init__(self, count: int, layers: int) -> None:
        self.count, self.layers = count, layers
        self.moved = Moved(0, 0)
        self._slot: dict[int, int] = {}  # of a page
        self._page = [-1] * count
        self._last_use = np.zeros(count, np.int64)
        self._clock = self._generation = 0
        self._complete: dict[int, int] = {}  # of a layer, the generation in which all that it wants was there

    def attend(self, wants: Wants) -> None:
        needs = [[len(pages) for pages in row] for row in wants.pages]
        total, most = sum(map(sum, needs)), max(map(max, needs), default=0)
        if most > self.count:
            raise ValueError(f"slots: expected at least the {most} pages that a head attends, got {self.count}")
        others = self.layers - 1
        keep = max(0, self.count - total) // others if others else self.count
        if total <= self.count:
            if wants.is_same and self._complete.get(wants.layer) == self._generation:
                self.moved = Moved(self.moved.wanted + total, self.moved.fetched)
                return
            self._fetch([page for row in wants.pages for pages in row for page in pages.tolist()], keep)
            if wants.is_step:
                self._complete[wants.layer] = self._generation
            return
        if wants.is_step and not wants.is_same:
            self._complete.pop(wants.layer, None)
        for b, h in parts(needs, len(needs[0]), self.count, len(needs[0])):
            pages = [page for row in wants.pages[b] for some in row[h] for page in some.tolist()]
            self._fetch(pages, keep)
            keep = max(0, keep - len(pages))

    def _fetch(self, pages: Sequence[int], keep: int) -> None:
        self._clock += 1
        missing = [page for page in pages if page not in self._slot]
        self._last_use[[self._slot[page] for page in pages if page in self._slot]] = self._clock
        victims = np.sort(np.argsort(self._last_use, kind="stable")[: len(missing)]).tolist()
        for page, slot in zip(missing, victims, strict=True):
            self._slot.pop(self._page[slot], None)
            self._page[slot], self._slot[page] = page, slot
        self._last_use[[self._slot[page] for page in pages]] = [self._clock * (i < keep) for i in range(len(pages))]
        self._generation += bool(missing)
        self.moved = Moved(self.moved.wanted + len(pages), self.moved.fetched + len(missing))


def moved_bytes(moved: Sequence[Moved], page_bytes: int) -> float:
    """Bytes that are fetched, of a forward pass on average."""
    return sum(m.fetched for m in moved) * page_bytes / max(1, len(moved))
