"""The code of the README and the examples run, and what the README says of presets and ops is so."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from lserve_ext import ops
from lserve_ext.config import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_code_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.stem == "serve":
        pytest.importorskip("vllm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *(["eager"] if path.stem == "batch" else [])])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    expected = {"custom_scorer": "middle: ", "long_document": "31415", "batch": "Paris", "tiers": "phase III"}
    expected["serve"] = ": found"
    assert expected[path.stem] in printed


def test_tables_name_every_preset_and_op() -> None:
    first_cells = re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(PRESETS) | {name for name in ops.__all__ if name.islower()}
