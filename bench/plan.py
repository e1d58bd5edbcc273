"""What the cost model says, drawn: contexts on a GPU, and ALISA's published figures beside those of its schedules.

    python bench/plan.py                      a minute, on any machine: nothing is measured
    python bench/plan.py --save               bench/results/plan.json and plan.png

Machines are those that come with the package; their figures are nominal. ALISA (arXiv 2403.17312) compares with FlexGen
and vLLM on a V100 with a link of 20 GB/s and on an H100, prompts of 128 tokens and 512 to generate. Assumptions: KV
takes what the weights leave of the device; a step reads weights and KV at 80% of the memory's bandwidth and overlaps
nothing with transfers; FlexGen keeps one split for the whole run and attends what lies in host memory on the CPU; 80%
of tokens are left out; a layer's inputs lie in host memory for recomputation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lserve_ext import SparseConfig
from lserve_ext.machine import Figure, Profile
from lserve_ext.plan import Model, Plan
from lserve_ext.schedule import METHODS, Paper, Schedule, Workload, search, seconds

BATCHES = (4, 8, 16, 32, 64)
MACHINES = {"opt-6.7b": "v100-20gbs", "opt-13b": "v100-20gbs", "llama-7b": "v100-20gbs", "llama-13b": "v100-20gbs",
            "opt-30b": "h100-pcie5", "llama-33b": "h100-pcie5"}  # fmt: skip


def contexts(model: str, machine: str, batch: int) -> dict[str, Any]:
    """Steps and tokens a second over contexts: dense and sparse, on the device alone and with tiers."""
    shape, profile = Model.load(model), Profile.load(machine)
    configs = {"dense": SparseConfig.dense(), "lserve": SparseConfig.lserve()}
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, config in configs.items():
        for tiers in (False, True):
            plan = Plan(shape, config, profile, tiers=tiers)
            found = [plan.predict(1 << n, batch) for n in range(12, 21)]
            lines[name + ", tiers" * tiers] = [
                {"context": p.context, "rate": p.rate, "step_ms": p.step * 1e3, "phase": p.phase, "binds": p.binds,
                 "alpha": p.alpha, "bytes": p.bytes, "seconds": p.seconds}
                for p in found
            ]  # fmt: skip
    lserve = Plan(shape, configs["lserve"], profile)
    budget = lserve.others * configs["lserve"].budget.picks * lserve.page_bytes * batch  # type: ignore[operator]
    twice = Plan(shape, configs["lserve"].replace(device_bytes=2 * budget), profile)
    loss = twice.predict(1 << 15, batch).rate / lserve.predict(1 << 15, batch).rate
    first = next(n for n in range(1 << 7, 1 << 20, 1 << 7) if _faster(shape, profile, n, batch))
    return {
        "model": model, "machine": machine, "batch": batch, "switches": lserve.switches(batch), "lines": lines,
        "crossover": first, "with_slots_of_without": loss,
    }  # fmt: skip


def _faster(shape: Model, profile: Profile, context: int, batch: int) -> bool:
    """Whether lserve is faster than dense attention, all on the device."""
    rates = [Plan(shape, config, profile).predict(context, batch).rate
             for config in (SparseConfig.lserve(), SparseConfig.dense())]  # fmt: skip
    return rates[0] > rates[1]


def steps(model: str, machine: str, work: Workload, host_bytes: float) -> dict[str, Any]:
    """Every step of a batch under ALISA's schedule, with so little host memory that all phases come."""
    profile = Profile.load(machine)
    figures = {**profile.figures, "host_bytes": Figure("bytes", "nominal", ((0, host_bytes),), "for this figure")}
    paper = Paper(Model.load(model, torch.float16), dataclasses.replace(profile, figures=figures))
    costs = paper.costs(work, swa=True)
    found = search(costs)
    assert found is not None
    return {"model": model, "machine": machine, "work": dataclasses.asdict(work), "host_bytes": host_bytes,
            "schedule": dataclasses.asdict(found), "phases": [found.phase(i) for i in range(costs.steps)],
            "step_ms": (seconds(costs, found) * 1e3).tolist()}  # fmt: skip


def batches(model: str, machine: str) -> dict[str, Any]:
    """Throughput over batches, ALISA's ideas added one at a time."""
    shape, profile = Model.load(model, torch.float16), Profile.load(machine)
    paper, int8 = Paper(shape, profile), Paper(shape, profile, kv_bits=8)
    rates: dict[str, list[float]] = {method: [] for method in (*METHODS, "scheduled, INT8")}
    for batch in BATCHES:
        work = Workload(batch, 128, 512)
        for method in METHODS:
            rates[method].append(paper.throughput(work, method))
        rates["scheduled, INT8"].append(int8.throughput(work, "scheduled"))
    return {"model": model, "machine": machine, "batches": BATCHES, "rates": rates}


def alisa(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Published beside simulated, as rows."""
    tight = []  # where KV does not fit, so that there is something to schedule
    for case in found:
        for i, _ in enumerate(case["batches"]):
            rates = {method: values[i] for method, values in case["rates"].items()}
            if rates["static"] < 0.9 * rates["paging"] and rates["paging"] > 0:
                peers = ("static, CPU attends", "static", "paging")
                tight.append([rates["scheduled, INT8"] / rates[peer] for peer in peers])
    attends, static, paging = zip(*tight, strict=True)
    loads = f"{min(static):.1f}x to {max(static):.1f}x if the device attends what it loads"
    rows = [
        {"what": "over static offloading (FlexGen)", "published": "1.4x to 3.0x",
         "simulated": f"{min(attends):.1f}x to {max(attends):.1f}x; {loads}"},
        {"what": "over keep-or-recompute paging (vLLM)", "published": "up to 1.9x",
         "simulated": f"up to {max(paging):.1f}x"},
    ]  # fmt: skip
    h100 = Paper(Model.load("opt-30b", torch.float16), Profile.load("h100-pcie5"))
    gains = []
    for batch in (32, 64):
        costs = h100.costs(Workload(batch, 128, 512), swa=True)
        best = search(costs)
        assert best is not None
        loaded = dataclasses.replace(best, beta=0.0)
        gains.append(float(seconds(costs, loaded).sum() / seconds(costs, best).sum()))
    rows.append({"what": "recomputation, OPT-30B", "published": "1.2x to 1.3x",
                 "simulated": " and ".join(f"{gain:.2f}x" for gain in gains) + " at batch 32 and 64"})  # fmt: skip
    v100 = Paper(Model.load("opt-6.7b", torch.float16), Profile.load("v100-20gbs"))
    costs = v100.costs(Workload(32, 128, 512), swa=False)
    none, half, whole = (float(seconds(costs, Schedule(a, 0.0, 0, costs.steps)).sum()) for a in (0.0, 0.5, 1.0))
    base = (half - none) / 2  # what a step without transfers would have to take for 3x
    rows.append({"what": "half and all KV on the CPU, OPT-6.7B: slower by", "published": "3x and 5x",
                 "simulated": f"{half / none:.1f}x and {whole / none:.1f}x; {(half - none + base) / base:.1f}x and "
                              f"{(whole - none + base) / base:.1f}x if a step took {base / none:.1f} times as long "
                              "without any"})  # fmt: skip
    return rows


def plot(results: dict[str, Any], path: Path) -> None:
    """Throughput over context; ALISA's steps with their phases; throughput over batches."""
    from matplotlib import pyplot as plt

    _, (left, middle, right) = plt.subplots(1, 3, figsize=(20, 5))
    found = results["contexts"][0]
    for name, points in found["lines"].items():
        held = [(p["context"], p["rate"]) for p in points if p["rate"]]
        left.plot(*zip(*held, strict=True), "o-" if "tiers" in name else "s--", label=name, alpha=0.8)
    left.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="tokens/s",
             title=f"{found['model']}, batch {found['batch']}, {found['machine']} (nominal)")  # fmt: skip
    found = results["steps"]
    middle.plot(found["step_ms"])
    for phase, color in ((1, "white"), (2, "tab:orange"), (3, "tab:red")):
        inside = [i for i, p in enumerate(found["phases"]) if p == phase]
        if inside:
            middle.axvspan(min(inside), max(inside) + 1, color=color, alpha=0.15, label=f"phase {'I' * phase}")
    title = f"ALISA's schedule, {found['model']}, batch {found['work']['batch']}, 8 GB of host memory"
    middle.set(xlabel="step", ylabel="ms", ylim=0, title=title)
    found = next(case for case in results["batches"] if case["model"] == "opt-13b")
    for method, rates in found["rates"].items():
        right.plot(found["batches"], rates, "o--" if method == "paging" else "o-", label=method, alpha=0.8)
    right.set(xscale="log", xlabel="batch", ylabel="tokens/s", title=f"{found['model']}, {found['machine']}")
    right.set_xticks(found["batches"], [str(batch) for batch in found["batches"]])
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    plt.savefig(path, dpi=100, bbox_inches="tight")
    plt.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write bench/results/plan.json and plan.png")
    parser.add_argument("--out", type=Path, help="write this file, and a picture beside it")
    options = parser.parse_args()
    cases = [batches(model, machine) for model, machine in tqdm(MACHINES.items(), desc="batches")]
    results = {
        "contexts": [contexts("llama-3-8b", "h100-pcie5", batch) for batch in (16, 1)],
        "steps": steps("opt-13b", "v100-20gbs", Workload(32, 128, 512), 8e9),
        "batches": cases,
        "alisa": alisa(cases),
    }
    for found in results["contexts"]:  # type: ignore[attr-defined]
        print(f"\n{found['model']}, {found['machine']}, batch {found['batch']}: tokens/s, 0 where it does not fit")
        for name, points in found["lines"].items():
            print(f"{name:16}" + "".join(f"{p['context'] // 1024:>6}K {p['rate']:>7,.0f}" for p in points))
        loss, first = found["with_slots_of_without"], found["crossover"]
        print(f"lserve is faster than dense from {first:,} tokens on; at 32K tokens, slots for twice the budget make "
              f"{loss:.2f} of its speed without a limit")  # fmt: skip
    print()
    for row in results["alisa"]:  # type: ignore[attr-defined]
        print(f"{row['what']:52}{row['published']:16}{row['simulated']}")
    out = options.out or (Path(__file__).parent / "results" / "plan.json" if options.save else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        plot(results, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
