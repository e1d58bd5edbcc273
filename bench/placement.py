"""Decoding where the device holds a part of the pages: how many are missing, and what that costs.

    python bench/placement.py                    two minutes
    python bench/placement.py --save             bench/results/placement-<machine>.json, and what `lserve plan` knows

One text is read by all runs, which take turns at each step. `slots` are those of a kv head, beside the pages that it
attends in a step (the budget): so much of the cache lies on the device, all the rest in host memory. A page is missed
if it is wanted and lies in no slot. `all` has no limit. The limit of a step's extra time is that of the bytes that
are moved, read and written once, by the bandwidth measured in the same run. HiSparse (arXiv 2608.07009) reports misses
of 30, 13 and 7% of the selected pages with 1, 2 and 4 times the budget.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lserve_ext import SparseCache, SparseConfig, __version__, models
from lserve_ext.blocks import Pool
from lserve_ext.eval import tasks
from lserve_ext.eval.generate import prefill
from lserve_ext.hf import cache_argument
from lserve_ext.machine import COLD, Machine
from lserve_ext.placement import Traffic, slot_bytes

LOCALITY = Path(__file__).parents[1] / "lserve_ext" / "data" / "locality" / "smollm2-135m-instruct.json"
FACTORS = (None, 1.0, 1.5, 2.0, 4.0)
WARM_UP = 16


class Decoding:
    """Steps of one cache, timed; `before` is the traffic until those that count."""

    def __init__(self, model: Any, config: SparseConfig, warm_up: int) -> None:
        self.model, self.warm_up = model, warm_up
        self.cache = SparseCache(model.config, config, model if config.recompute else None)
        self.steps: list[float] = []
        self.before = Traffic()

    def step(self, machine: Machine, token: Tensor) -> None:
        if len(self.steps) == self.warm_up:
            self.before = self.cache.traffic()
        forward = cache_argument(self.model, self.cache) | {"use_cache": True, "logits_to_keep": 1}
        self.steps.append(machine.seconds(lambda: self.model(token, **forward)))


class Run(Decoding):
    """Decoding with one reuse interval and so many slots for each page of the budget; None: for all pages."""

    def __init__(self, model: Any, config: SparseConfig, factor: float | None) -> None:
        text, self.factor = model.config, factor
        self.heads = text.num_hidden_layers * text.num_key_value_heads
        self.page_bytes = slot_bytes(Pool(config, torch.empty(1, 1, 0, text.head_dim, dtype=model.dtype), 0))
        if factor is not None:
            pages = (config.budget_tokens or 0) // config.page_size
            config = config.replace(device_bytes=int(factor * self.heads * pages) * self.page_bytes)
        self.config = config
        super().__init__(model, config, WARM_UP)

    def result(self, bandwidth: float) -> dict[str, Any]:
        steps = len(self.steps) - WARM_UP
        wanted, fetched, *_ = self.cache.traffic() - self.before
        listed = self.config.budget.picks or 0
        moved = fetched / steps * self.page_bytes
        return {
            "reuse_interval": self.config.reuse_interval,
            "slots": self.factor,
            "missed_of_wanted": fetched / wanted if wanted else 0.0,
            "missed_of_listed": fetched * self.config.reuse_interval / (steps * self.heads * listed),
            "pages_a_head_and_step": fetched / steps / self.heads,
            "moved_bytes": moved,
            "step_ms": median(self.steps[WARM_UP:]) * 1e3,
            "limit_ms": 2 * moved / bandwidth * 1e3,
        }


@torch.inference_mode()
def measure(model: Any, ids: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    machine, rates = Machine(COLD["cpu"], "cpu"), list[float]()
    runs = []
    for reuse in options.reuse:
        config = SparseConfig.lserve(streaming_heads=None, budget_tokens=options.budget, reuse_interval=reuse)
        runs += [Run(model, config, factor) for factor in FACTORS]
    for run in tqdm(runs, desc="prefill"):
        prefill(model, ids[:, : options.tokens], run.cache, 2048)
    for i in tqdm(range(options.tokens, options.tokens + WARM_UP + options.steps), desc="decode"):
        rates.append(machine.bandwidth())
        for run in runs:
            run.step(machine, ids[:, i : i + 1])
    return [run.result(median(rates)) for run in runs]


def missed(found: dict[str, Any]) -> dict[str, Any]:
    """What `lserve plan` takes from the results: of each reuse interval, pairs of slots and missed pages."""
    source = f"bench/placement.py: {found['model']}, {found['tokens']:,} tokens, budget {found['budget']:,}"
    curves: dict[str, list[list[float]]] = {}
    for r in found["results"]:
        if r["slots"] is not None:
            curves.setdefault(str(r["reuse_interval"]), []).append([r["slots"], r["missed_of_listed"]])
    return {"source": source, "missed_of_listed": curves}


def show(results: list[dict[str, Any]]) -> None:
    print(
        "\nreuse  slots   missed of listed  of wanted  pages a head and step  MB a step  step ms  beside all  limit ms"
    )
    for r in results:
        all_ = next(x for x in results if x["reuse_interval"] == r["reuse_interval"] and x["slots"] is None)
        slots = "all" if r["slots"] is None else f"{r['slots']:.1f}x"
        print(f"{r['reuse_interval']:>5}{slots:>7}{r['missed_of_listed']:>19.1%}{r['missed_of_wanted']:>11.1%}"
              f"{r['pages_a_head_and_step']:>20.2f}{r['moved_bytes'] / 1e6:>11.1f}{r['step_ms']:>9.1f}"
              f"{r['step_ms'] - all_['step_ms']:>+12.1f}{r['limit_ms']:>10.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6500, help="of context")
    parser.add_argument("--steps", type=int, default=64, help="decode steps that count")
    parser.add_argument("--budget", type=int, default=1024, help="tokens")
    parser.add_argument("--reuse", nargs="+", type=int, default=[1, 4], help="reuse intervals")
    parser.add_argument("--model", help="folder or hub name; by default SmolLM2-135M-Instruct")
    parser.add_argument("--save", action="store_true", help="write bench/results/placement-<machine>.json")
    parser.add_argument("--out", type=Path, help="write this file")
    options = parser.parse_args()
    model, tokenizer = models.load_model(options.model, dtype=torch.float32)
    ids = torch.tensor([tasks.encode(tokenizer, tasks.long_text())])
    head = {"lserve_ext": __version__, "torch": torch.__version__, "machine": platform.machine()}
    head |= {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    head |= {"model": options.model or "SmolLM2-135M-Instruct", "tokens": options.tokens, "budget": options.budget}
    print("  ".join(f"{key} {value}" for key, value in head.items()))
    results = measure(model, ids, options)
    show(results)
    name = f"placement-{head['machine']}.json"
    out = options.out or (Path(__file__).parent / "results" / name if options.save else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n", encoding="utf-8")
    if options.save:
        LOCALITY.write_text(json.dumps(missed(head | {"results": results}), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
