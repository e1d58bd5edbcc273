"""Attention over pages of which not all lie on the device: what it wants is fetched first, in rounds of heads."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from . import ops
from .home import Home, Inputs, Recompute
from .ops import Mask, PagedKV
from .packed import Packed, pack, pages_of
from .placement import TieredPool, over


class StepAttention(Protocol):
    """Who appends and attends pages in decode: `ops`, where all of them are resident, `Resident` or
    `reserved.ReservedResident`."""

    def append_kv(self, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, context_lens: Tensor, kv: PagedKV) -> None: ...

    def decode(
        self, q: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def attention_mass(
        self, q: Tensor, lse: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> Tensor: ...


class Attention(StepAttention, Protocol):
    """The same in prefill, too."""

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, mask: Mask,
        kv: PagedKV | None = None, context_lens: Tensor | None = None, *, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@dataclasses.dataclass
class Given:
    """What a layer was given in a step, from which its keys and values come.

    Args:
        rows: [N, R] at the new tokens.
        newest: [B, 2P, R] at the newest tokens, as `PagedKV.residual_k`; NaN where that is not known.
        recompute: see `home.Recompute`.
    """

    rows: Tensor
    newest: Tensor
    recompute: Recompute

    def append(self, cu_seqlens: Tensor, context_lens: Tensor) -> None:
        """Writes the new rows into `newest`."""
        size, new = self.newest.shape[1], cu_seqlens.diff()
        device = self.rows.device
        b = torch.repeat_interleave(torch.arange(len(new), device=device), new)
        position = context_lens[b] + torch.arange(len(self.rows), device=device) - cu_seqlens[b]
        kept = position >= (context_lens + new)[b] - size
        self.newest[b[kept], (position % size)[kept].long()] = self.rows[kept]

    def inputs(self, sealing: Tensor, cu_seqlens: Tensor, context_lens: Tensor) -> tuple[Inputs, np.ndarray]:
        """Of the pages that are sealed now, [B, H, M] bool; and which blocks, in their order, have none."""
        M, size = sealing.shape[2], self.newest.shape[1]
        b, h, page = sealing.nonzero(as_tuple=True)
        pages, which = torch.unique(b * M + page, return_inverse=True)
        at, first = pages // M, (pages % M) * (size // 2)
        position = first[:, None] + torch.arange(size // 2, device=first.device)
        since = position - context_lens[at, None]
        new = (cu_seqlens[at, None] + since).clamp(min=0, max=max(0, len(self.rows) - 1)).long()
        rows = torch.where((since >= 0)[..., None], self.rows[new], self.newest[at[:, None], position % size])
        unknown = rows.isnan().flatten(1).any(1)[which].cpu().numpy()
        return Inputs(rows, which.cpu().numpy(), h.cpu().numpy(), self.recompute), unknown


def _write(home: Home, blocks: np.ndarray, pages: dict[str, Tensor], found: tuple[Inputs, np.ndarray] | None) -> None:
    """Pages whose inputs are known go with these, the others alone."""
    if found is None or found[1].all():
        home.write(blocks, pages)
        return
    (rows, page, head, recompute), unknown = found
    known = ~unknown
    pages = {name: x.cpu() for name, x in pages.items()}
    home.write(blocks[known], {name: x[torch.from_numpy(known)] for name, x in pages.items()},
               Inputs(rows, page[known], head[known], recompute))  # fmt: skip
    if unknown.any():
        home.write(blocks[unknown], {name: x[torch.from_numpy(unknown)] for name, x in pages.items()})


class Resident:
    """Attention over pages that are fetched into slots first: all heads at once, or, where they need more slots than
    there are, as many heads at a time as fit. Heads do not know of each other, so results are the same to the bit.

    A decode step that wants the same pages as the last one, because a selection is reused, looks for none of them if no
    slot has been given to another page meanwhile.

    Args:
        pool: whose blocks `PagedKV.block_table` names.
        packs: all heads follow lists of tokens. Where not all pages fit on the device, these tokens are copied side by
            side, without the rest of their pages; only local pages take slots.
        reuse_interval: steps that a list serves.
    """

    def __init__(self, pool: TieredPool, packs: bool = False, reuse_interval: int = 1) -> None:
        self._pool, self._slots, self._packs, self._reuse_interval = pool, pool.slots, packs, reuse_interval
        self.slot_table = torch.empty(0)
        """[B, H, M] int32 where pages may lie, of the layer that attends; written."""
        self.seals = True
        """Whether the step of now seals a page, as far as the host knows."""
        self.given: Given | None = None
        """What the layer's new pages can be recomputed from."""
        self._last = _Wanted(None, self.slot_table, [])  # of the last decode step
        self._served = 0  # steps that the lists of that step have served
        self._packed: _Packing | None = None  # of that step
        self._following: Callable[[], Resident | None] = lambda: None  # the layer that attended after this one

    def with_reuse(self, interval: int) -> Resident:
        """Of another cache over the same pool, whose lists serve so many steps."""
        return Resident(self._pool, self._packs, interval)

    def append_kv(self, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, context_lens: Tensor, kv: PagedKV) -> None:
        """`ops.append_kv`; where ops cannot write to the home, sealed pages are made beside it and then handed over."""
        home, P, given = self._pool.home, kv.k_pool.shape[1], self.given
        if not self._pool.is_apart or not self.seals:
            ops.append_kv(k, v, cu_seqlens_k, context_lens, kv)
            if given is not None:
                given.append(cu_seqlens_k, context_lens)
            return
        ends = torch.div(context_lens + cu_seqlens_k.diff(), P, rounding_mode="floor")[:, None] - 1
        page = torch.arange(kv.block_table.shape[2], device=k.device)
        sealing = ((page >= kv.sealed[:, None]) & (page < ends))[:, None] & (kv.block_table >= 0)
        blocks = kv.block_table[sealing]
        slot_table = torch.full_like(kv.block_table, -1)
        slot_table[sealing] = torch.arange(len(blocks), dtype=torch.int32, device=k.device)
        pages = {name: x.new_empty((len(blocks), *x.shape[1:])) for name, x in self._slots.tensors.items()}
        ops.append_kv(k, v, cu_seqlens_k, context_lens, over(kv, pages, slot_table))
        if home is None:
            self._pool.put(pages, torch.arange(len(blocks), dtype=torch.int32, device=k.device), blocks)
            return
        inputs = None if given is None else given.inputs(sealing, cu_seqlens_k, context_lens)
        if len(blocks):
            _write(home, blocks.cpu().numpy(), pages, inputs)
        if given is not None:
            given.append(cu_seqlens_k, context_lens)

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, mask: Mask,
        kv: PagedKV | None = None, context_lens: Tensor | None = None, *, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`ops.prefill`, with as many queries as new tokens."""
        assert kv is not None and context_lens is not None
        G = q.shape[1] // k.shape[1]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        bounds = cu_seqlens_k.tolist()
        for b, h, part in self._rounds(_wanted(None, mask, kv, context_lens), kv):
            tokens, queries = slice(bounds[b.start], bounds[b.stop]), slice(h.start * G, h.stop * G)
            cu_seqlens = cu_seqlens_k[b.start : b.stop + 1] - bounds[b.start]
            found = ops.prefill(
                q[tokens, queries], k[tokens, h], v[tokens, h], cu_seqlens, cu_seqlens, _part(mask, b, h), part,
                context_lens[b], scale=scale,
            )  # fmt: skip
            out[tokens, queries], lse[tokens, queries] = found
        return out, lse

    def decode(
        self, q: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`ops.decode`."""
        G = q.shape[1] // kv.block_table.shape[1]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        is_reused = self._last.key is not None and self._last.key.lists is mask.lists
        self._served = self._served + 1 if is_reused else 1
        wanted = self._of_step(mask, kv, seq_lens)
        for b, h, part in self._rounds(wanted, kv):
            whole = part.block_table is kv.block_table
            now, lens = (mask, seq_lens) if whole else (_part(mask, b, h), seq_lens[b])
            if wanted.packs:
                now, part, lens, *_ = self._pack(now, part, lens)
            if (b.stop, h.stop) == kv.block_table.shape[:2]:  # all that the layer wants has been fetched
                self._look_ahead()
            if whole:
                out, lse = ops.decode(q, now, part, lens, scale=scale)
                self._bring_ahead()
            else:
                queries = slice(h.start * G, h.stop * G)
                out[b, queries], lse[b, queries] = ops.decode(q[b, queries], now, part, lens, scale=scale)
        return out, lse

    def attention_mass(
        self, q: Tensor, lse: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """`ops.attention_mass`."""
        (B, H, M), P = kv.block_table.shape, kv.k_pool.shape[1]
        G = q.shape[2] // H
        mass = q.new_empty(B, H, M * P, dtype=torch.float32)
        if q.shape[1] == 1:
            wanted = self._of_step(mask, kv, seq_lens)
        else:
            wanted = _wanted(None, mask, kv, (seq_lens - q.shape[1]).clamp(min=-1))
        for b, h, part in self._rounds(wanted, kv):
            queries = slice(h.start * G, h.stop * G)
            logs = lse[b, :, queries].contiguous()
            whole = part.block_table is kv.block_table
            now, lens = (mask, seq_lens) if whole else (_part(mask, b, h), seq_lens[b])
            packed = self._pack(now, part, lens) if wanted.packs else None
            if packed is not None:
                now, part, lens, *_ = packed
            found = ops.attention_mass(q[b, :, queries], logs, now, part, lens, scale=scale)
            mass[b, h] = found if packed is None else packed.unpacked(found, M * P)
        return mass

    def _look_ahead(self) -> None:
        """Begins to read what the layer that comes next wanted in its last step, while this one computes. Which layer
        that is, the last step has shown."""
        before, self._pool.attending = self._pool.attending, weakref.ref(self)
        last = None if before is None else before()
        if last is not None:
            last._following = weakref.ref(self)
        following, home = self._following(), self._pool.home
        if following is not None and home is not None and home.tier is not None and self._pool.phase == 3:
            self._pool.read_ahead(following.likely())

    def _bring_ahead(self) -> None:
        """Where host memory is another one, begins to copy to the device what the layer that comes next wanted in its
        last step: after this layer's attention, and while the rest of it computes."""
        following = self._following()
        if following is None or self._pool.slabs is None:
            return
        last, slots = following._last, self._slots
        total = sum(map(sum, last.needs))
        if following._selects_next or last.packs or total > slots.count or last.generation == slots.generation:
            return
        assert last.key is not None
        table = last.key.block_table
        slots.bring_ahead(last.pages, table, last.key.slot_table[..., : table.shape[2]], slots.share(total))
        last.generation = slots.generation

    @property
    def _selects_next(self) -> bool:
        """Whether the next step will want other pages than the last one, as far as that is known."""
        key = self._last.key
        return key is None or (key.lists is not None and self._served >= self._reuse_interval)

    def likely(self) -> np.ndarray:
        """Blocks [N] that the layer's next step will want, as far as that is known: those of the last one, unless it
        selects other pages. (Other tokens mostly lie in the same pages.)"""
        last, key = self._last, self._last.key
        if key is None or (self._selects_next and not self._packs):
            return np.zeros(0, np.int64)
        if last.blocks is None:
            found = [key.block_table.gather(2, last.pages.clamp(min=0).long())[last.pages >= 0]]
            if self._packed is not None and self._packed.lists is key.lists:
                packed = self._packed.packed
                found.append(key.block_table.gather(2, packed.page)[packed.offset >= 0])
            last.blocks = torch.cat(found).unique().cpu().numpy()
        return last.blocks

    def _pack(self, mask: Mask, kv: PagedKV, seq_lens: Tensor) -> Packed:
        """A part of a step with its listed tokens side by side; their attention mass follows attention to them."""
        slots, last = self._slots, self._packed
        now = _Packing(mask.lists, kv.block_table, seq_lens, slots.generation)
        if last is None or slots.packed is not last or not last.is_of(now):
            slots.packed = None
            now.packed = pack(mask, kv, seq_lens, slots.count, self._reuse_interval)
            slots.copy_rows(now.packed, kv.block_table, kv.slot_table)
            last = slots.packed = self._packed = now
        return last.packed

    def _of_step(self, mask: Mask, kv: PagedKV, seq_lens: Tensor) -> _Wanted:
        """What a decode step wants. It follows from tensors that stay the same objects until something changes."""
        packs = self._packs and mask.lists is not None and self._pool.phase > 1
        key = _Key(mask.windows, mask.lists, mask.local_start, kv.sealed, kv.block_table, self.slot_table)
        last = self._last
        if last.key is None or last.packs != packs or any(a is not b for a, b in zip(last.key, key, strict=True)):
            self._last = _wanted(key, mask, kv, seq_lens - 1, packs)
        return self._last

    def _rounds(self, wanted: _Wanted, kv: PagedKV) -> Iterator[tuple[slice, slice, PagedKV]]:
        """Sequences, kv heads, and their cache with the pages that they want in slots."""
        slots, (B, H, M) = self._slots, kv.block_table.shape
        slot_table, tensors = self.slot_table[..., :M], slots.tensors
        total, packed = sum(map(sum, wanted.needs)), wanted.packed
        most = max(map(max, wanted.needs), default=0)
        slots.check(most + packed, "that a head attends")
        heads = B * H
        if packed:
            heads = max(1, min(heads, len(slots) // 2 // packed, (len(slots) - most) // packed))
            slots.reserve(heads * packed)
        elif most > slots.count:
            slots.reserve(0)
        keep = slots.share(total)
        if total <= slots.count and heads >= B * H:
            slots.fetch(wanted.pages, kv.block_table, slot_table, total, keep, wanted.generation)
            wanted.generation = slots.generation
            yield slice(0, B), slice(0, H), over(kv, tensors, slot_table)
            return
        for b, h in parts(wanted.needs, H, slots.count, heads):
            count = sum(sum(need[h]) for need in wanted.needs[b])
            slots.fetch(wanted.pages[b, h], kv.block_table[b, h], slot_table[b, h], count, keep)
            keep = max(0, keep - count)
            assert kv.residual_k is not None and kv.residual_v is not None
            residual_k, residual_v = kv.residual_k[b, h], kv.residual_v[b, h]
            yield b, h, PagedKV(tensors["k"], tensors["v"], kv.stats, tensors.get("scales"), kv.block_table[b, h],
                                slot_table[b, h], residual_k, residual_v, kv.sealed[b])  # fmt: skip


def parts(needs: list[list[int]], H: int, room: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Runs of at most so many heads of one sequence that need no more slots than there are."""
    for b, need in enumerate(needs):
        first, total = 0, 0
        for h, more in enumerate(need):
            if total + more > room or h - first == most:
                yield slice(b, b + 1), slice(first, h)
                first, total = h, 0
            total += more
        yield slice(b, b + 1), slice(first, H)


class _Key(NamedTuple):
    """The tensors that the wants of a decode step follow from."""

    windows: Tensor
    lists: Tensor | None
    local_start: Tensor | None
    sealed: Tensor
    block_table: Tensor
    slot_table: Tensor


@dataclasses.dataclass(eq=False)
class _Packing:
    """Tokens that lie side by side in slots, and what they follow from."""

    lists: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    generation: int
    """Of the slots, which say where local pages lie."""
    packed: Packed = dataclasses.field(init=False)

    def is_of(self, other: _Packing) -> bool:
        same = self.lists is other.lists and self.block_table is other.block_table and self.seq_lens is other.seq_lens
        return same and self.generation == other.generation


@dataclasses.dataclass
class _Wanted:
    """Pages that a step wants."""

    key: _Key | None
    """What it follows from; None: this step alone."""
    pages: Tensor
    """[B, H, M] int32, ascending, -1 padded."""
    needs: list[list[int]]
    """[B][H] how many."""
    packs: bool = False
    """Whether listed tokens are copied side by side. Then these are the other pages."""
    packed: int = 0
    """Slots a head that such tokens take."""
    generation: int = -1
    """Of the slots when all of them were there."""
    blocks: np.ndarray | None = None
    """See `Resident.likely`."""


def _wanted(key: _Key | None, mask: Mask, kv: PagedKV, first: Tensor, packs: bool = False) -> _Wanted:
    P = kv.k_pool.shape[1]
    packed = pages_of(mask, P) if packs else 0
    if packs and mask.lists is not None:
        mask = mask._replace(lists=mask.lists[..., :0])
    pages, counts = ops.wanted_pages(mask, kv.block_table, kv.sealed, first, P)
    return _Wanted(key, pages, counts.tolist(), packs, packed)


def _part(mask: Mask, b: slice, h: slice) -> Mask:
    """What these heads of these sequences attend."""
    lists = None if mask.lists is None else mask.lists[b, h]
    return mask._replace(
        windows=mask.windows[h], lists=lists, local_start=None if mask.local_start is None else mask.local_start[b]
    )
