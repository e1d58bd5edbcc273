"""Rules of selecting pages, tried in plain PyTorch: how near each comes to the oracle, and for how many bytes.

    python bench/simulation.py                     512 positions of a text after 4,096 tokens, budget 1,024
    python bench/simulation.py --budget-tokens 2048 --only minmax

Rows of attention after the prefix are masked to sink, selected and local pages; rows before it are dense. That is what
teacher-forced decoding computes, a token at a time, without streaming heads. No op of this package takes part, and no
quantisation; `accuracy.py` runs what it has. Bytes are those that a decode step reads of a kv head, at 16 bits an
element: statistics of all pages, keys and values of attended ones.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from lserve_ext import __version__, models
from lserve_ext.eval import tasks
from lserve_ext.eval.metrics import compare

SINK, LOCAL = 128, 256
"""Tokens."""
ELEMENT = 2
"""Bytes."""
Score = Callable[[Tensor, Tensor], Tensor]
"""Queries [H, G, N, D], scaled, and pages [H, M, P, D] -> [H, G, N, M]: an estimate of the log of a page's mass."""


def minmax(group: int) -> Score:
    """The bound of its best group of keys (Quest, LServe)."""

    def score(q: Tensor, pages: Tensor) -> Tensor:
        groups = pages.unflatten(2, (-1, group))
        return _best_group(q, groups.amin(3), groups.amax(3))

    return score


def moments(group: int, c: float = 1.0) -> Score:
    """Mean minus and plus c deviations in the place of min and max."""

    def score(q: Tensor, pages: Tensor) -> Tensor:
        groups = pages.unflatten(2, (-1, group))
        mean, off = groups.mean(3), c * groups.std(3, correction=0)
        return _best_group(q, mean - off, mean + off)

    return score


def _best_group(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """low, high: [H, M, groups, D]."""
    flat = [x.flatten(1, 2)[:, None].transpose(2, 3) for x in (low, high)]
    scores = q.clamp_max(0) @ flat[0] + q.clamp_min(0) @ flat[1]
    return scores.unflatten(3, low.shape[1:3]).amax(4)


def log_mass(group: int) -> Score:
    """Log of the mass of keys that are normal with their group's mean and variance of each channel."""

    def score(q: Tensor, pages: Tensor) -> Tensor:
        groups = pages.unflatten(2, (-1, group))
        mean, variance = groups.mean(3), groups.var(3, correction=0)
        flat = [x.flatten(1, 2)[:, None].transpose(2, 3) for x in (mean, variance)]
        return (q @ flat[0] + q**2 @ flat[1] / 2).unflatten(3, groups.shape[1:3]).logsumexp(4)

    return score


def oracle(q: Tensor, pages: Tensor) -> Tensor:
    """The mass itself."""
    logits = q @ pages.flatten(1, 2)[:, None].transpose(2, 3)
    return logits.unflatten(3, pages.shape[1:3]).logsumexp(4)


@dataclass(frozen=True)
class Rule:
    """How pages are scored, and how many a head gets."""

    name: str
    score: Score
    vectors: int = 0
    """Statistics that a page keeps, D elements each."""
    page_size: int = 64
    normalised: bool = False
    """Whether each query head's scores are made shares of its mass, and summed; otherwise the greatest of a group
    counts."""
    shared: bool = False
    """Whether kv heads of a layer share one budget, so that the largest shares win wherever they are."""
    reuse: int = 1
    dense_layers: int = 0
    top_p: float | None = None
    """In place of the budget: as many pages as have this much of a head's estimated mass (Twilight), at most twice the
    budget's."""
    layers: int = 1
    """That share a selection, of the first of them (Kascade)."""


class Simulation:
    """An attention function of transformers: dense, or masked by `rule` if there is one."""

    rule: Rule | None = None
    budget = 0

    def __init__(self) -> None:
        self.read: list[float] = []
        """Bytes that a decode step reads of a kv head, in each layer of the last forward."""
        self.recall: list[float] = []
        self._chosen = torch.empty(0)  # [H, N, M] by the last layer that selected

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        (_, Hq, N, D), (_, H, T, _) = q.shape, k.shape
        t = torch.arange(T - N, T)[:, None]
        q = q[0].view(H, Hq // H, N, D) * D**-0.5
        weights = (q @ k[0][:, None].transpose(2, 3)).masked_fill_(torch.arange(T) > t, -math.inf)
        if self.rule is not None and module.layer_idx < self.rule.dense_layers:
            self.recall.append(1.0)
            self.read.append(float((t + 1).float().mean()) * 2 * D * ELEMENT)
        elif self.rule is not None:
            seen = self._seen(self.rule, q, k[0], module.layer_idx)
            total = weights.logsumexp(3)
            weights.masked_fill_(~seen[:, None], -math.inf)
            self.recall.append(float((weights.logsumexp(3) - total).exp().mean()))
            stats = self.rule.vectors * D * ELEMENT * float((t // self.rule.page_size).float().mean())
            stats /= self.rule.reuse * self.rule.layers
            self.read.append(stats + float(seen.sum(2).float().mean()) * 2 * D * ELEMENT)
        out = weights.softmax(3) @ v[0][:, None]
        return out.view(1, Hq, N, D).transpose(1, 2), None

    def _seen(self, rule: Rule, q: Tensor, k: Tensor, layer: int) -> Tensor:
        """[H, N, T]: which positions the queries [H, G, N, D], the last N of T, attend."""
        P, N, T = rule.page_size, q.shape[2], k.shape[1]
        t = torch.arange(T - N, T)
        selected_at = t - (torch.arange(N) % rule.reuse)
        pages, sink = torch.arange(T // P), SINK // P
        local = (selected_at // P - LOCAL // P + 1)[:, None]
        candidates = (pages >= sink) & (pages < local)  # [N, M]
        if layer % rule.layers == 0 or layer == rule.dense_layers:
            self._chosen = self._select(rule, q[:, :, selected_at - (T - N)], k, candidates)
        position = torch.arange(T)
        page = position // P
        forced = (page < sink) | (page >= local)
        return (forced | self._chosen[:, :, page.clamp_max(len(pages) - 1)]) & (position <= t[:, None])

    def _select(self, rule: Rule, queries: Tensor, k: Tensor, candidates: Tensor) -> Tensor:
        """[H, N, M]: which of the candidates [N, M] the queries [H, G, N, D] pick."""
        P, M = rule.page_size, candidates.shape[1]
        scores = rule.score(queries, k[:, : M * P].unflatten(1, (-1, P)))
        scores = scores.masked_fill(~candidates, -math.inf)
        shares = scores.softmax(3).sum(1) if rule.normalised else scores.amax(1)  # [H, N, M]
        count = (self.budget - SINK - LOCAL) // P
        if rule.shared:
            flat = shares.transpose(0, 1).flatten(1)  # [N, H * M]
            best = flat.topk(count * len(k), 1).indices
            chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True).unflatten(1, (len(k), -1))
            chosen = chosen.transpose(0, 1)
        elif rule.top_p is not None:
            shares = shares / shares.sum(2, keepdim=True)
            best = shares.topk(min(2 * count, M), 2)
            enough = best.values.cumsum(2) - best.values < rule.top_p
            chosen = torch.zeros_like(shares, dtype=torch.bool).scatter_(2, best.indices, enough)
        else:
            chosen = torch.zeros_like(shares, dtype=torch.bool).scatter_(2, shares.topk(count, 2).indices, True)
        return chosen & candidates


RULES = [
    Rule("oracle", oracle, normalised=True),
    Rule("oracle, shared", oracle, normalised=True, shared=True),
    Rule("oracle, P 32", oracle, normalised=True, page_size=32),
    Rule("oracle, P 16", oracle, normalised=True, page_size=16),
    Rule("minmax, L 16", minmax(16), 8),
    Rule("minmax, L 64", minmax(64), 2),
    Rule("minmax, P 16", minmax(16), 2, 16),
    Rule("moments", moments(64), 2),
    Rule("moments, L 32", moments(32), 4),
    Rule("moments, L 16", moments(16), 8),
    Rule("moments, P 32", moments(32), 2, 32),
    Rule("moments, P 16", moments(16), 2, 16),
    Rule("moments, normalised", moments(64), 2, normalised=True),
    Rule("moments, normalised, P 32", moments(32), 2, 32, normalised=True),
    Rule("moments, normalised, P 16", moments(16), 2, 16, normalised=True),
    Rule("log mass", log_mass(64), 2, normalised=True),
    Rule("log mass, L 16", log_mass(16), 8, normalised=True),
    Rule("log mass, P 32", log_mass(32), 2, 32, normalised=True),
    Rule("log mass, P 16", log_mass(16), 2, 16, normalised=True),
    Rule("log mass, shared", log_mass(64), 2, normalised=True, shared=True),
    Rule("log mass, P 32, shared", log_mass(32), 2, 32, normalised=True, shared=True),
    Rule("log mass, P 16, shared", log_mass(16), 2, 16, normalised=True, shared=True),
    Rule("moments, normalised, P 16, shared", moments(16), 2, 16, normalised=True, shared=True),
    Rule("moments, P 16, half a deviation", moments(16, 0.5), 2, 16),
    Rule("moments, P 16, two deviations", moments(16, 2.0), 2, 16),
    Rule("moments, P 16, 2 dense layers", moments(16), 2, 16, dense_layers=2),
    *(Rule(f"moments, P 16, top {p:.0%}", moments(16), 2, 16, normalised=True, top_p=p) for p in (0.7, 0.8, 0.9)),
    *(Rule(f"log mass, P 16, top {p:.0%}", log_mass(16), 2, 16, normalised=True, top_p=p) for p in (0.7, 0.8, 0.9)),
    *(Rule(f"oracle, P 16, top {p:.0%}", oracle, 0, 16, normalised=True, top_p=p) for p in (0.7, 0.8, 0.9)),
    Rule("moments, P 16, 2 layers share", moments(16), 2, 16, layers=2),
    Rule("moments, P 16, 3 layers share", moments(16), 2, 16, layers=3),
    Rule("oracle, P 16, 2 layers share", oracle, 0, 16, normalised=True, layers=2),
    Rule("minmax, L 16, reuse 4", minmax(16), 8, reuse=4),
    Rule("moments, P 16, reuse 4", moments(16), 2, 16, reuse=4),
    Rule("oracle, P 16, reuse 4", oracle, page_size=16, normalised=True, reuse=4),
]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0, help="first token of the text (%(default)s)")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens attended densely (%(default)s)")
    parser.add_argument("--positions", type=int, default=512, help="tokens after it (%(default)s)")
    parser.add_argument("--budget-tokens", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--only", default="", help="rules whose name contains this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    simulation = Simulation()
    AttentionInterface.register("simulation", simulation)
    AttentionMaskInterface.register("simulation", lambda *_, **__: None)
    model, tokenizer = models.load_model(attn_implementation="simulation")
    end = options.start + options.prefix + options.positions
    ids = torch.tensor([tasks.encode(tokenizer, tasks.long_text())[options.start : end]])
    cache = DynamicCache()
    for part in tqdm(ids[:, : options.prefix].split(512, 1), desc="prefix"):
        model(part, past_key_values=cache, logits_to_keep=1)

    def logits() -> Tensor:
        out: Tensor = model(ids[:, options.prefix :], past_key_values=cache).logits[0]
        cache.crop(-options.positions)
        return out

    dense, results = logits(), []
    simulation.budget = options.budget_tokens
    for rule in RULES:
        if options.only not in rule.name:
            continue
        simulation.rule = rule
        simulation.read.clear(), simulation.recall.clear()
        found = compare(dense, logits())
        read, recall = (sum(x) / len(x) for x in (simulation.read, simulation.recall))
        results.append({"rule": rule.name, "bytes": read, "recall": recall} | found)
        figures = f"{read / 1024:6.0f} KiB  recall {recall:.3f}  kl {found['kl']:.4f}  top1 {found['top1']:.3f}"
        print(f"{rule.name:36} {figures}", flush=True)
    if options.out:
        head = {"lserve_ext": __version__, "torch": torch.__version__, "model": "SmolLM2-135M-Instruct, float32"}
        head |= {"machine": platform.machine(), "prefix": options.prefix, "positions": options.positions}
        head |= {"start": options.start, "budget_tokens": options.budget_tokens}
        options.out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
