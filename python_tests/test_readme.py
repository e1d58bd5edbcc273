"""The code of the README runs, and what it says of presets and ops is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lserve_ext import ops
from lserve_ext.config import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_code_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_tables_name_every_preset_and_op() -> None:
    first_cells = re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(PRESETS) | {name for name in ops.__all__ if name.islower()}
