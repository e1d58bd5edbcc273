"""lm-eval-harness over a `SparseCache`: its own command, with one more kind of model.

    python -m lserve_ext.eval.harness run --model lserve --tasks niah_single_1,ruler_vt \\
        --model_args pretrained=MODEL,preset=lserve,streaming_heads=heads.json,budget_tokens=1024

Model arguments that are fields of `SparseConfig` change the preset (`lserve`), or what `config=FILE` says in its place;
all others are those of `--model hf`. What is generated goes through the cache. Likelihoods are of whole texts in one
forward pass without a cache, so a preset shows in generation alone. Needs `lserve_ext[harness]`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .. import hf
from ..config import SparseConfig


@register_model("lserve")
class LServe(HFLM):  # type: ignore[misc]
    """A transformers model whose every batch of prompts gets a `SparseCache` of its own."""

    def __init__(self, pretrained: Any, preset: str = "lserve", config: str | None = None, **arguments: Any) -> None:
        fields = {f.name for f in dataclasses.fields(SparseConfig)} & arguments.keys()
        overrides = {name: arguments.pop(name) for name in fields}
        made = SparseConfig.preset(preset) if config is None else SparseConfig.load(config)
        self.sparse = made.replace(**overrides)
        super().__init__(pretrained, **({"attn_implementation": "lserve"} | arguments))

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        cache = hf.SparseCache(self.model.config, self.sparse)
        found: torch.Tensor = super()._model_generate(
            context, max_length, stop, **options, **hf.cache_argument(self.model, cache)
        )
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
