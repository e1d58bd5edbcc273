"""Decode, prefill, attention mass and merging, against the reference and against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _cases import (
    BF16,
    F16,
    F32,
    PER_SEQUENCE,
    SHAPES,
    SMALL,
    Case,
    Shape,
    assert_as_good_as_torch,
    assert_attention,
    awkward_lengths,
    build,
    free_past,
    generator,
    ints,
    normal,
    one_thread,
    pack,
    permuted,
    poisoned,
    same_bits,
    sequence,
    spread,
)
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask, PagedKV

pytestmark = pytest.mark.gpu

SINK, WINDOW = 1, 2  # pages of the streaming head in most tests


def three_heads(shape: Shape, lengths: list[int], device: str, *, strided: bool = False, count: int = 2) -> tuple[
    Case, Tensor, Tensor, Tensor
]:  # fmt: skip
    """A dense, a streaming (with its past freed) and a retrieval head: case, windows, lists, local_start."""
    case = build(shape, lengths, device=device, strided=strided)
    lists, start = case.lists(sink=SINK, local=1, count=count)
    return free_past(case, 1, WINDOW, SINK), case.windows(DENSE, WINDOW, 0), lists, start


# ---------------------------------------------------------------------------------------------- INT8 keys

INT8 = [shape for shape in SHAPES if shape.kv_dtype == "int8"]


def one_hot(case: Case, rows: int, first: int) -> Tensor:
    """Queries [rows, Hq, D], each of another channel: a logit is that channel of a key, in whatever order one sums."""
    heads, D = case.heads * case.shape.group, case.shape.head_dim
    channels = (torch.arange(rows)[:, None] * heads + torch.arange(heads) + first) % D
    one_hots = torch.nn.functional.one_hot(channels, D)
    return one_hots.to(device=case.lengths.device, dtype=case.shape.dtype)


def dequantized(kv: PagedKV, dtype: torch.dtype) -> PagedKV:
    """The cache with what `dequantize_kv` makes of its pools, statistics in `dtype` too."""
    assert kv.scales is not None
    P, D = kv.k_pool.shape[1:]
    slots, blocks = (table[kv.slot_table >= 0].long() for table in (kv.slot_table, kv.block_table))
    stats = None if kv.stats is None else kv.stats.to(dtype)
    k, v = (torch.full((len(kv.k_pool), P, D), math.nan, dtype=dtype, device=kv.k_pool.device) for _ in "kv")
    of = None if stats is None else stats[blocks]
    k[slots], v[slots] = ops.dequantize_kv(kv.k_pool[slots], kv.v_pool[slots], of, kv.scales[slots], dtype)
    return kv._replace(k_pool=k, v_pool=v, scales=None, stats=stats)


@pytest.mark.parametrize("shape", INT8, ids=str)
def test_decode_reads_the_keys_of_dequantize_kv(shape: Shape, device: str) -> None:
    """A sequence for each token of a page, which attends it and raw ones without weight: lse is a channel of its key,
    to the bit in float32. Tensor cores take logits in units of log 2."""
    P, D = shape.page_size, shape.head_dim
    case = build(shape, [2 * P], device=device)
    whole = dequantized(case.kv, F32)
    k = whole.k_pool[whole.slot_table[0, :, 0].long()]  # [H, P, D]
    low = torch.full((P, case.heads, 2 * P, D), -3e4, dtype=shape.dtype, device=device)
    tables = {name: getattr(case.kv, name).repeat(P, 1, 1) for name in ("block_table", "slot_table")}
    kv = case.kv._replace(**tables, residual_k=low, residual_v=low.clone(), sealed=case.kv.sealed.repeat(P))
    lists = torch.arange(P, dtype=torch.int32, device=device)[:, None, None].repeat(1, case.heads, 1)
    mask = Mask(case.windows(0, 0, 0), lists, ints([P] * P, device), unit=1)
    for first in range(0, D, case.heads * shape.group):
        q = one_hot(case, 1, first).repeat(P, 1, 1)
        _, lse = ops.decode(q, mask, kv, ints([2 * P] * P, device), scale=1.0)
        of_head = q.unflatten(1, (case.heads, -1)).float() @ k.transpose(1, 2)  # [token, H, G, P]
        expected = of_head.diagonal(dim1=0, dim2=3).permute(2, 0, 1).flatten(1)
        error = 0 if shape.dtype == F32 else 2e-6
        torch.testing.assert_close(lse, expected, rtol=error, atol=error)


@pytest.mark.parametrize("shape", [shape for shape in INT8 if shape.dtype == F32], ids=str)
def test_all_read_the_same_key(shape: Shape, device: str) -> None:
    """Decode, prefill and attention_mass, over codes and over what dequantize_kv makes of them: equal to the bit."""
    case, windows, lists, start = three_heads(shape, awkward_lengths(shape.page_size), device)
    both, rows = (case.kv, dequantized(case.kv, F32)), 2
    mask, chunk_mask = Mask(windows, lists, start, sink=SINK), Mask(case.windows(DENSE, WINDOW, DENSE), sink=SINK)
    cu = ints(range(0, rows * case.batch + 1, rows), device)
    new = normal(5, rows * case.batch, case.heads, shape.head_dim, device=device)
    for first in range(0, shape.head_dim, case.heads * shape.group):
        q = one_hot(case, case.batch, first)
        lse, of_plain = (ops.decode(q, mask, kv, case.lengths)[1] for kv in both)
        assert same_bits(lse, of_plain)
        mass = [ops.attention_mass(q[:, None], lse[:, None], mask, kv, case.lengths) for kv in both]
        assert same_bits(*mass)
        q = one_hot(case, rows * case.batch, first)
        chunks = [ops.prefill(q, new, new, cu, cu, chunk_mask, kv, case.lengths)[1] for kv in both]
        assert same_bits(*chunks)


# ---------------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_decode(shape: Shape, strided: bool, device: str) -> None:
    case, windows, lists, start = three_heads(shape, awkward_lengths(shape.page_size), device, strided=strided)
    q = case.queries()
    if strided:
        q, lists = spread(spread(q, 1), 0), spread(lists, 1)
    args = (Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    assert_attention(ops.decode(q, *args), reference.decode, q, *args)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4], SHAPES[6], SHAPES[9]], ids=str)
def test_decode_of_single_tokens(shape: Shape, device: str) -> None:
    case = build(shape, awkward_lengths(shape.page_size), device=device)
    lists, start = case.token_lists(ratio=0.4, max_picks=shape.page_size)
    q, windows = case.queries(), case.windows(0, DENSE, 0)
    args = (Mask(windows, lists, start, unit=1), case.kv, case.lengths)
    assert_attention(ops.decode(q, *args), reference.decode, q, *args)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[8], SHAPES[10]], ids=str)
def test_decode_over_many_chunks(shape: Shape, device: str) -> None:
    """Kernels cut a sequence's entries every 256 tokens and merge."""
    case, windows, lists, start = three_heads(shape, [1000, 256, 257, 512 + shape.page_size], device, count=30)
    q = case.queries()
    args = (Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    assert_attention(ops.decode(q, *args), reference.decode, q, *args)
    lists, start = case.token_lists(ratio=0.8, max_picks=400)
    args = (Mask(windows, lists, start, unit=1), case.kv, case.lengths)
    assert_attention(ops.decode(q, *args), reference.decode, q, *args)


@pytest.mark.parametrize("shape", INT8, ids=str)
def test_int8_stays_near_the_original(shape: Shape, device: str) -> None:
    """The other tests hold the kernels to the dequantised cache; this one holds the cache to the tokens."""
    case = build(shape, [5 * shape.page_size, 3 * shape.page_size + 1], heads=2, device=device)
    q = case.queries()
    out, _ = ops.decode(q, Mask(case.windows(DENSE, DENSE)), case.kv, case.lengths)
    for b in range(case.batch):
        for h in range(case.heads):
            g = slice(h * shape.group, (h + 1) * shape.group)
            want, _ = reference.attend(q[b, g], case.k[b][:, h], case.v[b][:, h], shape.head_dim**-0.5)
            assert (out[b, g].double() - want).abs().max() < 0.04


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale_and_large_logits(scale: float, device: str) -> None:
    shape = SHAPES[1]
    case, windows, lists, start = three_heads(shape, [90, 33], device)
    for q in (case.queries(), 300 * case.queries()):
        args = (Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
        got = ops.decode(q, *args, scale=scale)
        exact = reference.decode(q.double(), *args, scale=scale)
        if float(q.abs().max()) < 10:
            assert_attention(got, reference.decode, q, *args, scale=scale)
        torch.testing.assert_close(got[1], exact[1], rtol=2e-6, atol=1e-4)
        assert got[0].isfinite().all() and (got[0].abs() <= 6).all()


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.5])
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_any_scale_of_prefill(kv: str, scale: float, device: str) -> None:
    """Among them such as turn the order of products around, and make them all equal."""
    case = build(Shape(64, 16, 16, 2, BF16, kv), [90, 0], device=device)
    q, cu = ragged(case.shape, [30, 21], case.heads * 2, device, seed=10)
    k, v = (ragged(case.shape, [30, 21], case.heads, device, seed=seed)[0] for seed in (11, 12))
    args = (k, v, cu, cu, Mask(case.windows(DENSE, 2, DENSE), sink=1), case.kv, case.lengths)
    assert_attention(ops.prefill(q, *args, scale=scale), reference.prefill, q, *args, scale=scale)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_all_pages_selected_is_dense(shape: Shape, device: str) -> None:
    case = build(shape, awkward_lengths(shape.page_size), device=device)
    q, pages = case.queries(), case.kv.block_table.shape[2]
    dense = ops.decode(q, Mask(case.windows(DENSE, DENSE, DENSE)), case.kv, case.lengths)
    for sink, local in ((0, 1), (1, 1), (2, 2)):
        lists, start = case.lists(sink=sink, local=local, count=pages)
        listed = ops.decode(q, Mask(case.windows(0, 0, 0), lists, start, sink=sink), case.kv, case.lengths)
        assert all(same_bits(a, b) for a, b in zip(listed, dense, strict=True))


def test_all_tokens_selected_is_dense(device: str) -> None:
    case = build(SHAPES[1], [300, 17, 64], device=device)
    q = case.queries()
    lists, start = case.token_lists(ratio=1.0, max_picks=300)
    dense = ops.decode(q, Mask(case.windows(DENSE, DENSE, DENSE)), case.kv, case.lengths)
    listed = ops.decode(q, Mask(case.windows(0, 0, 0), lists, start, unit=1), case.kv, case.lengths)
    for a, b in zip(listed, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("sink, window", [(0, 1), (1, 2), (3, 1), (1, 100)])
def test_a_streaming_rule_is_its_explicit_list(shape: Shape, sink: int, window: int, device: str) -> None:
    """Sink pages as a list, local pages by local_start."""
    p = shape.page_size
    case = build(shape, awkward_lengths(p), device=device)
    q = case.queries()
    starts = [
        max(0, min((n - 1) // p - window + 1, sealed)) if n else 0
        for n, sealed in zip(case.lengths.tolist(), case.kv.sealed.tolist(), strict=True)
    ]
    rows = [list(range(min(sink, start))) for start in starts]
    lists = ints([[[*row, *([-1] * (sink - len(row)))]] * 3 for row in rows], device).reshape(case.batch, 3, sink)
    streaming = ops.decode(q, Mask(case.windows(window, window, window), sink=sink), case.kv, case.lengths)
    listed = ops.decode(q, Mask(case.windows(0, 0, 0), lists, ints(starts, device)), case.kv, case.lengths)
    assert all(same_bits(a, b) for a, b in zip(streaming, listed, strict=True))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_streaming_head_passes_over_what_it_freed(shape: Shape, device: str) -> None:
    """Inside its window too: the window may have been smaller when the page was freed."""
    case = build(shape, [6 * shape.page_size + 3, 3 * shape.page_size], device=device)
    freed = free_past(case, 1, 1, 0)
    q, windows = case.queries(), case.windows(DENSE, 4, DENSE)
    args = (Mask(windows, sink=2), freed.kv, freed.lengths)
    assert_attention(ops.decode(q, *args), reference.decode, q, *args)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_where_blocks_lie_changes_nothing(shape: Shape, device: str) -> None:
    case, windows, lists, start = three_heads(shape, [7 * shape.page_size + 1, shape.page_size, 300], device, count=3)
    q, moved = case.queries(), permuted(case.kv, seed=5)
    want = ops.decode(q, Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    got = ops.decode(q, Mask(windows, lists, start, sink=SINK), moved, case.lengths)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    masses = [
        ops.attention_mass(q[:, None], want[1][:, None], Mask(windows, lists, start, sink=SINK), kv, case.lengths)
        for kv in (case.kv, moved)
    ]
    assert same_bits(*masses)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_a_sequence_alone_is_the_same_in_a_batch(shape: Shape, device: str) -> None:
    case, windows, lists, start = three_heads(shape, [*awkward_lengths(shape.page_size), 600], device)
    q = case.queries()
    out, lse = ops.decode(q, Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    mass = ops.attention_mass(q[:, None], lse[:, None], Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    for b in range(case.batch):
        i, one = slice(b, b + 1), sequence(case, b)
        args = (Mask(windows, lists[i], start[i], sink=SINK), one.kv, one.lengths)
        alone = ops.decode(q[i], *args)
        assert same_bits(alone[0], out[i]) and same_bits(alone[1], lse[i])
        assert same_bits(ops.attention_mass(q[i, None], lse[i, None], *args), mass[i])


def test_equal_sequences_have_equal_results(device: str) -> None:
    """Two sequences that share all their blocks, as a fork does."""
    case, windows, lists, start = three_heads(SHAPES[1], [100], device)
    kv = case.kv._replace(**{name: getattr(case.kv, name).repeat_interleave(3, dim=0) for name in PER_SEQUENCE})
    q = case.queries().repeat_interleave(3, dim=0)
    out, lse = ops.decode(
        q, Mask(windows, lists.repeat(3, 1, 1), start.repeat(3), sink=SINK), kv, case.lengths.repeat(3)
    )
    want, want_lse = ops.decode(q[:1], Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    assert all(same_bits(out[i : i + 1], want) and same_bits(lse[i : i + 1], want_lse) for i in range(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_of_one_give_one(shape: Shape, device: str) -> None:
    def ones_for_v(seed: int, *dims: int, dtype: torch.dtype, device: str) -> Tensor:
        x = normal(seed, *dims, dtype=dtype, device=device)
        return torch.ones_like(x) if seed >= 200 else x

    lengths = awkward_lengths(shape.page_size)
    case = build(shape, lengths, device=device, make=ones_for_v)
    lists, start = case.lists(sink=SINK, local=1, count=1)
    q = case.queries()
    out, _ = ops.decode(q, Mask(case.windows(DENSE, WINDOW, 0), lists, start, sink=SINK), case.kv, case.lengths)
    tolerance = 4 * torch.finfo(shape.dtype).eps
    for b, n in enumerate(lengths):
        assert ((out[b].float() - (1 if n else 0)).abs() <= tolerance).all()


def test_nothing_attended(device: str) -> None:
    case = build(SHAPES[1], [0, 0], columns=2, device=device)
    out, lse = ops.decode(case.queries(), Mask(case.windows(DENSE, 1, 1)), case.kv, case.lengths)
    assert not out.any() and (lse == -math.inf).all()
    no_batch = case.kv._replace(**{name: getattr(case.kv, name)[:0] for name in PER_SEQUENCE})
    out, lse = ops.decode(case.queries()[:0], Mask(case.windows(DENSE, 1, 1)), no_batch, case.lengths[:0])
    assert out.shape == (0, 12, 64) and lse.shape == (0, 12)


def without_raw_buffer(case: Case) -> PagedKV:
    """A plain paged cache of the same tokens: the last page, maybe partial, is in the pools too. Tails are poison."""
    shape = case.shape
    p, counts = shape.page_size, [-(-n // shape.page_size) for n in case.lengths.tolist()]
    total, int8 = sum(counts) * case.heads, shape.kv_dtype == "int8"
    pool = torch.uint8 if int8 else shape.dtype
    k_pool, v_pool = (poisoned(total, p, shape.head_dim, dtype=pool, device=str(case.lengths.device)) for _ in range(2))
    scales = poisoned(total, 2, p, 2, dtype=F32, device=str(case.lengths.device)) if int8 else None
    table, block = torch.full((case.batch, case.heads, max(counts)), -1, dtype=torch.int32), 0
    for b, n in enumerate(case.lengths.tolist()):
        for h in range(case.heads):
            for page in range(counts[b]):
                rows = slice(page * p, min(n, (page + 1) * p))
                k, v = case.k[b][None, rows, h], case.v[b][None, rows, h]
                size = k.shape[1]
                if scales is not None:
                    k, v, scale = reference.quantize_kv(k, v)
                    scales[block, :, :size] = scale[0]
                k_pool[block, :size], v_pool[block, :size] = k[0], v[0]
                table[b, h, page], block = block, block + 1
    table = table.to(case.lengths.device)
    return PagedKV(k_pool, v_pool, None, scales, table, table, None, None, ints(counts, str(case.lengths.device)))


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5], SHAPES[8], SHAPES[9]], ids=str)
def test_a_plain_paged_cache(shape: Shape, device: str) -> None:
    case = build(shape, awkward_lengths(shape.page_size), device=device)
    kv, q = without_raw_buffer(case), case.queries()
    lists, start = case.lists(sink=SINK, local=1, count=2)
    args = (Mask(case.windows(DENSE, WINDOW, 0), lists, start, sink=SINK), kv, case.lengths)
    got = ops.decode(q, *args)
    assert_attention(got, reference.decode, q, *args)
    if shape.kv_dtype == "auto":
        with_raw = ops.decode(q, args[0], case.kv, args[2])
        torch.testing.assert_close(got[0], with_raw[0], rtol=1e-2 if shape.dtype == BF16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_step_reads_pages_as_they_lay_when_it_began(shape: Shape, device: str) -> None:
    """The append of the 2P-th token seals a page; with `sealed` from before it, the page is still read raw."""
    p = shape.page_size
    lengths = [2 * p, 4 * p]  # both seal a page with their newest token
    raw = build(Shape(shape.head_dim, p, None, shape.group, shape.dtype, "auto"), lengths, heads=2, device=device)
    done = build(shape, lengths, heads=2, device=device)
    # as build leaves it, but with all raw rows of the last two pages
    for b, n in enumerate(lengths):
        for t in range(n - 2 * p, n):
            for rows, tokens in ((done.kv.residual_k, done.k[b]), (done.kv.residual_v, done.v[b])):
                assert rows is not None
                rows[b, :, t % (2 * p)] = tokens[t]
    q, windows = done.queries(), done.windows(DENSE, DENSE)
    before = done.kv._replace(sealed=done.kv.sealed - 1)
    args = (Mask(windows), before, done.lengths)
    got = ops.decode(q, *args)
    assert_attention(got, reference.decode, q, *args)
    exact = reference.decode(q.double(), Mask(windows), raw.kv, raw.lengths)[1]
    torch.testing.assert_close(got[1][0], exact[0], rtol=1e-5, atol=1e-5)  # nothing of the first is quantised


def test_bad_values_stay_in_their_sequence(device: str) -> None:
    case, windows, lists, start = three_heads(SHAPES[1], [100, 100, 40], device)
    q = case.queries()
    clean = ops.decode(q, Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    assert case.kv.residual_k is not None and case.kv.residual_v is not None
    case.kv.residual_k[1, :, 99 % 32, 3], case.kv.residual_v[1, :, 98 % 32, 4], q[1, 0, 0] = (
        math.nan,
        math.inf,
        math.nan,
    )
    got = ops.decode(q, Mask(windows, lists, start, sink=SINK), case.kv, case.lengths)
    for a, b in zip(got, clean, strict=True):
        assert same_bits(a[[0, 2]], b[[0, 2]])
    assert got[1][1, 0].isnan()


# ---------------------------------------------------------------------------------------------- prefill


def page_lists(lengths: list[int], page_size: int, heads: int, count: int, device: str) -> Tensor:
    """Random older pages for every page of queries [B, H, R, count], without page 0, which is the sink."""
    rows = max(-(-n // page_size) for n in lengths)
    rng = generator(6)

    def row(page: int) -> list[int]:
        picks = sorted((torch.randperm(max(page - SINK, 0), generator=rng)[:count] + SINK).tolist())
        return picks + [-1] * (count - len(picks))

    return ints([[[row(page) for page in range(rows)] for _ in range(heads)] for _ in lengths], device)


def ragged(shape: Shape, lengths: list[int], heads: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Random packed tokens [N, heads, D] and their bounds."""
    dims = heads, shape.head_dim
    return pack([normal(seed + b, n, *dims, dtype=shape.dtype, device=device) for b, n in enumerate(lengths)])


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


# ---------------------------------------------------------------------------------------------- mass


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


# ---------------------------------------------------------------------------------------------- merge


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


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.gpu
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


def test_one_huge_channel_does_not_blur_the_others() -> None:
    """INT8 without statistics: decode is as near to the dequantised keys as plain attention over these is."""
    shape = Shape(64, 16, None, 4, F32, "int8")

    def huge(seed: int, *dims: int, **options: Any) -> Tensor:
        x = normal(seed, *dims, **options)
        x[..., 5] = -1e5
        return x

    case = build(shape, [160], heads=1, make=huge)
    q = case.queries()
    q[..., 5] = 0  # what is left are the others
    got = ops.decode(q, Mask(case.windows(DENSE)), case.kv, case.lengths)
    assert_attention(got, reference.decode, q, Mask(case.windows(DENSE)), case.kv, case.lengths)
