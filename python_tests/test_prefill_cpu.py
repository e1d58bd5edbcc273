"""Prefill on a CPU: tiles of every size, and matrix units."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _cases import BF16, SHAPES, Shape, assert_attention, build, ints, normal, ragged

import lserve_ext
from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (6, 9, 13)], ids=str)
def test_many_tiles(shape: Shape) -> None:
    """More queries and more keys than a tile of the CPU's kernel takes, in sequences of every tile size."""
    p = shape.page_size
    case = build(shape, [300, 30])
    lengths = [1100, 257]
    q, cu = ragged(shape, lengths, 3 * shape.group, "cpu", seed=10)
    k, _ = ragged(shape, lengths, 3, "cpu", seed=20)
    v, _ = ragged(shape, lengths, 3, "cpu", seed=40)
    mask = Mask(case.windows(DENSE, max(1, 300 // p), DENSE), sink=1)
    args = (k, v, cu, cu, mask, case.kv, case.lengths)
    assert_attention(ops.prefill(q, *args), reference.prefill, q, *args)


WITHOUT_AMX = """
import sys, torch
from lserve_ext import ops
q, k, v, cu = torch.load(sys.argv[1])
mask = ops.Mask(torch.tensor([ops.DENSE, 3], dtype=torch.int32), sink=1)
out, lse = ops.prefill(q, k, v, cu, cu, mask)
wide, wide_lse = ops.prefill(q.float(), k.float(), v.float(), cu, cu, mask)
assert torch.equal(lse, wide_lse) and torch.equal(out, wide.to(out.dtype))
torch.save((out, lse), sys.argv[1])
"""


def test_bfloat16_with_and_without_matrix_units(tmp_path: Path) -> None:
    """Without them it is float32's arithmetic, to the bit; with them weights are rounded."""
    q, k, v = (normal(seed, 603, heads, 80, dtype=BF16) for seed, heads in ((1, 6), (2, 2), (3, 2)))
    cu = ints([0, 600, 603])
    torch.save((q, k, v, cu), tmp_path / "case.pt")
    command = [sys.executable, "-c", WITHOUT_AMX, str(tmp_path / "case.pt")]
    env = os.environ | {"LSERVE_AMX": "0", "PYTHONPATH": str(Path(lserve_ext.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out, lse = torch.load(tmp_path / "case.pt")
    found, found_lse = ops.prefill(q, k, v, cu, cu, Mask(ints([DENSE, 3]), sink=1))
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, out, rtol=2e-2, atol=1e-2)
