"""A context larger than its memory: a part of its KV on the device, a part in host memory, all on a disk.

Run: python examples/tiers.py
"""

from __future__ import annotations

import tempfile

import torch

from lserve_ext import SparseCache, SparseConfig, models
from lserve_ext.eval import tasks
from lserve_ext.hf import cache_argument


@torch.inference_mode()
def main() -> None:
    model, tokenizer = models.load_model()  # yours: from_pretrained(name, attn_implementation="lserve")
    text = tasks.long_text()
    document = torch.tensor([tasks.encode(tokenizer, text)[:3000]])
    config = SparseConfig.lserve(streaming_heads="smollm2-135m-instruct", budget_tokens=1024)

    answers = []
    with tempfile.TemporaryDirectory() as folder:
        limits = config.replace(device_bytes=12 << 20, host_bytes=8 << 20, disk_dir=folder)
        for name, kind in (("all on the device", config), ("on tiers", limits)):
            cache = SparseCache(model.config, kind)
            for chunk in document.split(512, 1):
                model(chunk, **cache_argument(model, cache), logits_to_keep=1)
            held = {tier: f"{memory.used / 2**20:.0f} MiB" for tier, memory in cache.memory().items()}
            tokens = model.generate(
                torch.cat([document, document[:, -1:]], 1), **cache_argument(model, cache), max_new_tokens=12,
                do_sample=False,
            )  # fmt: skip
            answers.append(tokenizer.decode(tokens[0, -12:]))
            print(f"{name}: phase {'I' * cache.phase}, {held}, {cache.traffic()}\n  {answers[-1]!r}")
    assert answers[0] == answers[1]  # where pages lie changes nothing but the time


if __name__ == "__main__":
    main()
