"""The page selection of `lserve` as one masked forward in plain PyTorch: what accuracy.py should find.

    python bench/simulation.py                     the same text, prefix and positions as accuracy.py

Rows of attention after the prefix are masked to sink, selected and local pages; rows before it are dense. That is what
teacher-forced decoding computes, a token at a time, with a selection at every step and no streaming heads. No op of
this package takes part, and no quantisation.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from lserve_ext import SparseConfig, models
from lserve_ext.eval import tasks
from lserve_ext.eval.metrics import compare


class Simulation:
    """An attention function of transformers: dense up to `prefix`, then masked by `sparse`; dense if that is None."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self.sparse: SparseConfig | None = None

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        dense = q.shape[2] if self.sparse is None else self.prefix
        head = [x[:, :, :dense] for x in (q, k, v)]
        parts = [scaled_dot_product_attention(*head, is_causal=True, enable_gqa=True)]
        if self.sparse is not None:
            seen = torch.stack([self._seen(*pair) for pair in self._groups(q[0, :, dense:], k[0])])
            seen = seen.repeat_interleave(q.shape[1] // k.shape[1], 0)
            parts.append(scaled_dot_product_attention(q[:, :, dense:], k, v, attn_mask=seen, enable_gqa=True))
        return torch.cat(parts, 2).transpose(1, 2), None

    @staticmethod
    def _groups(q: Tensor, k: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Query heads [G, N, D] and keys [T, D] of every kv head."""
        return list(zip(q.unflatten(0, (len(k), -1)), k, strict=True))

    def _seen(self, q: Tensor, k: Tensor) -> Tensor:
        """[N, T]: which positions the queries, the last N of T, attend."""
        assert self.sparse is not None
        P, L = self.sparse.page_size, self.sparse.stats_group
        t = torch.arange(self.prefix, len(k))[:, None]
        pages = torch.arange(len(k) // P)
        boxes = k[: len(pages) * P].unflatten(0, (-1, L))  # [groups, L, D]
        low, high = boxes.amin(1), boxes.amax(1)
        scores = (q.clamp_min(0) @ high.T + q.clamp_max(0) @ low.T).amax(0).unflatten(1, (-1, P // L)).amax(-1)
        local = t // P - self.sparse.local_pages + 1
        candidates = (pages >= self.sparse.sink_pages) & (pages < local)
        best = scores.masked_fill(~candidates, -torch.inf).topk(self.sparse.list_pages, 1).indices
        chosen = torch.zeros_like(candidates).scatter_(1, best, True) & candidates
        position = torch.arange(len(k))
        page = (position // P).clamp_max(len(pages) - 1)
        forced = (position // P < self.sparse.sink_pages) | (position // P >= local)
        return (forced | chosen[:, page]) & (position <= t)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0, help="first token of the text (%(default)s)")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens attended densely (%(default)s)")
    parser.add_argument("--positions", type=int, default=2048, help="tokens after it (%(default)s)")
    parser.add_argument("--budget-tokens", type=int, default=2048, help="(%(default)s)")
    options = parser.parse_args()

    simulation = Simulation(options.prefix)
    AttentionInterface.register("simulation", simulation)
    AttentionMaskInterface.register("simulation", lambda *_, **__: None)
    model, tokenizer = models.load_model(attn_implementation="simulation")
    end = options.start + options.prefix + options.positions
    ids = torch.tensor([tasks.encode(tokenizer, tasks.long_text())[options.start : end]])
    logits = []
    for sparse in (None, SparseConfig.lserve(streaming_heads=None, budget_tokens=options.budget_tokens)):
        simulation.sparse = sparse
        logits.append(model(ids, use_cache=False, logits_to_keep=options.positions).logits[0])
    print("  ".join(f"{name} {value:.4g}" for name, value in compare(*logits).items()))


if __name__ == "__main__":
    main()
