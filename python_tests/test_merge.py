"""Merging parts of attention, against attention over all."""

from __future__ import annotations

import math

import pytest
import torch
from _cases import (
    BF16,
    F16,
    F32,
    SHAPES,
    Shape,
    assert_as_good_as_torch,
    ints,
    normal,
    same_bits,
)
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask

pytestmark = pytest.mark.gpu


def parts_of(seed: int, dtype: torch.dtype, device: str, count: int) -> list[tuple[Tensor, Tensor]]:
    shape = (3, 5, 64)
    return [
        (normal(seed + i, *shape, dtype=dtype, device=device), 4 * normal(seed + 10 + i, *shape[:-1], device=device))
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dims", [(64,), (7, 16), (2, 3, 4, 256), (0, 80)], ids=str)
def test_merge_states(dims: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, b = normal(1, *dims, dtype=dtype, device=device), normal(2, *dims, dtype=dtype, device=device)
    lse_a, lse_b = 5 * normal(3, *dims[:-1], device=device), 5 * normal(4, *dims[:-1], device=device)
    out, lse = ops.merge_states(a, lse_a, b, lse_b)
    want, want_lse = reference.merge_states(a.double(), lse_a, b.double(), lse_b)
    assert_as_good_as_torch(out, want, want.to(dtype))
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_two_halves_of_the_keys_merge_to_the_whole(shape: Shape, device: str) -> None:
    q = normal(1, 4, 2 * shape.group, shape.head_dim, dtype=shape.dtype, device=device)
    k, v = (normal(s, 90, 2, shape.head_dim, dtype=shape.dtype, device=device) for s in (2, 3))
    ends, windows = ints([0, 4], device), ints([DENSE, DENSE], device)
    whole = ops.prefill(q, k, v, ends, ints([0, 90], device), Mask(windows))
    # The first 30 keys end before any query, so every query attends all of them.
    old = [(k[:30, h // shape.group], v[:30, h // shape.group]) for h in range(2 * shape.group)]
    parts = [reference.attend(q[:, h], *kv, shape.head_dim**-0.5) for h, kv in enumerate(old)]
    first = torch.stack([x[0] for x in parts], 1).to(shape.dtype), torch.stack([x[1] for x in parts], 1).float()
    second = ops.prefill(q, k[30:], v[30:], ends, ints([0, 60], device), Mask(windows))
    out, lse = ops.merge_states(*first, *second)
    tolerance = 2e-6 if shape.dtype == F32 else 2 * torch.finfo(shape.dtype).eps
    torch.testing.assert_close(out, whole[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_merging_is_associative_and_commutative(dtype: torch.dtype, device: str) -> None:
    a, b, c = parts_of(1, dtype, device, 3)
    left, right = ops.merge_states(*ops.merge_states(*a, *b), *c), ops.merge_states(*a, *ops.merge_states(*b, *c))
    swapped = ops.merge_states(*c, *ops.merge_states(*b, *a))
    tolerance = 4 * torch.finfo(dtype).eps
    for other in (right, swapped):
        torch.testing.assert_close(left[0], other[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(left[1], other[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_merging_with_nothing(dtype: torch.dtype, device: str) -> None:
    (a, lse_a), _ = parts_of(1, dtype, device, 2)
    nothing, never = torch.zeros_like(a), torch.full_like(lse_a, -math.inf)
    for out, lse in (ops.merge_states(a, lse_a, nothing, never), ops.merge_states(nothing, never, a, lse_a)):
        assert same_bits(out, a) and same_bits(lse, lse_a)
    out, lse = ops.merge_states(nothing, never, nothing, never)
    assert not out.any() and (lse == -math.inf).all()


def test_merging_very_unequal_parts(device: str) -> None:
    """exp(200) overflows float32; a difference of lse never does."""
    (a, lse_a), (b, lse_b) = parts_of(1, F32, device, 2)
    out, lse = ops.merge_states(a, lse_a + 200, b, lse_b - 200)
    assert same_bits(out, a) and same_bits(lse, lse_a + 200)
    out, lse = ops.merge_states(a, lse_a - 1e30, b, lse_b)
    assert same_bits(out, b) and same_bits(lse, lse_b)
