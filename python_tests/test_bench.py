"""The benchmarks run, cover every op, and report what can be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lserve_ext import ops

KERNELS = Path(__file__).parents[1] / "bench" / "kernels.py"


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = [sys.executable, str(KERNELS), "--quick", "--threads", "1", "--limit", "0.05", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert {result["op"] for result in results} == {name for name in ops.__all__ if name.islower()}
    for result in results:
        assert 0 < result["share"] < 1.5, result
        assert f"{result['us']:,.1f}" in done.stdout
    assert {result["kv_dtype"] for result in results if result["op"] == "decode"} == {"auto", "int8"}
    assert {"SDPA", "SDPA grouped"} <= {name for result in results for name in result["peers_us"]}


@pytest.mark.parametrize("int8", [False, True])
def test_the_peer_of_onnx_runtime_does_the_same_work(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    monkeypatch.syspath_prepend(str(KERNELS.parent))
    import onnx_peer

    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, *rows, 64, generator=rng) for heads, rows in ((8, ()), (2, (300,)), (2, (300,))))
    call, out = onnx_peer.decode(q, k, v, int8)
    for _ in range(2):  # the newest token is written each time
        call()
        want = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
        assert torch.allclose(out, want, atol=0.03 if int8 else 1e-5)


def test_a_usual_turn_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes around what it can, but not around work; what is looked up counts by how often it is."""
    monkeypatch.syspath_prepend(str(KERNELS.parent))
    import static

    def kernel(name: str) -> static.Kernel:
        ops = ["MOV", "LDGSTS.128", "BRA", "LDG.32", "IMAD", "BRA", *["FMUL"] * 3, "HMMA", "BRA", "BRA", "EXIT"]
        jumps = {2: (5, False), 5: (8, False), 10: (0, False), 11: (12, True)}
        code = [static.Instruction(i, op, *jumps.get(i, ())) for i, op in enumerate(ops)]
        return static.Kernel("sm_80", name, 0, 0, code=code)

    name = "decode_kernel<bf16, 128, plain, {}>"
    loop = kernel(name.format("false"))
    assert [i.address for i in loop.main_loop()] == list(range(11))
    turn = {"MOV": 1, "LDGSTS.128": 1, "BRA": 3, "FMUL": 1, "HMMA": 1}
    assert Counter(i.op for i in static.way(loop.main_loop(), static.USUAL)) == turn
    assert loop.usual_turn() == turn | {"MOV": 1, "LDG.32": 1 / 32, "IMAD": 1 / 32}
    assert kernel(name.format("true")).usual_turn() == turn | {"LDG.32": 1 / 2, "IMAD": 1 / 2}
    assert loop.headroom() == pytest.approx(64 * 2 * 128 * 2 / static.BYTES_A_CYCLE / (7 + 2 / 32))


def test_loads_that_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a load asks for counts where it is used, and not what is asked for in vain or together."""
    monkeypatch.syspath_prepend(str(KERNELS.parent))
    import static

    code = [
        ("S2R", " R0, SR_TID.X"),
        ("LDG.64", " R2, desc[UR4][R8.64]"),  # of two
        ("LDG.32", " R5, desc[UR4][R10.64]"),  # together with it
        ("ISETP", " P0, PT, R3, RZ, PT"),  # waits for the first
        ("BRA", "@P0 0x50"),
        ("IMAD", " R5, R5, 0x2, RZ"),
        ("LDG.32", " R6, desc[UR4][R0.64]"),  # after that
        ("LDG.32", "@P0 R12, desc[UR4][R6.64]"),  # after this, and nobody waits for it
        ("LDGSTS.128", " [R0], desc[UR4][R6.64]"),
        ("EXIT", ""),
    ]
    kernel = static.Kernel("sm_80", "a", 0, 0)
    for i, (op, operands) in enumerate(code):
        target = {"target": 0x50, "always": False} if op == "BRA" else {}
        kernel.code.append(static.Instruction(16 * i, op, operands=operands, **target))
    assert kernel.prologue() == (4, 2)


def results_of(script: str, out: Path, *options: str) -> list[dict[str, Any]]:
    """What another bench of the folder writes."""
    command = [sys.executable, str(KERNELS.with_name(script)), *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(out.read_text())["results"]
    return results


@pytest.mark.slow
def test_generate(tmp_path: Path) -> None:
    results = results_of("generate.py", tmp_path / "x.json", "--tokens", "200", "--steps", "8", "--only", "lserve")
    assert [r["run"] for r in results] == ["Dynamic", "lserve", "lserve, reserved"]
    assert all(r["limit_ms"] > 0 and r["step_ms"] > 0 and r["prefill_s"] > 0 for r in results)
    ours = results[1]
    assert 0.3 < sum(ours[f"{part}_ms"] for part in ("model", "cache", "ops")) / ours["step_ms"] < 3


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    """What is read: all by dense heads, as much as ever by streaming heads, statistics alone grow with lists."""
    options = ["--tokens", "8192", "16384", "24576", "--rounds", "1", "--dtype", "float32"]
    results = results_of("growth.py", tmp_path / "x.json", *options)
    read = {(r["config"], r["tokens"]): r["bytes"] for r in results}
    names = {name for name, _ in read}
    steps = {name: [read[name, b] - read[name, a] for a, b in ((8192, 16384), (16384, 24576))] for name in names}
    assert steps["dense"] == [8192 * 8 * 128 * 2 * 4] * 2 and steps["streaming (static)"] == [0, 0]
    assert steps["lists (dynamic)"] == [128 * 8 * (4 * 2 * 128 * 4) / 4] * 2
    assert [2 * grows for grows in steps["lserve, half of each"]] == steps["lists (dynamic)"]
    assert all(r["step_us"] > 0 and r["limit_us"] > 0 for r in results)


@pytest.mark.slow
def test_placement(tmp_path: Path) -> None:
    results = results_of("placement.py", tmp_path / "x.json", "--tokens", "1500", "--steps", "8", "--reuse", "4")
    assert [r["slots"] for r in results] == [None, 1.0, 1.5, 2.0, 4.0]
    missed = [r["missed_of_listed"] for r in results]
    assert missed[0] == 0 and 0 < missed[4] <= missed[2] <= missed[1]
    assert all(r["step_ms"] > 0 for r in results)


@pytest.mark.slow
def test_accuracy(tmp_path: Path) -> None:
    results = results_of(
        "accuracy.py", tmp_path / "x.json", "--lengths", "600", "--positions", "18", "--only", "quest, 5"
    )
    assert [r["config"] for r in results] == ["dense", "quest, 512"] and 0 < results[1]["kl"] < 1
    assert 0.5 < sum(results[1]["recall"]) / 28 < sum(results[1]["oracle"]) / 28 < 1  # all layers but the first two


@pytest.mark.slow
def test_speculate(tmp_path: Path) -> None:
    results = results_of("speculate.py", tmp_path / "x.json", "--tokens", "700", "--new", "9", "--rounds", "1")
    assert [r["run"] for r in results[:5]] == ["dense", "sparse", "drafts of 2", "drafts of 4", "drafts of 8"]
    assert all(r["token_ms"] > 0 and r["over_dense"] > 0 for r in results)
    drafted = [r for r in results if r["run"].startswith("drafts")]
    assert all(0 <= r["accepted"] <= 1 for r in drafted)
    assert all(r["same"] for r in drafted if r["kv_dtype"] == "auto")


@pytest.mark.slow
def test_tiers(tmp_path: Path) -> None:
    """Short contexts: what is checked is that it runs, and that bytes are those of the trace, and about those that
    follow from lengths."""
    options = ["--tokens", "720", "--steps", "4", "--batch", "2", "--prompt", "200", "--new", "80"]
    options += ["--machine", "epyc-9005-2cores"]
    results = results_of("tiers.py", tmp_path / "x.json", *options)
    assert [(r["run"], r["where"]) for r in results] == [
        (run, where) for run in ("dense", "lserve", "alisa") for where in ("all", "tenth", "disk")
    ]
    for r in results:
        assert (
            r["step_ms"] > 0 and r["predicted_ms"] > 0 and r["phase"] == {"all": 1, "tenth": 2, "disk": 3}[r["where"]]
        )
        if r["run"] != "alisa" and r["where"] != "all":
            assert r["fetched_bytes"] == pytest.approx(r["replayed_fetched"], rel=1e-9)
        if r["run"] == "dense":
            assert r["fetched_bytes"] == pytest.approx(r["predicted_fetched"], rel=0.01)
    found = json.loads((tmp_path / "x.json").read_text())
    assert [r["run"] for r in found["recompute"]] == ["loaded", "recomputed"]
    assert found["many"]["paging"]["prefill_again_s"] > 0


def same(a: Any, b: Any) -> bool:
    """Of two trees of JSON, but for the last digits of numbers, which follow from the machine's logarithms."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == (pytest.approx(b, rel=1e-6) if isinstance(b, float) else b))


@pytest.mark.slow
def test_plan(tmp_path: Path) -> None:
    command = [sys.executable, str(KERNELS.with_name("plan.py")), "--out", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    kept = json.loads((KERNELS.parent / "results" / "plan.json").read_text())
    assert same(found, kept), "the cost model says something else than bench/results/plan.json: bench/plan.py --save"
    assert all(row["what"] in done.stdout for row in found["alisa"]) and (tmp_path / "plan.png").stat().st_size > 10_000
