"""The ops: typed wrappers of ``torch.ops.lserve_ext.*`` with their fake (meta) rules.

Letters used for shapes: B sequences, Hq query heads, H kv heads, G = Hq / H, D head dimension (a
multiple of 16, up to 256), P page size in tokens, L statistics group in tokens (divides P), M pages a
sequence may have (columns of a table), N tokens of a packed batch, K width of a list.

Shared by all ops: q, k, v, the residual buffer and the statistics have one dtype (float32, float16 or
bfloat16); ids and lengths are int32. The last dimensions must be contiguous where a shape is that of a
row or a page; outer strides are free. Wrong shapes, strides and values raise ValueError, wrong dtypes
and devices TypeError, before anything is written (the raw ops raise RuntimeError with the same text).
There is no autograd: an input that requires grad raises while grad mode is on. No op reads device data
on the host. Results are deterministic and independent of threads and of the rest of the batch. With the environment
variable LSERVE_DEBUG=1, q, k and v that are not finite raise ValueError; otherwise they give what arithmetic gives.
Ids and lengths that make no sense raise ValueError on the CPU always, and on a GPU with LSERVE_DEBUG=1 (by a run on the
CPU before it); without it, a CUDA kernel reads tables without looking.

On a CPU with matrix units (AMX) prefill in bfloat16 rounds weights to bfloat16, as GPUs do; with LSERVE_AMX=0 in the
environment it does without them, in float32.

What a query attends is a `Mask`: per kv head ``sink ∪ list ∪ local``, always causal. For a query at
position t of its sequence, in page b = t // P:

- sink: the first ``sink`` pages;
- local: for ``windows[h] > 0`` the pages (b - windows[h], b]; with ``DENSE`` that is all of them;
- list: for ``windows[h] == LISTED`` the units of ``lists`` (pages, or tokens with ``unit=1``), and local
  starts at ``local_start``;
- every unsealed page.

``context_lens`` are the tokens that a cache holds before a call, ``seq_lens`` those with the call's own.

A head with a finite window (streaming) skips pages that it no longer holds (``block_table`` -1).
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C  # noqa: F401  (its import registers torch.ops.lserve_ext)

__all__ = [
    "DENSE",
    "LISTED",
    "MAX_HEAD_DIM",
    "Mask",
    "PagedKV",
    "append_kv",
    "attention_mass",
    "decode",
    "dequantize_kv",
    "gather_pages",
    "merge_states",
    "page_moments",
    "page_scores",
    "page_stats",
    "prefill",
    "quantize_kv",
    "resolve_pages",
    "select_pages",
    "select_tokens",
    "wanted_pages",
]

DENSE = 2**31 - 1
"""A window that reaches back to page 0."""
LISTED = 0
"""In place of a window: the head follows its list."""
MAX_HEAD_DIM = 256
"""The most channels that a head may have; D is a multiple of 16."""
_ops = torch.ops.lserve_ext
_DEBUG = os.environ.get("LSERVE_DEBUG") == "1"


class PagedKV(NamedTuple):
    """What one attention layer holds: pools, tables and the residual buffer of the newest tokens.

    Page p of (sequence b, kv head h) lies in the pools if ``p < sealed[b]``, else in the residual buffer,
    where token t has row ``t % (2 * P)``. At most two pages are unsealed.
    """

    k_pool: Tensor
    """[blocks, P, D], the model's dtype or uint8 codes."""
    v_pool: Tensor
    """[blocks, P, D], like k_pool."""
    stats: Tensor | None
    """[blocks, P/L, 2, D] min and max of each group and channel of K: bounds for page scores, and K's grid."""
    scales: Tensor | None
    """[blocks, C, P, 2] float32 (step, min) a token, with uint8 pools: row 0 for V; without stats also row 1, for K."""
    block_table: Tensor
    """[B, H, M] int32 block that holds a page's statistics; -1: the page is not held any more."""
    slot_table: Tensor
    """[B, H, M] int32 row of the pools and scales that holds a page; -1: not resident. Often the same tensor."""
    residual_k: Tensor | None
    """[B, H, 2P, D], the model's dtype; None (both): all pages are in the pools, the last one maybe partly."""
    residual_v: Tensor | None
    """[B, H, 2P, D]."""
    sealed: Tensor
    """[B] int32 pages that are in the pools."""
    moments: Tensor | None = None
    """[blocks, P/L, 2, D] mean minus and plus a standard deviation, for page scores in place of stats; the groups may
    be others. Only `append_kv` takes them, which writes them."""


_READ = PagedKV._fields[:-1]  # what attention takes


class Mask(NamedTuple):
    """What every kv head attends, see the module's text."""

    windows: Tensor
    """[H] int32 local pages, the query's own included; `DENSE`; or `LISTED`."""
    lists: Tensor | None = None
    """[B, H, K] int32, ascending, -1 padded: for heads that are `LISTED`. In prefill [B, H, R, K], see there."""
    local_start: Tensor | None = None
    """[B] int32 first local unit of the heads that are `LISTED`. Not in prefill."""
    sink: int = 0
    """Pages."""
    unit: int | None = None
    """Tokens that an entry of lists stands for: P (None) or 1."""


def _call(op: Any, *args: Any) -> Any:
    """Runs an op; turns the text of a failed check into the Python error that a caller expects."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if _DEBUG and any(isinstance(x, Tensor) and x.is_cuda for x in args):
            op(*(x.cpu() if isinstance(x, Tensor) else x for x in args))  # CPU kernels check the values of tables
        return op(*args)
    except NotImplementedError:  # no kernel for the device: torch's own text says it best
        _check_types(op, args)
        raise
    except (RuntimeError, TypeError, OverflowError) as error:
        _check_types(op, args)
        text = str(error).splitlines()[0] if str(error) else ""
        start = text.find("lserve_ext::")
        if start < 0 or "no gradient" in text:
            raise
        kind = TypeError if "expected dtype" in text or "expected the device" in text else ValueError
        raise kind(text[start:]) from None


_TYPES: dict[str, Any] = {"Tensor": Tensor, "int": int, "float": (int, float), "ScalarType": torch.dtype}


def _check_types(op: Any, args: tuple[Any, ...]) -> None:
    """Raises if an argument is no tensor, or no number, where its schema wants one. Asked when an op has failed."""
    for argument, value in zip(op.default._schema.arguments, args, strict=True):
        kind = str(argument.real_type).removeprefix("Optional[").removesuffix("]").removesuffix("?")
        if value is None and isinstance(argument.type, torch.OptionalType):
            continue
        where = f"lserve_ext::{op.__name__}: {argument.name}: expected"
        if not isinstance(value, _TYPES[kind]):
            got = "None" if value is None else f"{value!r:.40} of type {type(value).__name__}"
            raise TypeError(f"{where} {'a tensor' if kind == 'Tensor' else kind}, got {got}") from None
        if kind == "int" and not -(2**63) <= value < 2**63:
            raise ValueError(f"{where} at most {2**31 - 1}, got {value}") from None


def _cache(op: str, kv: PagedKV | None) -> tuple[Tensor | None, ...]:
    """The tensors of a cache that an op takes."""
    if not isinstance(kv, tuple) or len(kv) != len(PagedKV._fields):
        raise TypeError(f"lserve_ext::{op}: kv: expected a PagedKV, got {type(kv).__name__}")
    return kv if op == "append_kv" else kv[: len(_READ)]


def _mask(op: str, mask: Mask, page_size: int | None) -> Mask:
    """With the unit that None stands for, a page of the cache."""
    if not isinstance(mask, tuple) or len(mask) != len(Mask._fields):
        raise TypeError(f"lserve_ext::{op}: mask: expected a Mask, got {type(mask).__name__}")
    return mask._replace(unit=page_size) if mask.unit is None else mask


def _page_size(kv: PagedKV) -> int:
    return kv.k_pool.shape[1] if isinstance(kv.k_pool, Tensor) and kv.k_pool.dim() == 3 else 1


def _scale(q: Tensor) -> float:
    """D ** -0.5. What has no D is left to the op, which says so."""
    D = q.shape[-1] if isinstance(q, Tensor) and q.dim() else 1
    return math.sqrt(1 / max(D, 1))


def _check_finite(op: str, **inputs: Tensor) -> None:
    for name, x in inputs.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"lserve_ext::{op}: {name}: expected finite numbers, got NaN or infinity")


def page_stats(k: Tensor, group: int) -> Tensor:
    """Min and max of every group and channel of whole pages (LServe, section 4.2; Quest, section 3).

    Args:
        k: [pages, P, D].
        group: L, tokens a group; divides P.

    Returns:
        [pages, P/L, 2, D] in k's dtype, so exact: minimum, maximum. A NaN stays NaN.
    """
    return cast(Tensor, _call(_ops.page_stats, k, group))


def page_moments(k: Tensor, group: int) -> Tensor:
    """Mean minus and plus a standard deviation of every group and channel of whole pages.

    In the place of min and max, `page_scores` makes ``q·mean + |q|·deviation`` of them: not a bound of q·k, but nearer
    to what most keys have.

    Args:
        k: [pages, P, D].
        group: L, tokens a group; divides P.

    Returns:
        [pages, P/L, 2, D] in k's dtype, taken in float32.
    """
    return cast(Tensor, _call(_ops.page_moments, k, group))


def quantize_kv(k: Tensor, v: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 codes and steps of whole pages.

    K lies on the grid of its statistics: step = max/255 - min/255 per group and channel, so that a
    dequantised key stays in the box that page scores are computed from. V, and K without statistics, has
    one (step, min) per token (LServe, section 3.1; ALISA, section 4.3).

    Args:
        k, v: [pages, P, D].
        stats: ``page_stats(k, L)``, or None for a per-token grid.

    Returns:
        k_codes, v_codes: [pages, P, D] uint8; scales: [pages, C, P, 2] float32 (step, min), C = 1 with
        statistics (V's), else 2 (V's, then K's).
    """
    return cast("tuple[Tensor, Tensor, Tensor]", _call(_ops.quantize_kv, k, v, stats))


def dequantize_kv(
    k_codes: Tensor, v_codes: Tensor, stats: Tensor | None, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The inverse of `quantize_kv`; K is clamped to its box in ``dtype``.

    Args:
        k_codes, v_codes: [pages, P, D] uint8.
        stats: [pages, P/L, 2, D] of ``dtype``, or None.
        scales: [pages, C, P, 2] float32.
        dtype: of the result.

    Returns:
        k, v: [pages, P, D].
    """
    return cast("tuple[Tensor, Tensor]", _call(_ops.dequantize_kv, k_codes, v_codes, stats, scales, dtype))


def append_kv(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, context_lens: Tensor, kv: PagedKV) -> None:
    """Appends the new tokens of a ragged batch, in place: into the residual buffer, and what is due into the pools.

    With n tokens held after the call, pages below ``max(sealed, n // P - 1)`` are sealed: statistics and moments are
    taken, codes written. A page whose slot is -1 is skipped (a streaming head is already past it). The
    caller then advances its lengths and ``sealed``; the op writes neither.

    Without a residual buffer the tokens go into their pages at once, as they are or as codes on a grid a token, and
    ``sealed`` is not read. Statistics and moments are None then: a page that is not full has none.

    Args:
        k, v: [N, H, D] packed new tokens, after rotary embedding.
        cu_seqlens_k: [B + 1] int32 bounds of each sequence's tokens in k and v.
        context_lens: [B] int32 tokens held before.
        kv: the layer's cache; pools, statistics, moments, scales and residual buffer are written.
    """
    if _DEBUG:
        _check_finite("append_kv", k=k, v=v)
    _call(_ops.append_kv, k, v, cu_seqlens_k, context_lens, *_cache("append_kv", kv))


def wanted_pages(
    mask: Mask, block_table: Tensor, sealed: Tensor, first: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """The sealed pages that attention will read: what has to lie in slots before it begins.

    Args:
        mask: as `decode` and `attention_mass` take it.
        block_table: [B, H, M] int32, as in `PagedKV`.
        sealed: [B] int32.
        first: [B] int32 position of a sequence's first query; later ones reach no further back.
        page_size: P.

    Returns:
        pages: [B, H, M] int32, ascending, -1 padded; counts: [B, H] int32, how many.
    """
    args = (*_mask("wanted_pages", mask, page_size), block_table, sealed, first, page_size)
    return cast("tuple[Tensor, Tensor]", _call(_ops.wanted_pages, *args))


def resolve_pages(
    lists: Tensor,
    block_table: Tensor,
    slot_table: Tensor,
    slot_blocks: Tensor,
    last_use: Tensor,
    clock: Tensor,
    keep: int = DENSE,
) -> tuple[Tensor, Tensor]:
    """Finds slots for the pages that are wanted now, where the device has fewer slots than there are pages.

    A page lies in slot s = ``slot_table[b, h, page]`` if that slot holds its block, ``slot_blocks[s] == block_table[b,
    h, page]``; so tables may be copied, and go out of date, as they like. Every wanted page that lies nowhere takes a
    slot. As many slots as these are make room, those least recently used (the lower one of two), none of which is
    wanted; in ascending order they go to the pages in the order of lists. With ``src_ids`` and ``dst_ids``,
    `gather_pages` copies what is missing. (As HiSparse does it, arXiv 2608.07009, but for one pool of slots.)

    Args:
        lists: [B, H, K] int32 pages, none twice for a head; -1: none.
        block_table: [B, H, M] int32 block of each page in the tier below.
        slot_table: [B, H, M] int32 as in `PagedKV`; -1: nowhere; written for the pages that are wanted.
        slot_blocks: [S] int32 block that lies in each slot, -1 at first; written.
        last_use: [S] int32 the call that wanted it last, 0 at first; written.
        clock: [1] int32 calls so far; written.
        keep: of the pages in lists, the first so many count as used now. The slots of the others, which the caller
            reads before the next call, make room first in it.

    Returns:
        src_ids, dst_ids: [B, H, K] int32 blocks to copy and slots to copy them to; -1 for pages that lay in a slot.
    """
    args = (lists, block_table, slot_table, slot_blocks, last_use, clock, keep)
    return cast("tuple[Tensor, Tensor]", _call(_ops.resolve_pages, *args))


def gather_pages(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor) -> None:
    """Copies listed rows between two pools: ``dst[dst_ids[i]] = src[src_ids[i]]``, in place.

    A row is a block, or a single token when both pools are viewed as [blocks * P, D].

    Args:
        src, dst: [rows, ...] with contiguous rows of one shape and dtype. With CUDA ids, each may lie on their device
            or in pinned host memory, which is then read or written directly, without staging.
        src_ids, dst_ids: [count] int32; a pair with a -1 is skipped. dst_ids should not repeat.
    """
    _call(_ops.gather_pages, src, src_ids, dst, dst_ids)


def page_scores(q: Tensor, stats: Tensor, block_table: Tensor, sealed: Tensor, windows: Tensor | None = None) -> Tensor:
    """Importance of every sealed page for every kv head (Quest, section 3.3; LServe, section 4.2).

    The maximum over a page's groups and over the G query heads of ``Σ_i max(q_i·min_i, q_i·max_i)``: an
    upper bound of every q·k in the page, before scaling.

    Args:
        q: [B, Hq, D].
        stats: [blocks, P/L, 2, D] from `page_stats` or `page_moments`.
        block_table: [B, H, M] int32.
        sealed: [B] int32.
        windows: [H] int32; heads other than `LISTED` follow no list and are skipped. None: all are scored.

    Returns:
        [B, H, M] float32; -inf for pages that are not sealed or not held, and for skipped heads.
    """
    return cast(Tensor, _call(_ops.page_scores, q, stats, block_table, sealed, windows))


def select_pages(
    scores: Tensor, seq_lens: Tensor, sealed: Tensor, page_size: int, sink: int, local: int, count: int
) -> tuple[Tensor, Tensor]:
    """The ``count`` best pages between sink and local, deterministically (LServe, section 4.3).

    Args:
        scores: [B, H, M] float32. NaN counts as -inf.
        seq_lens: [B] int32 tokens held, the query's own included.
        sealed: [B] int32.
        page_size: P.
        sink, local: pages; neither is selected, both are attended anyway.
        count: K, pages to pick.

    Returns:
        pages: [B, H, K] int32, ascending, -1 padded; ties go to the lower page.
        local_start: [B] int32, the first local page, which a reused list keeps.
    """
    return cast(
        "tuple[Tensor, Tensor]", _call(_ops.select_pages, scores, seq_lens, sealed, page_size, sink, local, count)
    )


def select_tokens(
    mass: Tensor, seq_lens: Tensor, sealed: Tensor, counts: Tensor, page_size: int, max_picks: int
) -> tuple[Tensor, Tensor]:
    """The heaviest tokens before the local ones, which are as many (ALISA, Algorithm 1: half local, half by mass).

    With k = min(max_picks, counts[b]), local are the newest max(k, unsealed) tokens; picked are the k heaviest older
    ones.

    Args:
        mass: [B, H, tokens] float32, for instance a running sum of `attention_mass`. NaN counts as -inf.
        seq_lens: [B] int32 tokens held, the query's own included.
        sealed: [B] int32.
        counts: [B] int32, at least 0.
        page_size: P.
        max_picks: K, the most that are picked.

    Returns:
        tokens: [B, H, K] int32 positions, ascending, -1 padded; ties go to the lower position.
        local_start: [B] int32 first local position.
    """
    return cast(
        "tuple[Tensor, Tensor]", _call(_ops.select_tokens, mass, seq_lens, sealed, counts, page_size, max_picks)
    )


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Mask,
    kv: PagedKV | None = None,
    context_lens: Tensor | None = None,
    *,
    page_size: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Block-sparse flash attention over a packed ragged batch (LServe, section 3.2).

    Query i of a sequence with nq queries and nk new keys stands at position ``context_lens + nk - nq + i``. It
    reads cached positions from the cache as it lies and new ones from k and v.

    Args:
        q: [Nq, Hq, D].
        k, v: [Nk, H, D] new tokens, not yet appended.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 bounds of each sequence in q and in k; nq <= nk.
        mask: lists are [B, H, R, K] pages: row r serves the queries of page r after that of the sequence's first
            query. The local part of a head that is `LISTED` is the query's own page, so there is no local_start.
        kv, context_lens: the cache and [B] int32 tokens held in it; or None.
        page_size: P; by default that of the cache, else 64.
        scale: of q·k; by default D ** -0.5.

    Returns:
        out: [Nq, Hq, D] in q's dtype; lse: [Nq, Hq] float32, natural logarithm.
    """
    cache = _cache("prefill", kv) if kv is not None else (None,) * len(_READ)
    if page_size is None:
        page_size = _page_size(kv) if kv is not None else 64
    if scale is None:
        scale = _scale(q)
    mask = _mask("prefill", mask, None)
    if mask.local_start is not None or mask.unit not in (None, page_size):
        name, want = ("local_start", None) if mask.local_start is not None else ("unit", page_size)
        raise ValueError(f"lserve_ext::prefill: {name}: expected {want}, got {getattr(mask, name)!r:.60}")
    if _DEBUG:
        _check_finite("prefill", q=q, k=k, v=v)
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, mask.windows, mask.lists, mask.sink, *cache, context_lens)
    return cast("tuple[Tensor, Tensor]", _call(_ops.prefill, *args, page_size, scale))


def decode(
    q: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One query a sequence against sink, list, local and residual tokens (LServe, section 3.3).

    Append the query's own token first. ``kv.sealed`` may be that from before the append, so that a step
    reads every page as it lay when the step began.

    Args:
        q: [B, Hq, D].
        mask: lists and local_start from `select_pages` or `select_tokens`.
        kv: the layer's cache.
        seq_lens: [B] int32 tokens held, the query's own included; 0 attends nothing.
        scale: of q·k; by default D ** -0.5.

    Returns:
        out: [B, Hq, D] in q's dtype; lse: [B, Hq] float32. Nothing attended: 0 and -inf.
    """
    cache = _cache("decode", kv)
    mask = _mask("decode", mask, _page_size(kv))
    if scale is None:
        scale = _scale(q)
    if _DEBUG:
        _check_finite("decode", q=q)
    return cast("tuple[Tensor, Tensor]", _call(_ops.decode, q, *mask, *cache, seq_lens, scale))


def attention_mass(
    q: Tensor, lse: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
) -> Tensor:
    """Softmax mass that queries put on every token, exp(q·k - lse): ALISA's and H2O's scorer.

    Args:
        q: [B, T, Hq, D], the last T tokens of every sequence.
        lse: [B, T, Hq] float32 from the attention of these queries; a row of -inf is no query.
        mask, kv, seq_lens, scale: as in `decode`.

    Returns:
        [B, H, M * P] float32: summed over the T queries and the G query heads of a kv head; 0 where
        nothing is attended.
    """
    cache = _cache("attention_mass", kv)
    mask = _mask("attention_mass", mask, _page_size(kv))
    if scale is None:
        scale = _scale(q)
    return cast(Tensor, _call(_ops.attention_mass, q, lse, *mask, *cache, seq_lens, scale))


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins two partial attentions over disjoint keys (FlashAttention's split-K rule, in float32).

    Args:
        out_a, out_b: [..., D], one floating dtype, contiguous.
        lse_a, lse_b: [...] float32; -inf: nothing was attended.

    Returns:
        out: [..., D] in out_a's dtype; lse: [...] float32.
    """
    return cast("tuple[Tensor, Tensor]", _call(_ops.merge_states, out_a, lse_a, out_b, lse_b))


# No op has a gradient. Saying so at the call is kinder than a wrong or missing gradient later.


def _refuse_grad(name: str) -> Any:
    op = getattr(_ops, name).default

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        grad, dual = torch.is_grad_enabled(), forward_ad._current_level >= 0
        for x in (*args, *kwargs.values()) if grad or dual else ():
            if grad and isinstance(x, Tensor) and x.requires_grad:
                raise RuntimeError(f"lserve_ext::{name} has no gradient: call it under torch.no_grad()")
            if dual and isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(f"lserve_ext::{name} has no gradient, in forward mode neither: got a dual tensor")
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


_autograd = torch.library.Library("lserve_ext", "IMPL")
for _name in __all__:
    if hasattr(_ops, _name):
        _autograd.impl(_name, _refuse_grad(_name), "Autograd", with_keyset=True)


# Fake rules, for torch.compile, torch.export and meta tensors: what the real ops check of shapes, dtypes and devices,
# and results without contents.

_PAGED = {
    "k_pool": "slots P D", "v_pool": "slots P D", "stats": "blocks groups 2 D", "scales": "slots C P 2",
    "block_table": "B H M", "slot_table": "B H M", "residual_k": "B H 2P D", "residual_v": "B H 2P D", "sealed": "B",
}  # fmt: skip
_MASK = {"windows": "H", "lists": "B H K", "local_start": "B"}
_SHAPES: dict[str, dict[str, str]] = {
    "page_stats": {"k": "pages P D"},
    "page_moments": {"k": "pages P D"},
    "quantize_kv": {"k": "pages P D", "v": "pages P D", "stats": "pages groups 2 D"},
    "dequantize_kv": {"k_codes": "pages P D", "v_codes": "pages P D", "stats": "pages groups 2 D",
                      "scales": "pages C P 2"},
    "append_kv": {"k": "N H D", "v": "N H D", "context_lens": "B", "cu_seqlens_k": "B+1", **_PAGED,
                  "moments": "blocks pairs 2 D"},
    "wanted_pages": {"block_table": "B H M", **_MASK, "sealed": "B", "first": "B"},
    "resolve_pages": {"lists": "B H K", "block_table": "B H M", "slot_table": "B H M", "slot_blocks": "S",
                      "last_use": "S", "clock": "1"},
    "gather_pages": {"src_ids": "count", "dst_ids": "count"},
    "page_scores": {"q": "B Hq D", "stats": "blocks groups 2 D", "block_table": "B H M", "sealed": "B", "windows": "H"},
    "select_pages": {"scores": "B H M", "seq_lens": "B", "sealed": "B"},
    "select_tokens": {"mass": "B H tokens", "seq_lens": "B", "sealed": "B", "counts": "B"},
    "prefill": {"q": "Nq Hq D", "k": "Nk H D", "v": "Nk H D", "cu_seqlens_q": "B+1", "cu_seqlens_k": "B+1", **_PAGED,
                "context_lens": "B", "windows": "H", "lists": "B H R K"},
    "decode": {"q": "B Hq D", **_PAGED, **_MASK, "seq_lens": "B"},
    "attention_mass": {"q": "B T Hq D", "lse": "B T Hq", **_PAGED, **_MASK, "seq_lens": "B"},
    "merge_states": {},
}  # fmt: skip
_INT32 = {"cu_seqlens_q", "cu_seqlens_k", "context_lens", "seq_lens", "counts", "sealed", "block_table", "slot_table",
          "windows", "lists", "local_start", "src_ids", "dst_ids", "slot_blocks", "last_use", "clock",
          "first"}  # fmt: skip
_FLOAT32 = {"scores", "mass", "lse", "lse_a", "lse_b", "scales"}
_UINT8 = {"k_codes", "v_codes"}
_OF_ANY_DTYPE = {"wanted_pages", "resolve_pages", "gather_pages", "select_pages", "select_tokens"}
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def _check_fake(op: str, args: dict[str, Any]) -> None:
    """What the real op checks without looking into tensors."""

    def fail(name: str, expected: str, got: object) -> None:
        raise RuntimeError(f"lserve_ext::{op}: {name}: expected {expected}, got {got}")

    tensors = {name: x for name, x in args.items() if isinstance(x, Tensor)}
    first = next(iter(tensors.values()))
    dtypes = {**dict.fromkeys(_INT32, (torch.int32,)), **dict.fromkeys(_FLOAT32, (torch.float32,)),
              **dict.fromkeys(_UINT8, (torch.uint8,))}  # fmt: skip
    own = args.get("dtype", first.dtype)
    if op not in _OF_ANY_DTYPE and own not in _FLOATING:
        fail(next(iter(tensors)), "dtype float32, float16 or bfloat16", own)
    sizes: dict[str, int] = {}
    for name, x in tensors.items():
        if x.device != first.device and op != "gather_pages":
            fail(name, "the device of the other arguments", x.device)
        wanted = dtypes.get(name, (own, torch.uint8) if name in ("k_pool", "v_pool") else (own,))
        if x.dtype not in wanted:
            fail(name, f"dtype {wanted[0]}", x.dtype)
        letters = _SHAPES[op][name].split() if name in _SHAPES[op] else ["*"] * x.dim()
        if x.dim() != len(letters):
            fail(name, f"[{', '.join(letters)}]", list(x.shape))
        for letter, size in zip(letters, x.shape, strict=True):
            if letter == "*":
                continue
            if letter == "B+1" and "B" not in sizes:
                sizes["B"] = size - 1
            want = sizes["B"] + 1 if letter == "B+1" else 2 * sizes["P"] if letter == "2P" else (
                int(letter) if letter.isdecimal() else sizes.setdefault(letter, size))  # fmt: skip
            if size != want:
                fail(name, f"[{', '.join(letters)}] with {letter} = {want}", list(x.shape))
    P, D = (sizes.get(letter) for letter in "PD")
    if D is not None and (D < 16 or D > MAX_HEAD_DIM or D % 16):
        fail(next(iter(tensors)), f"a head dimension D that is a multiple of 16 up to {MAX_HEAD_DIM}", D)
    group = args.get("group")
    if P is not None and group is not None and (group < 1 or P % group):
        fail("group", f"a divisor of the page size {P}", group)
    for name, letter in (("stats", "groups"), ("moments", "pairs")):
        groups = sizes.get(letter)
        if P is not None and groups is not None and (groups < 1 or P % groups):
            fail(name, f"a number of groups that divides P = {P}", groups)
    if "Hq" in sizes and "H" in sizes and (sizes["H"] == 0 or sizes["Hq"] % sizes["H"]):
        fail("q", f"query heads to be a multiple of the {sizes['H']} kv heads", sizes["Hq"])
    for name in ("page_size", "local"):
        if name in args and args[name] < 1:
            fail(name, "at least 1", args[name])
    for name in ("sink", "count", "max_picks", "keep"):
        if name in args and args[name] < 0:
            fail(name, "at least 0", args[name])
    if op == "gather_pages" and (args["dst"].dim() == 0 or args["dst"].shape[1:] != args["src"].shape[1:]):
        fail("dst", f"rows of src, {list(args['src'].shape[1:])}", list(args["dst"].shape))
    if op == "merge_states":
        out, rows = args["out_a"].shape, args["out_a"].shape[:-1]
        for name, want in (("lse_a", rows), ("out_b", out), ("lse_b", rows)):
            if args[name].shape != want:
                fail(name, str(list(want)), list(args[name].shape))


def _fake(op: str) -> Any:
    names = [argument.name for argument in getattr(_ops, op).default._schema.arguments]

    def register(rule: Any) -> Any:
        def checked(*args: Any) -> Any:
            _check_fake(op, dict(zip(names, args, strict=True)))
            return rule(*args)

        torch.library.register_fake(f"lserve_ext::{op}")(checked)
        return rule

    return register


@_fake("page_stats")
@_fake("page_moments")
def _(k: Tensor, group: int) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[1] // group, 2, k.shape[2])


@_fake("quantize_kv")
def _(k: Tensor, v: Tensor, stats: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    scales = k.new_empty(k.shape[0], 2 if stats is None else 1, k.shape[1], 2, dtype=torch.float32)
    return k.new_empty(k.shape, dtype=torch.uint8), k.new_empty(k.shape, dtype=torch.uint8), scales


@_fake("dequantize_kv")
def _(
    k_codes: Tensor, v_codes: Tensor, stats: Tensor | None, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return k_codes.new_empty(k_codes.shape, dtype=dtype), k_codes.new_empty(k_codes.shape, dtype=dtype)


@_fake("append_kv")
def _(*args: Any) -> None:
    return None


@_fake("wanted_pages")
def _(
    windows: Tensor, lists: Tensor | None, local_start: Tensor | None, sink: int, unit: int,
    block_table: Tensor, *args: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return block_table.new_empty(block_table.shape), block_table.new_empty(block_table.shape[:2])


@_fake("resolve_pages")
def _(lists: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return lists.new_empty(lists.shape), lists.new_empty(lists.shape)


@_fake("gather_pages")
def _(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor) -> None:
    return None


@_fake("page_scores")
def _(q: Tensor, stats: Tensor, block_table: Tensor, sealed: Tensor, windows: Tensor | None) -> Tensor:
    return q.new_empty(block_table.shape, dtype=torch.float32)


@_fake("select_pages")
def _(
    scores: Tensor, seq_lens: Tensor, sealed: Tensor, page_size: int, sink: int, local: int, count: int
) -> tuple[Tensor, Tensor]:
    B, H, _ = scores.shape
    return scores.new_empty(B, H, count, dtype=torch.int32), scores.new_empty(B, dtype=torch.int32)


@_fake("select_tokens")
def _(
    mass: Tensor, seq_lens: Tensor, sealed: Tensor, counts: Tensor, page_size: int, max_picks: int
) -> tuple[Tensor, Tensor]:
    B, H, _ = mass.shape
    return mass.new_empty(B, H, max_picks, dtype=torch.int32), mass.new_empty(B, dtype=torch.int32)


@_fake("prefill")
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("decode")
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("attention_mass")
def _(
    q: Tensor, lse: Tensor, windows: Tensor, lists: Tensor | None, local_start: Tensor | None, sink: int, unit: int,
    k_pool: Tensor, v_pool: Tensor, stats: Tensor | None, scales: Tensor | None, block_table: Tensor, *args: Any,
) -> Tensor:  # fmt: skip
    B, H, M = block_table.shape
    return q.new_empty(B, H, M * k_pool.shape[1], dtype=torch.float32)


@_fake("merge_states")
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)
