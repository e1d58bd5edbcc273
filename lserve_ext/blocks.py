"""Blocks of KV: who uses which (`BlockAllocator`), and the tensors that hold them (`Pool`)."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import sys
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import SparseConfig
from .ops import PagedKV


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a tier: in use now, reserved from the allocator, and the most that ever were in use."""

    used: int = 0
    reserved: int = 0
    peak: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.used + other.used, self.reserved + other.reserved, self.peak + other.peak)


_HUGE = 2**21


def empty_blocks(like: Tensor, count: int) -> Tensor:
    """[count, ...] of blocks like those of `like`.

    On a CPU the kernel is asked for pages of 2 MiB: blocks lie in no order, so with pages of 4 KiB nearly each of them
    waits for an address to be translated. Where Linux gives none, all else is the same.
    """
    blocks = like.new_empty((count, *like.shape[1:]))
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and blocks.device.type == "cpu":
        start = -(-blocks.data_ptr() // _HUGE) * _HUGE
        end = (blocks.data_ptr() + blocks.nbytes) // _HUGE * _HUGE
        if start < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return blocks


class BlockTable:
    """[B, H, M] blocks of an allocator, on the host; -1: none. Never changed. While it lives, its blocks are in use."""

    def __init__(self, allocator: BlockAllocator, ids: np.ndarray) -> None:
        self.allocator, self.ids = allocator, ids

    def __del__(self) -> None:
        if hasattr(self, "ids") and not sys.is_finalizing():
            self.allocator.release(self)


class BlockAllocator:
    """Which blocks are free, and how many tables name each of the others.

    The counts are kept as tables come and go. Whatever interrupts that, even between two lines, is mended from the
    tables that live at the next call.
    """

    def __init__(self) -> None:
        self.peak = 0
        """The most blocks that ever were in use."""
        self._tables: weakref.WeakSet[BlockTable] = weakref.WeakSet()
        self._references = np.zeros(0, np.int64)
        self._free: list[int] = []
        self._counted = 0  # tables that the counts include; another number than that of tables: count anew

    @property
    def capacity(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        """Blocks that no table names."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that a table names."""
        return self.capacity - len(self._free)

    def is_used(self, ids: np.ndarray) -> np.ndarray:
        """Whether a table names these blocks."""
        used: np.ndarray = self._references[ids] > 0
        return used

    def grow(self, capacity: int) -> None:
        """More free blocks."""
        old = self.capacity
        self._references = np.concatenate([self._references, np.zeros(capacity - old, np.int64)])
        self._free[:0] = range(capacity - 1, old - 1, -1)

    def allocate(self, count: int) -> list[int]:
        """Free blocks, which must be retained before the next call."""
        self.unsettle()
        return [self._free.pop() for _ in range(count)]

    def retain(self, ids: np.ndarray) -> BlockTable:
        """A table that names these blocks."""
        self.unsettle()
        np.add.at(self._references, ids[ids >= 0], 1)
        table = BlockTable(self, ids)
        self._tables.add(table)
        self.peak = max(self.peak, self.used)
        self._counted = len(self._tables)
        return table

    def release(self, table: BlockTable) -> None:
        """Called by a table that nobody has any more; blocks without any table are free again."""
        held = table.ids[table.ids >= 0]
        np.subtract.at(self._references, held, 1)
        free = np.unique(held[self._references[held] == 0])
        self._free.extend(free[::-1].tolist())
        self._counted -= self._counted > 0

    def unsettle(self) -> None:
        """A change begins. It ends with `retain` or `settle`."""
        self._counted = -1

    def is_settled(self) -> bool:
        """Whether the counts are those of the tables that live."""
        return self._counted == len(self._tables)

    def settle(self, capacity: int) -> None:
        """Counts anew, over so many blocks."""
        counts = np.zeros(capacity, np.int64)
        for table in self._tables:
            np.add.at(counts, table.ids[table.ids >= 0], 1)
        self._references = counts
        self._free = np.flatnonzero(counts == 0)[::-1].tolist()
        self._counted = len(self._tables)


class Pool:
    """The tensors of one layer's blocks in one tier, `PagedKV`'s pools, statistics and scales, grown on demand.

    Args:
        config: says which tensors there are.
        like: [..., D], of whose dtype and device they are.
        capacity: blocks.
    """

    GROWTH = 1.5

    def __init__(self, config: SparseConfig, like: Tensor, capacity: int) -> None:
        P, D, dtype = config.page_size, like.shape[-1], like.dtype
        int8 = config.kv_dtype == "int8"
        rows: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "k": ((P, D), torch.uint8 if int8 else dtype),
            "v": ((P, D), torch.uint8 if int8 else dtype),
        }
        if config.needs_stats:
            rows["stats"] = ((P // config.stats_group, 2, D), dtype)
        if config.needs_moments:
            rows["moments"] = ((P // (config.moments_group or P), 2, D), dtype)
        if int8:
            rows["scales"] = ((1 if config.needs_stats else 2, P, 2), torch.float32)
        self.config, self._like = config, like[..., :0, :]
        self.allocator = BlockAllocator()
        self.tensors = {name: like.new_empty((0, *shape), dtype=kind) for name, (shape, kind) in rows.items()}
        self.block_bytes = sum(t.element_size() * t.shape[1:].numel() for t in self.tensors.values())
        self.grow(capacity)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        """One like it, of no blocks: those who copy tables put their own there."""
        return type(self)(self.config, self._like, 0)

    @property
    def memory(self) -> Memory:
        self.settle()
        counts = (self.allocator.used, self.allocator.capacity, self.allocator.peak)
        return Memory(*(count * self.block_bytes for count in counts))

    def tiers(self) -> dict[str, Memory]:
        """Bytes of each tier."""
        return {"device": self.memory}

    def kv(
        self, block_table: Tensor, slot_table: Tensor, residual_k: Tensor, residual_v: Tensor, sealed: Tensor
    ) -> PagedKV:
        """With these tables, what ops take."""
        t = self.tensors
        return PagedKV(t["k"], t["v"], t.get("stats"), t.get("scales"), block_table, slot_table, residual_k,
                       residual_v, sealed, t.get("moments"))  # fmt: skip

    def read(self, ids: np.ndarray) -> dict[str, Tensor]:
        """What lies in these blocks [N], as tensors [N, ...]."""
        rows = torch.from_numpy(ids).long()
        return {name: x[rows.to(x.device)].to(self._like.device) for name, x in self.tensors.items()}

    def write(self, ids: np.ndarray, contents: dict[str, Tensor]) -> None:
        """Fills new blocks [N] with what `read` has given."""
        rows = torch.from_numpy(ids).long()
        for name, x in contents.items():
            tensor = self.tensors[name]
            tensor[rows.to(tensor.device)] = x.to(tensor.device)

    def table(self, ids: np.ndarray, wanted: np.ndarray | None = None) -> BlockTable:
        """A table of these blocks (-1: none), with free ones where `wanted`; the pool grows if there are too few."""
        self.settle()
        ids = ids.astype(np.int32)
        if wanted is not None and wanted.any():
            count = int(wanted.sum())
            if count > self.allocator.free:
                capacity = self.allocator.capacity
                self.grow(max(self.allocator.used + count, int(capacity * self.GROWTH)))
            ids[wanted] = self.allocator.allocate(count)
        return self.allocator.retain(ids)

    def grow(self, capacity: int) -> None:
        """One tensor after the other: the peak is one copy, not all."""
        self.allocator.unsettle()
        old = self.allocator.capacity
        for name, tensor in self.tensors.items():
            grown = empty_blocks(tensor, capacity)
            grown[:old] = tensor[:old]
            self.tensors[name] = grown
        self.allocator.grow(capacity)

    def storage(self) -> list[Tensor]:
        """All tensors of blocks."""
        return list(self.tensors.values())

    def settle(self) -> None:
        """Mends what an interrupt has left of a change."""
        if not self.allocator.is_settled():
            sizes = [len(tensor) for tensor in self.tensors.values()]
            capacity = min(sizes, default=self.allocator.capacity)
            self.tensors = {name: tensor[:capacity] for name, tensor in self.tensors.items()}
            self.allocator.settle(capacity)
