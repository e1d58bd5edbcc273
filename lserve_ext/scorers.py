"""Which pages or tokens the retrieval heads of a layer attend in decode: policies, registered by name.

A new one is a subclass of `Scorer` under a name of its own, which `SparseConfig.scorer` then takes:

    @register("newest", unit="page")
    class Newest(Scorer):
        def select(self, before, q, kv, step, windows):
            ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from . import ops
from .ops import PagedKV
from .sequences import OnDevice

PREFILL_QUERIES = 64
"""How many of the last queries of a prefill put their attention mass on tokens."""

PageScores: TypeAlias = Callable[..., Tensor]
"""A function with the arguments and result of `ops.page_scores`."""


class Budget(NamedTuple):
    """How much a retrieval head attends in decode."""

    page_size: int
    sink: int
    """Pages."""
    local: int
    """Pages."""
    picks: int | None
    """Units of a list; None: `ratio` alone bounds them."""
    ratio: float | None
    """Share of a sequence's tokens that are picked (unit "token"); None: `picks` alone bounds them."""
    reuse_interval: int
    """Decode steps that share one selection."""


class Selection(NamedTuple):
    """What a layer knows of a batch between two steps. Never changed in place: a step that fails leaves the one from
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


class Scorer(ABC):
    """A policy, without state of its own: one object may serve all layers."""

    unit: ClassVar[Literal["page", "token"]]
    """What an entry of a list stands for."""
    observes: ClassVar[bool] = False
    """Whether it wants the attention mass of every step."""
    keeps: ClassVar[Literal["stats", "moments"]] = "stats"
    """The field of `PagedKV` that page scores are made of."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    @property
    def unit_tokens(self) -> int:
        """`ops.Mask.unit`."""
        return self.budget.page_size if self.unit == "page" else 1

    def next(self, before: Selection, q: Tensor, kv: PagedKV, step: OnDevice, windows: Tensor) -> Selection:
        """The selection of a decode step with queries [B, Hq, D]: a new one every `reuse_interval` steps."""
        if before.lists is not None and before.age < self.budget.reuse_interval:
            return before._replace(age=before.age + 1)
        lists, local_start = self.select(before, q, kv, step, windows)
        return Selection(lists, local_start, age=1, mass=before.mass)

    @abstractmethod
    def select(
        self, before: Selection, q: Tensor, kv: PagedKV, step: OnDevice, windows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lists [B, H, K] and local_start [B], as `ops.Mask` takes them; heads with a window other than LISTED need
        none."""

    def observe(self, before: Selection, mass: Tensor, step: OnDevice, queries: int) -> Selection:
        """With the attention mass [B, H, tokens] that the last `queries` tokens put on all."""
        return before

    def buffers(self, batch: int, heads: int, pages: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Room for the lists, local_start and mass of sequences of so many pages."""
        lists = torch.empty(batch, heads, self.budget.picks or 0, dtype=torch.int32, device=device)
        return lists, torch.empty(batch, dtype=torch.int32, device=device), None


S = TypeVar("S", bound=type[Scorer])
SCORERS: dict[str, type[Scorer]] = {}


def register(name: str, unit: Literal["page", "token"]) -> Callable[[S], S]:
    """Makes a subclass of `Scorer` known under a name."""

    def add(scorer: S) -> S:
        scorer.unit = unit
        SCORERS[name] = scorer
        return scorer

    return add


@register("minmax", unit="page")
class MinMax(Scorer):
    """Pages by the bounds of their keys (Quest, section 3.3; LServe, section 4.2)."""

    page_scores: PageScores = staticmethod(ops.page_scores)

    def select(
        self, before: Selection, q: Tensor, kv: PagedKV, step: OnDevice, windows: Tensor
    ) -> tuple[Tensor, Tensor]:
        P, sink, local, picks, *_ = self.budget
        stats = getattr(kv, self.keeps)
        assert picks is not None
        scores = self.page_scores(q, stats, kv.block_table, kv.sealed, windows)
        return ops.select_pages(scores, step.seq_lens, kv.sealed, P, sink, local, picks)


@register("moments", unit="page")
class Moments(MinMax):
    """Pages by mean and deviation of their keys: bounds are far from what they bound where a page is long."""

    keeps = "moments"


class Function(MinMax):
    """Pages by the scores of a function."""

    def __init__(self, budget: Budget, page_scores: PageScores) -> None:
        super().__init__(budget)
        self.page_scores = page_scores


@register("mass", unit="token")
class Mass(Scorer):
    """Tokens by the attention mass that all queries so far put on them, per head (H2O, section 4)."""

    observes = True
    heads_share: ClassVar[bool] = False
    """Whether the heads of a layer have one list."""

    def select(
        self, before: Selection, q: Tensor, kv: PagedKV, step: OnDevice, windows: Tensor
    ) -> tuple[Tensor, Tensor]:
        B, H, M = kv.block_table.shape
        P, tokens = self.budget.page_size, M * self.budget.page_size
        mass = _padded(before.mass, B, 1 if self.heads_share else H, tokens, q.device)
        picks = self._picks(tokens)
        counts = step.once("counts", self._counts)
        lists, local_start = ops.select_tokens(mass, step.seq_lens, kv.sealed, counts, P, picks)
        return lists.expand(B, H, picks), local_start

    def _picks(self, tokens: int) -> int:
        """Width of a list. Without a budget it grows with the table, whose width is known without asking the device."""
        return self.budget.picks if self.budget.picks is not None else round(tokens * (self.budget.ratio or 0.0))

    def buffers(self, batch: int, heads: int, pages: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = pages * self.budget.page_size
        lists = torch.empty(batch, heads, self._picks(tokens), dtype=torch.int32, device=device)
        mass = torch.empty(batch, 1 if self.heads_share else heads, tokens, device=device)
        return lists, torch.empty(batch, dtype=torch.int32, device=device), mass

    def _counts(self, seq_lens: Tensor) -> Tensor:
        """[B] int32 tokens to pick."""
        if self.budget.ratio is None:
            return torch.full_like(seq_lens, self.budget.picks or 0)
        return (seq_lens * self.budget.ratio).round().int()

    def observe(self, before: Selection, mass: Tensor, step: OnDevice, queries: int) -> Selection:
        if before.mass is None:
            return before._replace(mass=mass)
        return before._replace(mass=_padded_as(before.mass, mass) + mass)


@register("decayed_mass", unit="token")
class DecayedMass(Mass):
    """The same, one list a layer and forgetting (ALISA, Algorithm 1, whose window of the last k queries the decay
    stands for)."""

    heads_share = True

    def observe(self, before: Selection, mass: Tensor, step: OnDevice, queries: int) -> Selection:
        mass = mass.sum(1, keepdim=True)
        # A prefill of PREFILL_QUERIES or more takes the place of what was seen before, however it is cut into chunks.
        if before.mass is None or queries >= PREFILL_QUERIES:
            return before._replace(mass=mass)
        decay = step.once("decay", self._decay)
        if queries > 1:
            decay = decay**queries
        return before._replace(mass=torch.addcmul(mass, _padded_as(before.mass, mass), decay))

    def _decay(self, seq_lens: Tensor) -> Tensor:
        """[B, 1, 1] of one step: 1 - 1/k, k tokens being picked."""
        k = seq_lens * self.budget.ratio if self.budget.ratio is not None else seq_lens.float()
        return (1 - 1 / k.clamp(1.0, self.budget.picks))[:, None, None]


def _padded_as(mass: Tensor, other: Tensor) -> Tensor:
    B, H, tokens = other.shape
    return _padded(mass, B, H, tokens, other.device)


def _padded(mass: Tensor | None, B: int, H: int, tokens: int, device: torch.device) -> Tensor:
    if mass is None:
        return torch.zeros(B, H, tokens, device=device)
    return mass if mass.shape[2] == tokens else torch.nn.functional.pad(mass, (0, tokens - mass.shape[2]))
