"""Generation without loss: a model drafts tokens on its cache's sparse lists, and then reads them all at once, densely.

    cache = SparseCache(model.config, SparseConfig.moments(kv_dtype="auto"))
    model.generate(**inputs, cache=cache, custom_generate=speculate, draft_tokens=4)

What several tokens at once attend is everything (heads that stream apart, which are refused here), so what is accepted
is what dense attention over the same cache would have said. A draft is taken back exactly: its tokens still lie in the
residual buffer. (Speculative sampling: Leviathan et al., arXiv 2211.17192; a draft by the same model with fewer keys:
MagicDec, arXiv 2408.11049.)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .cache import SparseCache
from .interface import cache_argument

_KNOWN = {"attention_mask", "position_ids", "cache_position", "cache", "past_key_values"}


@torch.no_grad()
def speculate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    draft_tokens: int = 4,
    counts: Counter[str] | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """`generate(custom_generate=speculate)`: greedy or sampling, one sequence.

    With greedy search the tokens are those of dense attention over the same cache, but for rounding; with sampling they
    follow the same distribution. INT8 pages are sealed up to `draft_tokens` tokens earlier than without drafts.

    Args:
        input_ids: [1, T], of which the cache may hold the first ones.
        draft_tokens: drafted in a round, 1 to the page size.
        counts: takes the numbers of "rounds", of tokens "drafted" and of those "accepted".

    Returns:
        [1, T + new tokens].

    Raises:
        ValueError: more than one sequence, padding, a cache that is none of ours or whose heads stream, or an output or
            input that is not supported.
    """
    cache = _checked(input_ids, draft_tokens, generation_config, model_kwargs)
    drafting = _Drafting(model, cache, logits_processor, generation_config.do_sample)
    counts = Counter() if counts is None else counts
    text, held = input_ids, cache.get_seq_length()
    if text.shape[1] - held > 2:  # two tokens and more at once are attended densely, so one is never fed alone
        drafting.feed(text[:, held:-1], 1)
        held = text.shape[1] - 1
    while True:
        pending = text[:, held:]
        draft, guesses = drafting.draft(text, pending, draft_tokens)
        found, accepted = drafting.verify(text, pending, draft, guesses)
        counts.update(rounds=1, drafted=draft_tokens, accepted=accepted)
        is_done = False
        for token, scores in found:
            text = torch.cat([text, token], 1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if is_done := bool(stopping_criteria(text, scores).all()):
                break
        held = text.shape[1] - 1
        cache.crop(min(0, held - cache.get_seq_length()))
        if is_done:
            break
    if streamer is not None:
        streamer.end()
    return text


def _checked(input_ids: Tensor, draft_tokens: int, generation_config: Any, model_kwargs: dict[str, Any]) -> SparseCache:
    """The cache, if all is as it must be."""
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))

    def fail(name: str, expected: str, got: object) -> None:
        raise ValueError(f"speculate: {name}: expected {expected}, got {got}")

    if not isinstance(cache, SparseCache):
        raise ValueError(f"speculate: cache: expected a SparseCache, got {type(cache).__name__}")
    if cache.config.streaming_heads not in (None, 0):
        fail("cache", "one without streaming heads, which never attend everything", cache.config.streaming_heads)
    if input_ids.shape[0] != 1 or input_ids.shape[1] <= cache.get_seq_length():
        fail("input_ids", "one sequence, longer than what the cache holds", list(input_ids.shape))
    if isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int):
        fail("draft_tokens", "an int", repr(draft_tokens))
    if not 1 <= draft_tokens <= cache.config.page_size:
        fail("draft_tokens", f"1 to the page size {cache.config.page_size}", draft_tokens)
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        fail("attention_mask", "no padding", "some")
    for name in ("return_dict_in_generate", "output_scores", "output_logits"):
        if getattr(generation_config, name, False):
            fail(name, "False", True)
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor) and name not in _KNOWN:
            fail(name, "a model of text alone", "a tensor")
    return cache


class _Drafting:
    """A model and its cache, fed a few tokens at a time."""

    def __init__(self, model: Any, cache: SparseCache, logits_processor: Any, samples: bool) -> None:
        self.model, self.cache, self.process, self.samples = model, cache, logits_processor, samples

    def feed(self, tokens: Tensor, count: int) -> Tensor:
        """Logits [count, vocabulary] float32 of the last of the tokens [1, T]."""
        outputs = self.model(tokens, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=count)
        logits: Tensor = outputs.logits[0, -count:].float()
        return logits

    def draft(self, text: Tensor, pending: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
        """So many tokens [1, count] after the text, whose last ones the cache does not hold, and the scores [1,
        vocabulary] that each was taken from. The cache is left as it was."""
        fed, tokens, guesses = pending, list[Tensor](), list[Tensor]()
        for _ in range(count):
            scores = self.process(text, self.feed(fed, 1))
            fed = self._pick(scores)
            text = torch.cat([text, fed], 1)
            tokens.append(fed)
            guesses.append(scores)
        self.cache.crop(-(pending.shape[1] + count - 1))
        return torch.cat(tokens, 1), guesses

    def verify(
        self, text: Tensor, pending: Tensor, draft: Tensor, guesses: list[Tensor]
    ) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """Tokens [1, 1] that follow the text, at least one, with their scores; and how many of the draft they begin
        with."""
        count = draft.shape[1]
        logits = self.feed(torch.cat([pending, draft], 1), count + 1)
        found = list[tuple[Tensor, Tensor]]()
        for i in range(count):
            scores = self.process(torch.cat([text, draft[:, :i]], 1), logits[i : i + 1])
            token = self._accept(scores, guesses[i], draft[:, i : i + 1])
            found.append((token, scores))
            if not torch.equal(token, draft[:, i : i + 1]):
                return found, i
        scores = self.process(torch.cat([text, draft], 1), logits[count:])
        return [*found, (self._pick(scores), scores)], count

    def _pick(self, scores: Tensor) -> Tensor:
        """[1, 1] of scores [1, vocabulary]."""
        if self.samples:
            return torch.multinomial(scores.softmax(-1), 1)
        return scores.argmax(-1, keepdim=True)

    def _accept(self, scores: Tensor, guess: Tensor, token: Tensor) -> Tensor:
        """The drafted token, or another one in its place, so that tokens follow `scores`."""
        if not self.samples:
            return scores.argmax(-1, keepdim=True)
        p, q = scores.softmax(-1), guess.softmax(-1)
        share, rest = p.gather(1, token) / q.gather(1, token), (p - q).clamp(min=0)
        if torch.rand((), device=share.device) < share or not rest.any():
            return token
        return torch.multinomial(rest, 1)
