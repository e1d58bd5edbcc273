"""Decoding under vLLM: its own attention and the plugin's, which take turns step by step in one process.

Run with an environment that has vLLM (`make vllm-test` makes build/vllm):

    build/vllm/bin/python bench/serving.py --cells 1x1024 1x4096 1x7900 8x1024 --out bench/results/serving-x86_64.json
    build/vllm/bin/python bench/serving.py --shared --cells 8x4096 16x7900

With --shared, prompts differ in their last tokens only, as questions about one document do, and vLLM's prefix caching
holds the document once: so a batch of long prompts needs neither their memory nor the hours to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lserve_ext import models
from lserve_ext.eval import tasks

ENGINES: dict[str, dict[str, Any] | None] = {
    "vLLM": None,
    "dense": {"page_size": 32},
    "int8": {"page_size": 32, "kv_dtype": "int8"},
    "duo": {"preset": "duo", "page_size": 32, "streaming_heads": "smollm2-135m-instruct"},
    "lserve": {
        "preset": "lserve",
        "page_size": 32,
        "streaming_heads": "smollm2-135m-instruct",
        "budget_tokens": 1024,
    },
    "moments": {"preset": "moments", "budget_tokens": 1024},
}
WARM = 3
"""Steps that are not counted."""
OWN = 64
"""Last tokens of a prompt that no other prompt has, with --shared."""


def start(name: str, args: argparse.Namespace) -> Any:
    """An engine in this process."""
    from vllm import LLM

    given = ENGINES[name]
    return LLM(
        model=args.model,
        dtype=args.dtype,
        enforce_eager=not args.compile,
        max_model_len=max(tokens + new_tokens(batch, tokens, args) for batch, tokens in args.cells),
        max_num_seqs=args.batch,
        max_num_batched_tokens=args.chunk,
        enable_prefix_caching=args.shared,
        disable_log_stats=True,
        additional_config={} if given is None else {"lserve": given},
    )


def new_tokens(batch: int, tokens: int, args: argparse.Namespace) -> int:
    """So many that the first request still runs when the last one has been read and all steps are done."""
    read = tokens + batch * 2 * OWN if args.shared else batch * tokens
    return args.steps + WARM + batch + -(-read // args.chunk) + 8


def read(llm: Any, ids: list[list[int]], new: int) -> float:
    """Seconds until every prompt has its first token."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    begin, waiting = time.perf_counter(), set()
    for i, prompt in enumerate(ids):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        waiting.add(str(i))
    while waiting:
        waiting -= {output.request_id for output in llm.llm_engine.step() if output.outputs[0].token_ids}
    return time.perf_counter() - begin


def step(llm: Any) -> float:
    """Seconds of one decode step of all."""
    begin = time.perf_counter()
    llm.llm_engine.step()
    return time.perf_counter() - begin


def concurrency(llm: Any) -> float:
    """How many requests of the greatest length fit into vLLM's memory, by its own count."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config
    return float(get_max_concurrency_for_kv_cache_config(llm.llm_engine.vllm_config, config))


def held_bytes(llm: Any) -> int:
    """Of the blocks that requests hold now."""
    books = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    config, pool = books.kv_cache_config, books.block_pool
    used = config.num_blocks - 1 - pool.get_num_free_blocks()  # one is nobody's
    return int(used * config.kv_cache_tensors[0].size // config.num_blocks)


def measure(llms: dict[str, Any], ids: list[list[int]], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of every engine, milliseconds a step (median), seconds to the first tokens, and bytes of KV held in the end."""
    new = new_tokens(len(ids), len(ids[0]), args)
    first = {name: read(llm, ids, new) for name, llm in llms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in llms}
    for i in range(args.steps + WARM):
        for name, llm in llms.items():
            took = step(llm)
            if i >= WARM:
                seconds[name].append(took)
    held = {name: held_bytes(llm) for name, llm in llms.items()}
    for llm in llms.values():
        assert llm.llm_engine.get_num_unfinished_requests() == len(ids)
    for llm in llms.values():
        llm.llm_engine.abort_request([str(i) for i in range(len(ids))])
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    return {
        name: {"step_ms": 1e3 * statistics.median(of), "first_s": first[name], "held_bytes": held[name]}
        for name, of in seconds.items()
    }


def head_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a file of results says of where they come from."""
    return {
        "machine": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "vllm": __import__("vllm").__version__,
        "python": platform.python_version(),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "compiled": args.compile,
        "chunk": args.chunk,
        "engines": {name: ENGINES[name] for name in args.engines},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--cells", nargs="+", default=["1x1024", "1x4096"], help="prompts x their tokens")
    parser.add_argument("--chunk", type=int, default=512, help="tokens that are read at a time")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--shared", action="store_true", help="prompts about one document")
    parser.add_argument("--compile", action="store_true", help="vLLM's own compilation, for all engines")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cells = [tuple(map(int, cell.split("x"))) for cell in args.cells]
    args.batch = max(batch for batch, _ in args.cells)
    args.model = args.model or str(models.converted(models.smollm2_path()))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB an engine
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = tasks.encode(tokenizer, tasks.long_text())
    llms = {name: start(name, args) for name in args.engines}
    head = head_of(args) | {"threads": torch.get_num_threads(), "shared": args.shared, "steps": args.steps}
    # vLLM's own figure: requests of the model's length that fit at a time.
    room = {name: concurrency(llm) for name, llm in llms.items()}
    print("fit at a time:", ", ".join(f"{name} {of:.1f}" for name, of in room.items()))
    head["fit"] = room
    results = []
    for batch, tokens in args.cells:
        ids = [text[i * tokens : (i + 1) * tokens] for i in range(batch)]
        if args.shared:
            ids = [text[: tokens - OWN] + text[tokens + i * OWN : tokens + (i + 1) * OWN] for i in range(batch)]
        found = measure(llms, ids, args)
        stock = found[args.engines[0]]["step_ms"]
        for name, figures in found.items():
            results.append({"engine": name, "batch": batch, "tokens": tokens, **figures})
            print(
                f"{batch:3d} x {tokens:6,d}  {name:8s} {figures['step_ms']:8.1f} ms a step "
                f"({stock / figures['step_ms']:.2f}x), first tokens after {figures['first_s']:.1f} s, "
                f"{figures['held_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
        if args.out:
            args.out.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
