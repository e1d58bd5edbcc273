"""Lossless generation: drafts on sparse lists, verified densely, beside dense decoding of the same cache.

    python bench/speculate.py                  SmolLM2, contexts of 4,096 and 7,900 tokens
    python bench/speculate.py --save           bench/results/speculate-<machine>.json

Greedy. All runs of a context follow the same text and take turns; seconds are medians. `same` says whether the tokens
are those of dense decoding (INT8: of pages that are sealed at other moments, so they need not be). A round is as many
sparse steps as it drafts and one dense step over one token more; with all drafts accepted it yields as many tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lserve_ext import SparseCache, SparseConfig, __version__, models
from lserve_ext.eval import tasks
from lserve_ext.eval.generate import prefill
from lserve_ext.hf import cache_argument, speculate

DRAFTS = (2, 4, 8)


@torch.inference_mode()
def compare(model: Any, ids: Tensor, kv_dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense decoding, and drafts of each length."""
    sparse = SparseConfig.moments(kv_dtype=kv_dtype, budget_tokens=options.budget_tokens)
    runs: list[tuple[str, SparseConfig, dict[str, Any]]] = [("dense", SparseConfig.dense(kv_dtype=kv_dtype), {})]
    runs.append(("sparse", sparse, {}))
    runs += [(f"drafts of {n}", sparse, {"custom_generate": speculate, "draft_tokens": n}) for n in DRAFTS]
    read = {}
    for config in (runs[0][1], sparse):
        read[config] = SparseCache(model.config, config)
        prefill(model, ids[:, :-1], read[config])
    times: dict[str, list[float]] = {name: [] for name, *_ in runs}
    tokens, counts = dict[str, list[int]](), {name: Counter[str]() for name, *_ in runs}
    for _ in tqdm(range(options.rounds), desc=f"{ids.shape[1]:,} tokens, {kv_dtype}"):
        for name, config, arguments in runs:
            if arguments:
                arguments = arguments | {"counts": counts[name]}
            cache, start = read[config].fork(), time.perf_counter()
            length = {"max_new_tokens": options.new, "min_new_tokens": options.new}
            out = model.generate(ids, **length, do_sample=False, **cache_argument(model, cache), **arguments)
            times[name].append(time.perf_counter() - start)
            tokens[name] = out[0, ids.shape[1] :].tolist()
    results = []
    for name, *_ in runs:
        took, count = median(times[name]) / options.new, counts[name]
        results.append({
            "run": name, "context": ids.shape[1], "kv_dtype": kv_dtype, "token_ms": took * 1e3,
            "over_dense": median(times["dense"]) / options.new / took, "same": tokens[name] == tokens["dense"],
            "accepted": count["accepted"] / count["drafted"] if count else None,
        })  # fmt: skip
    return results


def show(results: list[dict[str, Any]]) -> None:
    print("\ncontext  kv    run             ms a token  beside dense  accepted  same tokens")
    for r in results:
        accepted = "" if r["accepted"] is None else f"{r['accepted']:.0%}"
        print(f"{r['context']:>7}  {r['kv_dtype']:5} {r['run']:14}{r['token_ms']:>12.1f}{r['over_dense']:>13.2f}x"
              f"{accepted:>10}  {'yes' if r['same'] else 'no'}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 7900], help="of context")
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=3, help="that times are medians of")
    parser.add_argument("--budget-tokens", type=int, default=1024, help="of drafts (%(default)s)")
    parser.add_argument("--model", help="folder or hub name; by default SmolLM2-135M-Instruct")
    parser.add_argument("--save", action="store_true", help="write bench/results/speculate-<machine>.json")
    parser.add_argument("--out", type=Path, help="write this file")
    options = parser.parse_args()
    model, tokenizer = models.load_model(options.model, dtype=torch.float32)
    ids = torch.tensor([tasks.encode(tokenizer, tasks.long_text())])
    head = {"lserve_ext": __version__, "torch": torch.__version__, "machine": platform.machine(),
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
            "model": options.model or "SmolLM2-135M-Instruct", "budget": options.budget_tokens}  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in head.items()))
    results = [
        result
        for context in options.tokens
        for kv_dtype in ("auto", "int8")
        for result in compare(model, ids[:, :context], kv_dtype, options)
    ]
    show(results)
    out = options.out or (
        Path(__file__).parent / "results" / f"speculate-{platform.machine()}.json" if options.save else None
    )
    if out:
        out.write_text(json.dumps(head | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
