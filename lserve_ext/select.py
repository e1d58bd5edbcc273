"""Which pages or tokens the retrieval heads of a layer attend in decode, and for how many steps."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .config import SparseConfig
from .ops import PagedKV

PREFILL_QUERIES = 64
"""How many of the last queries of a prefill put their attention mass on tokens."""


class Selector(Protocol):
    """The reusable selection of one layer. Tensors have the batch as their first dimension."""

    unit: int
    """Tokens that an entry of a list stands for."""

    def select(self, q: Tensor, kv: PagedKV, lengths: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Lists [B, H, K] and local_start [B] for queries [B, Hq, D], which are the last of `lengths` tokens."""

    def observe(self, mass: Tensor, lengths: Tensor, steps: int) -> None:
        """Takes the attention mass [B, H, tokens] of the last `steps` tokens, if `observes`."""

    observes: bool

    def drop(self, lengths: Tensor | None = None) -> None:
        """Forgets the lists; with lengths, also what is known of tokens beyond them."""

    def take_rows(self, rows: Tensor) -> None:
        """Keeps these sequences of the batch, in this order."""

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


class _Reusable:
    """Lists that serve `interval` steps. A list keeps the local_start of its own step, so that a page which leaves
    the window meanwhile is still attended."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._age = 0
        self._chosen: tuple[Tensor, Tensor] | None = None

    def _due(self) -> bool:
        return self._chosen is None or self._age >= self._interval

    def _keep(self, chosen: tuple[Tensor, Tensor]) -> None:
        self._chosen, self._age = chosen, 0

    def _next(self) -> tuple[Tensor, Tensor]:
        assert self._chosen is not None
        self._age += 1
        return self._chosen

    def drop(self, lengths: Tensor | None = None) -> None:
        self._chosen = None

    def take_rows(self, rows: Tensor) -> None:
        if self._chosen is not None:
            lists, local_start = self._chosen
            self._chosen = lists[rows], local_start[rows]

    def state(self) -> dict[str, Tensor]:
        if self._chosen is None:
            return {}
        lists, local_start = self._chosen
        return {"lists": lists.contiguous(), "local_start": local_start, "age": torch.tensor(self._age)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._chosen = (state["lists"], state["local_start"]) if "lists" in state else None
        self._age = int(state["age"]) if "age" in state else 0


class PageSelector(_Reusable):
    """Pages by the bounds of their keys (Quest, LServe), or by the scores of a callable."""

    observes = False

    def __init__(self, config: SparseConfig) -> None:
        super().__init__(config.reuse_interval)
        self.unit = config.page_size
        self._sink, self._local, self._count = config.sink_pages, config.local_pages, config.list_pages
        self._scores = config.scorer if callable(config.scorer) else ops.page_scores

    def select(self, q: Tensor, kv: PagedKV, lengths: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        if self._due():
            assert kv.stats is not None
            scores = self._scores(q, kv.stats, kv.block_table, kv.sealed, windows)
            self._keep(ops.select_pages(scores, lengths, kv.sealed, self.unit, self._sink, self._local, self._count))
        return self._next()

    def observe(self, mass: Tensor, lengths: Tensor, steps: int) -> None:
        raise AssertionError("pages are scored by their bounds")


class TokenSelector(_Reusable):
    """Tokens by the attention mass that queries put on them: accumulated per head (H2O), or decayed and summed
    over the heads of the layer (ALISA, Algorithm 1, whose window of the last k queries the decay stands for)."""

    unit = 1
    observes = True

    def __init__(self, config: SparseConfig) -> None:
        super().__init__(config.reuse_interval)
        self._page_size = config.page_size
        self._ratio, self._picks = config.token_ratio, config.token_picks
        self._decays = config.scorer == "decayed_mass"
        self._mass: Tensor | None = None  # [B, H, tokens], or [B, 1, tokens] summed over heads

    def select(self, q: Tensor, kv: PagedKV, lengths: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        if self._due():
            B, H, M = kv.block_table.shape
            mass = self._padded(M * self._page_size, B, 1 if self._decays else H, q.device)
            # Without a budget the list grows with the sequences; M bounds it without asking the device.
            picks = self._picks if self._picks is not None else round(M * self._page_size * self._ratio / 2)
            tokens, local_start = ops.select_tokens(mass, lengths, kv.sealed, self._page_size, self._ratio, picks)
            self._keep((tokens.expand(B, H, picks), local_start))
        return self._next()

    def observe(self, mass: Tensor, lengths: Tensor, steps: int) -> None:
        # A prefill of PREFILL_QUERIES or more takes the place of what was seen before, however it is cut into chunks.
        if self._decays:
            mass = mass.sum(1, keepdim=True)
        if self._mass is not None and not (self._decays and steps >= PREFILL_QUERIES):
            before = self._padded(mass.shape[2], mass.shape[0], mass.shape[1], mass.device)
            if self._decays:
                window = (lengths * (self._ratio / 2)).clamp(1.0, self._picks)  # k
                before = before * ((1 - 1 / window) ** steps)[:, None, None]
            mass = before + mass
        self._mass = mass

    def _padded(self, tokens: int, B: int, H: int, device: torch.device) -> Tensor:
        if self._mass is None:
            return torch.zeros(B, H, tokens, device=device)
        return torch.nn.functional.pad(self._mass, (0, tokens - self._mass.shape[2]))

    def drop(self, lengths: Tensor | None = None) -> None:
        super().drop()
        if self._mass is not None and lengths is not None:
            held = torch.arange(self._mass.shape[2], device=self._mass.device) < lengths[:, None]
            self._mass = self._mass * held[:, None]

    def take_rows(self, rows: Tensor) -> None:
        super().take_rows(rows)
        if self._mass is not None:
            self._mass = self._mass[rows]

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self._mass is None else {"mass": self._mass})

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self._mass = state.get("mass")


def make_selector(config: SparseConfig) -> Selector | None:
    """The selector of a layer whose retrieval heads follow lists; None if they are dense."""
    if not config.selects:
        return None
    return TokenSelector(config) if config.unit == "token" else PageSelector(config)
