"""Prefill, against the reference, against itself and against decode."""

from __future__ import annotations

import math

import pytest
import torch
from _cases import (
    BF16,
    F16,
    F32,
    SHAPES,
    SINK,
    SMALL,
    WINDOW,
    Shape,
    assert_attention,
    awkward_lengths,
    build,
    free_past,
    generator,
    ints,
    normal,
    pack,
    ragged,
    same_bits,
    spread,
)
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask

pytestmark = pytest.mark.gpu


def page_lists(lengths: list[int], page_size: int, heads: int, count: int, device: str) -> Tensor:
    """Random older pages for every page of queries [B, H, R, count], without page 0, which is the sink."""
    rows = max(-(-n // page_size) for n in lengths)
    rng = generator(6)

    def row(page: int) -> list[int]:
        picks = sorted((torch.randperm(max(page - SINK, 0), generator=rng)[:count] + SINK).tolist())
        return picks + [-1] * (count - len(picks))

    return ints([[[row(page) for page in range(rows)] for _ in range(heads)] for _ in lengths], device)


@pytest.mark.parametrize("shape, strided", [*((s, False) for s in SHAPES), *((s, True) for s in SMALL)], ids=str)
def test_prefill_without_a_cache(shape: Shape, strided: bool, device: str) -> None:
    p, lengths = shape.page_size, awkward_lengths(shape.page_size)
    q, cu = ragged(shape, lengths, 3 * shape.group, device, seed=10)
    k, _ = ragged(shape, lengths, 3, device, seed=20)
    v, _ = ragged(shape, lengths, 3, device, seed=40)
    lists = page_lists(lengths, p, 3, 2, device)
    if strided:
        q, k, v, lists = spread(q, 0), spread(k, 1), spread(v, 0), spread(lists, 2)
    args = (k, v, cu, cu, Mask(ints([DENSE, WINDOW, 0], device), lists, sink=SINK))
    assert_attention(ops.prefill(q, *args, page_size=p), reference.prefill, q, *args, page_size=p)


def newer(shape: Shape, device: str) -> tuple[list[int], list[int]]:
    """New tokens and queries after `awkward_lengths`."""
    p = shape.page_size
    return [3, 2 * p + 1, 1, p, 0, 2 * p, p + 2, 1], [3, p, 1, 1, 0, 2 * p, 1, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_after_a_cache(shape: Shape, device: str) -> None:
    """Later chunks: ragged history, fewer queries than new tokens, pages that the streaming head has freed."""
    p, (new, queries) = shape.page_size, newer(shape, device)
    case = free_past(build(shape, awkward_lengths(p), device=device, strided=True), 1, WINDOW, SINK)
    q, cu_seqlens_q = ragged(shape, queries, 3 * shape.group, device, seed=10)
    k, cu_seqlens_k = ragged(shape, new, 3, device, seed=20)
    v, _ = ragged(shape, new, 3, device, seed=40)
    args = (
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        Mask(case.windows(DENSE, WINDOW, DENSE), sink=SINK),
        case.kv,
        case.lengths,
    )
    assert_attention(ops.prefill(q, *args), reference.prefill, q, *args)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[9]], ids=str)
def test_prefill_with_lists_after_a_cache(shape: Shape, device: str) -> None:
    p, (new, queries) = shape.page_size, newer(shape, device)
    lengths = awkward_lengths(p)
    case = build(shape, lengths, device=device)
    q, cu_seqlens_q = ragged(shape, queries, 3 * shape.group, device, seed=10)
    k, cu_seqlens_k = ragged(shape, new, 3, device, seed=20)
    v, _ = ragged(shape, new, 3, device, seed=40)
    totals = [n + m for n, m in zip(lengths, new, strict=True)]
    by_page = page_lists(totals, p, 3, 2, device)
    first = [(n - m) // p for n, m in zip(totals, queries, strict=True)]  # page of the first query
    rows = by_page.shape[2]
    lists = torch.stack([by_page[b, :, [min(r + f, rows - 1) for r in range(rows)]] for b, f in enumerate(first)])
    args = (k, v, cu_seqlens_q, cu_seqlens_k, Mask(case.windows(0, 0, DENSE), lists, sink=SINK), case.kv, case.lengths)
    assert_attention(ops.prefill(q, *args), reference.prefill, q, *args)


# More tokens than a block of threads takes alone, where few queries follow; heads that fill a tile with few of them.
LONG = [
    Shape(64, 16, 16, 4, BF16, "int8"),
    Shape(128, 64, 16, 8, BF16, "auto"),
    Shape(96, 16, None, 16, F16, "auto"),
    Shape(80, 12, 4, 3, F16, "int8"),
    Shape(256, 16, None, 1, BF16, "int8"),
    Shape(64, 16, None, 17, BF16, "auto"),
]


def few_after(
    shape: Shape, lengths: list[int], queries: list[int], device: str, columns: int | None = None
) -> tuple[Tensor, ...]:
    """q, k, v, bounds, mask, cache and lengths: a dense head, a streaming one and one with lists."""
    case = build(shape, lengths, device=device, columns=columns)
    q, cu = ragged(shape, queries, 3 * shape.group, device, seed=10)
    k, _ = ragged(shape, queries, 3, device, seed=20)
    v, _ = ragged(shape, queries, 3, device, seed=40)
    by_page = page_lists([n + m for n, m in zip(lengths, queries, strict=True)], shape.page_size, 3, 2, device)
    rows, last = range(max(queries) // shape.page_size + 2), by_page.shape[2] - 1
    lists = [by_page[b, :, [min(n // shape.page_size + r, last) for r in rows]] for b, n in enumerate(lengths)]
    return q, k, v, cu, cu, Mask(case.windows(DENSE, WINDOW, 0), torch.stack(lists), sink=SINK), case.kv, case.lengths


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.parametrize("queries", [[5, 1, 16], [3, 40, 17]], ids=str)
def test_prefill_of_few_queries_after_a_long_cache(shape: Shape, queries: list[int], device: str) -> None:
    """Turns of a chat, and drafts that are verified: also beside prompts."""
    q, *args = few_after(shape, [1300, 511, 3], queries, device)
    assert_attention(ops.prefill(q, *args), reference.prefill, q, *args)


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_few_queries_alone(shape: Shape, device: str) -> None:
    """Neither other sequences nor wider tables change a bit."""
    lengths, queries = [1300, 90, 700], [5, 60, 16]
    q, k, v, cu, _, mask, kv, held = few_after(shape, lengths, queries, device)
    out, lse = ops.prefill(q, k, v, cu, cu, mask, kv, held)
    for b in (0, 2):
        rows, bounds = slice(int(cu[b]), int(cu[b + 1])), ints([0, queries[b]], device)
        own = kv._replace(sealed=kv.sealed[b : b + 1])
        for name in ("block_table", "slot_table"):
            table = getattr(kv, name)[b : b + 1]
            own = own._replace(**{name: torch.cat([table, torch.full_like(table, -1)], -1)})
        for name in ("residual_k", "residual_v"):
            own = own._replace(**{name: getattr(kv, name)[b : b + 1]})
        assert mask.lists is not None
        alone = mask._replace(lists=mask.lists[b : b + 1])
        one = ops.prefill(q[rows], k[rows], v[rows], bounds, bounds, alone, own, held[b : b + 1])
        assert same_bits(one[0], out[rows]) and same_bits(one[1], lse[rows])


def test_few_queries_after_more_tokens_than_splits(device: str) -> None:
    """Splits become longer where there would be too many."""
    shape = Shape(16, 64, None, 2, BF16, "auto")
    case = build(shape, [17_000], heads=1, device=device)
    q, cu = ragged(shape, [6], 2, device, seed=10)
    k, _ = ragged(shape, [6], 1, device, seed=20)
    args = (k, -k, cu, cu, Mask(case.windows(DENSE)), case.kv, case.lengths)
    assert_attention(ops.prefill(q, *args), reference.prefill, q, *args)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_later_draft_changes_no_earlier_one(value: float, device: str) -> None:
    shape = LONG[0]
    q, k, v, *args = few_after(shape, [1300], [9], device)
    want, _ = ops.prefill(q, k, v, *args)
    k[6, 0], v[6, 1, 3:9] = value, value
    got, _ = ops.prefill(q, k, v, *args)
    assert same_bits(got[:6], want[:6]) and not torch.isfinite(got[6]).all()


@pytest.mark.parametrize("chunk", [1, 16, 37])
def test_chunks_of_a_prompt_attend_what_the_prompt_attends(chunk: int, device: str) -> None:
    shape = Shape(64, 16, 8, 2, F32, "auto")
    n = 120
    q, cu = ragged(shape, [n], 4, device, seed=10)
    case = build(shape, [n], heads=2, device=device)
    k, v, windows = case.k[0], case.v[0], case.windows(DENSE, WINDOW)
    whole, whole_lse = ops.prefill(q, k, v, cu, cu, Mask(windows, sink=SINK), page_size=16)
    kv = case.kv._replace(sealed=torch.zeros_like(case.kv.sealed))
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        bounds, held = ints([0, rows.stop - start], device), ints([start], device)
        out, lse = ops.prefill(q[rows], k[rows], v[rows], bounds, bounds, Mask(windows, sink=SINK), kv, held)
        torch.testing.assert_close(out, whole[rows], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse, whole_lse[rows], rtol=1e-5, atol=2e-6)
        ops.append_kv(k[rows], v[rows], bounds, held, kv)
        kv = kv._replace(sealed=ints([max(0, rows.stop // 16 - 1)], device))


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_the_last_row_of_prefill_is_a_decode_step(shape: Shape, device: str) -> None:
    """A dense head, new tokens raw on both sides."""
    auto = Shape(shape.head_dim, shape.page_size, None, shape.group, shape.dtype, "auto")
    case = build(auto, [3 * shape.page_size + 1, 5], heads=2, device=device)
    (k, cu), (v, _), q = pack(case.k), pack(case.v), case.queries()
    rows = ints([0, 1, 2], device)
    out, lse = ops.prefill(q, k, v, rows, cu, Mask(case.windows(DENSE, DENSE)), page_size=shape.page_size)
    want, want_lse = ops.decode(q, Mask(case.windows(DENSE, DENSE)), case.kv, case.lengths)
    atol = 2e-6 if shape.dtype == F32 else 2e-3
    torch.testing.assert_close(out, want, rtol=2 * torch.finfo(shape.dtype).eps, atol=atol)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_prefill_of_a_sequence_alone(shape: Shape, device: str) -> None:
    lengths = [2 * shape.page_size + 3, 1, 4 * shape.page_size, 5]
    q, cu = ragged(shape, lengths, 2 * shape.group, device, seed=10)
    k, _ = ragged(shape, lengths, 2, device, seed=20)
    windows = ints([DENSE, WINDOW], device)
    out, lse = ops.prefill(q, k, k, cu, cu, Mask(windows, sink=SINK), page_size=shape.page_size)
    for b, n in enumerate(lengths):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        bounds = ints([0, n], device)
        one = ops.prefill(
            q[rows], k[rows], k[rows], bounds, bounds, Mask(windows, sink=SINK), page_size=shape.page_size
        )
        assert same_bits(one[0], out[rows]) and same_bits(one[1], lse[rows])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_prefill_of_values_of_one(dtype: torch.dtype, device: str) -> None:
    q, k = normal(1, 150, 4, 64, dtype=dtype, device=device), normal(2, 150, 2, 64, dtype=dtype, device=device)
    cu = ints([0, 20, 20, 150], device)
    out, lse = ops.prefill(q, k, torch.ones_like(k), cu, cu, Mask(ints([DENSE, 1], device), sink=1), page_size=16)
    assert (out.float() - 1).abs().max() <= 4 * torch.finfo(dtype).eps
    assert lse.isfinite().all()


def test_prefill_of_nothing(device: str) -> None:
    nothing, bounds = torch.zeros(0, 2, 64, device=device), ints([0, 0], device)
    out, lse = ops.prefill(nothing, nothing, nothing, bounds, bounds, Mask(ints([1, DENSE], device)))
    assert out.shape == (0, 2, 64) and lse.shape == (0, 2)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.5])
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_any_scale_of_prefill(kv: str, scale: float, device: str) -> None:
    """Among them such as turn the order of products around, and make them all equal."""
    case = build(Shape(64, 16, 16, 2, BF16, kv), [90, 0], device=device)
    q, cu = ragged(case.shape, [30, 21], case.heads * 2, device, seed=10)
    k, v = (ragged(case.shape, [30, 21], case.heads, device, seed=seed)[0] for seed in (11, 12))
    args = (k, v, cu, cu, Mask(case.windows(DENSE, 2, DENSE), sink=1), case.kv, case.lengths)
    assert_attention(ops.prefill(q, *args, scale=scale), reference.prefill, q, *args, scale=scale)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_later_token_changes_no_earlier_query(dtype: torch.dtype, value: float, device: str) -> None:
    """Neither its values nor its key, not a bit, wherever the prompt is cut."""
    n, D = 150, 64
    q, k, v = (normal(seed, n, heads, D, dtype=dtype, device=device) for seed, heads in ((1, 4), (2, 2), (3, 2)))
    windows = ints([DENSE, 2], device)

    def attend(k: Tensor, v: Tensor, end: int = n) -> Tensor:
        cu = ints([0, end], device)
        return ops.prefill(q[:end], k[:end], v[:end], cu, cu, Mask(windows), page_size=16)[0]

    want = attend(k, v)
    for place in (30, 63, 64, 100, 149):
        other_k, other_v = k.clone(), v.clone()
        other_v[place, 1, 5:9] = value
        other_k[place, 0] = value
        got = attend(other_k, other_v)
        assert same_bits(got[:place], want[:place])
        assert same_bits(got[:place], attend(other_k, other_v, place))
        assert not torch.isfinite(got[place]).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_largest_values_have_a_finite_mean(dtype: torch.dtype) -> None:
    """In prefill as in decode."""
    n, D = 200, 64
    q, k = (normal(seed, n, 2, D, dtype=dtype) for seed in (1, 2))
    v = torch.full((n, 2, D), float(torch.finfo(dtype).max) / 2, dtype=dtype)
    cu, windows = ints([0, n]), ints([DENSE, 2])
    out, _ = ops.prefill(q, k, v, cu, cu, Mask(windows), page_size=16)
    torch.testing.assert_close(out.double(), v.double(), rtol=1e-2 if dtype == BF16 else 1e-5, atol=0)
