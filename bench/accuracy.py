"""What sparsity and INT8 cost on a real text: KL divergence and top-1 agreement with dense attention.

    python bench/accuracy.py                       SmolLM2, 2,048 positions after a prefix of 4,096
    python bench/accuracy.py --positions 256       quicker

Teacher-forced: every config reads the prefix once and then one token of the text at a time, so each position compares
the logits of a decode step with those of dense attention over the same tokens. Writes bench/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lserve_ext import HeadPattern, SparseCache, SparseConfig, __version__, models
from lserve_ext.eval import generate, tasks
from lserve_ext.eval.metrics import compare


def configs(layers: int, kv_heads: int) -> dict[str, SparseConfig]:
    calibrated = HeadPattern.load("smollm2-135m-instruct")
    rng = random.Random(0)
    lserve = {"budget_tokens": 2048, "streaming_heads": None, "reuse_interval": 1}
    table = {
        "int8, all heads dense": SparseConfig.dense(kv_dtype="int8"),
        "lserve, budget 2048, no streaming, reuse 1": SparseConfig.lserve(**lserve),
        "lserve, budget 2048, no streaming, reuse 4": SparseConfig.lserve(**lserve | {"reuse_interval": 4}),
        "lserve, budget 2048, calibrated half streaming": SparseConfig.lserve(
            budget_tokens=2048, streaming_heads=calibrated
        ),
    }
    for name, fields in {
        "lserve": {},
        "moments": {"scorer": "moments"},
        "moments, pages of 32": {"scorer": "moments", "page_size": 32},
        "moments, pages of 16": {"scorer": "moments", "page_size": 16},
    }.items():
        for reuse in (1, 4):
            few = lserve | {"budget_tokens": 1024, "reuse_interval": reuse}
            table[f"{name}, budget 1024, no streaming, reuse {reuse}"] = SparseConfig.lserve(**few | fields)
    for draw in range(3):
        scores = [[rng.random() for _ in range(kv_heads)] for _ in range(layers)]
        half = SparseConfig.lserve(budget_tokens=2048, streaming_heads=HeadPattern(scores))
        table[f"lserve, budget 2048, random half streaming {draw}"] = half
    table["quest, budget 1024"] = SparseConfig.quest(budget_tokens=1024)
    table["alisa, 80% sparsity"] = SparseConfig.alisa()
    return table


@torch.inference_mode()
def read(
    model: torch.nn.Module, ids: Tensor, prefix: int, sparse: SparseConfig, name: str
) -> tuple[Tensor, dict[str, float]]:
    """Logits [positions, vocabulary] of the tokens after the prefix, one decode step each."""
    cache = SparseCache(model.config, sparse)
    generate.prefill(model, ids[:, :prefix], cache)
    start = time.perf_counter()
    logits = generate.follow(model, tqdm(ids[0, prefix:].tolist(), desc=name, unit=" tokens"), cache)
    cost = {"tokens_per_second": len(logits) / (time.perf_counter() - start)}
    attended, held = cache.attended()
    cost |= {"attended": attended / held, "kv_bytes": cache.memory()["device"].used}
    return logits, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0, help="first token of the text (%(default)s)")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens that are prefilled (%(default)s)")
    parser.add_argument("--positions", type=int, default=2048, help="tokens that are decoded after it (%(default)s)")
    parser.add_argument("--only", default="", help="configs whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy.json")
    options = parser.parse_args()

    model, tokenizer = models.load_model()
    end = options.start + options.prefix + options.positions
    ids = torch.tensor([tasks.encode(tokenizer, tasks.long_text())[options.start : end]])
    dense, cost = read(model, ids, options.prefix, SparseConfig.dense(), "dense")
    results = {"dense": cost}
    for name, sparse in configs(model.config.num_hidden_layers, model.config.num_key_value_heads).items():
        if options.only in name:
            logits, cost = read(model, ids, options.prefix, sparse, name)
            results[name] = compare(dense, logits) | cost
            figures = "  ".join(f"{key} {value:.4g}" for key, value in results[name].items())
            print(f"{name:50} {figures}", flush=True)
            write(options, results)


def write(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    """After every config, so that a long run can be cut short."""
    head = {"lserve_ext": __version__, "torch": torch.__version__, "model": "SmolLM2-135M-Instruct, float32"}
    head |= {"machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    head |= {"threads": torch.get_num_threads(), "start": options.start}
    head |= {"prefix": options.prefix, "positions": options.positions}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
