"""How a decode step of one layer grows with its context: dense, streaming heads only, lists only, and half of each.

    python bench/growth.py                         4K to 256K tokens, Llama-3-8B's heads, bfloat16
    python bench/growth.py --save                  bench/results/growth-<machine>.json, and a picture beside it

A layer is filled with random keys and values, and decodes; what a step takes is the mean over the steps that share a
selection, the calls of Python included, and medians of these are compared. Before each step the same threads sum
memory that no cache holds, which leaves the caches cold and gives the rate that the limit is taken from: the time that
keys, values, scales and statistics take at it, where lists are read that were selected once in `reuse_interval` steps.
Beside them stands torch's SDPA over as many contiguous keys and values, and SDPA with the query heads of a group as
rows of one, which is the best that torch does.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lserve_ext import SparseConfig, __version__
from lserve_ext.blocks import empty_blocks
from lserve_ext.cache import LayerCache
from lserve_ext.doctor import table
from lserve_ext.machine import Machine
from lserve_ext.sequences import Sequences

HEADS, KV_HEADS, D = 32, 8, 128
COLD = 2**28
"""Bytes."""
CONFIGS = {
    "dense": (SparseConfig.dense(), 0),
    "dense, INT8": (SparseConfig.dense(kv_dtype="int8"), 0),
    "streaming (static)": (SparseConfig.lserve(streaming_heads=1.0), KV_HEADS),
    "lists (dynamic)": (SparseConfig.lserve(streaming_heads=None), 0),
    "lserve, half of each": (SparseConfig.lserve(), KV_HEADS // 2),
    "moments": (SparseConfig.moments(), 0),
}
"""Each with how many of the kv heads stream. Budgets are 4,096 tokens, the presets' own."""


def filled(config: SparseConfig, streaming: int, tokens: int, dtype: torch.dtype) -> LayerCache:
    """A layer that holds so many random tokens of one sequence."""
    heads = [head < streaming for head in range(KV_HEADS)]
    layer = LayerCache(config, heads, False, torch.empty(1, KV_HEADS, 0, D, dtype=dtype))
    P, pages = config.page_size, config.pages
    sealed = tokens // P - 1
    freed = max(pages.sink, tokens // P - pages.decode_window)
    batch = Sequences(pages, *(np.array([n]) for n in (tokens, sealed, freed)), pages.decode_window, tokens)
    page = np.arange(tokens // P + 1)
    past = (page >= pages.sink) & (page < freed)
    held = (page < sealed) & ~(np.array(heads)[:, None] & past)
    ids = np.full((1, KV_HEADS, len(page)), -1, np.int32)
    ids[0][held] = np.random.default_rng(0).permutation(int(held.sum()))
    state: dict[str, torch.Tensor] = {"table": torch.from_numpy(ids), "selection.age": torch.tensor(0)}
    for name, like in layer.pool.read(np.zeros(0, np.int32)).items():
        some = torch.randn(min(int(held.sum()), 64), *like.shape[1:])
        if name in ("stats", "moments"):
            some = some.sort(2).values  # min and max
        elif name == "scales":
            some = some.abs() / 100
        elif like.dtype == torch.uint8:
            some = torch.randint(0, 256, some.shape)
        state[f"pool.{name}"] = some.to(like.dtype).repeat(-(-int(held.sum()) // len(some)), *[1] * (some.dim() - 1))
        state[f"pool.{name}"] = state[f"pool.{name}"][: int(held.sum())]
    for name in ("residual_k", "residual_v"):
        state[name] = torch.randn(1, KV_HEADS, 2 * P, D).to(dtype)
    layer.restore(state, batch)
    return layer


def timed(step: Callable[[], Any], count: int, machine: Machine) -> tuple[list[float], float]:
    """Seconds of each step, and bytes a second of sums in between."""
    steps, rates = [], []
    for _ in range(count):
        rates.append(machine.bandwidth())
        steps.append(machine.seconds(step))
    return steps, median(rates)


def measure(layer: LayerCache, rounds: int, machine: Machine) -> dict[str, float]:
    q, k, v = (torch.randn(1, heads, D).to(layer.dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    size = layer.config.reuse_interval
    steps, rate = timed(lambda: layer.attend(q, k, v, [1], D**-0.5), (rounds + 1) * size, machine)
    shared = [mean(steps[i : i + size]) for i in range(size, len(steps), size)]  # the first ones warm up
    attended, read = layer.attended()[0], layer.read_bytes()
    found = {"step_us": median(shared) * 1e6, "limit_us": read / rate * 1e6, "bytes": read}
    return found | {"attended": attended, "selecting_us": median(steps[size::size]) * 1e6}


def measure_peers(tokens: int, dtype: torch.dtype, rounds: int, machine: Machine) -> dict[str, dict[str, float]]:
    q = torch.randn(1, HEADS, 1, D).to(dtype)
    # In memory as caches have it.
    k, v = (empty_blocks(torch.empty(0, KV_HEADS, tokens, D, dtype=dtype), 1).normal_() for _ in "kv")
    found = {}
    for name, step in {
        "SDPA": lambda: sdpa(q, k, v, enable_gqa=True),
        "SDPA grouped": lambda: sdpa(q.view(1, KV_HEADS, -1, D), k, v),
    }.items():
        steps, rate = timed(step, rounds + 1, machine)
        read = k.nbytes + v.nbytes
        found[name] = {"step_us": median(steps[1:]) * 1e6, "limit_us": read / rate * 1e6, "bytes": read}
    return found


def slope(results: list[dict[str, Any]], least: int) -> float:
    """Microseconds for each 1,024 tokens more, by least squares over contexts of at least so many."""
    points = [(r["tokens"] / 1024, r["step_us"]) for r in results if r["tokens"] >= least]
    if len(points) < 2:
        return float("nan")
    x, y = (np.array(values) for values in zip(*points, strict=True))
    return float(np.polyfit(x, y, 1)[0])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(figsize=(7, 5))
    for name in dict.fromkeys(r["config"] for r in results):
        rows = [r for r in results if r["config"] == name]
        (line,) = axes.loglog([r["tokens"] for r in rows], [r["step_us"] / 1e3 for r in rows], "o-", label=name)
        axes.loglog([r["tokens"] for r in rows], [r["limit_us"] / 1e3 for r in rows], ":", color=line.get_color())
    axes.set(xlabel="tokens of context", ylabel="ms a layer and step (dotted: the limit)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plt.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << n for n in range(12, 19)], help="of context")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7, help="selections that a median is taken of (%(default)s)")
    parser.add_argument("--only", default="", help="configs whose name contains this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--save", action="store_true", help="write to bench/results, with a picture")
    options = parser.parse_args()

    torch.manual_seed(0)
    machine, results = Machine(COLD, "cpu"), []
    dtype = getattr(torch, options.dtype)
    for tokens in options.tokens:
        for name, found in measure_peers(tokens, dtype, options.rounds, machine).items():
            results.append({"config": name, "tokens": tokens} | found)
        for name, (config, streaming) in CONFIGS.items():
            if options.only in name:
                layer = filled(config, streaming, tokens, dtype)
                results.append({"config": name, "tokens": tokens} | measure(layer, options.rounds, machine))
                del layer
    names = list(dict.fromkeys(r["config"] for r in results))
    rows = [
        ["ms a layer and step, and of the limit", *(f"{tokens:,}" for tokens in options.tokens), "us a 1K tokens more"]
    ]
    for name in names:
        of = [r for r in results if r["config"] == name]
        cells = [f"{r['step_us'] / 1e3:.3f} ({r['limit_us'] / r['step_us']:.0%})" for r in of]
        rows.append([name, *cells, f"{slope(of, 32768):.2f}"])
    print(table(rows))
    rows = [["times as fast as SDPA, SDPA grouped", *(f"{tokens:,}" for tokens in options.tokens)]]
    took = {(r["config"], r["tokens"]): r["step_us"] for r in results}
    for name in names[2:]:
        speeds = ([took[peer, n] / took[name, n] for peer in names[:2]] for n in options.tokens)
        rows.append([name, *(f"{one:.3g}, {grouped:.3g}" for one, grouped in speeds)])
    print(table(rows))
    head = {"lserve_ext": __version__, "torch": torch.__version__, "dtype": options.dtype, "shape": "llama-3-8b"}
    head |= {"machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    head |= {"threads": torch.get_num_threads()}
    out = Path(__file__).parent / "results" / f"growth-{platform.machine()}.json" if options.save else options.out
    if out is not None:
        out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n", encoding="utf-8")
    if options.save:
        plot(results, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
