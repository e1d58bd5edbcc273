"""Which pages lie on the device where not all do: slots, the pages that attention wants, and rounds of heads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from . import ops
from .blocks import BlockTable, Memory, Pool
from .config import SparseConfig
from .home import Home, Inputs, Recompute, open_tier
from .ops import LISTED, Mask, PagedKV
from .reference import quantize_kv
from .sequences import on_device


class Attention(Protocol):
    """Who appends and attends pages: `ops`, where all of them are resident, or `Resident`."""

    def append_kv(self, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, context_lens: Tensor, kv: PagedKV) -> None: ...

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, mask: Mask,
        kv: PagedKV | None = None, context_lens: Tensor | None = None, *, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def decode(
        self, q: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def attention_mass(
        self, q: Tensor, lse: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> Tensor: ...


MOVED = ("k", "v", "scales")
"""Tensors of a pool that lie in slots. Statistics stay on the device anyway."""


class Traffic(NamedTuple):
    """Pages of one kv head that have been moved between tiers."""

    wanted: int = 0
    """By attention, on the device."""
    fetched: int = 0
    """From host memory to the device."""
    loaded: int = 0
    """From the disk to host memory."""
    written: int = 0
    """From host memory to the disk: pages, or the inputs of some."""
    recomputed: int = 0
    """From a layer's inputs, which were loaded from the disk in their place."""

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


def slot_bytes(pool: Pool) -> int:
    """Of one page of one kv head."""
    pages = pool.read(np.zeros(0, np.int32))
    return sum(x.element_size() * x.shape[1:].numel() for name, x in pages.items() if name in MOVED)


class Slots:
    """Room on the device for some of the blocks of a pool, which is their home. They are copies: eviction forgets.

    Args:
        pool: of one layer or of several.
        size: the most bytes that they take.
        layers: how many share them.

    Raises:
        ValueError: there is no room for a single block.
    """

    def __init__(self, pool: TieredPool, size: int, layers: int = 1) -> None:
        self._pool = pool
        moved = {name: x for name, x in pool.read(np.zeros(0, np.int32)).items() if name in MOVED}
        self.slot_bytes = slot_bytes(pool)
        count = size // self.slot_bytes
        if count < 1:
            raise ValueError(f"device_bytes: expected at least the {self.slot_bytes:,} bytes of one page, got {size:,}")
        self.tensors = {name: x.new_empty((count, *x.shape[1:])) for name, x in moved.items()}
        self._layers = layers
        device = moved["k"].device
        self._blocks = torch.full((count,), -1, dtype=torch.int32, device=device)
        self._last_use = torch.zeros_like(self._blocks)
        self._clock = torch.zeros(1, dtype=torch.int32, device=device)
        self._is_settled = True
        self.generation = 0
        """Changes when a slot is given to another page."""
        self.fetched = 0
        """Pages that were copied into slots."""
        self.wanted = 0
        """Pages that were wanted, of which those fetched had not been there."""

    @property
    def count(self) -> int:
        """Slots."""
        return len(self._blocks)

    @property
    def memory(self) -> Memory:
        used = int((self._blocks >= 0).sum()) * self.slot_bytes
        reserved = self.count * self.slot_bytes
        return Memory(used, reserved, reserved)

    def fetch(
        self, lists: Tensor, block_table: Tensor, slot_table: Tensor, count: int, generation: int | None = None
    ) -> None:
        """Copies what is wanted and not there.

        Args:
            lists: [B, H, K] int32 pages, -1: none; no more than there are slots.
            block_table, slot_table: [B, H, M], see `ops.resolve_pages`; the second is written.
            count: pages in the lists.
            generation: when all of them were there. If it is still the same, nothing is to be done.
        """
        self.wanted += count
        if not self._is_settled:  # an interrupt has left slots that say more than they hold
            self._blocks.fill_(-1)
        elif generation == self.generation:
            return
        self._is_settled = False
        src, dst = ops.resolve_pages(lists, block_table, slot_table, self._blocks, self._last_use, self._clock)
        fetched = int((src >= 0).sum())
        if fetched:
            self.generation += 1
            self._pool.copy(src.view(-1), self.tensors, dst.view(-1))
            self.fetched += fetched
        self._is_settled = True

    def share(self, wanted: int) -> int:
        """Pages that a layer keeps which wants so many: the shares of all layers and the rest of one fit."""
        others = self._layers - 1
        return max(0, self.count - wanted) // others if others else self.count

    def offer(self, lists: Tensor, slot_table: Tensor, kept: int, count: int, share: int) -> None:
        """What was fetched has been attended. Pages beyond the layer's share make room before those of other layers: a
        step goes through all layers in turn, and where it wants more than there are slots, those used longest ago are
        just those that come next.

        Args:
            lists, slot_table, count: as `fetch` took them.
            kept: pages of the layer so far in this step.
            share: of the layer.
        """
        if kept + count <= share:
            return
        wanted = lists >= 0
        surplus = wanted & (kept + wanted.view(-1).cumsum(0).view(wanted.shape) > share)
        slots = torch.where(surplus, slot_table, self.count).view(-1).long()
        padded = torch.cat([self._last_use, self._last_use[:1]])
        padded[slots] = 0
        self._last_use.copy_(padded[:-1])

    def forget(self, blocks: Tensor) -> None:
        """These blocks [N] will hold something else."""
        self._blocks[torch.isin(self._blocks, blocks)] = -1


class TieredPool(Pool):
    """Blocks whose home is host memory, and slots for some of them on the device.

    Where the home is limited, or the device is a GPU, its tensors are not by block: what ops take of them is to be had
    in slots alone.
    """

    home: Home | None = None

    def __init__(self, config: SparseConfig, like: Tensor, capacity: int, layers: int = 1) -> None:
        super().__init__(config, like, capacity)
        assert config.device_bytes is not None
        self.layers = layers
        if config.host_bytes is not None or is_far(like):
            self.home = Home(
                {name: self.tensors.pop(name)[:0] for name in MOVED if name in self.tensors},
                config.host_bytes,
                None if config.disk_dir is None else partial(open_tier, config.disk_dir, config.disk_bytes),
                self._is_used,
                self._encode,
                config.recompute,
            )
        self.slots = Slots(self, config.device_bytes, layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredPool:
        return TieredPool(self.config, self._like, 0, self.layers)

    def _is_used(self, blocks: np.ndarray) -> np.ndarray:
        self.settle()
        return self.allocator.is_used(blocks)

    def _encode(self, blocks: np.ndarray, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Keys and values [N, P, D] as pages of these blocks, INT8 keys on the grid of their statistics."""
        if self.config.kv_dtype != "int8":
            return {"k": k, "v": v}
        stats = self.tensors.get("stats")
        codes = quantize_kv(k, v, None if stats is None else stats[torch.from_numpy(blocks).to(stats.device)])
        return dict(zip(MOVED, codes, strict=True))

    def table(self, ids: np.ndarray, wanted: np.ndarray | None = None) -> BlockTable:
        table = super().table(ids, wanted)
        if wanted is not None and wanted.any():
            self.slots.forget(on_device(table.ids[wanted], self._like.device))
            if self.home is not None:
                self.home.forget(table.ids[wanted])
        return table

    def kv(
        self, block_table: Tensor, slot_table: Tensor, residual_k: Tensor, residual_v: Tensor, sealed: Tensor
    ) -> PagedKV:
        if self.home is None:
            return super().kv(block_table, slot_table, residual_k, residual_v, sealed)
        t = self.slots.tensors
        nowhere = torch.full_like(slot_table, -1)
        return PagedKV(t["k"], t["v"], self.tensors.get("stats"), t.get("scales"), block_table, nowhere, residual_k,
                       residual_v, sealed)  # fmt: skip

    def read(self, ids: np.ndarray) -> dict[str, Tensor]:
        pages = super().read(ids)
        if self.home is None:
            return pages
        return {name: x.to(self._like.device) for name, x in self.home.read(ids).items()} | pages

    def write(self, ids: np.ndarray, contents: dict[str, Tensor]) -> None:
        moved = {name: x for name, x in contents.items() if name not in self.tensors}
        super().write(ids, {name: x for name, x in contents.items() if name in self.tensors})
        if self.home is not None:
            self.home.write(ids, moved)

    def copy(self, src: Tensor, into: dict[str, Tensor], dst: Tensor) -> None:
        """Pages of blocks src [N] to rows dst [N] of slots; -1: none."""
        if self.home is not None:
            self.home.copy(src, into, dst)
            return
        for name, tensor in into.items():
            ops.gather_pages(self.tensors[name], src, tensor, dst)

    @property
    def phase(self) -> int:
        """1: all pages fit on the device; 2: they fit in host memory; 3: they fit in neither (ALISA, Algorithm 2)."""
        self.settle()
        held = self.allocator.used
        return 1 if held <= self.slots.count else 2 if self.home is None or held <= len(self.home) else 3

    def traffic(self) -> Traffic:
        """Since the pool was made."""
        home = () if self.home is None else (self.home.loaded, self.home.written, self.home.recomputed)
        return Traffic(self.slots.wanted, self.slots.fetched, *home)

    def tiers(self) -> dict[str, Memory]:
        blocks = self.allocator
        self.settle()
        counts, page = (blocks.used, blocks.capacity, blocks.peak), self.slots.slot_bytes
        tiers = {"device": self.slots.memory + Memory(*(n * (self.block_bytes - page) for n in counts))}
        return tiers | ({"host": Memory(*(n * page for n in counts))} if self.home is None else self.home.tiers())


def is_far(like: Tensor) -> bool:
    """Whether host memory is another memory than that of a tensor's device."""
    return like.is_cuda


def make_pool(config: SparseConfig, like: Tensor, capacity: int, layers: int = 1) -> Pool:
    """The pool that a config asks for. Steps change its tensors, in inference mode or not."""
    with torch.inference_mode(False):
        if config.device_bytes is None:
            return Pool(config, like, capacity)
        return TieredPool(config, like, capacity, layers)


class SharedPool:
    """The pool of layers that share a limit, made for the first of them."""

    def __init__(self, config: SparseConfig, layers: int) -> None:
        self.config, self.layers = config, layers
        self._kind: tuple[int, torch.dtype, torch.device] | None = None
        self._pool: Pool | None = None

    def pool(self, like: Tensor) -> Pool:
        """For keys of that head dimension, dtype and device.

        Raises:
            ValueError: they are others than those of the first layer, so that the limit would not be one of both.
        """
        kind = like.shape[-1], like.dtype, like.device
        if self._pool is None:
            self._pool, self._kind = make_pool(self.config, like, 0, self.layers), kind
        if kind != self._kind:
            raise ValueError(f"device_bytes: expected layers of {self._kind} as the first one, got one of {kind}")
        return self._pool

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedPool:
        twin = SharedPool(self.config, self.layers)
        twin._kind, twin._pool = self._kind, copy.deepcopy(self._pool, memo)
        return twin


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
    """

    def __init__(self, pool: TieredPool) -> None:
        self._pool, self._slots = pool, pool.slots
        self.slot_table = torch.empty(0)
        """[B, H, M] int32 where pages may lie, of the layer that attends; written."""
        self.seals = True
        """Whether the step of now seals a page, as far as the host knows."""
        self.given: Given | None = None
        """What the layer's new pages can be recomputed from."""
        self._last = _Wanted((), self.slot_table, [])  # of the last decode step

    def append_kv(self, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, context_lens: Tensor, kv: PagedKV) -> None:
        """`ops.append_kv`; where the home is limited, sealed pages are made beside it and then handed over."""
        home, P, given = self._pool.home, kv.k_pool.shape[1], self.given
        if home is None or not self.seals:
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
        pages = {name: x.new_empty((len(blocks), *x.shape[1:])) for name, x in home.tensors.items()}
        beside = kv._replace(k_pool=pages["k"], v_pool=pages["v"], scales=pages.get("scales"), slot_table=slot_table)
        ops.append_kv(k, v, cu_seqlens_k, context_lens, beside)
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
        for b, h, part in self._rounds(_wanted((), mask, kv, context_lens), kv):
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
        for b, h, part in self._rounds(self._of_step(mask, kv, seq_lens), kv):
            if part.block_table is kv.block_table:
                out, lse = ops.decode(q, mask, part, seq_lens, scale=scale)
                continue
            queries = slice(h.start * G, h.stop * G)
            found = ops.decode(q[b, queries], _part(mask, b, h), part, seq_lens[b], scale=scale)
            out[b, queries], lse[b, queries] = found
        return out, lse

    def attention_mass(
        self, q: Tensor, lse: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """`ops.attention_mass`."""
        (B, H, M), P = kv.block_table.shape, kv.k_pool.shape[1]
        G = q.shape[2] // H
        mass = q.new_empty(B, H, M * P, dtype=torch.float32)
        one = q.shape[1] == 1
        wanted = self._of_step(mask, kv, seq_lens) if one else _wanted((), mask, kv, seq_lens - q.shape[1])
        for b, h, part in self._rounds(wanted, kv):
            queries = slice(h.start * G, h.stop * G)
            logs = lse[b, :, queries].contiguous()
            found = ops.attention_mass(q[b, :, queries], logs, _part(mask, b, h), part, seq_lens[b], scale=scale)
            mass[b, h] = found
        return mass

    def _of_step(self, mask: Mask, kv: PagedKV, seq_lens: Tensor) -> _Wanted:
        """What a decode step wants. It follows from tensors that stay the same objects until something changes."""
        key = (mask.windows, mask.lists, mask.local_start, kv.sealed, kv.block_table, self.slot_table)
        if len(self._last.key) != len(key) or any(a is not b for a, b in zip(key, self._last.key, strict=True)):
            self._last = _wanted(key, mask, kv, seq_lens - 1)
        return self._last

    def _rounds(self, wanted: _Wanted, kv: PagedKV) -> Iterator[tuple[slice, slice, PagedKV]]:
        """Sequences, kv heads, and their cache with the pages that they want in slots."""
        slots, (B, H, M) = self._slots, kv.block_table.shape
        slot_table, tensors = self.slot_table[..., :M], slots.tensors
        total = sum(map(sum, wanted.needs))
        kept, share = 0, slots.share(total)
        if total <= slots.count:
            slots.fetch(wanted.lists, kv.block_table, slot_table, total, wanted.generation)
            whole = kv._replace(k_pool=tensors["k"], v_pool=tensors["v"], scales=tensors.get("scales"))
            yield slice(0, B), slice(0, H), whole._replace(slot_table=slot_table)
            slots.offer(wanted.lists, slot_table, 0, total, share)
            wanted.generation = slots.generation
            return
        for b, h in self._parts(wanted.needs, H):
            count = sum(sum(need[h]) for need in wanted.needs[b])
            slots.fetch(wanted.lists[b, h], kv.block_table[b, h], slot_table[b, h], count)
            assert kv.residual_k is not None and kv.residual_v is not None
            residual_k, residual_v = kv.residual_k[b, h], kv.residual_v[b, h]
            yield b, h, PagedKV(tensors["k"], tensors["v"], kv.stats, tensors.get("scales"), kv.block_table[b, h],
                                slot_table[b, h], residual_k, residual_v, kv.sealed[b])  # fmt: skip
            slots.offer(wanted.lists[b, h], slot_table[b, h], kept, count, share)
            kept += count

    def _parts(self, needs: list[list[int]], H: int) -> Iterator[tuple[slice, slice]]:
        """Runs of heads of one sequence that need no more slots than there are."""
        room = self._slots.count
        for b, need in enumerate(needs):
            if max(need) > room:
                want, have = (n * self._slots.slot_bytes for n in (max(need), room))
                pages = f"the {max(need)} pages that a head attends"
                raise ValueError(f"device_bytes: expected at least {want:,}, for {pages}, got {have:,}")
            first, total = 0, 0
            for h, more in enumerate(need):
                if total + more > room:
                    yield slice(b, b + 1), slice(first, h)
                    first, total = h, 0
                total += more
            yield slice(b, b + 1), slice(first, H)


@dataclasses.dataclass
class _Wanted:
    """Pages that a step wants."""

    key: tuple[Tensor | None, ...]
    """What it follows from."""
    lists: Tensor
    """[B, H, M] int32, -1: none."""
    needs: list[list[int]]
    """[B][H] how many."""
    generation: int = -1
    """Of the slots when all of them were there."""


def _wanted(key: tuple[Tensor | None, ...], mask: Mask, kv: PagedKV, first: Tensor) -> _Wanted:
    wanted = wanted_pages(mask, kv, first)
    page = torch.arange(wanted.shape[2], dtype=torch.int32, device=wanted.device)
    return _Wanted(key, torch.where(wanted, page, -1), wanted.sum(2).tolist())


def wanted_pages(mask: Mask, kv: PagedKV, first: Tensor) -> Tensor:
    """[B, H, M] bool: the sealed pages that queries attend, the first of which stands at position `first` [B]."""
    (B, H, M), P = kv.block_table.shape, kv.k_pool.shape[1]
    page = torch.arange(M, device=first.device)
    windows = mask.windows.long()[:, None]
    local = page > torch.div(first, P, rounding_mode="floor")[:, None, None] - windows  # [B, H, M]
    if mask.lists is not None and mask.local_start is not None:
        unit = mask.unit or P
        listed = torch.zeros(B, H, M + 1, dtype=torch.bool, device=first.device)
        pages = torch.where(mask.lists < 0, M, mask.lists * unit // P)
        listed.scatter_(2, pages.long(), True)
        after = page >= (mask.local_start * unit // P)[:, None]  # [B, M]
        local = torch.where(windows == LISTED, listed[..., :M] | after[:, None], local)
    return (local | (page < mask.sink)) & (page < kv.sealed[:, None])[:, None] & (kv.block_table >= 0)


def _part(mask: Mask, b: slice, h: slice) -> Mask:
    """What these heads of these sequences attend."""
    lists = None if mask.lists is None else mask.lists[b, h]
    return mask._replace(
        windows=mask.windows[h], lists=lists, local_start=None if mask.local_start is None else mask.local_start[b]
    )
