"""A scorer of one's own: pages are chosen by the mean of their bounds, and the command and configs know it by name.

Run: python examples/custom_scorer.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from lserve_ext import PagedKV, SparseCache, SparseConfig, models, ops
from lserve_ext.eval import generate, tasks
from lserve_ext.scorers import Scorer, Selection, register
from lserve_ext.sequences import OnDevice


@register("middle", unit="page")
class Middle(Scorer):
    """Scores a page by q · (min + max) / 2 of its groups of keys: a guess at them where `minmax` has their bound."""

    def select(
        self, before: Selection, q: Tensor, kv: PagedKV, step: OnDevice, windows: Tensor
    ) -> tuple[Tensor, Tensor]:
        P, sink, local, picks, *_ = self.budget
        assert kv.stats is not None and picks is not None
        middle = kv.stats.float().mean(2)[kv.block_table.clamp(min=0).long()]  # [B, H, M, P/L, D]
        heads = q.float().unflatten(1, (kv.block_table.shape[1], -1))  # [B, H, G, D]
        scores = torch.einsum("bhgd,bhmld->bhmgl", heads, middle).amax((3, 4))
        sealed = torch.arange(scores.shape[2], device=q.device) < kv.sealed[:, None]
        scores = scores.masked_fill(~sealed[:, None] | (kv.block_table < 0), float("-inf"))
        return ops.select_pages(scores, step.seq_lens, kv.sealed, P, sink, local, picks)


@torch.inference_mode()
def main() -> None:
    model, tokenizer = models.load_model()
    ids, key = tasks.passkey_prompt(tokenizer, 3000)
    for scorer in ("minmax", "middle"):
        config = SparseConfig.lserve(streaming_heads=None, budget_tokens=1024, scorer=scorer)
        cache = SparseCache(model.config, config)
        token = generate.prefill(model, ids, cache).argmax()
        answer = [int(token)]
        for _ in range(7):
            answer.append(int(generate.forward(model, torch.tensor([answer[-1:]]), cache).argmax()))
        attended, held = cache.attended()
        print(f"{scorer}: {tokenizer.decode(answer)!r}, the key is {key}; {attended / held:.0%} attended")


if __name__ == "__main__":
    main()
