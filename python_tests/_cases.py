"""Random paged caches, and what the op tests compare with.

Whatever nobody should read is poisoned: free blocks, stale raw rows and everything between strided rows are NaN, or
255 with NaN scales, so that one wrong read shows in the result.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch
from torch import Tensor

from lserve_ext import reference
from lserve_ext.ops import DENSE, PagedKV

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Shape:
    """One combination of what a kernel is compiled or dispatched for."""

    head_dim: int
    page_size: int
    stats_group: int | None
    group: int  # query heads of a kv head
    dtype: torch.dtype
    kv_dtype: str
    moments_group: int | None = None

    def __str__(self) -> str:
        stats = f"L{self.stats_group}" if self.stats_group else "token_grid"
        stats += f"-moments{self.moments_group}" if self.moments_group else ""
        return f"D{self.head_dim}-P{self.page_size}-{stats}-G{self.group}-{str(self.dtype)[6:]}-{self.kv_dtype}"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Every head dimension, page size, group and dtype of interest, not their product.
SHAPES = [
    Shape(64, 16, 16, 1, F32, "auto"),
    Shape(64, 16, 8, 4, F32, "int8", 16),
    Shape(128, 64, 16, 4, BF16, "int8", 32),
    Shape(128, 64, 16, 8, BF16, "auto"),
    Shape(80, 16, 4, 3, F16, "int8", 4),
    Shape(96, 12, 4, 7, F32, "auto"),
    Shape(16, 48, 16, 8, BF16, "int8"),
    Shape(256, 16, 16, 3, F16, "auto"),
    Shape(128, 16, None, 4, F32, "int8"),
    Shape(64, 12, None, 7, BF16, "int8"),
    Shape(256, 48, 16, 1, F32, "int8"),
    Shape(16, 64, None, 1, F16, "int8"),
    Shape(96, 16, None, 4, BF16, "auto", 8),
    Shape(80, 64, 64, 5, F32, "auto"),
]
SMALL = [SHAPES[1], SHAPES[4], SHAPES[9]]  # for tests that need no more than one of each kind
SINK, WINDOW = 1, 2  # pages of a streaming head in most tests


def awkward_lengths(page_size: int) -> list[int]:
    p = page_size
    return [3 * p + 5, 0, 1, p - 1, p, p + 1, 2 * p, 4 * p]


def ints(values: object, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(device=device, dtype=dtype)


def poisoned(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.full(shape, math.nan if dtype.is_floating_point else 255, dtype=dtype, device=device)


def guarded(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A poisoned tensor with a poisoned row before and after it, see `outside`."""
    return poisoned(shape[0] + 2, *shape[1:], dtype=dtype, device=device)[1:-1]


def spread(t: Tensor, dim: int) -> Tensor:
    """The same values with twice the stride in `dim` (and left of it), and poison between them."""
    wide = poisoned(*t.shape[: dim + 1], 2, *t.shape[dim + 1 :], dtype=t.dtype, device=str(t.device))
    if not t.dtype.is_floating_point and t.dtype != torch.uint8:
        wide.fill_(2**30)  # an id that no table may hold
    wide.select(dim + 1, 0).copy_(t)
    return wide.select(dim + 1, 0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit, NaN included."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


def one_thread(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The reference is thousands of tiny ops, whose threads would only wait for each other."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run


def outside(t: Tensor) -> Tensor:
    """The rest of a tensor's storage: guard rows, and what lies between strided ones."""
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()).clone()
    flat.as_strided(t.shape, t.stride(), t.storage_offset()).zero_()
    return flat


# ---------------------------------------------------------------------------------------------- caches


@dataclass(frozen=True)
class Case:
    """A paged cache of a ragged batch, and the tokens it was built from."""

    kv: PagedKV
    lengths: Tensor  # [B]
    k: list[Tensor]  # of every sequence, [n, H, D]
    v: list[Tensor]
    shape: Shape

    @property
    def heads(self) -> int:
        return self.kv.block_table.shape[1]

    @property
    def batch(self) -> int:
        return self.kv.block_table.shape[0]

    def queries(self, seed: int = 7, rows: int | None = None) -> Tensor:
        """q [B, Hq, D], or [B, rows, Hq, D]."""
        shape = (self.batch, *(() if rows is None else (rows,)), self.heads * self.shape.group, self.shape.head_dim)
        return normal(seed, *shape, dtype=self.shape.dtype, device=str(self.lengths.device))

    def windows(self, *pages: int) -> Tensor:
        return ints(pages, str(self.lengths.device))

    def lists(self, *, sink: int, local: int, count: int, seed: int = 3) -> tuple[Tensor, Tensor]:
        """Random pages between sink and local, and local_start."""
        scores = normal(seed, *self.kv.block_table.shape, device=str(self.lengths.device))
        return reference.select_pages(scores, self.lengths, self.kv.sealed, self.shape.page_size, sink, local, count)

    def token_lists(self, *, ratio: float, max_picks: int, seed: int = 3) -> tuple[Tensor, Tensor]:
        """Random tokens older than the local ones, and local_start, unit 1."""
        width = self.kv.block_table.shape[2] * self.shape.page_size
        mass = normal(seed, self.batch, self.heads, width, device=str(self.lengths.device))
        counts = halves(self.lengths.tolist(), ratio, str(mass.device))
        return reference.select_tokens(mass, self.lengths, self.kv.sealed, counts, self.shape.page_size, max_picks)


def halves(lengths: Sequence[int], ratio: float, device: str) -> Tensor:
    """Picks of `select_tokens` for a share of the tokens, half of it local."""
    return ints([round(n * ratio / 2) for n in lengths], device)


def empty_kv(
    shape: Shape,
    pages: Sequence[int],
    *,
    heads: int,
    columns: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> PagedKV:
    """A poisoned cache with blocks for the first pages[b] pages of sequence b, in a random order of the pools.

    Blocks and slots differ, as they do when some blocks live elsewhere.
    """
    int8, batch = shape.kv_dtype == "int8", len(pages)
    p, d, rng = shape.page_size, shape.head_dim, generator(seed)
    columns = max(pages, default=0) + 1 if columns is None else columns
    used = heads * sum(pages)

    def table(rows_of_pool: int) -> Tensor:
        ids = iter(torch.randperm(rows_of_pool, generator=rng).tolist())
        rows = [[[next(ids) for _ in range(n)] + [-1] * (columns - n) for _ in range(heads)] for n in pages]
        return ints(rows, device).reshape(batch, heads, columns)

    slots, blocks = used + 3, used + 5
    pool = torch.uint8 if int8 else shape.dtype
    groups = p // shape.stats_group if shape.stats_group else 0
    stats = guarded(blocks, groups, 2, d, dtype=shape.dtype, device=device) if groups else None
    scales = guarded(slots, 1 if shape.stats_group else 2, p, 2, dtype=F32, device=device) if int8 else None
    pairs = p // shape.moments_group if shape.moments_group else 0
    moments = guarded(blocks, pairs, 2, d, dtype=shape.dtype, device=device) if pairs else None
    return PagedKV(
        k_pool=guarded(slots, p, d, dtype=pool, device=device),
        v_pool=guarded(slots, p, d, dtype=pool, device=device),
        stats=stats,
        scales=scales,
        slot_table=table(slots),
        block_table=table(blocks),
        residual_k=guarded(batch, heads, 2 * p, d, dtype=shape.dtype, device=device),
        residual_v=guarded(batch, heads, 2 * p, d, dtype=shape.dtype, device=device),
        sealed=torch.zeros(batch, dtype=torch.int32, device=device),
        moments=moments,
    )


def sealed_pages(lengths: Sequence[int], page_size: int) -> list[int]:
    return [max(n // page_size - 1, 0) for n in lengths]


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[n, H, D] of every sequence -> packed [N, H, D] and cu_seqlens_k."""
    sizes = [0, *(len(s) for s in sequences)]
    return torch.cat(list(sequences)), ints(sizes, str(sequences[0].device)).cumsum(0, dtype=torch.int32)


def ragged(shape: Shape, lengths: list[int], heads: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Random packed tokens [N, heads, D] and their bounds."""
    dims = heads, shape.head_dim
    return pack([normal(seed + b, n, *dims, dtype=shape.dtype, device=device) for b, n in enumerate(lengths)])


def build(shape: Shape, lengths: Sequence[int], **options: Any) -> Case:
    """See `_build`, whose results are kept: many tests begin with the same cache. Guards are copied with the rest."""
    return copy.deepcopy(_build(shape, tuple(lengths), **options))


@functools.lru_cache(maxsize=32)
@one_thread
def _build(
    shape: Shape,
    lengths: tuple[int, ...],
    *,
    heads: int = 3,
    device: str = "cpu",
    seed: int = 0,
    columns: int | None = None,
    room: int = 0,
    strided: bool = False,
    make: Callable[..., Tensor] = normal,
) -> Case:
    """A cache that holds `lengths` tokens a sequence, written by the reference, and blocks for `room` pages more."""
    sealed = sealed_pages(lengths, shape.page_size)
    columns = max(-(-n // shape.page_size) for n in lengths) + 1 + room if columns is None else columns
    pages = [n + room for n in sealed]
    kv = empty_kv(shape, pages, heads=heads, columns=columns, device=device, seed=seed)
    if strided:
        kv = spread_kv(kv)
    dims = (heads, shape.head_dim)
    k = [make(seed + 100 + b, n, *dims, dtype=shape.dtype, device=device) for b, n in enumerate(lengths)]
    v = [make(seed + 200 + b, n, *dims, dtype=shape.dtype, device=device) for b, n in enumerate(lengths)]
    (packed_k, cu), (packed_v, _) = pack(k), pack(v)
    reference.append_kv(packed_k, packed_v, cu, ints([0] * len(lengths), device), kv)
    kv = kv._replace(sealed=ints(sealed, device))
    poison_stale_rows(kv, lengths)
    return Case(kv, ints(lengths, device), k, v, shape)


def spread_kv(kv: PagedKV) -> PagedKV:
    """The same cache with outer strides of its own in every tensor."""

    def maybe(t: Tensor | None, dim: int) -> Tensor | None:
        return None if t is None else spread(t, dim)

    return PagedKV(
        spread(kv.k_pool, 0),
        spread(kv.v_pool, 0),
        maybe(kv.stats, 0),
        maybe(kv.scales, 0),
        spread(kv.block_table, 1),
        spread(spread(kv.slot_table, 0), 1),
        maybe(kv.residual_k, 1),
        maybe(kv.residual_v, 1),
        kv.sealed,
        maybe(kv.moments, 0),
    )


def unsealed_rows(kv: PagedKV, b: int, length: int) -> list[int]:
    """Rows of the residual buffer that hold a token which is in no page."""
    page_size = kv.k_pool.shape[1]
    return [t % (2 * page_size) for t in range(int(kv.sealed[b]) * page_size, length)]


def poison_stale_rows(kv: PagedKV, lengths: Sequence[int]) -> None:
    for raw in (kv.residual_k, kv.residual_v):
        assert raw is not None
        for b, n in enumerate(lengths):
            stale = sorted(set(range(raw.shape[2])) - set(unsealed_rows(kv, b, n)))
            raw[b, :, stale] = math.nan


def free_past(case: Case, head: int, window: int, sink: int) -> Case:
    """Frees the pages of a streaming head that its newest query no longer attends, and poisons their blocks."""
    kv = case.kv._replace(block_table=case.kv.block_table.clone(), slot_table=case.kv.slot_table.clone())
    for b, n in enumerate(case.lengths.tolist()):
        past = range(sink, min(int(kv.sealed[b]), (n - 1) // case.shape.page_size - window + 1))
        for page in past:
            slot, block = int(kv.slot_table[b, head, page]), int(kv.block_table[b, head, page])
            kv.slot_table[b, head, page] = kv.block_table[b, head, page] = -1
            in_slot, of_block = (kv.k_pool, kv.v_pool, kv.scales), (kv.stats, kv.moments)
            for t, row in (*((t, slot) for t in in_slot), *((t, block) for t in of_block)):
                if t is not None:
                    t[row] = math.nan if t.dtype.is_floating_point else 255
    return replace(case, kv=kv)


def three_heads(shape: Shape, lengths: list[int], device: str, *, strided: bool = False, count: int = 2) -> tuple[
    Case, Tensor, Tensor, Tensor
]:  # fmt: skip
    """A dense, a streaming (with its past freed) and a retrieval head: case, windows, lists, local_start."""
    case = build(shape, lengths, device=device, strided=strided)
    lists, start = case.lists(sink=SINK, local=1, count=count)
    return free_past(case, 1, WINDOW, SINK), case.windows(DENSE, WINDOW, 0), lists, start


def permuted(kv: PagedKV, seed: int) -> PagedKV:
    """The same cache with its blocks and slots elsewhere in the pools."""
    rng = generator(seed)
    slots = torch.randperm(kv.k_pool.shape[0], generator=rng).to(kv.k_pool.device)
    by_block = kv.moments if kv.stats is None else kv.stats
    blocks = slots if by_block is None else torch.randperm(by_block.shape[0], generator=rng).to(kv.k_pool.device)

    def moved(t: Tensor | None, order: Tensor) -> Tensor | None:
        return None if t is None else torch.empty_like(t).index_copy_(0, order, t)

    def renamed(table: Tensor, order: Tensor) -> Tensor:
        return torch.where(table >= 0, order[table.long().clamp(min=0)].int(), table)

    k_pool, v_pool = moved(kv.k_pool, slots), moved(kv.v_pool, slots)
    assert k_pool is not None and v_pool is not None
    return kv._replace(
        k_pool=k_pool,
        v_pool=v_pool,
        scales=moved(kv.scales, slots),
        stats=moved(kv.stats, blocks),
        moments=moved(kv.moments, blocks),
        slot_table=renamed(kv.slot_table, slots),
        block_table=renamed(kv.block_table, blocks),
    )


PER_SEQUENCE = ("block_table", "slot_table", "residual_k", "residual_v", "sealed")


def sequence(case: Case, b: int) -> Case:
    """One sequence of the batch, in the same pools."""
    own = {name: getattr(case.kv, name)[b : b + 1] for name in PER_SEQUENCE}
    return Case(case.kv._replace(**own), case.lengths[b : b + 1], [case.k[b]], [case.v[b]], case.shape)


# ---------------------------------------------------------------------------------------------- comparison


def attend_in_dtype(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What one would write in torch: everything in the dtype of the query."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    logits = q @ k.T * scale
    if k.shape[0] == 0:
        return torch.zeros_like(q), torch.full(q.shape[:1], -math.inf, device=q.device)
    return logits.softmax(-1) @ v, logits.logsumexp(-1).float()


MOMENTS = {F32: 2e-6, BF16: 2**-7, F16: 2**-10}
"""Tolerance of moments, which are taken in float32 and stored in this dtype."""


def assert_moments(actual: Tensor, expected: Tensor) -> None:
    """Up to rounding, NaN where NaN belongs."""
    tolerance = MOMENTS[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@contextmanager
def same_dtype_torch() -> Iterator[None]:
    """Inside, the reference computes attention in the dtype of the query: the error that a kernel may have too."""
    with mock.patch.object(reference, "attend", attend_in_dtype):
        yield


def assert_as_good_as_torch(actual: Tensor, exact: Tensor, plain: Tensor, atol: float | None = None) -> None:
    """Error against the exact result <= 2 x the error of plain torch in the same dtype + atol."""
    atol = atol or {F32: 3e-6, BF16: 2e-3, F16: 5e-4}[actual.dtype]
    assert actual.shape == exact.shape
    exact, plain, actual = exact.double(), plain.double(), actual.double()
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN where none belongs, or none where one does"
    assert torch.equal(actual.isneginf(), exact.isneginf()), "-inf where none belongs, or none where one does"
    finite = exact.isfinite()
    if finite.any():
        error = (actual - exact)[finite].abs().max()
        allowed = 2 * (plain - exact)[finite].abs().max() + atol * max(1.0, float(exact[finite].abs().max()))
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@one_thread
def assert_attention(
    op: tuple[Tensor, Tensor], function: Callable[..., tuple[Tensor, Tensor]], q: Tensor, *args: Any, **kwargs: Any
) -> None:
    """Compares (out, lse) of an op with the reference `function` of the same arguments."""
    exact = function(q.double(), *args, **kwargs)
    with same_dtype_torch():
        plain = function(q, *args, **kwargs)
    assert op[0].dtype == q.dtype and op[1].dtype == F32
    assert_as_good_as_torch(op[0], exact[0], plain[0])
    assert_as_good_as_torch(op[1], exact[1].float(), plain[1], atol=3e-6)
