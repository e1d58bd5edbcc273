"""Decoding end to end: a model's step with transformers' caches and with ours, interleaved in one run.

    python bench/generate.py --quick                  256 and 1,024 tokens of context, eager, in a minute or two
    python bench/generate.py --full --save            bench/results/generate-<machine>.json and a plot beside it
    python bench/generate.py --tokens 4096 --only lserve --compile
    python bench/generate.py --device cuda --random llama-3-8b --tokens 32768 --chunk 4096 --only graph

Every run reads the same text: a prompt in chunks, whose time is that to the first token, then one token at a time.
Runs take turns at each chunk and each step, so that what else the machine does meets all of them; medians count.
`Dynamic` and `Static` are transformers' caches with SDPA, `FP8` its QuantizedCache of 8 bits, and `llama.cpp`, where
llama-cpp-python is installed, has the same float32 weights and FlashAttention over keys and values of 16 bits or of
q8_0. `reserved` is ours with `max_tokens`; `compiled` is
torch.compile of the model's forward (inductor, fullgraph), and `graph`, on a GPU, CUDA graphs of it as it is. With
--random, weights and text are random, on which speed does not depend, and so is which half of the heads streams. The
limit is the time in which a step's bytes can be read at all, by the bandwidth measured in the same run: all weights,
and the keys and values that are attended.

Where a step's time goes is measured in steps of their own: `ops` are the calls of kernels, `cache` what is around them
in cache and attention function, `model` the rest.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import llama_peer
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

from lserve_ext import HeadPattern, SparseCache, SparseConfig, __version__, models, ops
from lserve_ext.eval import tasks
from lserve_ext.hf import cache_argument, interface
from lserve_ext.machine import COLD, Machine

WARM_UP = 5
PRESETS = {
    "dense": SparseConfig.dense(),
    "int8": SparseConfig.dense(kv_dtype="int8"),
    "lserve": SparseConfig.lserve(budget_tokens=1024, streaming_heads="smollm2-135m-instruct"),
    "alisa": SparseConfig.alisa(),
}
COMPILED = ("dense", "lserve")
QUICK: dict[str, Any] = {"tokens": [256, 1024], "dtypes": ["float32"], "steps": 24}
FULL: dict[str, Any] = {
    "tokens": [256, 1024, 4096, 7900],
    "dtypes": ["float32", "bfloat16"],
    "steps": 40,
    "compile": True,
}


class Graphed:
    """A step of one token as CUDA graphs, one for each age of a selection; the first steps are made without, as a
    warm-up."""

    def __init__(self, model: Any, ages: int) -> None:
        self.model, self.ages, self.steps, self.graphs = model, ages, 0, list[torch.cuda.CUDAGraph]()
        self.stream = torch.cuda.Stream()
        self.given: dict[str, Tensor] = {}
        self.out: Any = None

    def __call__(self, ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
        now = {"input_ids": ids, "position_ids": position_ids}
        self.given = self.given or {name: x.clone() for name, x in now.items()}
        for name, x in now.items():
            self.given[name].copy_(x)
        if self.steps < self.ages:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.out = self.model(**self.given, **options)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            while len(self.graphs) < self.ages:
                self.graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(self.graphs[-1]):
                    self.out = self.model(**self.given, **options)
            self.graphs[self.steps % self.ages].replay()
        self.steps += 1
        return self.out


@dataclass
class Run:
    """One cache on its way through the text."""

    name: str
    model: Any
    cache: Any
    forward: Callable[..., Any]
    chunks: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def step(self, machine: Machine, ids: Tensor, position: int, prefill: bool = False) -> float:
        """Seconds of one forward."""
        positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
        options = cache_argument(self.model, self.cache) | {"position_ids": positions, "use_cache": True}
        return machine.seconds(lambda: (self.model if prefill else self.forward)(ids, **options, logits_to_keep=1))


class LlamaRun(Run):
    def step(self, machine: Machine, ids: Tensor, position: int, prefill: bool = False) -> float:
        return machine.seconds(lambda: self.cache.step(ids))


def runs(model: Any, sdpa: Any, presets: dict[str, SparseConfig], tokens: int, options: argparse.Namespace
         ) -> list[Run]:  # fmt: skip
    config, room = model.config, tokens + 128

    def compiled(which: Any) -> Callable[..., Any]:
        step: Callable[..., Any] = torch.compile(which.forward, fullgraph=True, dynamic=False)
        return step

    def static() -> StaticCache:
        return StaticCache(config=config, max_cache_len=room)

    found = [Run("Dynamic", sdpa, DynamicCache(config=config), sdpa), Run("Static", sdpa, static(), sdpa)]
    with suppress(ValueError):  # transformers has no such backend yet
        found.append(Run("FP8", sdpa, QuantizedCache("fp8", config=config), sdpa))
    if options.device == "cpu" and not options.model and not options.random and model.dtype == torch.float32:
        for kv in ("f16", "q8_0") if any(word in "llama.cpp" for word in options.only) else ():
            with suppress(ImportError):
                peer = llama_peer.LlamaCpp(room, options.chunk, kv, torch.get_num_threads())
                found.append(LlamaRun(f"llama.cpp, {kv}", None, peer, peer.step))
    if options.compile:
        found.append(Run("Static, compiled", sdpa, static(), compiled(sdpa)))
    for name, preset in presets.items():
        reserved = preset.replace(max_tokens=room)
        found.append(Run(name, model, SparseCache(config, preset), model))
        found.append(Run(f"{name}, reserved", model, SparseCache(config, reserved), model))
        if options.compile and name in COMPILED:
            found.append(Run(f"{name}, compiled", model, SparseCache(config, reserved), compiled(model)))
        if model.device.type == "cuda":
            ages = preset.reuse_interval if preset.selects else 1
            found.append(Run(f"{name}, graph", model, SparseCache(config, reserved), Graphed(model, ages)))
    return [run for run in found if run.name == "Dynamic" or any(word in run.name for word in options.only)]


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Adds up the seconds in calls of ops and in attention with its cache."""
    spent = {"ops": 0.0, "cache": 0.0}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return call

    attention, update, call = interface.attention, SparseCache.update, ops._call
    mapping = interface.AttentionInterface._global_mapping
    try:
        mapping["lserve"] = clocked("cache", attention)
        SparseCache.update = clocked("cache", update)  # type: ignore[method-assign]
        ops._call = clocked("ops", call)
        yield spent
    finally:
        mapping["lserve"], SparseCache.update, ops._call = attention, update, call  # type: ignore[method-assign]
    spent["cache"] -= spent["ops"]


def attended_bytes(run: Run) -> int:
    """Keys and values that a step must read."""
    if isinstance(run.cache, SparseCache):
        some, all_ = run.cache.attended()
        pools = [layer.kv.kv for layer in run.cache.ours if layer.kv is not None]
        row = sum(2 * kv.k_pool.shape[2] * kv.k_pool.element_size() * kv.block_table.shape[1] for kv in pools)
        return int(row * run.cache.get_seq_length() * some / max(all_, 1))
    if isinstance(run.cache, llama_peer.LlamaCpp):
        return run.cache.read_bytes()
    found = 0
    for layer in run.cache.layers:
        quantised = getattr(layer, "_quantized_keys", None), getattr(layer, "_quantized_values", None)
        found += sum(x[0].nbytes for x in quantised if x is not None) + layer.keys.nbytes + layer.values.nbytes
    return found


@torch.inference_mode()
def measure(model: Any, sdpa: Any, presets: dict[str, SparseConfig], ids: Tensor, tokens: int,
            options: argparse.Namespace) -> list[dict[str, Any]]:  # fmt: skip
    found = runs(model, sdpa, presets, tokens, options)
    machine, rates = Machine(COLD[options.device], options.device), list[float]()
    for first in tqdm(range(0, tokens, options.chunk), desc=f"{tokens} tokens: prefill"):
        part = ids[:, first : min(first + options.chunk, tokens)]
        for run in found:
            run.chunks.append(run.step(machine, part, first, prefill=True))
    for i in tqdm(range(options.steps), desc=f"{tokens} tokens: decode"):
        rates.append(machine.bandwidth())
        for run in found:
            run.steps.append(run.step(machine, ids[:, tokens + i : tokens + i + 1], tokens + i))
    for i in range(options.steps, options.steps + 8):
        for run in found:
            if run.forward is model:
                with timed() as spent:
                    whole = run.step(machine, ids[:, tokens + i : tokens + i + 1], tokens + i)
                run.parts.append(spent | {"model": whole - sum(spent.values())})
    bandwidth = median(rates)
    weights = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values())
    base, results = median(found[0].steps[WARM_UP:]), []
    for run in found:
        took, read = median(run.steps[WARM_UP:]), weights + attended_bytes(run)
        result = {"run": run.name, "tokens": tokens, "dtype": str(model.dtype).removeprefix("torch.")}
        result |= {"prefill_s": sum(run.chunks), "step_ms": took * 1e3, "speedup": base / took}
        result |= {"limit_ms": read / bandwidth * 1e3, "share": read / bandwidth / took, "bytes": read}
        result |= (
            {f"{name}_ms": median(part[name] for part in run.parts) * 1e3 for name in run.parts[0]} if run.parts else {}
        )
        results.append(result)
    return results


def show(results: list[dict[str, Any]]) -> None:
    print(f"\n{results[0]['tokens']} tokens, {results[0]['dtype']}")
    print(f"{'':20}{'prefill s':>10}{'step ms':>9}{'speedup':>9}{'limit ms':>10}{'share':>7}   model + cache + ops, ms")
    for r in results:
        parts = " + ".join(f"{r[f'{name}_ms']:.1f}" for name in ("model", "cache", "ops")) if "ops_ms" in r else ""
        print(f"{r['run']:20}{r['prefill_s']:>10.2f}{r['step_ms']:>9.1f}{r['speedup']:>8.2f}x{r['limit_ms']:>10.1f}"
              f"{r['share']:>7.0%}   {parts}", flush=True)  # fmt: skip


def plot(head: dict[str, Any], results: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a step over tokens of context, a panel a dtype."""
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    _, panels = plt.subplots(1, len(dtypes), figsize=(7 * len(dtypes), 5), squeeze=False)
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        rows = [r for r in results if r["dtype"] == dtype]
        for i, name in enumerate(dict.fromkeys(r["run"] for r in rows)):
            points = [(r["tokens"], r["step_ms"]) for r in rows if r["run"] == name]
            style = "--" if "reserved" in name else ":" if "compiled" in name else "-"
            axes.plot(*zip(*points, strict=True), style, marker="osD^v<>ph*"[i % 10], label=name)
        axes.set(
            xscale="log", xlabel="tokens of context", ylabel="ms a step", title=f"{head['machine']}, {dtype}", ylim=0
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    plt.savefig(path, dpi=120, bbox_inches="tight")
    plt.close()


def random_model(shape: str, dtype: torch.dtype, device: str) -> tuple[Any, dict[str, SparseConfig]]:
    """A model of one of the package's shapes, and presets with a random half of its heads streaming."""
    fields = json.loads((resources.files("lserve_ext") / "data" / "models" / f"{shape}.json").read_text("utf-8"))
    config = AutoConfig.for_model(**fields | {"max_position_embeddings": 2**20})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="lserve").train(False)
    heads = HeadPattern(torch.rand(config.num_hidden_layers, config.num_key_value_heads).tolist(), 0.5)
    lserve, moments = SparseConfig.lserve(streaming_heads=heads), SparseConfig.preset("moments")
    return model, {**PRESETS, "lserve": lserve, "moments": moments}


def load(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any, dict[str, SparseConfig], Tensor]:
    """A model for our caches, the same for transformers', presets, and a text."""
    if options.random:
        model, presets = random_model(options.random, dtype, options.device)
        ids = torch.randint(model.config.vocab_size, (1, max(options.tokens) + 128), device=options.device)
    else:
        model, tokenizer = models.load_model(options.model, dtype=dtype)
        model, presets = model.to(options.device), PRESETS
        ids = torch.tensor([tasks.encode(tokenizer, tasks.long_text())], device=options.device)
    sdpa = copy.deepcopy(model, {id(x): x for x in model.parameters()})
    sdpa.set_attn_implementation("sdpa")
    return model, sdpa, presets, ids


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"defaults: {QUICK}")
    add("--full", action="store_true", help=f"defaults: {FULL}")
    add("--tokens", nargs="+", type=int, default=[1024, 4096], help="of context")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    add("--steps", type=int, default=24, help="decode steps, of which medians are taken")
    add("--only", nargs="+", default=[""], help="runs whose name contains one of these, beside Dynamic")
    add("--compile", action="store_true", help="also torch.compile, which takes minutes")
    add("--model", help="folder or hub name; by default SmolLM2-135M-Instruct")
    add("--random", help="the name of a shape in lserve_ext/data/models: random weights")
    add("--chunk", type=int, default=512, help="tokens of the prompt at a time")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--save", action="store_true", help="write bench/results/generate-<machine>.json")
    add("--out", type=Path, help="write this file")
    first = parser.parse_args()
    parser.set_defaults(**QUICK if first.quick else FULL if first.full else {})
    if first.device == "cuda":
        parser.set_defaults(dtypes=["bfloat16"])
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch._dynamo.config.recompile_limit = 256  # every run and length has graphs of its own
    name = torch.cuda.get_device_name().replace(" ", "-") if options.device == "cuda" else platform.machine()
    head = {"lserve_ext": __version__, "torch": torch.__version__, "machine": name, "threads": torch.get_num_threads()}
    which = f"{options.random}, random weights" if options.random else options.model or "SmolLM2-135M-Instruct"
    head |= {"cpu": torch.backends.cpu.get_cpu_capability(), "model": which, "chunk": options.chunk}
    print("  ".join(f"{key} {value}" for key, value in head.items()))
    results: list[dict[str, Any]] = []
    out = options.out or (Path(__file__).parent / "results" / f"generate-{name}.json" if options.save else None)
    for dtype in options.dtypes:
        model, sdpa, presets, ids = load(options, getattr(torch, dtype))
        for tokens in options.tokens:
            results += (now := measure(model, sdpa, presets, ids, tokens, options))
            show(now)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n", encoding="utf-8")
                plot(head, results, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
