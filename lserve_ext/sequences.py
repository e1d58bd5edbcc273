"""The sequences of a batch: how long each is and how much of it is sealed, once for all layers of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .files import Tensors


class Pages(NamedTuple):
    """When pages are sealed and freed, which follows from a config."""

    page_size: int
    sink: int
    """Pages that streaming heads never free."""
    decode_window: int
    """Local pages that streaming heads keep in decode."""
    longest_window: int
    """The same until the first decode step: those of decode or of prefill, whichever are more."""


@dataclasses.dataclass(eq=False)
class OnDevice:
    """The facts of one forward on one device; between page borders the device itself made them."""

    context_lens: Tensor
    """[B] int32 tokens held before."""
    sealed: Tensor
    """[B] int32 pages sealed before."""
    cu_seqlens: Tensor
    """[B + 1] int32 bounds of the new tokens."""
    seq_lens: Tensor
    """[B] int32 tokens held after."""
    sealed_after: Tensor
    """[B] int32."""
    _derived: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def once(self, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What a policy makes of `seq_lens`, made once a forward."""
        if name not in self._derived:
            self._derived[name] = make(self.seq_lens)
        return self._derived[name]


class Facts(NamedTuple):
    """The device's copy of a batch."""

    lengths: Tensor
    sealed: Tensor
    ones: Tensor
    """[B + 1] int32 bounds of one token a sequence."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """A batch at one moment. Never changed: `Step` makes the next one, and so does whatever else changes the batch."""

    pages: Pages
    lengths: np.ndarray
    """[B] tokens held, without padding."""
    sealed: np.ndarray
    """[B] pages in the pools."""
    freed: np.ndarray
    """[B] streaming heads hold no page from the sink up to here."""
    window: int
    """Pages that streaming heads keep: until the first decode step those of the longer window."""
    columns: int
    """Columns of the padded batch that have been fed, less those that were cropped."""
    _facts: dict[torch.device, Facts] = dataclasses.field(default_factory=dict)

    @classmethod
    def empty(cls, pages: Pages, batch: int) -> Sequences:
        """A batch that holds nothing yet."""
        nothing = np.zeros(batch, np.int64)
        return cls(pages, nothing, nothing, np.full(batch, pages.sink, np.int64), pages.longest_window, 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def same_as(self, other: Sequences) -> bool:
        """Whether both say the same."""
        arrays = zip((self.lengths, self.sealed, self.freed), (other.lengths, other.sealed, other.freed), strict=True)
        same = (self.pages, self.window, self.columns) == (other.pages, other.window, other.columns)
        return same and all(np.array_equal(a, b) for a, b in arrays)

    def facts(self, device: torch.device) -> Facts:
        """Its copy on a device; the first time, it is copied there."""
        if device not in self._facts:
            self._facts[device] = Facts(
                on_device(self.lengths, device),
                on_device(self.sealed, device),
                on_device(np.arange(len(self) + 1), device),
            )
        return self._facts[device]

    def has_made(self, device: torch.device, facts: Facts) -> None:
        """Takes the copy that a device has made itself."""
        self._facts[device] = facts

    def crop(self, tokens: int) -> Sequences:
        """Without the newest `tokens` of every sequence. A page that is cut is no longer sealed."""
        P, lengths = self.pages.page_size, np.maximum(self.lengths - tokens, 0)
        return Sequences(
            self.pages,
            lengths,
            np.where(lengths < self.sealed * P, lengths // P, self.sealed),
            np.maximum(np.minimum(self.freed, lengths // P), self.pages.sink),
            self.window if lengths.any() else self.pages.longest_window,  # without tokens: as new
            max(0, self.columns - tokens),
        )

    def take_rows(self, rows: np.ndarray) -> Sequences:
        """These sequences, in this order; they may repeat."""
        return dataclasses.replace(
            self, lengths=self.lengths[rows], sealed=self.sealed[rows], freed=self.freed[rows], _facts={}
        )

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs."""
        arrays = {"lengths": self.lengths, "sealed": self.sealed, "freed": self.freed}
        numbers = {"window": self.window, "columns": self.columns}
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
            name: torch.tensor(number) for name, number in numbers.items()
        }

    @classmethod
    def restore(cls, state: dict[str, Tensor], pages: Pages) -> Sequences:
        """The inverse of `state`.

        Raises:
            ValueError: a tensor is missing or unknown, has another shape or dtype, or holds what no batch can.
        """
        tensors, most = Tensors(state), np.iinfo(np.int32).max
        tensors.only({"lengths", "sealed", "freed", "window", "columns"})
        lengths = tensors.take("lengths", torch.int64, None).numpy().copy()
        sealed, freed = (tensors.take(name, torch.int64, len(lengths)).numpy().copy() for name in ("sealed", "freed"))
        window, columns = (int(tensors.take(name, torch.int64)) for name in ("window", "columns"))
        full = lengths // pages.page_size
        tensors.within("lengths", lengths, 0, most)
        tensors.within("sealed", sealed, np.maximum(full - 1, 0), full)
        tensors.within("freed", freed, pages.sink, np.maximum(full, pages.sink))
        tensors.within("window", window, pages.decode_window, pages.longest_window)
        tensors.within("columns", columns, lengths.max(initial=0), most)
        return cls(pages, lengths, sealed, freed, window, columns)


class Step:
    """One forward of a batch: the same for all layers, which ask for `before`, `after` and `on`.

    Args:
        before: the batch.
        new: [B] new tokens of each sequence.
        columns: columns of the padded batch that the forward feeds; by default the most new tokens.
        decode: one query a sequence, which is decode also when it is a prompt's last chunk; by default, if no sequence
            has more than one new token.
        layers: the `LayerCache`s that take it, whose tables then change together.
    """

    def __init__(
        self,
        before: Sequences,
        new: np.ndarray | Sequence[int],
        columns: int | None = None,
        decode: bool | None = None,
        layers: Sequence[Any] = (),
    ) -> None:
        new = np.asarray(new, np.int64)
        if new.shape != before.lengths.shape or (new < 0).any():
            raise ValueError(f"new: expected the tokens of {len(before)} sequences, got {new.tolist()}")
        self.before, self.new = before, new
        self.columns = int(new.max(initial=0)) if columns is None else columns
        self.decode = int(new.max(initial=0)) <= 1 if decode is None else decode
        self.tokens = int(new.sum())
        """New tokens of all sequences."""
        self.is_padded = self.tokens < len(new) * self.columns
        P, window = before.pages.page_size, before.pages.decode_window if self.decode else before.window
        lengths = before.lengths + new
        self.after = Sequences(
            before.pages,
            lengths,
            np.maximum(before.sealed, lengths // P - 1),
            np.maximum(before.freed, lengths // P - window),  # a page more than the window, for exact crops
            window,
            before.columns + self.columns,
        )
        self.is_border = bool((self.after.sealed > before.sealed).any() or (self.after.freed > before.freed).any())
        """Whether a layer's table changes."""
        self.pages = -(-int(lengths.max(initial=0)) // P)
        """Columns that a table must have."""
        self.sealed = (before.sealed, self.after.sealed)
        """[B] and [B]: what it seals, the pages of each sequence from the one to before the other, in all layers."""
        self.layers = layers
        self.tables: dict[int, Any] = {}
        """Of the layers that have asked, by `id`: what `LayerCache` makes of them."""
        self._on: dict[torch.device, OnDevice] = {}

    def on(self, device: torch.device) -> OnDevice:
        """The facts of both ends on a device. Between borders of decode nothing is copied there."""
        if device not in self._on:
            lengths, sealed, ones = self.before.facts(device)
            if self.decode and self.tokens == len(self.new):
                cu_seqlens, seq_lens = ones, lengths + 1
            else:
                cu_seqlens = on_device(np.concatenate([[0], np.cumsum(self.new)]), device)
                seq_lens = on_device(self.after.lengths, device)
            after = sealed
            if (self.after.sealed > self.before.sealed).any():
                after = torch.maximum(
                    sealed, torch.div(seq_lens, self.before.pages.page_size, rounding_mode="floor") - 1
                )
            self.after.has_made(device, Facts(seq_lens, after, ones))
            self._on[device] = OnDevice(lengths, sealed, cu_seqlens, seq_lens, after)
        return self._on[device]


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """int32."""
    return torch.from_numpy(values.astype(np.int32)).to(device)
