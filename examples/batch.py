"""A batch of prompts of different lengths, decoded in reserved memory by a compiled model.

Run: python examples/batch.py [backend]   inductor by default, which takes a minute to compile
"""

from __future__ import annotations

import sys

import torch
from transformers import CompileConfig

from lserve_ext import SparseCache, SparseConfig, models
from lserve_ext.hf import cache_argument

PROMPTS = ["The capital of France is", "One, two, three, four,", "Water boils at a temperature of"]


@torch.inference_mode()
def main(backend: str = "inductor") -> None:
    model, tokenizer = models.load_model()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token  # pad tokens never enter the cache
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")

    # Memory for 512 tokens a sequence: a decode step then needs nothing of the host, and is one graph.
    cache = SparseCache(model.config, SparseConfig.dense(kv_dtype="int8", max_tokens=512))
    compile_config = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on GPUs alone, unless it is told to
    tokens = model.generate(
        **inputs, **cache_argument(model, cache), max_new_tokens=8, do_sample=False, compile_config=compile_config
    )
    for row in tokens:
        print(tokenizer.decode(row, skip_special_tokens=True))
    print(cache.memory()["device"])


if __name__ == "__main__":
    main(*sys.argv[1:])
