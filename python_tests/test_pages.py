"""Statistics, the INT8 grid, and the life of a page: append, seal, gather."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from _cases import (
    BF16,
    F16,
    F32,
    SHAPES,
    SMALL,
    Shape,
    assert_moments,
    awkward_lengths,
    build,
    empty_kv,
    generator,
    guarded,
    ints,
    normal,
    outside,
    pack,
    same_bits,
    sealed_pages,
    spread,
    spread_kv,
    unsealed_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask, PagedKV

pytestmark = pytest.mark.gpu

# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "page_size, group, head_dim",
    [(16, 16, 16), (16, 4, 80), (12, 4, 96), (64, 16, 256), (5, 1, 64)],
)
def test_page_stats(page_size: int, group: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    k = normal(0, 5, page_size, head_dim, dtype=dtype, device=device)
    assert torch.equal(ops.page_stats(k, group), reference.page_stats(k, group))
    for strided in (spread(k, 0), spread(k, 1)):
        assert torch.equal(ops.page_stats(strided, group), reference.page_stats(k, group))


def test_page_stats_of_no_pages(device: str) -> None:
    assert ops.page_stats(torch.zeros(0, 16, 64, device=device), 4).shape == (0, 4, 2, 64)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_page_stats_keep_nan_and_infinities(dtype: torch.dtype, device: str) -> None:
    k = normal(0, 2, 16, 64, dtype=dtype, device=device)
    k[0, 3, 5], k[0, 9, 6], k[1, 0, 7], k[1, 15, 63] = math.nan, math.inf, -math.inf, math.nan
    torch.testing.assert_close(ops.page_stats(k, 8), reference.page_stats(k, 8), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "page_size, group, head_dim", [(16, 16, 16), (64, 64, 128), (64, 32, 80), (12, 4, 96), (16, 2, 256), (5, 1, 64)]
)
def test_page_moments(page_size: int, group: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    k = (normal(0, 5, page_size, head_dim) * 2 + 3 * normal(1, head_dim)).to(device=device, dtype=dtype)
    got = ops.page_moments(k, group)
    assert_moments(got, reference.page_moments(k, group))
    for strided in (spread(k, 0), spread(k, 1)):
        assert same_bits(ops.page_moments(strided, group), got)
    if group == 1:
        assert torch.equal(got, torch.stack([k, k], 2))
    stats = ops.page_stats(k, group)
    if group == 2:
        assert_moments(got, stats)  # half the distance of two values is their deviation


def test_page_moments_of_no_pages(device: str) -> None:
    assert ops.page_moments(torch.zeros(0, 16, 64, device=device), 4).shape == (0, 4, 2, 64)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_page_moments_of_bad_values_stay_in_their_group(dtype: torch.dtype, device: str) -> None:
    k = normal(0, 2, 16, 64, dtype=dtype, device=device)
    clean = ops.page_moments(k, 8)
    k[0, 3, 5], k[0, 9, 6], k[1, 0, 7] = math.nan, math.inf, -math.inf
    got = ops.page_moments(k, 8)
    assert_moments(got, reference.page_moments(k, 8))
    same = ~reference.page_moments(k, 8).isnan()
    assert torch.equal(got[same], clean[same]) and int((~same).sum()) == 6


# ---------------------------------------------------------------------------------------------- the grid


def plain(pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return normal(1, pages, page_size, head_dim, dtype=dtype)


def constant_channels(pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    k = plain(pages, page_size, head_dim, dtype)
    k[:, :, ::2] = k[:, :1, ::2]
    return k


def constant(pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.full((pages, page_size, head_dim), -1.7, dtype=dtype)


def zeros(pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(pages, page_size, head_dim, dtype=dtype)


def offset_channels(pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return (plain(pages, page_size, head_dim, F32) + 50.0 * normal(2, head_dim)).to(dtype)


def outliers(pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Channels, and single values, at the ends of the range."""
    k = plain(pages, page_size, head_dim, F32)
    huge = min(3e38, float(torch.finfo(dtype).max))
    k[:, 3, 0], k[:, 5, 1] = huge, -huge
    k[:, 2, 2], k[:, 4, 2] = huge, -huge
    k[:, 2, 3] = min(1e30, huge)
    return k.to(dtype)


def denormals(pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return (plain(pages, page_size, head_dim, F32) * float(torch.finfo(dtype).tiny) * 2**-3).to(dtype)


VALUES = [plain, constant_channels, constant, zeros, offset_channels, outliers, denormals]


def assert_within_half_a_step(x: Tensor, back: Tensor, step: Tensor, dtype: torch.dtype) -> None:
    """|x - back| <= step / 2 + rounding: of the grid in float32, of the result in its dtype, of denormals."""
    size = torch.maximum(x.double().abs(), back.double().abs())
    span = 256 * step.double() + size
    info = torch.finfo(dtype)
    slack = 8 * torch.finfo(F32).eps * span + info.eps * (size + info.tiny) + 512 * 2.0**-149
    assert ((x.double() - back.double()).abs() <= step.double() / 2 + slack).all()


@pytest.mark.parametrize("make", VALUES, ids=lambda make: str(make.__name__))
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("page_size, group, head_dim", [(16, 4, 64), (12, 12, 80), (64, None, 128)])
def test_quantize_and_back(
    make: object, page_size: int, group: int | None, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    assert callable(make)
    k = make(3, page_size, head_dim, dtype).to(device)
    v = make(3, page_size, head_dim, dtype).flip(2).contiguous().to(device)
    stats = None if group is None else ops.page_stats(k, group)

    k_codes, v_codes, scales = ops.quantize_kv(k, v, stats)
    for got, want in zip((k_codes, v_codes, scales), reference.quantize_kv(k, v, stats), strict=True):
        assert same_bits(got, want)

    k_back, v_back = ops.dequantize_kv(k_codes, v_codes, stats, scales, dtype)
    want_k, want_v = reference.dequantize_kv(k_codes, v_codes, stats, scales, dtype)
    assert torch.equal(k_back, want_k)
    assert torch.equal(v_back, want_v)

    assert_within_half_a_step(v, v_back, scales[:, 0, :, :1], dtype)
    if stats is None:
        assert_within_half_a_step(k, k_back, scales[:, 1, :, :1], dtype)
    else:
        low, high = stats.repeat_interleave(page_size // stats.shape[1], dim=1).unbind(2)
        assert_within_half_a_step(k, k_back, high.float() / 255 - low.float() / 255, dtype)
        assert (k_back >= low).all() and (k_back <= high).all(), "a dequantised key left its box"


@pytest.mark.parametrize("with_stats", [True, False])
def test_a_constant_is_exact(with_stats: bool, device: str) -> None:
    x = torch.full((1, 16, 64), 0.1, device=device)
    stats = ops.page_stats(x, 4) if with_stats else None
    k_codes, v_codes, scales = ops.quantize_kv(x, x, stats)
    assert not k_codes.any() and not v_codes.any() and not scales[..., 0].any()
    assert all(torch.equal(back, x) for back in ops.dequantize_kv(k_codes, v_codes, stats, scales, F32))


def test_minimum_and_maximum_are_the_ends_of_the_grid(device: str) -> None:
    k = normal(4, 2, 16, 64, device=device)
    stats = ops.page_stats(k, 16)
    k_codes, v_codes, _ = ops.quantize_kv(k, k, stats)
    assert torch.equal(k_codes.amin(1), torch.zeros_like(k_codes[:, 0]))
    assert torch.equal(k_codes.amax(1), torch.full_like(k_codes[:, 0], 255))
    assert torch.equal(v_codes.amax(2), torch.full_like(v_codes[:, :, 0], 255))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_codes_of_any_number_on_any_grid(dtype: torch.dtype, device: str) -> None:
    """A division rounds once, whatever its sides are: random bits, and numbers next to the middle between two codes."""
    torch.manual_seed(5)
    bits, pages, D = {4: torch.int32, 2: torch.int16}[dtype.itemsize], 64, 64
    info = torch.iinfo(bits)
    stats, k = (torch.randint(info.min, info.max, (pages, n, D), dtype=bits).view(dtype) for n in (4, 16))
    stats = stats.view(pages, 2, 2, D).sort(2).values
    low, high = stats.float().repeat_interleave(8, dim=1).unbind(2)
    step = reference.grid_step(low, high)
    middle = low + step * (torch.randint(0, 256, k.shape) + 0.5 + 2.0**-20 * torch.randint(-2, 3, k.shape))
    k = torch.where(torch.rand(k.shape) < 0.8, middle.to(dtype), k)
    codes, _, _ = ops.quantize_kv(k.to(device), k.to(device), stats.to(device))
    assert same_bits(codes.cpu(), reference.grid_codes(k.float(), low, step))
    assert len(codes.unique()) > 250


@settings(max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
def test_any_finite_token_comes_back_within_half_a_step(values: list[float]) -> None:
    x = torch.tensor(values, dtype=F32)
    v, k = x.reshape(1, 1, 16), x.reshape(1, 16, 1).expand(1, 16, 16).contiguous()
    stats = ops.page_stats(k, 16)
    k_codes, _, _ = ops.quantize_kv(k, k, stats)
    _, v_codes, scales = ops.quantize_kv(v, v)
    k_back, _ = ops.dequantize_kv(k_codes, k_codes, stats, torch.zeros(1, 1, 16, 2), F32)
    _, v_back = ops.dequantize_kv(v_codes, v_codes, None, scales, F32)
    step = x.max() / 255 - x.min() / 255
    assert k_back.min() >= x.min() and k_back.max() <= x.max()
    assert_within_half_a_step(k, k_back, step, F32)
    assert_within_half_a_step(v, v_back, step, F32)


@pytest.mark.parametrize("with_stats", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_stay_in_their_group(bad: float, with_stats: bool, device: str) -> None:
    """No crash, and no other token (of V) or channel's group (of K) notices."""
    k = normal(5, 1, 16, 64, device=device)
    broken = k.clone()
    broken[0, 3, 7] = bad
    stats, broken_stats = (ops.page_stats(x, 4) if with_stats else None for x in (k, broken))
    clean, dirty = ops.quantize_kv(k, k, stats), ops.quantize_kv(broken, broken, broken_stats)
    backs = ops.dequantize_kv(*dirty[:2], broken_stats, dirty[2], F32)
    wants = ops.dequantize_kv(*clean[:2], stats, clean[2], F32)
    for i, (back, want) in enumerate(zip(backs, wants, strict=True)):
        same = back == want
        if i == 0 and with_stats:
            same[0, :4, 7] = True
        else:
            same[0, 3] = True
        assert same.all()


# ---------------------------------------------------------------------------------------------- append


def assert_same_cache(got: PagedKV, want: PagedKV, lengths: list[int]) -> None:
    """Every bit of the pools, the poison of unused blocks included, and the raw rows that hold a token."""
    for name in ("k_pool", "v_pool", "stats", "scales"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert same_bits(a, b), name
            assert same_bits(outside(a), outside(b)), f"{name}: written out of bounds"
    if got.moments is not None and want.moments is not None:
        assert_moments(got.moments, want.moments)
        assert same_bits(outside(got.moments), outside(want.moments)), "moments: written out of bounds"
    for name in ("residual_k", "residual_v"):
        a, b = getattr(got, name), getattr(want, name)
        for i, n in enumerate(lengths):
            rows = unsealed_rows(want, i, n)
            assert same_bits(a[i][:, rows], b[i][:, rows]), name
        assert same_bits(outside(a), outside(b)), f"{name}: written out of bounds"


def append_in_steps(k: list[Tensor], v: list[Tensor], kv: PagedKV, steps: list[list[int]]) -> PagedKV:
    """Appends steps[i][b] tokens of sequence b at a time, keeping lengths and sealed as a cache does."""
    page_size, held = kv.k_pool.shape[1], [0] * len(k)
    for step in steps:
        parts = [[s[b : b + n] for s, b, n in zip(x, held, step, strict=True)] for x in (k, v)]
        (new_k, cu), (new_v, _) = pack(parts[0]), pack(parts[1])
        ops.append_kv(new_k, new_v, cu, ints(held, str(new_k.device)), kv)
        held = [n + new for n, new in zip(held, step, strict=True)]
        due = ints(sealed_pages(held, page_size), str(new_k.device))
        kv = kv._replace(sealed=torch.maximum(kv.sealed, due))
    return kv


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_append_in_one_go(shape: Shape, strided: bool, device: str) -> None:
    lengths = awkward_lengths(shape.page_size)
    want = build(shape, lengths, device=device, seed=1, strided=strided)
    kv = empty_kv(shape, sealed_pages(lengths, shape.page_size), heads=3, columns=want.kv.block_table.shape[2],
                  device=device, seed=1)  # fmt: skip
    kv = spread_kv(kv) if strided else kv
    (k, cu), (v, _) = pack(want.k), pack(want.v)
    if strided:
        k, v = spread(k, 0), spread(v, 1)
    ops.append_kv(k, v, cu, torch.zeros_like(want.lengths), kv)
    assert_same_cache(kv._replace(sealed=want.kv.sealed), want.kv, lengths)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("how", ["token by token", "pages", "random"])
def test_chunks_make_the_same_cache(shape: Shape, how: str, device: str) -> None:
    p = shape.page_size
    lengths = [3 * p + 5, 1, 4 * p, p + 1, 0, 2 * p - 1]
    want = build(shape, lengths, heads=2, device=device, seed=2)
    kv = empty_kv(shape, sealed_pages(lengths, p), heads=2, columns=want.kv.block_table.shape[2], device=device, seed=2)
    rng, left, steps = generator(9), list(lengths), []
    while any(left):
        most = {"token by token": 1, "pages": p, "random": 1 + int(torch.randint(3 * p, (), generator=rng))}[how]
        step = [min(most if how != "random" else int(torch.randint(most + 1, (), generator=rng)), n) for n in left]
        steps.append(step)
        left = [n - s for n, s in zip(left, step, strict=True)]
    kv = append_in_steps(want.k, want.v, kv, steps)
    assert_same_cache(kv, want.kv, lengths)
    for b, h, page in product(range(len(lengths)), range(2), range(4)):
        if kv.moments is not None and page < int(kv.sealed[b]):
            rows = want.k[b][None, page * p : (page + 1) * p, h]
            assert same_bits(
                kv.moments[kv.block_table[b, h, page]], ops.page_moments(rows, shape.moments_group or p)[0]
            )


def test_append_of_nothing_writes_nothing(device: str) -> None:
    case = build(SHAPES[1], [40, 0], device=device)
    before = [None if t is None else t.clone() for t in case.kv]
    nothing = torch.zeros(0, 3, 64, device=device)
    ops.append_kv(nothing, nothing, ints([0, 0, 0], device), case.lengths, case.kv)
    assert all(a is None or b is None or same_bits(a, b) for a, b in zip(before, case.kv, strict=True))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_page_without_a_slot_is_passed_over(shape: Shape, device: str) -> None:
    """A streaming head's pages that are already past: no block is needed, and none is touched."""
    p = shape.page_size
    lengths = [5 * p + 3]
    full = build(shape, lengths, heads=2, device=device, seed=3)
    kv = empty_kv(shape, [4], heads=2, columns=full.kv.block_table.shape[2], device=device, seed=3)
    want = build(shape, lengths, heads=2, device=device, seed=3)
    for page in (1, 2):
        slot, block = int(kv.slot_table[0, 1, page]), int(kv.block_table[0, 1, page])
        in_slot, of_block = (want.kv.k_pool, want.kv.v_pool, want.kv.scales), (want.kv.stats, want.kv.moments)
        for t, row in (*((t, slot) for t in in_slot), *((t, block) for t in of_block)):
            if t is not None:
                t[row] = math.nan if t.dtype.is_floating_point else 255
        kv.slot_table[0, 1, page] = kv.block_table[0, 1, page] = -1
    (k, cu), (v, _) = pack(full.k), pack(full.v)
    ops.append_kv(k, v, cu, ints([0], device), kv)
    assert_same_cache(kv._replace(sealed=ints([4], device)), want.kv, lengths)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_sealed_page_is_never_written_again(shape: Shape, device: str) -> None:
    """After a crop more pages may be sealed than the length alone would say."""
    p = shape.page_size
    case = build(shape, [4 * p], heads=2, device=device)  # 3 sealed
    before = [None if t is None else t.clone() for t in case.kv[:4] + case.kv[-1:]]
    more = normal(9, p - 2, 2, shape.head_dim, dtype=shape.dtype, device=device)
    ops.append_kv(more, more, ints([0, p - 2], device), ints([3 * p + 1], device), case.kv)  # to 4P - 1: nothing is due
    after = case.kv[:4] + case.kv[-1:]
    assert all(a is None or b is None or same_bits(a, b) for a, b in zip(before, after, strict=True))


def test_append_reads_bad_values_without_harm(device: str) -> None:
    shape = SHAPES[1]
    kv = empty_kv(shape, [2], heads=1, device=device)
    k = normal(1, 48, 1, 64, device=device)
    k[3, 0, 0], k[20, 0, 1], k[21, 0, 1] = math.nan, math.inf, -math.inf
    ops.append_kv(k, k, ints([0, 48], device), ints([0], device), kv)
    assert kv.stats is not None
    held = kv.stats[int(kv.block_table[0, 0, 0])]
    torch.testing.assert_close(held, reference.page_stats(k[None, :16, 0], 8)[0], rtol=0, atol=0, equal_nan=True)


# Each kind of pools, without what only whole pages have.
PLAIN = [replace(shape, stats_group=None, moments_group=None) for shape in SHAPES]


@pytest.mark.parametrize("shape", PLAIN, ids=str)
@pytest.mark.parametrize("how", ["one go", "token by token", "strided"])
def test_append_without_a_residual_buffer(shape: Shape, how: str, device: str) -> None:
    """Tokens go into their pages at once, those of pages without a slot nowhere; nothing else is written."""
    p = shape.page_size
    lengths = awkward_lengths(p) if how != "token by token" else [p + 3, 0, 2 * p, 1]
    k, v = ([normal(s + i, n, 3, shape.head_dim, dtype=shape.dtype, device=device) for i, n in enumerate(lengths)]
            for s in (10, 30))  # fmt: skip
    pages = [-(-n // p) for n in lengths]
    got, want = (
        empty_kv(shape, pages, heads=3, device=device, seed=4)._replace(residual_k=None, residual_v=None)
        for _ in range(2)
    )
    for kv in (got, want):
        kv.slot_table[0, 1, 1] = kv.slot_table[-1, 2, 0] = -1
        kv.sealed.fill_(-7)  # not read
    if how == "strided":
        got, want = spread_kv(got), spread_kv(want)
    held = [0] * len(lengths)
    while held != lengths:
        step = [min(n - b, 1 if how == "token by token" else n) for n, b in zip(lengths, held, strict=True)]
        parts = [[s[b : b + n] for s, b, n in zip(x, held, step, strict=True)] for x in (k, v)]
        (new_k, cu), (new_v, _) = pack(parts[0]), pack(parts[1])
        reference.append_kv(new_k, new_v, cu, ints(held, device), want)
        if how == "strided":
            new_k, new_v = spread(new_k, 0), spread(new_v, 1)
        ops.append_kv(new_k, new_v, cu, ints(held, device), got)
        held = [n + new for n, new in zip(held, step, strict=True)]
    for name in ("k_pool", "v_pool", "scales"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert same_bits(a, b), name
            assert same_bits(outside(a), outside(b)), f"{name}: written out of bounds"


# ---------------------------------------------------------------------------------------------- slots


@dataclass
class Slots:
    """Fewer slots than pages, as `resolve_pages` takes them."""

    block_table: Tensor
    slot_table: Tensor
    slot_blocks: Tensor
    last_use: Tensor
    clock: Tensor

    @classmethod
    def empty(cls, B: int, H: int, M: int, S: int, device: str) -> Slots:
        blocks = torch.randperm(B * H * M, generator=generator(M)).view(B, H, M)
        values = blocks, torch.full((B, H, M), -1), torch.full((S,), -1), torch.zeros(S), torch.zeros(1)
        return cls(*(x.int().to(device) for x in values))

    def resolve(self, module: Any, lists: Tensor, keep: int = DENSE) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = module.resolve_pages(lists, **vars(self), keep=keep)
        return found

    def of(self, b: int, h: int) -> list[int]:
        """The pages of a head that lie in slots."""
        slots = self.slot_table[b, h].long()
        there = (slots >= 0) & (self.slot_blocks[slots.clamp(min=0)] == self.block_table[b, h])
        return there.nonzero()[:, 0].tolist()


def random_lists(step: int, B: int, H: int, M: int, K: int, device: str) -> Tensor:
    """Between none and K pages a head, with gaps, most of which the step before wanted, too."""
    lists = torch.full((B, H, K), -1)
    for i in range(B * H):
        count = (step * 7 + i * 3) % (K + 1)
        near = torch.randperm(min(M, 2 * K), generator=generator(1000 * step + i))[:count] + 2 * step % M
        lists[i // H, i % H, K - count :] = near % M
    return lists.int().to(device)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("M, S, K", [(40, 72, 12), (40, 144, 8), (9, 7, 1), (300, 900, 70), (6, 80, 4)], ids=str)
def test_resolve_pages(M: int, S: int, K: int, strided: bool, device: str) -> None:
    B, H = 2, 3
    ours, theirs = Slots.empty(B, H, M, S, device), Slots.empty(B, H, M, S, device)
    if strided:
        ours.block_table, ours.slot_table = spread(ours.block_table, 0), spread(ours.slot_table, 1)
    below = torch.arange(B * H * M, device=device)[:, None].repeat(1, 4)
    pool = torch.full((S, 4), -1, device=device)
    for step in range(30):
        lists = random_lists(step, B, H, M, K, device)
        if step == 20:  # beams: tables are copied, slots are not
            for state in (ours, theirs):
                for table in (state.block_table, state.slot_table):
                    table.copy_(table[[1, 1]].clone())
        keep = step * 5 % 17 if step % 2 else DENSE
        found = ours.resolve(ops, spread(lists, 1) if strided else lists, keep)
        assert all(torch.equal(a, b) for a, b in zip(found, theirs.resolve(reference, lists, keep), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))
        ops.gather_pages(below, found[0].view(-1), pool, found[1].view(-1))
        slots, blocks = (x.gather(2, lists.long().clamp(min=0)) for x in (ours.slot_table, ours.block_table))
        assert torch.equal(pool[slots[lists >= 0].long(), 0], blocks[lists >= 0].long())  # each lies in its slot


def test_pages_in_use_are_kept_and_the_oldest_go_first(device: str) -> None:
    state = Slots.empty(1, 1, 10, 3, device)
    for pages in ([0, 1, 2], [0, 2, -1], [2, -1, -1]):
        state.resolve(ops, ints([[pages]], device))
    src, _ = state.resolve(ops, ints([[[2, 5, -1]]], device))
    assert state.of(0, 0) == [0, 2, 5] and src[0, 0].tolist() == [-1, int(state.block_table[0, 0, 5]), -1]
    state.resolve(ops, ints([[[0, 7, 8]]], device))
    assert state.of(0, 0) == [0, 7, 8] and state.clock == 5


def test_heads_share_slots(device: str) -> None:
    """A head that wants nothing leaves its slots to the others."""
    state = Slots.empty(1, 2, 10, 4, device)
    state.resolve(ops, ints([[[0, 1, -1, -1], [0, 1, -1, -1]]], device))
    assert (state.of(0, 0), state.of(0, 1)) == ([0, 1], [0, 1])
    state.resolve(ops, ints([[[-1] * 4, [4, 5, 6, 7]]], device))
    assert (state.of(0, 0), state.of(0, 1)) == ([], [4, 5, 6, 7])


def test_pages_beyond_those_to_keep_make_room_first(device: str) -> None:
    state = Slots.empty(1, 2, 10, 6, device)
    state.resolve(ops, ints([[[0, 1, -1], [5, -1, -1]]], device))
    state.resolve(ops, ints([[[2, 3, -1], [-1, -1, -1]]], device), keep=1)  # page 3 is attended, and then of no use
    state.resolve(ops, ints([[[-1, -1, -1], [6, 7, -1]]], device))
    assert (state.of(0, 0), state.of(0, 1)) == ([0, 1, 2], [5, 6, 7])


@pytest.mark.parametrize("B, H, K, S", [(0, 2, 1, 1), (2, 0, 1, 1), (2, 2, 0, 3), (2, 2, 0, 0), (2, 2, 3, 0)], ids=str)
def test_resolve_nothing(B: int, H: int, K: int, S: int, device: str) -> None:
    state = Slots.empty(B, H, 5, S, device)
    src, dst = state.resolve(ops, torch.full((B, H, K), -1, dtype=torch.int32, device=device))
    assert src.shape == dst.shape == (B, H, K) and (src == -1).all() and (state.slot_table == -1).all()


# ---------------------------------------------------------------------------------------------- wanted


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("unit", [16, 1], ids=["pages", "tokens"])
@pytest.mark.parametrize("lengths", [[500], [0, 1, 16, 47, 48, 2000], [33_000]], ids=str)
def test_wanted_pages(lengths: list[int], unit: int, strided: bool, device: str) -> None:
    """Dense, streaming and listed heads; a streaming head without some pages; lists of all lengths."""
    P, g = 16, generator(sum(lengths))
    windows = ints([DENSE, 2, 0, 0, 1000, 1], device)
    B, H, M = len(lengths), len(windows), max(lengths) // P + 3
    table = torch.randperm(B * H * M, generator=g).view(B, H, M).int().to(device)
    table[:, 1, 1::3] = -1
    sealed = ints([max(0, n // P - 1) for n in lengths], device)
    for first, width in ((ints([n - 1 for n in lengths], device), 9), (ints(lengths, device), 0)):
        start = (sealed * P // unit * 3 // 4).clamp(min=0)
        lists = torch.full((B, H, width), -1)
        for b, h in product(range(B), range(H)):
            sink = min(P // unit, int(start[b]))
            picks = sink + torch.randperm(int(start[b]) - sink, generator=g)[: min(h, 4) * width // 4]
            lists[b, h, : len(picks)] = picks.sort().values
        lists = lists.int().to(device)
        mask = Mask(windows, spread(lists, 0) if strided else lists, start.int(), sink=1, unit=unit)
        blocks = spread(table, 1) if strided else table
        found, want = (m.wanted_pages(mask, blocks, sealed, first, P) for m in (ops, reference))
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_wanted_pages_are_those_that_decode_reads(device: str) -> None:
    """Pages that are not wanted may hold anything."""
    shape = SHAPES[0]
    case = build(shape, awkward_lengths(shape.page_size), heads=4, device=device)
    kv, q, P = case.kv, case.queries(), shape.page_size
    start = (case.lengths // P - 2).clamp(min=0).int()
    lists = torch.where(ints([0, 2], device) < start[:, None], ints([0, 2], device), -1)[:, None].repeat(1, 4, 1)
    mask = Mask(case.windows(DENSE, 2, 0, 0), lists, start)
    pages, _ = ops.wanted_pages(mask, kv.block_table, kv.sealed, case.lengths - 1, P)
    out = ops.decode(q, mask, kv, case.lengths)
    wanted = torch.zeros(*kv.slot_table.shape[:2], kv.slot_table.shape[2] + 1, device=device)
    wanted.scatter_(2, torch.where(pages < 0, kv.slot_table.shape[2], pages).long(), 1.0)
    unwanted = kv.slot_table[(wanted[..., :-1] == 0) & (kv.slot_table >= 0)].long()
    assert len(unwanted)
    k_pool, v_pool = kv.k_pool.clone(), kv.v_pool.clone()
    k_pool[unwanted], v_pool[unwanted] = (math.nan, math.nan) if k_pool.is_floating_point() else (255, 255)
    again = ops.decode(q, mask, kv._replace(k_pool=k_pool, v_pool=v_pool), case.lengths)
    assert all(same_bits(a, b) for a, b in zip(out, again, strict=True))


def test_wanted_nothing(device: str) -> None:
    mask = Mask(ints([DENSE, 1], device), sink=1)
    for B, M in ((0, 3), (2, 0), (2, 3)):
        table = torch.full((B, 2, M), -1, dtype=torch.int32, device=device)
        zeros = torch.zeros(B, dtype=torch.int32, device=device)
        pages, counts = ops.wanted_pages(mask, table, zeros, zeros - 1, 16)
        assert pages.shape == table.shape and (pages == -1).all() and not counts.any()


# ---------------------------------------------------------------------------------------------- gather


@pytest.mark.parametrize("dtype", [F32, BF16, torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("row", [(16, 64), (1,), (3, 2, 5), ()], ids=str)
def test_gather_pages(row: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    src = (normal(0, 11, *row) * 50).abs().to(dtype).to(device)
    dst = guarded(9, *row, dtype=dtype, device=device)
    want = guarded(9, *row, dtype=dtype, device=device)
    src_ids, dst_ids = ints([10, -1, 0, 0, 5, 3, 6], device), ints([8, 2, 0, 3, -1, 4, 7], device)
    reference.gather_pages(src, src_ids, want, dst_ids)
    ops.gather_pages(src, src_ids, dst, dst_ids)
    assert same_bits(dst, want) and same_bits(outside(dst), outside(want))


def test_gather_between_strided_pools(device: str) -> None:
    src, dst = normal(1, 6, 16, 64, device=device), normal(2, 7, 16, 64, device=device)
    ids = ints([5, 2], device), ints([0, 6], device)
    wide, target = spread(src, 0), spread(dst, 0)
    ops.gather_pages(wide, ids[0], target, ids[1])
    reference.gather_pages(src, ids[0], dst, ids[1])
    assert same_bits(target, dst)


def test_gather_of_single_tokens(device: str) -> None:
    """Rows of a pool seen as [blocks * P, D]: what a list of tokens stages."""
    pool, staging = normal(1, 4, 16, 64, device=device), torch.zeros(5, 64, device=device)
    ids = ints([63, 0, 17, -1, 16], device)
    ops.gather_pages(pool.view(-1, 64), ids, staging, ints(range(5), device))
    want = pool.view(-1, 64)[ids.long().clamp(min=0)]
    want[3] = 0
    assert torch.equal(staging, want)


def test_gather_of_nothing(device: str) -> None:
    dst = torch.ones(2, 3, device=device)
    ops.gather_pages(torch.zeros(0, 3, device=device), ints([], device), dst, ints([], device))
    assert torch.equal(dst, torch.ones(2, 3, device=device))


def test_pools_of_more_than_2_31_elements(device: str) -> None:
    """Ids are int32 but offsets are not. Only the pages at the far end are ever touched."""
    shape = Shape(256, 16, 16, 2, F32, "int8")
    blocks, lengths = 2**31 // (16 * 256) + 8, [100]
    want = build(shape, lengths, heads=2, device=device)
    far = blocks - 1 - want.kv.slot_table
    slot_table = torch.where(want.kv.slot_table < 0, want.kv.slot_table, far)
    kv = want.kv._replace(
        k_pool=torch.empty(blocks, 16, 256, dtype=torch.uint8, device=device),
        v_pool=torch.empty(blocks, 16, 256, dtype=torch.uint8, device=device),
        scales=torch.empty(blocks, 1, 16, 2, device=device),
        slot_table=slot_table,
        sealed=torch.zeros_like(want.kv.sealed),
    )
    (k, cu), (v, _) = pack(want.k), pack(want.v)
    ops.append_kv(k, v, cu, ints([0], device), kv)
    kv = kv._replace(sealed=want.kv.sealed)
    q = want.queries()
    windows = want.windows(ops.DENSE, ops.DENSE)
    for got, expected in zip(
        ops.decode(q, Mask(windows), kv, want.lengths), ops.decode(q, Mask(windows), want.kv, want.lengths), strict=True
    ):
        assert same_bits(got, expected)

    staging = torch.zeros(2, 16, 256, dtype=torch.uint8, device=device)
    near = want.kv.slot_table[0, 1, :2].contiguous()
    ops.gather_pages(kv.k_pool, (blocks - 1 - near).int(), staging, ints([0, 1], device))
    assert torch.equal(staging, want.kv.k_pool[near.long()])
