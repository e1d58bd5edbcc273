"""Decoding on the tiers: what the cost model says beside what is measured, and two ways to do without it.

    python bench/tiers.py                     five minutes
    python bench/tiers.py --save              bench/results/tiers-<machine>.json

The machine is measured first (`lserve profile`); predictions come from that profile and the model's config alone. Then
one text is read by all runs, which take turns at each step. `all`: every page lies on the device. `tenth`: a tenth of
the KV does, the rest in host memory. `disk`: a tenth on the device, a third in host memory, all on a disk past the page
cache. `replayed` is what a trace of the same text says that so many slots fetch (lists of pages): the same to the byte.

- static offloading: dense attention with the same limits, so that every page that does not stay is fetched each step.
- paging: dense attention over sequences that fit on the device; where they grow beyond it, the last one is dropped, and
  prefilled anew when there is room (`schedule.Paper.paging`, in earnest). `tiers` runs them all at once with the same
  bytes on the device.

At last a model with random weights and as many kv heads as query heads, dense, with a quarter of its KV on the device
and a quarter in host memory: what lies on the disk is KV, or the layers' inputs, from which KV is recomputed.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from placement import Decoding
from torch import Tensor
from tqdm import tqdm

from lserve_ext import SparseCache, SparseConfig, __version__, models
from lserve_ext.eval import tasks
from lserve_ext.eval.generate import prefill
from lserve_ext.hf import cache_argument
from lserve_ext.machine import COLD, Machine, Profile, measure
from lserve_ext.plan import Model, Plan
from lserve_ext.trace import Trace, moved_bytes

WARM_UP = 8
WHERE = ("all", "tenth", "disk")


def limited(config: SparseConfig, plan: Plan, context: int, where: str, folder: str) -> SparseConfig:
    """The config with the limits of a run: shares of the bytes that its pages take."""
    held = plan.held(context) * plan.page_bytes
    if where == "all":
        return config
    device = {"device_bytes": max(held // 10, plan.page_bytes * (context // config.page_size + 1))}
    return config.replace(**device, **({} if where == "tenth" else {"host_bytes": held // 3, "disk_dir": folder}))


class Run(Decoding):
    """Decoding of one text with one config."""

    def __init__(self, model: Any, config: SparseConfig, plan: Plan, name: str, where: str, context: int) -> None:
        super().__init__(model, config, WARM_UP)
        self.plan, self.name, self.where, self.context = plan, name, where, context
        self.replayed: float | None = None
        """Bytes a step that a trace of the same text says."""

    def result(self) -> dict[str, Any]:
        found, moved = self.plan.predict(self.context), self.cache.traffic() - self.before
        steps, page = len(self.steps) - WARM_UP, self.plan.page_bytes
        held = {tier: memory.used for tier, memory in self.cache.memory().items()}
        took = median(self.steps[WARM_UP:])
        fetched = moved.fetched + moved.rows / self.plan.config.page_size
        return {
            "run": self.name, "where": self.where, "context": self.context, "phase": found.phase,
            "step_ms": took * 1e3, "predicted_ms": found.step * 1e3, "predicted_of_measured": found.step / took,
            "binds": found.binds, "bytes": held, "predicted_bytes": found.bytes,
            "fetched_bytes": fetched * page / steps, "predicted_fetched": found.moved.get("fetch", 0.0),
            "replayed_fetched": self.replayed,
            "loaded_bytes": moved.loaded * page / steps, "predicted_loaded": found.moved.get("load", 0.0),
        }  # fmt: skip


def traced(model: Any, config: SparseConfig, ids: Tensor, context: int) -> Trace:
    """What a run without limits wants, of the same tokens in the same parts."""
    cache, trace = SparseCache(model.config, config), Trace(model.config.num_hidden_layers)
    with trace:
        prefill(model, ids[:, :context], cache, 512)
        for token in ids[:, context:].split(1, 1):
            model(token, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    return trace


@torch.inference_mode()
def one_sequence(model: Any, ids: Tensor, profile: Profile, folder: str, options: Any) -> list[dict[str, Any]]:
    """Every config at every context, all of it, a tenth and on a disk."""
    shape, machine, results = Model.from_config(model.config, model.dtype), Machine(COLD["cpu"], "cpu"), []
    configs = {
        "dense": SparseConfig.dense(kv_dtype="int8"),
        "lserve": SparseConfig.lserve(streaming_heads=None, budget_tokens=1024),
        "alisa": SparseConfig.alisa(),
    }
    for context in options.tokens:
        runs = []
        for name, config in configs.items():
            whole = Plan(shape, config, profile)
            for where in WHERE:
                now = limited(config, whole, context, where, folder)
                runs.append(Run(model, now, Plan(shape, now, profile), name, where, context))
        for run in tqdm(runs, desc=f"prefill {context}"):
            prefill(model, ids[:, :context], run.cache, 512)
        for i in tqdm(range(context, context + WARM_UP + options.steps), desc="decode"):
            for run in runs:
                run.step(machine, ids[:, i : i + 1])
        for name, config in configs.items():
            if config.unit == "page":
                trace = traced(model, config, ids[:, : context + WARM_UP + options.steps], context)
                for run in runs:
                    if run.name == name and run.where != "all":
                        moved = trace.replay((run.plan.config.device_bytes or 0) // run.plan.page_bytes)
                        run.replayed = moved_bytes(moved[-options.steps :], run.plan.page_bytes)
        results += [run.result() for run in runs]
    return results


@torch.inference_mode()
def many_sequences(model: Any, ids: Tensor, profile: Profile, options: Any) -> dict[str, Any]:
    """So many prompts that the device does not hold what they grow to: seconds of all, tiers and paging."""
    batch, prompt, new = options.batch, options.prompt, options.new
    shape, dense = Model.from_config(model.config, model.dtype), SparseConfig.dense(kv_dtype="int8")
    texts = torch.cat([ids[:, i * 97 : i * 97 + prompt] for i in range(batch)])
    plan = Plan(shape, dense, profile)
    room = batch * (prompt + new // 4)  # tokens on the device
    step = {"use_cache": True, "logits_to_keep": 1}

    def forward(cache: SparseCache, tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens, **cache_argument(model, cache), **step).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def read(cache: SparseCache, tokens: Tensor) -> Tensor:
        for part in tokens.split(512, 1):
            last = forward(cache, part)
        return last

    lserve = SparseConfig.lserve(streaming_heads=None, budget_tokens=1024)
    limit = room * shape.layers * shape.kv_heads * plan.page_bytes // dense.page_size
    start = time.perf_counter()
    cache = SparseCache(model.config, lserve.replace(device_bytes=limit))
    token = read(cache, texts)
    prefilled = time.perf_counter()
    for _ in tqdm(range(new), desc="tiers"):
        token = forward(cache, token)
    tiers = {"prefill_s": prefilled - start, "decode_s": time.perf_counter() - prefilled}

    start, again, decode = time.perf_counter(), 0.0, 0.0
    held = [texts[b : b + 1] for b in range(batch)]  # tokens of each sequence
    waiting, running, caches = list(range(batch)), list[int](), dict[int, SparseCache]()
    predicted = 0.0  # of what is prefilled again
    bar = tqdm(total=batch * new, desc="paging")
    while waiting or running:
        while waiting and sum(held[b].shape[1] + 1 for b in [*running, waiting[0]]) <= room:
            b = waiting.pop(0)
            begin = time.perf_counter()
            caches[b] = SparseCache(model.config, dense)
            last = read(caches[b], held[b])
            is_again = held[b].shape[1] > prompt
            again += (time.perf_counter() - begin) * is_again
            predicted += Plan(shape, dense, profile).prefix(held[b].shape[1])["ids"] * is_again
            running.append(b)
            held[b] = torch.cat([held[b], last], 1) if held[b].shape[1] == prompt else held[b]
        while sum(held[b].shape[1] + 1 for b in running) > room:
            waiting.insert(0, running.pop())
            del caches[waiting[0]]
        begin = time.perf_counter()
        for b in list(running):
            held[b] = torch.cat([held[b], forward(caches[b], held[b][:, -1:])], 1)
            bar.update()
            if held[b].shape[1] > prompt + new:
                running.remove(b)
                del caches[b]
        decode += time.perf_counter() - begin
    total = time.perf_counter() - start
    paging = {
        "prefill_s": total - decode - again,
        "prefill_again_s": again,
        "predicted_again_s": predicted,
        "decode_s": decode,
    }
    after = paging["decode_s"] + again
    return {"batch": batch, "prompt": prompt, "new": new, "device_bytes": limit, "tiers": tiers, "paging": paging,
            "paging_over_tiers": after / tiers["decode_s"]}  # fmt: skip


@torch.inference_mode()
def recomputation(profile: Profile, folder: str, options: Any) -> list[dict[str, Any]]:
    """Steps where KV is loaded, and where it is recomputed."""
    from transformers import LlamaConfig, LlamaForCausalLM  # which would take kernels.py beside this file for a package

    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 1000}
    made = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=8192, **shape)
    model: Any = LlamaForCausalLM._from_config(made, attn_implementation="lserve").train(False)
    seen = Model.from_config(made, torch.float32, "random, MHA")
    machine, context, dense = Machine(COLD["cpu"], "cpu"), options.tokens[0], SparseConfig.dense()
    held = Plan(seen, dense, profile).held(context) * Plan(seen, dense, profile).page_bytes
    limits: dict[str, Any] = {"device_bytes": held // 4, "host_bytes": held // 4, "disk_dir": folder}
    ids = torch.randint(0, 1000, (1, context + WARM_UP + options.steps), generator=torch.Generator().manual_seed(0))
    runs = []
    for name, recompute in (("loaded", False), ("recomputed", True)):
        config = dense.replace(recompute=recompute, **limits)
        run = Run(model, config, Plan(seen, config, profile), name, "disk", context)
        prefill(model, ids[:, :context], run.cache, 512)
        runs.append(run)
    for i in tqdm(range(context, ids.shape[1]), desc="recompute"):
        for run in runs:
            run.step(machine, ids[:, i : i + 1])
    return [run.result() | {"choice": run.plan.choice.why} for run in runs]


def show(results: list[dict[str, Any]]) -> None:
    print("\nrun      where  context  phase  measured ms  predicted ms  ratio  binds       MB fetched, predicted,"
          "  replayed   loaded, predicted")  # fmt: skip
    for r in results:
        moved = [r[name] / 1e6 for name in ("fetched_bytes", "predicted_fetched", "loaded_bytes", "predicted_loaded")]
        replayed = "-" if r["replayed_fetched"] is None else f"{r['replayed_fetched'] / 1e6:.2f}"
        print(f"{r['run']:9}{r['where']:6}{r['context']:>8}{r['phase']:>7}{r['step_ms']:>13.1f}{r['predicted_ms']:>14.1f}"
              f"{r['predicted_of_measured']:>7.2f}  {r['binds']:10}{moved[0]:>12.2f}{moved[1]:>11.2f}"
              f"{replayed:>10}{moved[2]:>10.2f}{moved[3]:>11.2f}")  # fmt: skip
    errors = [abs(r["predicted_of_measured"] - 1) for r in results]
    print(f"\nmedian error of {len(errors)} predictions: {median(errors):.0%}")
    for context in dict.fromkeys(r["context"] for r in results):
        step = {(r["run"], r["where"]): r["step_ms"] for r in results if r["context"] == context}
        ratios = ", ".join(f"{w} {step['dense', w] / step['lserve', w]:.1f}x" for w in ("tenth", "disk"))
        print(f"{context} tokens: lserve over static offloading (dense, same limits): {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 6000], help="of context")
    parser.add_argument("--steps", type=int, default=24, help="decode steps that count")
    parser.add_argument("--batch", type=int, default=4, help="sequences that compete for the device")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of each of them")
    parser.add_argument("--new", type=int, default=128, help="tokens that each of them generates")
    parser.add_argument("--disk", type=Path, help="a folder on the disk to use; by default where temporary files lie")
    parser.add_argument("--model", help="folder or hub name; by default SmolLM2-135M-Instruct")
    parser.add_argument(
        "--machine", help="a profile from before, as of `lserve plan`; by default the machine is measured"
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/tiers-<machine>.json")
    parser.add_argument("--out", type=Path, help="write this file")
    options = parser.parse_args()
    model, tokenizer = models.load_model(options.model, dtype=torch.float32)
    ids = torch.tensor([tasks.encode(tokenizer, tasks.long_text())])
    head = {"lserve_ext": __version__, "torch": torch.__version__, "machine": platform.machine(),
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
            "model": options.model or "SmolLM2-135M-Instruct"}  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in head.items()))
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        if options.machine:
            profile = Profile.load(options.machine)
        else:
            profile = measure(platform.machine(), folder, lambda what: print(f"measuring {what}", flush=True))
        results = one_sequence(model, ids, profile, folder, options)
        again = recomputation(profile, folder, options)
    show(results)
    for r in again:
        print(f"MHA, {r['run']:11}{r['step_ms']:8.1f} ms, predicted {r['predicted_ms']:8.1f}   {r['choice']}")
    many = many_sequences(model, ids, profile, options)
    print(json.dumps(many, indent=1))
    name = f"tiers-{platform.machine()}.json"
    out = options.out or (Path(__file__).parent / "results" / name if options.save else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = head | {"profile": profile.to_dict(), "results": results, "recompute": again, "many": many}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
