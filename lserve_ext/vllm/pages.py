"""One page of one kv head in vLLM's memory: where its keys, values and what belongs to them lie."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from ..config import SparseConfig

ALIGNMENT = 16
"""Bytes; CUDA kernels copy as many at a time."""


@dataclasses.dataclass(frozen=True)
class Page:
    """The layout of a page, one behind the other: keys, values, scales, statistics or moments, and a list.

    A list lies in the page that a sequence is writing, which no other sequence holds. So lists need no name for the
    sequence, and are gone when its blocks are.

    Args:
        size: P, tokens.
        dim: D, channels.
        dtype: of the model.
        is_int8: whether keys and values are codes, on a grid a token.
        groups: of tokens that have statistics or moments; 0: neither.
        picks: pages of a list; None: there is none.
    """

    size: int
    dim: int
    dtype: torch.dtype
    is_int8: bool
    groups: int
    picks: int | None

    @classmethod
    def of(cls, config: SparseConfig, dim: int, dtype: torch.dtype) -> Page:
        """The page that a config wants."""
        groups, tokens = 0, config.stats_group
        if config.needs_moments:
            tokens = config.moments_group or config.page_size
        if config.selects:
            groups = config.page_size // tokens
        picks = config.list_pages if config.selects and config.reuse_interval > 1 else None
        return cls(config.page_size, dim, dtype, config.kv_dtype == "int8", groups, picks)

    @cached_property
    def _parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        kv = torch.uint8 if self.is_int8 else self.dtype
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "k": (kv, (self.size, self.dim)),
            "v": (kv, (self.size, self.dim)),
        }
        if self.is_int8:
            parts["scales"] = torch.float32, (2, self.size, 2)
        if self.groups:
            parts["stats"] = self.dtype, (self.groups, 2, self.dim)
        if self.picks is not None:
            parts["list"] = torch.int32, (self.picks + 2,)
        return parts

    @property
    def bytes(self) -> int:
        """Of a page."""
        used = sum(_bytes(dtype, shape) for dtype, shape in self._parts.values())
        return -(-used // ALIGNMENT) * ALIGNMENT

    def pools(self, storage: torch.UntypedStorage, device: torch.device, offset: int) -> dict[str, Tensor]:
        """Each part of all pages: [pages, ...], a page a row.

        Args:
            offset: bytes before the first page.
        """
        pages, found = (storage.nbytes() - offset) // self.bytes, {}
        for name, (dtype, shape) in self._parts.items():
            strides = torch.empty(shape, device="meta").stride()
            like = torch.empty(0, dtype=dtype, device=device)
            found[name] = like.set_(
                storage, offset // dtype.itemsize, (pages, *shape), (self.bytes // dtype.itemsize, *strides)
            )
            offset += _bytes(dtype, shape)
        return found


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
