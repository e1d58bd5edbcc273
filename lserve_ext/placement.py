"""Which pages lie on the device where not all do: slots for copies, and pools whose home is elsewhere."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .blocks import BlockTable, Memory, Pool
from .config import SparseConfig
from .home import Home, open_tier
from .ops import PagedKV
from .reference import quantize_kv
from .sequences import on_device

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
        self,
        lists: Tensor,
        block_table: Tensor,
        slot_table: Tensor,
        count: int,
        keep: int,
        generation: int | None = None,
    ) -> None:
        """Copies what is wanted and not there.

        Args:
            lists: [B, H, K] int32 pages, -1: none; no more than there are slots.
            block_table, slot_table: [B, H, M], see `ops.resolve_pages`; the second is written.
            count: pages in the lists.
            keep: how many of them count as used now, see `share`. Those beyond make room before pages of other layers.
            generation: when all of them were there. If it is still the same, nothing is to be done.
        """
        self.wanted += count
        if not self._is_settled:  # an interrupt has left slots that say more than they hold
            self._blocks.fill_(-1)
        elif generation == self.generation:
            return
        self._is_settled = False
        state = self._blocks, self._last_use, self._clock
        src, dst = ops.resolve_pages(lists, block_table, slot_table, *state, keep)
        fetched = int((src >= 0).sum())
        if fetched:
            self.generation += 1
            self._pool.copy(src.view(-1), self.tensors, dst.view(-1))
            self.fetched += fetched
        self._is_settled = True

    def share(self, wanted: int) -> int:
        """Pages that a layer keeps which wants so many: the shares of all layers and the rest of one fit. A step goes
        through all layers in turn, and where it wants more than there are slots, those used longest ago are just those
        that come next."""
        others = self._layers - 1
        return max(0, self.count - wanted) // others if others else self.count

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
