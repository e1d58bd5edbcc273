"""Prompts whose right answer is known: pass keys hidden in a long text that comes with Python."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch

# Plain completion in the words that stand before the key: a model of 135M parameters copies better than it answers.
QUESTION = "Here is the secret pass key of {name}. Remember it. The secret pass key of {name} is"
NEEDLE = QUESTION + " {key}. The secret pass key of {name} is {key}.\n\n"


def long_text() -> str:
    """The reference of the Python language that comes with Python, several hundred thousand characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def passkey_prompt(
    tokenizer: Any, length: int, *, depth: float = 0.5, seed: int = 0, text: str | None = None
) -> tuple[torch.Tensor, str]:
    """A part of a text with a pass key in it, and the beginning of a sentence that the key completes.

    Args:
        length: tokens of the prompt.
        depth: where the key stands, from 0 (the beginning) to 1 (the end).
        seed: of the key and of the part of the text.
        text: by default `long_text`.

    Returns:
        Token ids [1, length] and the key, five digits.
    """
    rng = random.Random(seed)
    key = str(rng.randrange(10_000, 100_000))
    question = encode(tokenizer, "\n\n" + QUESTION.format(name="this document"))
    needle = encode(tokenizer, NEEDLE.format(name="this document", key=key))
    return torch.tensor([hide(tokenizer, length, [(depth, needle)], question, rng, text)]), key


def passkey_recital(
    tokenizer: Any, length: int, names: Sequence[str], *, seed: int = 0, text: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of a text with a pass key a name in it, evenly spread, and in the end all of them in another order.

    Returns:
        Token ids [1, length], and which of these tokens predict one of a key at the end, bool [length].
    """
    rng = random.Random(seed)
    keys = {name: str(rng.randrange(10_000, 100_000)) for name in names}
    needles = [encode(tokenizer, NEEDLE.format(name=name, key=key)) for name, key in keys.items()]
    end: list[int] = []
    predicts: list[bool] = []
    for name in rng.sample(list(names), len(names)):
        question, key = encode(tokenizer, "\n\n" + QUESTION.format(name=name)), encode(tokenizer, f" {keys[name]}")
        end += question + key
        predicts += [False] * (len(question) - 1) + [True] * len(key) + [False]
    depths = [(i + 0.5) / len(names) for i in range(len(names))]
    ids = hide(tokenizer, length, list(zip(depths, needles, strict=True)), end, rng, text)
    return torch.tensor([ids]), torch.tensor([False] * (length - len(end)) + predicts)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of a text, without what the tokenizer puts before a whole one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def hide(
    tokenizer: Any,
    length: int,
    needles: Sequence[tuple[float, list[int]]],
    end: list[int],
    rng: random.Random,
    text: str | None,
    *,
    head: str = "",
) -> list[int]:
    """The head, the text from a paragraph on that rng chooses, with needles (depth and ids, in order of depth) between
    paragraphs, and the end: `length` tokens."""
    start: list[int] = list(tokenizer(head).input_ids)
    room = length - len(start) - sum(len(needle) for _, needle in needles) - len(end)
    paragraphs = [f"{paragraph}\n\n" for paragraph in (text or long_text()).split("\n\n")]
    pieces: list[list[int]] = tokenizer(paragraphs, add_special_tokens=False).input_ids
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    if not 0 < room <= ends[-1]:
        least = length - room + 1
        raise ValueError(f"length: expected {least} to {least - 1 + ends[-1]} tokens with this text, got {length}")
    first = rng.randrange(sum(ends[-1] - end >= room for end in ends))
    hay = list(itertools.chain.from_iterable(pieces[first:]))[:room]
    ids, done = start, 0
    for depth, needle in needles:
        place = min(next(end - ends[first] for end in ends[first:] if end - ends[first] >= depth * room), room)
        ids, done = ids + hay[done:place] + needle, place
    return ids + hay[done:] + end
