"""Which pages or tokens the retrieval heads of a layer attend in decode, and for how many steps."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import ops
from .config import SparseConfig
from .ops import PagedKV

PREFILL_QUERIES = 64
"""How many of the last queries of a prefill put their attention mass on tokens."""


class Selection(NamedTuple):
    """What a selector knows of a batch between two steps. Never changed in place: a step that fails leaves the one from
    before it."""

    lists: Tensor | None = None
    """[B, H, K] of the last selection; None: the next step selects."""
    local_start: Tensor | None = None
    """[B] of the same moment: so a page that leaves the window meanwhile is still attended."""
    age: int = 0
    """Steps that the lists have served."""
    mass: Tensor | None = None
    """[B, H, tokens] attention that tokens received, or [B, 1, tokens] summed over heads."""

    def take_rows(self, rows: Tensor) -> Selection:
        """These sequences of the batch, in this order."""
        taken = {name: x[rows] for name, x in self.tensors().items()}
        return Selection(taken.get("lists"), taken.get("local_start"), self.age, taken.get("mass"))

    def without_lists(self, lengths: Tensor | None = None) -> Selection:
        """The lists forgotten; with lengths [B], also what is known of tokens beyond them."""
        mass = self.mass
        if mass is not None and lengths is not None:
            mass = mass * (torch.arange(mass.shape[2], device=mass.device) < lengths[:, None])[:, None]
        return Selection(mass=mass)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the fields that are there."""
        fields = {"lists": self.lists, "local_start": self.local_start, "mass": self.mass}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


class Selector(Protocol):
    """A policy of one layer, without state of its own."""

    unit: int
    """Tokens that an entry of a list stands for."""
    observes: bool
    """Whether it wants the attention mass of every step."""

    def select(self, before: Selection, q: Tensor, kv: PagedKV, lengths: Tensor, windows: Tensor) -> Selection:
        """With lists for queries [B, Hq, D], which are the last of `lengths` tokens."""

    def observe(self, before: Selection, mass: Tensor, lengths: Tensor, steps: int) -> Selection:
        """With the attention mass [B, H, tokens] of the last `steps` tokens."""


class PageSelector:
    """Pages by the bounds of their keys (Quest, LServe), or by the scores of a callable."""

    observes = False

    def __init__(self, config: SparseConfig) -> None:
        self.unit, self._interval = config.page_size, config.reuse_interval
        self._sink, self._local, self._count = config.sink_pages, config.local_pages, config.list_pages
        self._scores = config.scorer if callable(config.scorer) else ops.page_scores

    def select(self, before: Selection, q: Tensor, kv: PagedKV, lengths: Tensor, windows: Tensor) -> Selection:
        if before.lists is not None and before.age < self._interval:
            return before._replace(age=before.age + 1)
        assert kv.stats is not None
        scores = self._scores(q, kv.stats, kv.block_table, kv.sealed, windows)
        chosen = ops.select_pages(scores, lengths, kv.sealed, self.unit, self._sink, self._local, self._count)
        return Selection(*chosen, age=1)

    def observe(self, before: Selection, mass: Tensor, lengths: Tensor, steps: int) -> Selection:
        raise AssertionError("pages are scored by their bounds")


class TokenSelector:
    """Tokens by the attention mass that queries put on them: accumulated per head (H2O), or decayed and summed
    over the heads of the layer (ALISA, Algorithm 1, whose window of the last k queries the decay stands for)."""

    unit = 1
    observes = True

    def __init__(self, config: SparseConfig) -> None:
        self._page_size, self._interval = config.page_size, config.reuse_interval
        self._ratio, self._picks = config.token_ratio, config.token_picks
        self._decays = config.scorer == "decayed_mass"

    def select(self, before: Selection, q: Tensor, kv: PagedKV, lengths: Tensor, windows: Tensor) -> Selection:
        if before.lists is not None and before.age < self._interval:
            return before._replace(age=before.age + 1)
        B, H, M = kv.block_table.shape
        mass = _padded(before.mass, B, 1 if self._decays else H, M * self._page_size, q.device)
        # Without a budget the list grows with the sequences; M bounds it without asking the device.
        picks = self._picks if self._picks is not None else round(M * self._page_size * self._ratio / 2)
        counts = (lengths * (self._ratio / 2)).round().int()
        tokens, local_start = ops.select_tokens(mass, lengths, kv.sealed, counts, self._page_size, picks)
        return Selection(tokens.expand(B, H, picks), local_start, age=1, mass=before.mass)

    def observe(self, before: Selection, mass: Tensor, lengths: Tensor, steps: int) -> Selection:
        # A prefill of PREFILL_QUERIES or more takes the place of what was seen before, however it is cut into chunks.
        if self._decays:
            mass = mass.sum(1, keepdim=True)
        if before.mass is not None and not (self._decays and steps >= PREFILL_QUERIES):
            B, H, tokens = mass.shape
            earlier = _padded(before.mass, B, H, tokens, mass.device)
            if self._decays:
                window = (lengths * (self._ratio / 2)).clamp(1.0, self._picks)  # k
                earlier = earlier * ((1 - 1 / window) ** steps)[:, None, None]
            mass = earlier + mass
        return before._replace(mass=mass)


def _padded(mass: Tensor | None, B: int, H: int, tokens: int, device: torch.device) -> Tensor:
    if mass is None:
        return torch.zeros(B, H, tokens, device=device)
    return torch.nn.functional.pad(mass, (0, tokens - mass.shape[2]))


def make_selector(config: SparseConfig) -> Selector | None:
    """The selector of a layer whose retrieval heads follow lists; None if they are dense."""
    if not config.selects:
        return None
    return TokenSelector(config) if config.unit == "token" else PageSelector(config)
