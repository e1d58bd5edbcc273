"""One small call of every kernel there is: quick enough for tools that follow each memory access of each thread."""

from __future__ import annotations

import pytest
import torch
from _cases import BF16, F16, F32, Shape, assert_attention, assert_moments, build, halves, ints, normal, pack, same_bits

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask

pytestmark = pytest.mark.gpu

# Tiles of the model's dtype, of codes on both kinds of grid, and what goes without tiles.
SHAPES = [
    Shape(64, 16, None, 2, BF16, "auto"),
    Shape(64, 16, 16, 3, F16, "int8", 16),
    Shape(64, 16, None, 1, BF16, "int8", 4),
    Shape(32, 16, 4, 2, F32, "int8"),
    Shape(128, 16, 16, 10, F16, "int8"),  # more heads share keys than one pass of decode takes
]
LENGTHS = [90, 17, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape: Shape, device: str) -> None:
    case = build(shape, LENGTHS, heads=3, device=device)
    windows = case.windows(DENSE, 2, 0)
    pages, tokens = case.lists(sink=1, local=2, count=2), case.token_lists(ratio=0.5, max_picks=20)
    q, n = case.queries(), case.lengths
    for (lists, start), unit in ((pages, None), (tokens, 1)):
        mask = Mask(windows, lists, start, sink=1 if unit is None else 0, unit=unit)
        result = ops.decode(q, mask, case.kv, n)
        assert_attention(result, reference.decode, q, mask, case.kv, n)
        mass = ops.attention_mass(q[:, None], result[1][:, None], mask, case.kv, n)
        want = reference.attention_mass(q[:, None], result[1][:, None], mask, case.kv, n)
        torch.testing.assert_close(mass, want, atol=1e-4, rtol=1e-3)

    new = [normal(30 + b, m, 3, shape.head_dim, dtype=shape.dtype, device=device) for b, m in enumerate([5, 20, 33])]
    (k, cu), v = pack(new), pack([x.flip(0) for x in new])[0]
    rows = normal(40, len(k), 3 * shape.group, shape.head_dim, dtype=shape.dtype, device=device)
    args = (k, v, cu, cu, Mask(case.windows(DENSE, 2, DENSE), sink=1), case.kv, n)
    assert_attention(ops.prefill(rows, *args), reference.prefill, rows, *args)


@pytest.mark.parametrize("dims", [(256, 1), (64, 2)], ids=["D256-G1", "D64-G2"])
def test_more_tiles_than_a_pipeline_has_stages(dims: tuple[int, int], device: str) -> None:
    """What a stage held is overwritten while other threads may still read it: in decode, then in prefill."""
    D, G = dims
    for shape in (Shape(D, 16, None, G, BF16, "auto"), Shape(D, 16, 16, G, BF16, "int8")):
        case = build(shape, [650 if D == 64 else 330], heads=1, device=device)
        q, windows = case.queries(), case.windows(DENSE)
        result = ops.decode(q, Mask(windows), case.kv, case.lengths)
        assert_attention(result, reference.decode, q, Mask(windows), case.kv, case.lengths)
        (k, cu), v = pack([normal(30, 20, 1, D, dtype=BF16, device=device)]), normal(31, 20, 1, D, dtype=BF16)
        args = (k, v.to(device), cu, cu, Mask(windows), case.kv, case.lengths)
        rows = normal(40, 20, G, D, dtype=BF16, device=device)
        assert_attention(ops.prefill(rows, *args), reference.prefill, rows, *args)


def test_the_largest_values(device: str) -> None:
    n, D = 130, 64
    q, k = (normal(seed, n, 1, D, dtype=BF16, device=device) for seed in (1, 2))
    v = torch.full((n, 1, D), float(torch.finfo(BF16).max) / 2, dtype=BF16, device=device)
    cu = ints([0, n], device)
    out, _ = ops.prefill(q, k, v, cu, cu, Mask(ints([DENSE], device)))
    torch.testing.assert_close(out.double(), v.double(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("new", [[1, 1, 1], [40, 0, 70]], ids=["step", "prompt"])
def test_append(shape: Shape, new: list[int], device: str) -> None:
    """The residual buffer is read by one page and written for another."""
    got, want = (build(shape, LENGTHS, device=device, columns=9, room=4) for _ in range(2))
    k, cu = pack([normal(50 + b, m, 3, shape.head_dim, dtype=shape.dtype, device=device) for b, m in enumerate(new)])
    ops.append_kv(k, -k, cu, got.lengths, got.kv)
    reference.append_kv(k, -k, cu, want.lengths, want.kv)
    for b, (held, m) in enumerate(zip(LENGTHS, new, strict=True)):
        sealed = max((held + m) // shape.page_size - 1, 0)
        kept = [t % (2 * shape.page_size) for t in range(sealed * shape.page_size, held + m)]
        for a, c in ((got.kv.residual_k, want.kv.residual_k), (got.kv.residual_v, want.kv.residual_v)):
            assert a is not None and c is not None
            assert same_bits(a[b, :, kept], c[b, :, kept])
    for name in ("k_pool", "v_pool", "stats", "scales"):
        a, c = getattr(got.kv, name), getattr(want.kv, name)
        assert a is None or same_bits(a, c)
    if got.kv.moments is not None and want.kv.moments is not None:
        assert_moments(got.kv.moments, want.kv.moments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages(shape: Shape, device: str) -> None:
    k, v = (normal(i, 5, shape.page_size, shape.head_dim, dtype=shape.dtype, device=device) for i in (1, 2))
    stats = ops.page_stats(k, 4)
    assert_moments(ops.page_moments(k, 16), reference.page_moments(k, 16))
    for grid in (stats, None):
        codes = ops.quantize_kv(k, v, grid)
        assert all(same_bits(a, b) for a, b in zip(codes, reference.quantize_kv(k, v, grid), strict=True))
        back = ops.dequantize_kv(codes[0], codes[1], grid, codes[2], shape.dtype)
        want = reference.dequantize_kv(codes[0], codes[1], grid, codes[2], shape.dtype)
        assert all(same_bits(a, b) for a, b in zip(back, want, strict=True))
    blocks, table = ints([[[4, 3, 2, 1, 0], [5, 6, 7, 8, 9]]], device), torch.full((1, 2, 5), -1, device=device).int()
    slots, use, clock = (
        torch.full((6,), -1, device=device).int(),
        *(torch.zeros(n, device=device).int() for n in (6, 1)),
    )
    for wanted in ([[0, 3, -1], [1, 2, 4]], [[1, 2, 3], [0, -1, -1]], [[1, 0, -1], [0, 3, 4]]):
        state, lists = (table, slots, use, clock), ints([wanted], device)
        was = [x.clone() for x in state]
        found, want = ops.resolve_pages(lists, blocks, *state, 3), reference.resolve_pages(lists, blocks, *was, 3)
        assert all(same_bits(a, b) for a, b in zip((*found, *state), (*want, *was), strict=True))
    mask = Mask(ints([1, 0], device), ints([[[1, -1], [1, 2]]], device), ints([3], device), sink=1)
    args = (mask, blocks, ints([5], device), ints([5 * shape.page_size], device), shape.page_size)
    assert all(same_bits(a, b) for a, b in zip(ops.wanted_pages(*args), reference.wanted_pages(*args), strict=True))
    moved = torch.zeros_like(k)
    ops.gather_pages(k, ints([4, -1, 0], device), moved, ints([1, 2, 3], device))
    assert same_bits(moved[[1, 2, 3]], torch.stack([k[4], torch.zeros_like(k[0]), k[0]]))
    lse = normal(3, 5, shape.page_size, device=device)
    merged, want = (m.merge_states(k, lse, v, -lse) for m in (ops, reference))
    torch.testing.assert_close(merged, want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
def test_selection(shape: Shape, device: str) -> None:
    case = build(shape, LENGTHS, device=device)
    q, kv = case.queries(), case.kv
    assert kv.stats is not None
    scores, want = (m.page_scores(q, kv.stats, kv.block_table, kv.sealed) for m in (ops, reference))
    torch.testing.assert_close(scores, want, atol=1e-2, rtol=1e-2)
    mass = normal(5, 3, 3, 200, device=device)
    pages = [m.select_pages(scores, case.lengths, kv.sealed, shape.page_size, 1, 1, 2) for m in (ops, reference)]
    counts = halves(case.lengths.tolist(), 0.4, device)
    args = (mass, case.lengths, kv.sealed, counts, shape.page_size, 30)
    tokens = [m.select_tokens(*args) for m in (ops, reference)]
    for got, want in (pages, tokens):
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
