"""What attention_mass adds up, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from _cases import (
    F32,
    SHAPES,
    SINK,
    SMALL,
    WINDOW,
    Shape,
    awkward_lengths,
    build,
    free_past,
    normal,
    one_thread,
    pack,
    ragged,
    spread,
    three_heads,
)

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask

pytestmark = pytest.mark.gpu


def mass_tolerance(shape: Shape) -> float:
    """Relative. Where tensor cores multiply, dequantised keys are rounded to the model's dtype."""
    return 2 * torch.finfo(shape.dtype).eps if shape.kv_dtype == "int8" and shape.dtype != F32 else 5e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_attention_mass(shape: Shape, rows: int, device: str) -> None:
    """Rows before a sequence's first token carry an lse of -inf; so does one query here that is none."""
    case = free_past(build(shape, awkward_lengths(shape.page_size), device=device), 1, WINDOW, SINK)
    lists, start = case.lists(sink=SINK, local=2, count=2)
    q = case.queries(rows=rows)
    lse = 3 + normal(9, *q.shape[:3], device=device)  # any lse will do
    for b, n in enumerate(case.lengths.tolist()):
        lse[b, : max(0, rows - n)] = -math.inf
    lse[0, 0, 1 % lse.shape[2]] = -math.inf
    windows = case.windows(DENSE, WINDOW, 0 if rows == 1 else DENSE)
    args = (Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    got = ops.attention_mass(spread(q, 1), lse, *args)
    want = one_thread(reference.attention_mass)(q, lse, *args)
    assert got.dtype == F32 and torch.equal(got == 0, want == 0)
    torch.testing.assert_close(got, want, rtol=mass_tolerance(shape), atol=1e-6)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.dtype != F32][:4], ids=str)
@pytest.mark.parametrize("rows", [43, 100])
def test_attention_mass_of_many_queries(shape: Shape, rows: int, device: str) -> None:
    """More than a kernel knows the places of at once; and a sequence that is shorter than they are many."""
    case = build(shape, [130, 60], device=device)
    q = case.queries(rows=rows)
    lse = 3 + normal(9, *q.shape[:3], device=device)
    for b, n in enumerate(case.lengths.tolist()):
        lse[b, : max(0, rows - n)] = -math.inf
    args = (Mask(case.windows(DENSE, WINDOW, DENSE), sink=SINK), case.kv, case.lengths)
    got, want = ops.attention_mass(q, lse, *args), one_thread(reference.attention_mass)(q, lse, *args)
    assert torch.equal(got == 0, want == 0)
    torch.testing.assert_close(got, want, rtol=mass_tolerance(shape), atol=1e-6)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_attention_mass_of_tokens(shape: Shape, device: str) -> None:
    case = build(shape, awkward_lengths(shape.page_size), device=device)
    lists, start = case.token_lists(ratio=0.4, max_picks=shape.page_size)
    q = case.queries()
    args = (Mask(case.windows(0, 0, 0), lists, start, unit=1), case.kv, case.lengths)
    _, lse = ops.decode(q, *args)
    got = ops.attention_mass(q[:, None], lse[:, None], *args)
    want = reference.attention_mass(q[:, None], lse[:, None], *args)
    torch.testing.assert_close(got, want, rtol=mass_tolerance(shape), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_mass_sums_to_the_number_of_queries(shape: Shape, device: str) -> None:
    """Each query puts a mass of 1 on what it attends, whatever that is; G of them share a row."""
    case, windows, lists, start = three_heads(shape, [*awkward_lengths(shape.page_size), 400], device)
    q = case.queries()
    _, lse = ops.decode(q, Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    mass = ops.attention_mass(q[:, None], lse[:, None], Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    want = torch.where(case.lengths > 0, float(shape.group), 0.0)[:, None].expand(-1, 3)
    torch.testing.assert_close(mass.sum(-1), want, rtol=max(1e-4, mass_tolerance(shape)), atol=0)


def test_mass_after_prefill(device: str) -> None:
    """The scorer's start: the last queries of a prompt, with the lse that prefill returned."""
    shape = Shape(64, 16, 8, 3, F32, "auto")
    case = build(shape, [100, 3], heads=2, device=device)
    (k, cu), (v, _) = pack(case.k), pack(case.v)
    q, _ = ragged(shape, [100, 3], 6, device, seed=10)
    _, lse = ops.prefill(q, k, v, cu, cu, Mask(case.windows(DENSE, DENSE)), page_size=16)
    last, last_lse = torch.zeros(2, 8, 6, 64, device=device), torch.full((2, 8, 6), -math.inf, device=device)
    last[0], last_lse[0], last[1, 5:], last_lse[1, 5:] = q[92:100], lse[92:100], q[100:], lse[100:]
    mass = ops.attention_mass(last, last_lse, Mask(case.windows(DENSE, DENSE)), case.kv, case.lengths)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([[24.0, 24.0], [9.0, 9.0]], device=device))
    queries = q[92:100].reshape(8, 2, 3, 64).transpose(0, 1).flatten(1, 2)  # [H, T * G, D]
    weights = queries @ k[:100].permute(1, 2, 0) / 8
    future = torch.arange(100) > torch.arange(92, 100).repeat_interleave(3)[:, None]
    weights = weights.masked_fill(future.to(device), -math.inf).softmax(-1).sum(1)
    torch.testing.assert_close(mass[0, :, :100], weights, rtol=1e-4, atol=1e-6)
