"""Which blocks lie on the device where not all do: slots, the pages that attention wants, and rounds of heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import ops
from .blocks import BlockTable, Memory, Pool
from .config import SparseConfig
from .ops import LISTED, Mask, PagedKV
from .sequences import on_device


class Attention(Protocol):
    """Who attends pages: `ops`, where all of them are resident, or `Resident`."""

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


def slot_bytes(pool: Pool) -> int:
    """Of one page of one kv head."""
    return sum(x.element_size() * x.shape[1:].numel() for name, x in pool.tensors.items() if name in MOVED)


class Slots:
    """Room on the device for some of the blocks of a pool, which is their home. They are copies: eviction forgets.

    Args:
        pool: of one layer or of several.
        size: the most bytes that they take.
        layers: how many share them.

    Raises:
        ValueError: there is no room for a single block.
    """

    def __init__(self, pool: Pool, size: int, layers: int = 1) -> None:
        self._pool = pool
        moved = {name: x for name, x in pool.tensors.items() if name in MOVED}
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
        self.fetched = torch.zeros((), dtype=torch.int64, device=device)
        """Pages that were copied into slots."""
        self.wanted = torch.zeros((), dtype=torch.int64, device=device)
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

    def fetch(self, lists: Tensor, block_table: Tensor, slot_table: Tensor) -> None:
        """Copies what is wanted and not there.

        Args:
            lists: [B, H, K] int32 pages, -1: none; no more than there are slots.
            block_table, slot_table: [B, H, M], see `ops.resolve_pages`; the second is written.
        """
        if not self._is_settled:  # an interrupt has left slots that say more than they hold
            self._blocks.fill_(-1)
        self._is_settled = False
        src, dst = ops.resolve_pages(lists, block_table, slot_table, self._blocks, self._last_use, self._clock)
        for name, tensor in self.tensors.items():
            ops.gather_pages(self._pool.tensors[name], src.view(-1), tensor, dst.view(-1))
        self.wanted += (lists >= 0).sum()
        self.fetched += (src >= 0).sum()
        self._is_settled = True

    def share(self, wanted: int) -> int:
        """Pages that a layer keeps which wants so many: the shares of all layers and the rest of one fit."""
        others = self._layers - 1
        return max(0, self.count - wanted) // others if others else self.count

    def offer(self, lists: Tensor, slot_table: Tensor, kept: Tensor, share: int) -> Tensor:
        """What was fetched has been attended. Pages beyond the layer's share make room before those of other layers: a
        step goes through all layers in turn, and where it wants more than there are slots, those used longest ago are
        just those that come next.

        Args:
            lists, slot_table: as `fetch` took them.
            kept: [] pages of the layer so far in this step.
            share: of the layer.

        Returns:
            [] the same with these.
        """
        wanted = lists >= 0
        order = kept + wanted.view(-1).cumsum(0).view(wanted.shape)
        surplus = wanted & (order > share)
        slots = torch.where(surplus, slot_table, self.count).view(-1).long()
        padded = torch.cat([self._last_use, self._last_use[:1]])
        padded[slots] = 0
        self._last_use.copy_(padded[:-1])
        return kept + wanted.sum()

    def forget(self, blocks: Tensor) -> None:
        """These blocks [N] will hold something else."""
        self._blocks[torch.isin(self._blocks, blocks)] = -1


class TieredPool(Pool):
    """Blocks whose home is host memory, and slots for some of them on the device."""

    def __init__(self, config: SparseConfig, like: Tensor, capacity: int, layers: int = 1) -> None:
        if like.device.type != "cpu":
            raise ValueError(
                f"device_bytes: expected None on a GPU, where it is not supported yet, got {config.device_bytes}"
            )
        super().__init__(config, like, capacity)
        assert config.device_bytes is not None
        self.layers = layers
        self.slots = Slots(self, config.device_bytes, layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredPool:
        return TieredPool(self.config, self._like, 0, self.layers)

    def table(self, ids: np.ndarray, wanted: np.ndarray | None = None) -> BlockTable:
        table = super().table(ids, wanted)
        if wanted is not None and wanted.any():
            self.slots.forget(on_device(table.ids[wanted], self._like.device))
        return table

    def tiers(self) -> dict[str, Memory]:
        home, moved = self.memory, self.slots.slot_bytes / self.block_bytes
        host = Memory(*(int(n * moved) for n in (home.used, home.reserved, home.peak)))
        stats = Memory(*(n - m for n, m in zip(vars(home).values(), vars(host).values(), strict=True)))
        return {"device": self.slots.memory + stats, "host": host}


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


class Resident:
    """Attention over pages that are fetched into slots first: all heads at once, or, where they need more slots than
    there are, as many heads at a time as fit. Heads do not know of each other, so results are the same to the bit.

    Args:
        slots: of the pool whose blocks `PagedKV.block_table` names.
        slot_table: [B, H, M] int32 where pages may lie; written.
    """

    def __init__(self, slots: Slots, slot_table: Tensor) -> None:
        self._slots, self._slot_table = slots, slot_table

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, mask: Mask,
        kv: PagedKV | None = None, context_lens: Tensor | None = None, *, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`ops.prefill`, with as many queries as new tokens."""
        assert kv is not None and context_lens is not None
        G = q.shape[1] // k.shape[1]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        bounds = cu_seqlens_k.tolist()
        for b, h, part in self._rounds(wanted_pages(mask, kv, context_lens), kv):
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
        for b, h, part in self._rounds(wanted_pages(mask, kv, seq_lens - 1), kv):
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
        for b, h, part in self._rounds(wanted_pages(mask, kv, seq_lens - q.shape[1]), kv):
            queries = slice(h.start * G, h.stop * G)
            logs = lse[b, :, queries].contiguous()
            found = ops.attention_mass(q[b, :, queries], logs, _part(mask, b, h), part, seq_lens[b], scale=scale)
            mass[b, h] = found
        return mass

    def _rounds(self, wanted: Tensor, kv: PagedKV) -> Iterator[tuple[slice, slice, PagedKV]]:
        """Sequences, kv heads, and their cache with the pages that they want in slots."""
        needs, (B, H, M) = wanted.sum(2).tolist(), kv.block_table.shape
        page = torch.arange(M, dtype=torch.int32, device=wanted.device)
        lists = torch.where(wanted, page, -1)
        slot_table, tensors = self._slot_table[..., :M], self._slots.tensors
        kept, share = torch.zeros((), dtype=torch.int64, device=wanted.device), self._slots.share(sum(map(sum, needs)))
        for b, h in self._parts(needs, B, H):
            self._slots.fetch(lists[b, h], kv.block_table[b, h], slot_table[b, h])
            assert kv.residual_k is not None and kv.residual_v is not None
            residual_k, residual_v = kv.residual_k[b, h], kv.residual_v[b, h]
            yield b, h, PagedKV(tensors["k"], tensors["v"], kv.stats, tensors.get("scales"), kv.block_table[b, h],
                                slot_table[b, h], residual_k, residual_v, kv.sealed[b])  # fmt: skip
            kept = self._slots.offer(lists[b, h], slot_table[b, h], kept, share)

    def _parts(self, needs: list[list[int]], B: int, H: int) -> Iterator[tuple[slice, slice]]:
        """All heads of all sequences, or else runs of heads of one, that need no more slots than there are."""
        room = self._slots.count
        if sum(map(sum, needs)) <= room:
            yield slice(0, B), slice(0, H)
            return
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
