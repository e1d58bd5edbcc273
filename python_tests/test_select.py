"""Scores of pages, and the choice of pages and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from _cases import (
    BF16,
    F16,
    F32,
    SHAPES,
    SMALL,
    Shape,
    awkward_lengths,
    build,
    halves,
    ints,
    normal,
    permuted,
    same_bits,
    sequence,
    spread,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE

pytestmark = pytest.mark.gpu

SCORED = [shape for shape in SHAPES if shape.stats_group]

# ---------------------------------------------------------------------------------------------- scores


def absolute_sum(q: Tensor, k: Tensor) -> Tensor:
    """sum |q||k| of every pair: what the rounding of a dot product is relative to."""
    return q.double().abs() @ k.double().abs().T


@pytest.mark.parametrize("shape", SCORED, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_page_scores(shape: Shape, strided: bool, device: str) -> None:
    case = build(shape, awkward_lengths(shape.page_size), device=device, strided=strided)
    q, stats = case.queries(), case.kv.stats
    assert stats is not None
    if strided:
        q = spread(spread(q, 1), 0)
    for windows in (None, case.windows(0, 2, DENSE)):
        got = ops.page_scores(q, stats, case.kv.block_table, case.kv.sealed, windows)
        want = reference.page_scores(q, stats, case.kv.block_table, case.kv.sealed, windows)
        assert got.dtype == F32
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * float(q.double().abs().sum(-1).max()) * 4)


@pytest.mark.parametrize("shape", SCORED, ids=str)
def test_no_key_of_a_page_beats_its_score(shape: Shape, device: str) -> None:
    """The promise of the statistics: score >= logit - c·eps·Σ|q||k|, for the true keys and for those that are read."""
    case = build(shape, [5 * shape.page_size + 3, 2 * shape.page_size], heads=2, device=device)
    q, stats = case.queries(), case.kv.stats
    assert stats is not None
    scores = ops.page_scores(q, stats, case.kv.block_table, case.kv.sealed)
    eps = torch.finfo(F32).eps
    for b, n in enumerate(case.lengths.tolist()):
        for h in range(case.heads):
            read, _ = reference.history(case.kv, b, h, n)
            queries = q[b, h * shape.group : (h + 1) * shape.group].double()
            for k in (case.k[b][:, h], read):
                logits = queries @ k.double().T - 32 * eps * absolute_sum(queries, k)
                for page in range(int(case.kv.sealed[b])):
                    rows = slice(page * shape.page_size, (page + 1) * shape.page_size)
                    assert scores[b, h, page] >= logits[:, rows].max()


@pytest.mark.parametrize("shape", SMALL[:2], ids=str)
def test_scores_of_permuted_blocks(shape: Shape, device: str) -> None:
    case = build(shape, [4 * shape.page_size, 70], device=device)
    q, moved = case.queries(), permuted(case.kv, seed=4)
    assert case.kv.stats is not None and moved.stats is not None
    assert same_bits(
        ops.page_scores(q, case.kv.stats, case.kv.block_table, case.kv.sealed),
        ops.page_scores(q, moved.stats, moved.block_table, moved.sealed),
    )


@pytest.mark.parametrize("shape", SMALL[:2], ids=str)
def test_scores_of_a_sequence_alone(shape: Shape, device: str) -> None:
    case = build(shape, awkward_lengths(shape.page_size), device=device)
    q = case.queries()
    assert case.kv.stats is not None
    batch = ops.page_scores(q, case.kv.stats, case.kv.block_table, case.kv.sealed)
    for b in range(case.batch):
        kv = sequence(case, b).kv
        assert kv.stats is not None
        assert same_bits(ops.page_scores(q[b : b + 1], kv.stats, kv.block_table, kv.sealed), batch[b : b + 1])


def test_statistics_with_nan_spoil_their_page_only(device: str) -> None:
    case = build(SHAPES[1], [6 * 16], heads=1, device=device)
    q, stats = case.queries(), case.kv.stats
    assert stats is not None
    clean = ops.page_scores(q, stats, case.kv.block_table, case.kv.sealed)
    stats[int(case.kv.block_table[0, 0, 2]), 0, 1, 5] = math.nan
    got = ops.page_scores(q, stats, case.kv.block_table, case.kv.sealed)
    assert math.isnan(got[0, 0, 2]) or got[0, 0, 2] == -math.inf
    got[0, 0, 2] = clean[0, 0, 2]
    assert same_bits(got, clean)


def test_a_freed_page_scores_nothing(device: str) -> None:
    case = build(SHAPES[1], [6 * 16], heads=1, device=device)
    assert case.kv.stats is not None
    case.kv.block_table[0, 0, 3] = -1
    scores = ops.page_scores(case.queries(), case.kv.stats, case.kv.block_table, case.kv.sealed)
    assert scores[0, 0, 3] == -math.inf
    assert scores[0, 0, [0, 1, 2, 4]].isfinite().all()


# ---------------------------------------------------------------------------------------------- pages


def assert_selects(
    scores: Tensor, lengths: list[int], sealed: list[int], page_size: int, sink: int, local: int, count: int
) -> None:
    args = (ints(lengths, str(scores.device)), ints(sealed, str(scores.device)), page_size, sink, local, count)
    for given_scores in (scores, spread(scores, 1)):
        for got, want in zip(ops.select_pages(given_scores, *args), reference.select_pages(scores, *args), strict=True):
            assert got.dtype == torch.int32
            assert torch.equal(got, want)


@pytest.mark.parametrize("sink, local, count", [(0, 1, 3), (2, 2, 4), (1, 5, 0), (3, 1, 50), (40, 1, 4), (0, 40, 4)])
def test_select_pages(sink: int, local: int, count: int, device: str) -> None:
    lengths = [0, 1, 16, 17, 100, 320, 321, 5, 330]
    sealed = [0, 0, 0, 0, 5, 19, 19, 0, 21]  # the last: after a crop
    assert_selects(normal(0, 9, 3, 22, device=device), lengths, sealed, 16, sink, local, count)


def test_select_at_all_sizes(device: str) -> None:
    for pages in (1, 2, 31, 32, 33, 255, 256, 257, 1000, 5000):
        for count in (1, pages // 2, pages - 1, pages):
            scores = normal(pages, 1, 2, pages, device=device)
            assert_selects(scores, [(pages + 1) * 4], [pages], 4, 0, 1, count)


@pytest.mark.parametrize(
    "name, scores",
    [
        ("all the same", torch.zeros(1, 1, 100)),
        ("few values", (normal(1, 1, 2, 300) * 1.5).round()),
        ("infinities", normal(2, 1, 1, 50).masked_fill(normal(3, 1, 1, 50) > 0.8, math.inf)),
        ("minus infinities", normal(2, 1, 1, 50).masked_fill(normal(3, 1, 1, 50) > -0.5, -math.inf)),
        ("nothing but minus infinity", torch.full((1, 1, 40), -math.inf)),
        ("not numbers", normal(2, 1, 1, 50).masked_fill(normal(3, 1, 1, 50) > -0.5, math.nan)),
        ("negative not numbers", normal(2, 1, 1, 50).masked_fill(normal(3, 1, 1, 50) > -0.5, math.nan).neg()),
        ("equal prefixes", torch.tensor([1.0 + i % 7 * 2.0**-23 for i in range(200)]).reshape(1, 1, 200)),
        ("equal but for the sign", torch.tensor([(-1.0) ** i * (1 + i // 2) for i in range(64)]).reshape(1, 1, 64)),
        ("two zeros", torch.tensor([-0.0, 0.0] * 20 + [0.0, -0.0] * 20).reshape(1, 1, 80)),
        ("denormals", (normal(5, 1, 1, 90) * 1e-44)),
        ("ascending", torch.arange(500.0).reshape(1, 1, 500)),
        ("descending", -torch.arange(500.0).reshape(1, 1, 500)),
    ],
)
def test_select_against_a_sort(name: str, scores: Tensor, device: str) -> None:
    pages = scores.shape[2]
    for count in (1, 7, pages // 2, pages - 3):
        assert_selects(scores.to(device), [(pages + 1) * 16], [pages], 16, 2, 1, count)


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan])
SCORES = st.lists(st.one_of(st.floats(width=32), SPECIAL), min_size=1, max_size=80)


@given(SCORES, st.integers(0, 9), st.integers(1, 9), st.integers(0, 90), st.integers(0, 30))
def test_select_any_scores(values: list[float], sink: int, local: int, count: int, extra: int) -> None:
    pages = len(values)
    lengths = [(pages + 1) * 4 + extra % 4 if extra else 0]
    assert_selects(torch.tensor(values).reshape(1, 1, -1), lengths, [pages if extra else 0], 4, sink, local, count)


def test_selection_never_touches_sink_local_or_unsealed(device: str) -> None:
    scores = normal(1, 3, 2, 64, device=device)
    lengths, sealed = ints([1000, 777, 64], device), ints([61, 47, 3], device)
    pages, start = ops.select_pages(scores, lengths, sealed, 16, 2, 4, 10)
    assert start.tolist() == [59, 45, 0]  # 999 // 16 - 4 + 1, 776 // 16 - 4 + 1, 63 // 16 - 4 + 1
    for b, first in enumerate(start.tolist()):
        for row in pages[b].tolist():
            picks = [p for p in row if p >= 0]
            assert picks == sorted(set(picks)) and all(2 <= p < first for p in picks)
            assert row == picks + [-1] * (10 - len(picks))
            assert len(picks) == min(10, max(0, first - 2))


def test_all_unsealed_pages_are_local(device: str) -> None:
    """20 tokens after the last seal: the window alone would start at page 5."""
    _, start = ops.select_pages(torch.zeros(1, 1, 8, device=device), ints([81], device), ints([4], device), 16, 0, 1, 2)
    assert start.tolist() == [4]


# ---------------------------------------------------------------------------------------------- tokens


def assert_selects_tokens(
    mass: Tensor, lengths: list[int], sealed: list[int], page_size: int, ratio: float, max_picks: int
) -> None:
    device = str(mass.device)
    counts = halves(lengths, ratio, device)
    args = (ints(lengths, device), ints(sealed, device), counts, page_size, max_picks)
    for given_mass in (mass, spread(mass, 1)):
        for got, want in zip(ops.select_tokens(given_mass, *args), reference.select_tokens(mass, *args), strict=True):
            assert got.dtype == torch.int32
            assert torch.equal(got, want)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("max_picks", [0, 1, 20, 400])
def test_select_tokens(ratio: float, max_picks: int, device: str) -> None:
    lengths, sealed = [0, 1, 31, 32, 33, 200, 384, 210], [0, 0, 0, 1, 1, 11, 23, 13]
    assert_selects_tokens(normal(1, 8, 2, 384, device=device).abs(), lengths, sealed, 16, ratio, max_picks)


def test_select_tokens_with_ties(device: str) -> None:
    mass = (normal(1, 1, 2, 128, device=device).abs() * 2).round()
    assert_selects_tokens(mass, [128], [7], 16, 0.4, 64)
    assert_selects_tokens(torch.zeros_like(mass), [128], [7], 16, 0.4, 64)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20])
def test_as_many_tokens_are_local_as_are_picked(count: int, device: str) -> None:
    n, counts = 16, ints([count], device)
    tokens, start = ops.select_tokens(
        torch.ones(1, 1, n, device=device), ints([n], device), ints([n], device), counts, 1, 9
    )
    assert start.tolist() == [n - min(count, 9)]
    assert (tokens >= 0).sum() == min(count, 9, n - min(count, 9))


def test_unsealed_tokens_are_local(device: str) -> None:
    """The budget's local half is 5 tokens, but 17 are not sealed yet."""
    mass = normal(0, 1, 1, 64, device=device)
    tokens, start = ops.select_tokens(mass, ints([49], device), ints([2], device), ints([5], device), 16, 8)
    assert start.tolist() == [32]
    assert (tokens >= 0).sum() == 5 and tokens.max() < 32


# ---------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_selection_of_a_sequence_alone(dtype: torch.dtype, device: str) -> None:
    scores = normal(1, 4, 2, 40, device=device)
    lengths, sealed = ints([0, 640, 333, 17], device), ints([0, 39, 19, 0], device)
    pages, starts = ops.select_pages(scores, lengths, sealed, 16, 1, 2, 5)
    counts = ints([0, 8, 8, 3], device)
    tokens, token_starts = ops.select_tokens(scores, lengths.clamp(max=40), sealed.clamp(max=2), counts, 16, 5)
    for b in range(4):
        one = slice(b, b + 1)
        alone = ops.select_pages(scores[one], lengths[one], sealed[one], 16, 1, 2, 5)
        assert torch.equal(alone[0], pages[one]) and torch.equal(alone[1], starts[one])
        alone = ops.select_tokens(scores[one], lengths[one].clamp(max=40), sealed[one].clamp(max=2), counts[one], 16, 5)
        assert torch.equal(alone[0], tokens[one]) and torch.equal(alone[1], token_starts[one])
