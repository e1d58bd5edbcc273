"""One prompt through a model with a `SparseCache`: prefill in chunks, greedy decoding, or following given tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..blocks import Memory
from ..config import SparseConfig
from ..hf import SparseCache, cache_argument
from ..placement import Traffic
from . import metrics


def forward(model: Any, ids: Tensor, cache: SparseCache) -> Tensor:
    """Logits [vocabulary] float32 of the last of the tokens [1, T]."""
    outputs = model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    logits: Tensor = outputs.logits[0, -1].float()
    return logits


def prefill(
    model: Any, ids: Tensor, cache: SparseCache, chunk: int = 512, progress: Callable[[int], object] | None = None
) -> Tensor:
    """Reads a prompt [1, T] in chunks. Returns the logits [vocabulary] of its last token."""
    if ids.shape[1] < 1 or chunk < 1:
        raise ValueError(f"prefill: expected a token and a chunk at least, got {ids.shape[1]} and {chunk}")
    for part in ids.split(chunk, 1):
        last = forward(model, part, cache)
        if progress is not None:
            progress(part.shape[1])
    return last


def follow(model: Any, tokens: Iterable[int], cache: SparseCache) -> Tensor:
    """Teacher forcing: one decode step for every token. Returns their logits [tokens, vocabulary]."""
    rows = [forward(model, torch.tensor([[token]], device=model.device), cache) for token in tokens]
    return torch.stack(rows)


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out of one prompt under one config."""

    answer: str
    tokens: list[int]
    logits: Tensor
    """[tokens, vocabulary]: of the tokens generated, or of those of another run where it was made to follow."""
    agreement: dict[str, float] | None
    """`metrics.compare` with the first run; None: this is the first."""
    memory: dict[str, Memory]
    prefill: float
    """Tokens a second."""
    decode: float
    attended: tuple[int, int]
    """`SparseCache.attended` at the end."""
    length: int
    """Tokens in the cache at the end."""
    phases: list[int]
    """`SparseCache.phase` after the prompt and after each step."""
    traffic: Traffic
    """`SparseCache.traffic` at the end."""


class Generation:
    """Greedy generation over one prompt, in chunks, with progress bars. Its first run is what later ones agree with."""

    def __init__(self, model: Any, tokenizer: Any, ids: Tensor, new_tokens: int, chunk: int) -> None:
        self.model, self.tokenizer, self.ids = model, tokenizer, ids.to(model.device)
        self.new_tokens, self.chunk = new_tokens, chunk
        self.first: Run | None = None

    @torch.inference_mode()
    def run(self, name: str, config: SparseConfig) -> Run:
        """Generates; then, from the same prefill, follows the first run's tokens to compare logits with it."""
        model = self.model if config.recompute else None
        cache, length = SparseCache(self.model.config, config, model), self.ids.shape[1]
        start = time.perf_counter()
        with tqdm(total=length, desc=f"{name}: prefill", unit=" tokens") as bar:
            last = prefill(self.model, self.ids, cache, self.chunk, bar.update)
        prefilled = time.perf_counter()
        fork = cache.fork() if self.first is not None else None
        stop = set(_as_list(self.model.generation_config.eos_token_id))
        rows, tokens, phases = [last], [int(last.argmax())], [cache.phase]
        with tqdm(total=self.new_tokens, initial=1, desc=f"{name}: decode", unit=" tokens") as bar:
            while len(tokens) < self.new_tokens and tokens[-1] not in stop:
                rows.append(forward(self.model, torch.tensor([tokens[-1:]], device=self.ids.device), cache))
                tokens.append(int(rows[-1].argmax()))
                phases.append(cache.phase)
                bar.update()
        seconds = time.perf_counter() - prefilled
        logits, agreement = torch.stack(rows), None
        if self.first is not None and fork is not None:
            followed = self.first.tokens[:-1]
            logits = torch.cat([last[None], follow(self.model, followed, fork)]) if followed else last[None]
            agreement = metrics.compare(self.first.logits, logits)
        run = Run(
            answer=self.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            tokens=tokens,
            logits=logits,
            agreement=agreement,
            memory=cache.memory(),
            prefill=length / (prefilled - start),
            decode=(len(tokens) - 1) / seconds,
            attended=cache.attended(),
            length=cache.get_seq_length(),
            phases=phases,
            traffic=cache.traffic(),
        )
        self.first = self.first or run
        return run


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else value
