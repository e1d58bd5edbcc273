"""Pages in host memory that kernels of a GPU read and write in place: pinned, and growing without being moved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops


class _Slab(NamedTuple):
    """Pages first, first + 1, ... of all."""

    first: int
    tensors: dict[str, Tensor]
    """[pages, ...] of one buffer."""

    @property
    def end(self) -> int:
        return self.first + len(next(iter(self.tensors.values())))

    def rows(self, ids: Tensor, unit: int = 1) -> Tensor:
        """Ids [N] of pages, or of `unit` tokens each, counted from the first one here; -1: not here."""
        first, end = self.first * unit, self.end * unit
        return torch.where((ids >= first) & (ids < end), ids - first, -1)


class Slabs:
    """Pages by block, in a few buffers. Copies are kernels on the device's own stream: nothing waits, and a graph may
    hold them.

    Pinning takes about 0.1 s a GB, and torch's allocator rounds up to a power of two; so a slab is one. Each copy is a
    launch for every slab, so slabs are at least half as large as all before them.

    Args:
        like: tensors [0, ...] of a page; slabs are pinned if these lie on a GPU.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self._like = dict(like)
        self._sizes = {name: x.element_size() * x.shape[1:].numel() for name, x in like.items()}
        self._pins = any(x.is_cuda for x in like.values())
        self._slabs: list[_Slab] = []
        self.bytes = 0
        """Of all slabs."""

    def __len__(self) -> int:
        """Pages."""
        return self._slabs[-1].end if self._slabs else 0

    def grow(self, count: int) -> None:
        """So that there are at least so many pages."""
        page = sum(self._sizes.values())
        short = (count - len(self)) * page
        if short <= 0:
            return
        size = 1 << (max(short, self.bytes // 2) - 1).bit_length()
        pages = size // page
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pins)
        ends = itertools.accumulate(pages * n for n in self._sizes.values())
        parts = zip(ends, self._sizes.items(), strict=True)
        tensors = {
            name: buffer[end - pages * n : end].view(self._like[name].dtype).view(pages, *self._like[name].shape[1:])
            for end, (name, n) in parts
        }
        self._slabs = [*self._slabs, _Slab(len(self), tensors)]
        self.bytes += size

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        return itertools.chain.from_iterable(slab.tensors.values() for slab in self._slabs)

    def put(self, src: Mapping[str, Tensor], src_ids: Tensor, dst: Tensor) -> None:
        """`ops.gather_pages`: rows src_ids [N] of src to pages dst [N]; -1: none."""
        for slab in self._slabs:
            rows = slab.rows(dst)
            for name, x in slab.tensors.items():
                ops.gather_pages(src[name], src_ids, x, rows)

    def copy(self, src: Tensor, into: Mapping[str, Tensor], dst: Tensor) -> None:
        """`ops.gather_pages`: pages src [N] to rows dst [N]; -1: none."""
        for slab in self._slabs:
            rows = slab.rows(src)
            for name, x in slab.tensors.items():
                ops.gather_pages(x, rows, into[name], dst)

    def copy_rows(self, src: Tensor, into: Mapping[str, Tensor], dst: Tensor) -> None:
        """`gather_rows`: tokens src [N] to tokens dst [N]; -1: none."""
        for slab in self._slabs:
            gather_rows(slab.tensors, slab.rows(src, slab.tensors["k"].shape[1]), into, dst)

    def read(self, ids: np.ndarray) -> dict[str, Tensor]:
        """Pages ids [N], in host memory that is not pinned. Kernels must have written them."""
        at = torch.from_numpy(ids).to(torch.int32)
        found = {name: torch.empty((len(ids), *x.shape[1:]), dtype=x.dtype) for name, x in self._like.items()}
        self.copy(at, found, torch.arange(len(ids), dtype=torch.int32))
        return found

    def write(self, ids: np.ndarray, pages: Mapping[str, Tensor]) -> None:
        """Takes pages [N, ...]; kernels must have read what lay there."""
        near = {name: pages[name].cpu() for name in self._like}
        self.put(near, torch.arange(len(ids), dtype=torch.int32), torch.from_numpy(ids).to(torch.int32))


def gather_rows(src: Mapping[str, Tensor], src_ids: Tensor, dst: Mapping[str, Tensor], dst_ids: Tensor) -> None:
    """`ops.gather_pages` of tokens, page * P + offset, in place of pages."""
    for name, tensor in src.items():
        ids, P, D = [src_ids, dst_ids], *tensor.shape[-2:]
        if name == "scales":  # [pages, C, P, 2]
            C = tensor.shape[1]
            parts = torch.arange(C, dtype=torch.int32, device=src_ids.device)[:, None] * P
            ids = [torch.where(x < 0, -1, x + x // P * ((C - 1) * P) + parts).view(-1) for x in ids]
        ops.gather_pages(tensor.view(-1, D), ids[0], dst[name].view(-1, D), ids[1])
