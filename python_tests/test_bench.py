"""The benchmarks run, cover every op, and report what can be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lserve_ext import ops

KERNELS = Path(__file__).parents[1] / "bench" / "kernels.py"


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = [sys.executable, str(KERNELS), "--quick", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert {result["op"] for result in results} == {name for name in ops.__all__ if name.islower()}
    for result in results:
        assert 0 < result["share"] < 1.5, result
        assert f"{result['us']:,.0f}" in done.stdout
    assert {result["kv_dtype"] for result in results if result["op"] == "decode"} == {"auto", "int8"}
    assert {"SDPA", "SDPA grouped"} <= {name for result in results for name in result["peers_us"]}
