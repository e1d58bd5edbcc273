"""Decode, against the reference and against itself; and the keys that it and the others read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _cases import (
    BF16,
    F32,
    PER_SEQUENCE,
    SHAPES,
    SINK,
    SMALL,
    WINDOW,
    Case,
    Shape,
    assert_attention,
    awkward_lengths,
    build,
    free_past,
    ints,
    normal,
    permuted,
    poisoned,
    same_bits,
    sequence,
    spread,
    three_heads,
)
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask, PagedKV

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("size", [2.0**-13, 2.0**-5, 2.0**8])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4], SHAPES[9], SHAPES[11]], ids=str)
def test_values_of_any_size(shape: Shape, size: float, device: str) -> None:
    """What a weight is multiplied by to fit its code has as many digits as other numbers of 16 bits."""
    case = build(shape, awkward_lengths(shape.page_size), device=device)
    assert case.kv.scales is not None and case.kv.residual_v is not None
    case.kv.scales[:, 0] *= size
    case.kv.residual_v.mul_(size)
    q, args = case.queries(), (Mask(case.windows(*[DENSE] * case.heads)), case.kv, case.lengths)
    out, exact = ops.decode(q, *args)[0].double(), reference.decode(q.double(), *args)[0]
    assert (out - exact).abs().max() <= (0.012 if shape.dtype == BF16 else 0.0015) * exact.abs().max()


@pytest.mark.parametrize("shape", [SHAPES[9], SHAPES[11], Shape(64, 16, None, 4, BF16, "int8")], ids=str)
@pytest.mark.parametrize("logit", [-400.0, -3.0])
def test_one_enormous_value(shape: Shape, logit: float, device: str) -> None:
    """It neither hides the others where it has next to no weight, nor is lost where it has some."""
    case = build(shape, [5 * shape.page_size], device=device)
    kv, D = case.kv, shape.head_dim
    assert kv.scales is not None and kv.residual_k is not None
    kv.scales[:, 1] = 0  # keys of zeros, but for one
    kv.residual_k.zero_()
    largest = 2.0**100 if shape.dtype == BF16 else 2.0**15
    for slot in kv.slot_table[0, :, 1].tolist():
        kv.scales[slot, 1, 3, 1] = logit / D**0.5
        kv.scales[slot, 0, 3] = torch.tensor([largest / 255, -largest / 2], device=device)
    q, args = torch.ones_like(case.queries()), (Mask(case.windows(*[DENSE] * case.heads)), kv, case.lengths)
    assert_attention(ops.decode(q, *args), reference.decode, q, *args)


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
