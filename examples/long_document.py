"""One document, several questions: it is read once, and every question goes on from a fork of its cache.

Run: python examples/long_document.py
"""

from __future__ import annotations

import torch

from lserve_ext import SparseCache, SparseConfig, models
from lserve_ext.eval import tasks
from lserve_ext.hf import cache_argument


@torch.inference_mode()
def main() -> None:
    model, tokenizer = models.load_model()  # yours: from_pretrained(name, attn_implementation="lserve")
    keys = {"Alice": "31415", "Bob": "27182"}
    text, hidden = tasks.long_text(), "".join(tasks.NEEDLE.format(name=name, key=key) for name, key in keys.items())
    place = text.index("\n\n", 4000) + 2
    document = torch.tensor([tasks.encode(tokenizer, text[:place] + hidden + text[place:])[:3000]])

    cache = SparseCache(model.config, SparseConfig.lserve(streaming_heads="smollm2-135m-instruct", budget_tokens=2048))
    for chunk in document.split(512, 1):
        model(chunk, **cache_argument(model, cache), logits_to_keep=1)
    memory = cache.memory()["device"]
    print(f"{document.shape[1]:,} tokens in {memory.used / 2**20:.0f} MiB")

    for name in keys:
        question = torch.tensor([tasks.encode(tokenizer, "\n\n" + tasks.QUESTION.format(name=name))])
        turn = cache.fork()  # shares the sealed pages of the document
        tokens = model.generate(
            torch.cat([document, question], 1), **cache_argument(model, turn), max_new_tokens=6, do_sample=False
        )
        print(f"{name}: {tokenizer.decode(tokens[0, -6:])!r}")
    cache.save("document.safetensors")  # SparseCache.load reads it in another process
    print(f"still {cache.get_seq_length():,} tokens, saved")


if __name__ == "__main__":
    main()
