"""Which pages lie on the device where not all do: slots for copies, and pools whose home is elsewhere."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .blocks import BlockTable, Memory, Pool, empty_blocks
from .config import SparseConfig
from .home import Home, open_tier
from .ops import PagedKV
from .packed import Packed
from .reference import quantize_kv
from .sequences import on_device
from .slabs import Slabs, gather_rows

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
    rows: int = 0
    """Tokens that were fetched without the rest of their page."""

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


def slot_bytes(pool: Pool) -> int:
    """Of one page of one kv head."""
    pages = pool.read(np.zeros(0, np.int32))
    return sum(x.element_size() * x.shape[1:].numel() for name, x in pages.items() if name in MOVED)


def share(slots: float, wanted: float, layers: int) -> float:
    """Pages that a layer keeps which wants so many: the shares of all layers and the rest of one fit. A step goes
    through all layers in turn, and where it wants more than there are slots, those used longest ago are just those that
    come next."""
    return max(0, slots - wanted) // (layers - 1) if layers > 1 else slots


def over(kv: PagedKV, tensors: Mapping[str, Tensor], slot_table: Tensor) -> PagedKV:
    """A layer whose pages lie in these tensors."""
    return kv._replace(k_pool=tensors["k"], v_pool=tensors["v"], scales=tensors.get("scales"), slot_table=slot_table)


class CopyStream:
    """A stream for copies beside the one that computes, fenced in both directions; on a CPU there is one order only."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is issued within begins after all that has been issued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is issued from now on begins after all copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


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
        self.tensors = {name: empty_blocks(x, count) for name, x in moved.items()}
        self._layers = layers
        device = moved["k"].device
        self._blocks = torch.full((count,), -1, dtype=torch.int32, device=device)
        self._last_use = torch.zeros_like(self._blocks)
        self._clock = torch.zeros(1, dtype=torch.int32, device=device)
        self._is_settled = True
        self.generation = 0
        """Changes when a slot is given to another page."""
        self.fetched = 0
        """Pages that were copied into slots, as far as they have been counted, see `count_brought`."""
        self._brought = torch.zeros((), dtype=torch.int64, device=device)
        # The ids of copies beside, which must live until these are over.
        self._ahead: tuple[Tensor, ...] | None = None
        self.wanted = 0
        """Pages that were wanted, of which those fetched had not been there."""
        self.rows = 0
        """Tokens that were copied without the rest of their page."""
        self.packed: object = None
        """Whose tokens lie in the slots for packed ones."""
        self.reserved = 0
        """Slots for packed tokens, behind those for pages."""

    def __len__(self) -> int:
        """All slots."""
        return len(self._blocks)

    @property
    def count(self) -> int:
        """Slots for pages."""
        return len(self) - self.reserved

    def reserve(self, slots: int) -> None:
        """From now on so many are for packed tokens."""
        if slots != self.reserved:
            self._blocks[len(self) - slots :] = -1
            self.reserved = slots
            self.generation += 1

    def check(self, pages: int, whose: str) -> None:
        """Raises ValueError if not so many could be there at once."""
        if pages > len(self):
            want, have = (n * self.slot_bytes for n in (pages, len(self)))
            raise ValueError(f"device_bytes: expected at least {want:,}, for the {pages} pages {whose}, got {have:,}")

    def held(self) -> np.ndarray:
        """Blocks that lie in slots, and -1. On a GPU this waits for the device."""
        return self._blocks.cpu().numpy()

    @property
    def memory(self) -> Memory:
        used = (int((self._blocks >= 0).sum()) + self.reserved) * self.slot_bytes
        reserved = len(self) * self.slot_bytes
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
        self.land()
        if self._is_settled and generation == self.generation:
            return
        src, dst = self._resolve(lists, block_table, slot_table, keep)
        fetched = int((src >= 0).sum())
        if fetched:
            self.generation += 1
            self._pool.copy(src.view(-1), self.tensors, dst.view(-1))
            self.fetched += fetched
        self._is_settled = True

    def bring_ahead(self, lists: Tensor, block_table: Tensor, slot_table: Tensor, keep: int) -> None:
        """Begins a `fetch` beside what is computed from now on. The host asks nothing."""
        self.land()
        self.generation += 1
        self._ahead = ()
        src, dst = self.bring(lists, block_table, slot_table, keep, beside=True)
        self._brought += (src >= 0).sum()
        self._ahead = src, dst

    def land(self) -> None:
        """What is issued from now on begins after all that `bring_ahead` has begun."""
        if self._ahead is not None:
            self._pool.stream.join()
            self._ahead = None

    def count_brought(self) -> None:
        """Counts what `bring_ahead` has copied. On a GPU this waits for the device."""
        self.fetched += int(self._brought)
        self._brought.zero_()

    def bring(
        self, lists: Tensor, block_table: Tensor, slot_table: Tensor, keep: int, beside: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`fetch` that never asks the host, and so does not count.

        Args:
            beside: copy while other things are computed, until `CopyStream.join`.

        Returns:
            [B, H, K] int32 blocks that are copied, and their slots; -1: none. Somebody keeps them until then.
        """
        src, dst = self._resolve(lists, block_table, slot_table, keep)
        with self._pool.stream.beside() if beside else contextlib.nullcontext():
            self._pool.copy(src.view(-1), self.tensors, dst.view(-1))
        self._is_settled = True
        return src, dst

    def _resolve(self, lists: Tensor, block_table: Tensor, slot_table: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Until what is missing has been copied, slots say more than they hold."""
        if not self._is_settled:  # as an interrupt has left them
            self._blocks.fill_(-1)
        self._is_settled = False
        if self.reserved:  # no victims: of slots that were used in the same call, the last ones stay longest
            self._last_use[self.count :] = self._clock
        return ops.resolve_pages(lists, block_table, slot_table, *self.state, keep)

    def copy_rows(self, packed: Packed, block_table: Tensor, slot_table: Tensor) -> None:
        """Copies tokens of pages [B, H, M] to slots for packed ones: from other slots, where many pages lie in some,
        the others from their home."""
        self.land()
        P, found = self.tensors["k"].shape[1], packed.offset >= 0
        block = block_table.gather(2, packed.page)
        if self._pool.allocator.used < 4 * self.count:
            slot = slot_table.gather(2, packed.page)
            here = found & (slot >= 0) & (self._blocks[slot.clamp(min=0).long()] == block)
            near = torch.where(here, slot * P + packed.offset, -1)
            gather_rows(self.tensors, near.view(-1), self.tensors, packed.dst.view(-1))
            found &= ~here
        self.rows += int(found.sum())
        src = torch.where(found, block * P + packed.offset, -1)
        self._pool.copy_rows(src.view(-1), self.tensors, packed.dst.view(-1))

    def share(self, wanted: int) -> int:
        """See `share`."""
        return int(share(self.count, wanted, self._layers))

    def forget(self, blocks: Tensor) -> None:
        """These blocks [N] will hold something else."""
        self._blocks[torch.isin(self._blocks, blocks)] = -1

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `ops.resolve_pages` takes."""
        return self._blocks, self._last_use, self._clock


class TieredPool(Pool):
    """Blocks whose home is host memory, and slots for some of them on the device.

    The home is tensors of all blocks, to which ops write; on a machine with a GPU it is `slabs`, and where it is
    limited `home`, to which pages are handed over.
    """

    home: Home | None = None
    slabs: Slabs | None = None
    attending: Any = None
    """Which layer attends now, or did so last, as a weak reference."""

    def __init__(self, config: SparseConfig, like: Tensor, capacity: int, layers: int = 1) -> None:
        super().__init__(config, like, 0)
        assert config.device_bytes is not None
        self.layers = layers
        moved = {name: x for name, x in self.tensors.items() if name in MOVED}
        if config.host_bytes is None and is_far(like):
            self.slabs = Slabs(moved)
        elif config.host_bytes is not None:
            self.home = Home(
                moved,
                config.host_bytes,
                None if config.disk_dir is None else partial(open_tier, config.disk_dir, config.disk_bytes),
                self._is_used,
                self._encode,
                config.recompute,
            )
        if self.is_apart:
            self.tensors = {name: x for name, x in self.tensors.items() if name not in MOVED}
        self.slots = Slots(self, config.device_bytes, layers)
        self.stream = CopyStream(like.device)
        self.grow(capacity)

    def _wait(self) -> None:
        """Until kernels have written what the host is about to read, in memory that both see."""
        if self._like.is_cuda and self.slabs is not None:
            torch.cuda.current_stream(self._like.device).synchronize()

    def grow(self, capacity: int) -> None:
        if self.slabs is not None:
            self.slabs.grow(capacity)
        super().grow(capacity)

    def storage(self) -> list[Tensor]:
        return [*super().storage(), *([] if self.slabs is None else self.slabs.tensors())]

    @property
    def is_apart(self) -> bool:
        """Whether ops cannot write sealed pages to where they have their home."""
        return self._apart is not None

    @property
    def _apart(self) -> Home | Slabs | None:
        return self.slabs if self.home is None else self.home

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
        if not self.is_apart:
            return super().kv(block_table, slot_table, residual_k, residual_v, sealed)
        t = self.slots.tensors
        nowhere = torch.full_like(slot_table, -1)
        return PagedKV(t["k"], t["v"], self.tensors.get("stats"), t.get("scales"), block_table, nowhere, residual_k,
                       residual_v, sealed, self.tensors.get("moments"))  # fmt: skip

    def read(self, ids: np.ndarray) -> dict[str, Tensor]:
        self._wait()
        pages = super().read(ids)
        if self._apart is None:
            return pages
        return {name: x.to(self._like.device) for name, x in self._apart.read(ids).items()} | pages

    def write(self, ids: np.ndarray, contents: dict[str, Tensor]) -> None:
        self._wait()
        super().write(ids, {name: x for name, x in contents.items() if name in self.tensors})
        if self._apart is not None:
            self._apart.write(ids, {name: x for name, x in contents.items() if name not in self.tensors})

    def put(self, src: dict[str, Tensor], src_ids: Tensor, dst: Tensor) -> None:
        """Rows src_ids [N] of pages on the device to blocks dst [N]; -1: none. Nothing waits."""
        if self.slabs is not None:
            self.slabs.put(src, src_ids, dst)
            return
        for name, x in src.items():
            ops.gather_pages(x, src_ids, self.tensors[name], dst)

    def copy(self, src: Tensor, into: dict[str, Tensor], dst: Tensor) -> None:
        """Pages of blocks src [N] to rows dst [N] of slots; -1: none."""
        if self._apart is not None:
            self._apart.copy(src, into, dst)
            return
        for name, tensor in into.items():
            ops.gather_pages(self.tensors[name], src, tensor, dst)

    def copy_rows(self, src: Tensor, into: dict[str, Tensor], dst: Tensor) -> None:
        """Tokens src [N] of blocks to tokens dst [N] of slots, block * P + offset; -1: none."""
        if self._apart is not None:
            self._apart.copy_rows(src, into, dst)
            return
        gather_rows({name: self.tensors[name] for name in into}, src, into, dst)

    def read_ahead(self, blocks: np.ndarray) -> None:
        """Brings pages of these blocks [N] from the tier below to host memory, in the background."""
        assert self.home is not None
        below = self.home.below(blocks)
        if len(below):
            is_held = np.zeros(self.allocator.capacity + 1, bool)
            is_held[self.slots.held()] = True  # -1: the last one
            self.home.read_ahead(below[~is_held[below]])

    @property
    def phase(self) -> int:
        """1: all pages fit on the device; 2: they fit in host memory; 3: they fit in neither (ALISA, Algorithm 2)."""
        self.settle()
        held = self.allocator.used
        return 1 if held <= self.slots.count else 2 if self.home is None or held <= len(self.home) else 3

    def traffic(self) -> Traffic:
        """Since the pool was made."""
        self.slots.count_brought()
        home = (0, 0, 0) if self.home is None else (self.home.loaded, self.home.written, self.home.recomputed)
        return Traffic(self.slots.wanted, self.slots.fetched, *home, self.slots.rows)

    def tiers(self) -> dict[str, Memory]:
        blocks = self.allocator
        self.settle()
        counts, page = (blocks.used, blocks.capacity, blocks.peak), self.slots.slot_bytes
        tiers = {"device": self.slots.memory + Memory(*(n * (self.block_bytes - page) for n in counts))}
        if self.home is not None:
            return tiers | self.home.tiers()
        used, reserved, peak = (n * page for n in counts)
        return tiers | {"host": Memory(used, reserved if self.slabs is None else self.slabs.bytes, peak)}


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
