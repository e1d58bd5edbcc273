"""What every op owes torch and its callers: schemas, fakes, errors that name the argument, threads."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _cases import BF16, F32, SHAPES, SMALL, Case, Shape, build, halves, ints, normal, pack, same_bits
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask, PagedKV

OPS = [name for name in ops.__all__ if name.islower()]
OPS_OF_FLOATS = [name for name in OPS if name not in ("wanted_pages", "resolve_pages")]


def arguments(op: str, device: str = "cpu", shape: Shape = SHAPES[1]) -> dict[str, Any]:
    """Valid arguments of an op, by the names of its schema."""
    case = build(shape, [100, 35], heads=2, device=device)
    q, rows = case.queries(), case.queries(rows=3)
    lists, start = case.lists(sink=1, local=1, count=2)
    new = [normal(s, 5, 2, shape.head_dim, dtype=shape.dtype, device=device) for s in (1, 2)]
    page = [normal(s, 3, shape.page_size, shape.head_dim, dtype=shape.dtype, device=device) for s in (1, 2)]
    stats = reference.page_stats(page[0], shape.stats_group) if shape.stats_group else None
    k_codes, v_codes, scales = reference.quantize_kv(page[0], page[1], stats)
    cache, scale = case.kv._replace(moments=None)._asdict(), shape.head_dim**-0.5
    rule = {"windows": case.windows(DENSE, 0), "lists": lists, "local_start": start, "sink": 1}
    mass = normal(3, 2, 2, 128, device=device).abs()
    growing = build(shape, [100, 35], heads=2, device=device, room=2).kv._asdict()
    appended = normal(4, 30, 2, shape.head_dim, dtype=shape.dtype, device=device)  # seals pages of the first sequence
    everything: dict[str, dict[str, Any]] = {
        "page_stats": {"k": page[0], "group": shape.stats_group or shape.page_size},
        "page_moments": {"k": page[0], "group": shape.page_size},
        "quantize_kv": {"k": page[0], "v": page[1], "stats": stats},
        "dequantize_kv": {
            "k_codes": k_codes,
            "v_codes": v_codes,
            "stats": stats,
            "scales": scales,
            "dtype": shape.dtype,
        },
        "append_kv": {
            "k": appended,
            "v": appended + 1,
            "cu_seqlens_k": ints([0, 28, 30], device),
            "context_lens": case.lengths,
            **growing,
        },
        "wanted_pages": {
            **rule,
            "unit": shape.page_size,
            "page_size": shape.page_size,
            "block_table": cache["block_table"],
            "sealed": cache["sealed"],
            "first": case.lengths - 1,
        },
        "resolve_pages": {
            "lists": ints([[[0, 2, -1], [1, 3, 4]]], device),
            "block_table": ints([[[3, 1, 4, 0, 5], [2, 6, 7, 8, 9]]], device),
            "slot_table": ints([[[1, -1, -1, 0, -1], [-1, -1, -1, -1, 3]]], device),
            "slot_blocks": ints([0, 3, -1, 9, -1, 1, 2], device),
            "last_use": ints([2, 1, 0, 1, 0, 2, 2], device),
            "clock": ints([2], device),
            "keep": 4,
        },
        "gather_pages": {
            "src": page[0],
            "src_ids": ints([2, -1, 0], device),
            "dst": torch.zeros_like(page[1]),
            "dst_ids": ints([0, 1, 2], device),
        },
        "page_scores": {
            "q": q,
            "stats": cache["stats"],
            "block_table": cache["block_table"],
            "sealed": cache["sealed"],
            "windows": ints([0, DENSE], device),
        },
        "select_pages": {
            "scores": normal(3, 2, 2, 8, device=device),
            "seq_lens": case.lengths,
            "sealed": cache["sealed"],
            "page_size": shape.page_size,
            "sink": 1,
            "local": 1,
            "count": 2,
        },
        "select_tokens": {
            "mass": mass,
            "seq_lens": case.lengths,
            "sealed": cache["sealed"],
            "counts": ints([20, 7], device),
            "page_size": shape.page_size,
            "max_picks": 9,
        },
        "prefill": {
            "q": normal(5, 4, 2 * shape.group, shape.head_dim, dtype=shape.dtype, device=device),
            "k": new[0],
            "v": new[1],
            "cu_seqlens_q": ints([0, 3, 4], device),
            "cu_seqlens_k": ints([0, 4, 5], device),
            **cache,
            "context_lens": case.lengths,
            "windows": case.windows(DENSE, 0),
            "lists": ints([[[[2, 3], [3, -1]]] * 2, [[[1, -1], [1, -1]]] * 2], device),
            "sink": 1,
            "page_size": shape.page_size,
            "scale": scale,
        },
        "decode": {"q": q, **cache, "seq_lens": case.lengths, **rule, "unit": shape.page_size, "scale": scale},
        "attention_mass": {
            "q": rows[:, :1],
            "lse": torch.ones(rows[:, :1].shape[:3], device=device),
            **cache,
            "seq_lens": case.lengths,
            **rule,
            "unit": shape.page_size,
            "scale": scale,
        },
        "merge_states": {
            "out_a": q,
            "lse_a": torch.ones(q.shape[:2], device=device),
            "out_b": q + 1,
            "lse_b": torch.zeros(q.shape[:2], device=device),
        },
    }
    return everything[op]


def raw_op(op: str) -> Any:
    return getattr(torch.ops.lserve_ext, op).default


def call_raw(op: str, args: dict[str, Any]) -> Any:
    return raw_op(op)(*(args[a.name] for a in raw_op(op)._schema.arguments))


def call(op: str, args: dict[str, Any], module: Any = ops) -> Any:
    """The same through the wrapper, or the reference: cache and mask are one argument each."""
    args = dict(args)
    if "k_pool" in args:
        cache = {name: args.pop(name) for name in PagedKV._fields}
        args["kv"] = None if cache["k_pool"] is None else PagedKV(**cache)
    if "windows" in args and op != "page_scores":
        args["mask"] = Mask(**{name: args.pop(name) for name in Mask._fields if name in args})
    return getattr(module, op)(**args)


def tensors(args: dict[str, Any]) -> list[Tensor]:
    return [t for t in args.values() if isinstance(t, Tensor)]


# ---------------------------------------------------------------------------------------------- shape of the library


@pytest.mark.parametrize("op", OPS)
def test_wrapper_reference_and_schema_agree(op: str) -> None:
    wrapper, plain = (inspect.signature(getattr(module, op)).parameters for module in (ops, reference))
    assert list(wrapper) == list(plain)
    assert [p.default for p in wrapper.values()] == [p.default for p in plain.values()]
    assert [p.kind for p in wrapper.values()] == [p.kind for p in plain.values()]
    whole = {"kv": PagedKV._fields if op == "append_kv" else PagedKV._fields[:-1], "mask": Mask._fields}
    flat = [name for w in wrapper for name in whole.get(w, (w,))]
    if op == "prefill":
        flat = [name for name in flat if name not in ("local_start", "unit")]
    assert flat == [a.name for a in raw_op(op)._schema.arguments]
    assert getattr(ops, op).__doc__ and getattr(reference, op).__doc__


def test_every_op_is_wrapped() -> None:
    registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("lserve_ext::")}
    assert registered == set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.gpu
def test_raw_op_and_wrapper_do_the_same(op: str, device: str) -> None:
    a, b = arguments(op, device), arguments(op, device)
    for x, y in zip(_flat(call(op, a)) + tensors(a), _flat(call_raw(op, b)) + tensors(b), strict=True):
        assert same_bits(x, y)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op != "page_scores"])
@pytest.mark.gpu
def test_opcheck(op: str, shape: Shape, device: str) -> None:
    args = arguments(op, device, shape)
    torch.library.opcheck(raw_op(op), tuple(args[a.name] for a in raw_op(op)._schema.arguments))


@pytest.mark.parametrize("shape", SMALL[:2], ids=str)
@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.gpu
def test_opcheck_of_page_scores(shape: Shape, windows: bool, device: str) -> None:
    args = arguments("page_scores", device, shape)
    args["windows"] = args["windows"] if windows else None
    torch.library.opcheck(raw_op("page_scores"), tuple(args.values()))


@pytest.mark.gpu
def test_opcheck_without_a_cache(device: str) -> None:
    args = arguments("prefill", device)
    args.update(dict.fromkeys(PagedKV._fields), context_lens=None, lists=None, windows=ints([DENSE, 2], device))
    torch.library.opcheck(raw_op("prefill"), tuple(args[a.name] for a in raw_op("prefill")._schema.arguments))


def _flat(result: Any) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, before: Tensor, after: Tensor, windows: Tensor, kv: PagedKV
) -> tuple[Tensor, Tensor]:
    ops.append_kv(k, v, cu, before, kv)
    assert kv.stats is not None
    scores = ops.page_scores(q, kv.stats, kv.block_table, kv.sealed, windows)
    pages, start = ops.select_pages(scores, after, kv.sealed, 16, 1, 1, 2)
    return ops.decode(q, Mask(windows, pages, start, sink=1), kv, after)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.gpu
def test_a_decode_step_compiles_without_graph_breaks(backend: str, device: str) -> None:
    def run(step: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        case = build(SHAPES[1], [100, 35], heads=2, device=device)
        (k, cu), (v, _) = (pack([normal(s, 1, 2, 64, device=device)] * 2) for s in (1, 2))
        windows = case.windows(0, DENSE)
        results = step(case.queries(), k, v, cu, case.lengths, case.lengths + 1, windows, case.kv)
        assert case.kv.residual_k is not None
        assert torch.equal(case.kv.residual_k[0, :, 100 % 32], k[0])  # the append has really happened
        return [*results, case.kv.residual_k]

    torch.compiler.reset()
    compiled = run(torch.compile(decode_step, fullgraph=True, backend=backend))
    assert all(same_bits(a, b) for a, b in zip(compiled, run(decode_step), strict=True))


@pytest.mark.gpu
def test_decode_compiles_for_any_length(device: str) -> None:
    """Lengths are data, so a longer sequence is no new graph."""
    counts = torch._dynamo.testing.CompileCounter()
    torch.compiler.reset()
    step = torch.compile(lambda q, kv, n, w: ops.decode(q, Mask(w), kv, n), fullgraph=True, backend=counts)
    case = build(SHAPES[1], [100, 35], heads=2, device=device)
    for shorter in (0, 1, 5):
        step(case.queries(), case.kv, case.lengths - shorter, case.windows(DENSE, 2))
    assert counts.frame_count == 1


# ---------------------------------------------------------------------------------------------- errors


def another_dtype(t: Tensor) -> Tensor:
    return t.to({torch.uint8: torch.int8, torch.int32: torch.int64}.get(t.dtype, torch.float64))


def another_rank(t: Tensor) -> Tensor:
    return t[None]


def gaps_inside(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


# Arguments that set the expectation for the others, so that another one is named; and a single number has no gaps.
SETS_THE_RULE = {("gather_pages", "src", another_dtype), ("gather_pages", "src", another_rank),
                 ("resolve_pages", "clock", gaps_inside), ("merge_states", "out_a", another_rank)}  # fmt: skip


def wrong_tensors() -> Iterator[Any]:
    for op in OPS:
        for name, value in arguments(op).items():
            if not isinstance(value, Tensor):
                continue
            for change, error in ((another_dtype, TypeError), (another_rank, ValueError), (gaps_inside, ValueError)):
                if (op, name, change) not in SETS_THE_RULE:
                    yield pytest.param(op, name, change, error, id=f"{op}-{name}-{change.__name__}")


def set_at(*index: Any, to: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = to
        return t

    return change


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def lens(op: str) -> str:
    """What an op calls the lengths of its sequences."""
    return "context_lens" if op in ("append_kv", "prefill") else "seq_lens"


CACHE_READERS = ("decode", "attention_mass", "prefill")
WRONG_VALUES: list[tuple[str, str, str, Callable[[Any], Any]]] = [
    ("page_stats", "group", "no divisor", constant(5)),
    ("page_stats", "group", "zero", constant(0)),
    ("page_moments", "group", "no divisor", constant(5)),
    ("page_moments", "k", "head dim 8", lambda t: t[..., :8].contiguous()),
    ("page_stats", "k", "head dim 8", lambda t: t[..., :8].contiguous()),
    ("page_stats", "k", "head dim 272", constant(torch.zeros(1, 16, 272))),
    ("page_stats", "k", "head dim 40", constant(torch.zeros(1, 16, 40))),
    ("quantize_kv", "v", "other pages", lambda t: t[:2]),
    ("quantize_kv", "stats", "3 groups", lambda t: torch.cat([t, t[:, :1]], 1)),
    ("dequantize_kv", "scales", "two rows", lambda t: torch.cat([t, t], 1)),
    ("append_kv", "v", "other tokens", lambda t: t[:-1]),
    ("append_kv", "cu_seqlens_k", "fewer than there are", set_at(2, to=29)),
    ("append_kv", "cu_seqlens_k", "does not begin at 0", set_at(0, to=1)),
    ("append_kv", "slot_table", "one slot for two pages", lambda t: t[..., [0] * 5 + [5, 5]]),
    ("append_kv", "k_pool", "zero strides", lambda t: t[:1].expand(t.shape)),
    ("gather_pages", "dst_ids", "a row twice", set_at(2, to=0)),
    ("gather_pages", "dst", "zero strides", lambda t: t[:1].expand(t.shape)),
    *((op, name, f"{value} is too large", constant(value))
      for op, name in (("prefill", "page_size"), ("select_pages", "page_size"), ("select_pages", "sink"),
                       ("select_pages", "local"), ("select_pages", "count"), ("select_tokens", "page_size"),
                       ("select_tokens", "max_picks"), ("decode", "sink"))
      for value in (2**31, 2**32, 2**32 - 1, 2**63 - 1)),
    ("select_pages", "count", "more than memory", constant(2**31 - 1)),
    ("decode", "lists", "a -1 inside", set_at(0, 1, 0, to=-1)),
    ("append_kv", "cu_seqlens_k", "more than there are", set_at(2, to=31)),
    ("append_kv", "cu_seqlens_k", "descends", set_at(1, to=31)),
    ("append_kv", "cu_seqlens_k", "negative", set_at(0, to=-1)),
    ("append_kv", "context_lens", "negative", set_at(0, to=-1)),
    ("append_kv", "sealed", "too few", set_at(0, to=2)),
    ("append_kv", "sealed", "too many", set_at(0, to=7)),
    ("append_kv", "slot_table", "out of range", set_at(0, 0, 5, to=10**6)),
    ("append_kv", "slot_table", "below -1", set_at(0, 0, 5, to=-2)),
    ("append_kv", "block_table", "out of range", set_at(0, 1, 5, to=10**6)),
    ("append_kv", "block_table", "no block", set_at(0, 1, 5, to=-1)),
    ("append_kv", "slot_table", "narrower than block_table", lambda t: t[..., :-1]),
    ("append_kv", "moments", "other blocks than stats", lambda t: t[:-1]),
    ("append_kv", "moments", "3 groups", lambda t: t[:, [0, 0, 0]]),
    ("append_kv", "moments", "zero strides", lambda t: t[:1].expand(t.shape)),
    ("append_kv", "scales", "none", constant(None)),
    ("append_kv", "residual_k", "one page", lambda t: t[:, :, :16]),
    ("wanted_pages", "windows", "negative", set_at(0, to=-1)),
    ("wanted_pages", "lists", "out of range", set_at(0, 1, 1, to=10**6)),
    ("wanted_pages", "lists", "descends", lambda t: t.flip(-1)),
    ("wanted_pages", "lists", "a -1 inside", set_at(0, 1, 0, to=-1)),
    ("wanted_pages", "local_start", "none", constant(None)),
    ("wanted_pages", "unit", "half a page", constant(8)),
    ("wanted_pages", "page_size", "zero", constant(0)),
    ("wanted_pages", "sink", "negative", constant(-1)),
    ("wanted_pages", "sealed", "more than there are", set_at(1, to=99)),
    ("wanted_pages", "first", "below -1", set_at(0, to=-2)),
    ("resolve_pages", "keep", "negative", constant(-1)),
    ("resolve_pages", "lists", "out of range", set_at(0, 0, 1, to=5)),
    ("resolve_pages", "lists", "below -1", set_at(0, 0, 2, to=-2)),
    ("resolve_pages", "lists", "a page twice", set_at(0, 1, 2, to=3)),
    ("resolve_pages", "block_table", "no block", set_at(0, 1, 3, to=-1)),
    ("resolve_pages", "slot_table", "out of range", set_at(0, 0, 0, to=7)),
    ("resolve_pages", "slot_table", "below -1", set_at(0, 0, 0, to=-2)),
    ("resolve_pages", "slot_table", "zero strides", lambda t: t[:, :1].expand(t.shape)),
    ("resolve_pages", "slot_blocks", "below -1", set_at(2, to=-2)),
    ("resolve_pages", "last_use", "negative", set_at(2, to=-1)),
    ("resolve_pages", "last_use", "later than the clock", set_at(2, to=3)),
    ("resolve_pages", "last_use", "other slots", lambda t: t[:4]),
    ("resolve_pages", "clock", "at its end", set_at(0, to=2**31 - 1)),
    ("resolve_pages", "slot_table", "other pages", lambda t: t[..., :4]),
    ("gather_pages", "src_ids", "out of range", set_at(0, to=3)),
    ("gather_pages", "src_ids", "below -1", set_at(0, to=-2)),
    ("gather_pages", "dst_ids", "out of range", set_at(1, to=3)),
    ("gather_pages", "dst_ids", "other count", lambda t: t[:2]),
    ("gather_pages", "dst", "other rows", lambda t: t[:, :8]),
    ("page_scores", "q", "no multiple of the kv heads", lambda t: t[:, :7]),
    ("page_scores", "block_table", "out of range", set_at(0, 0, 1, to=10**6)),
    ("page_scores", "block_table", "below -1", set_at(0, 0, 1, to=-2)),
    ("page_scores", "sealed", "more than the table", set_at(0, to=100)),
    ("page_scores", "sealed", "negative", set_at(0, to=-1)),
    ("select_pages", "page_size", "zero", constant(0)),
    ("select_pages", "sink", "negative", constant(-1)),
    ("select_pages", "local", "zero", constant(0)),
    ("select_pages", "count", "negative", constant(-1)),
    ("select_pages", "seq_lens", "negative", set_at(0, to=-1)),
    ("select_pages", "sealed", "negative", set_at(0, to=-1)),
    ("select_pages", "seq_lens", "other batch", lambda t: t[:1]),
    ("select_tokens", "counts", "negative", set_at(0, to=-1)),
    ("select_tokens", "counts", "other batch", lambda t: t[:1]),
    ("select_tokens", "max_picks", "negative", constant(-1)),
    ("select_tokens", "page_size", "zero", constant(0)),
    ("select_tokens", "seq_lens", "negative", set_at(0, to=-1)),
    ("select_tokens", "sealed", "negative", set_at(0, to=-1)),
    *((op, "k_pool", "other head dim", lambda t: t[..., :32].contiguous()) for op in CACHE_READERS),
    *((op, "v_pool", "other blocks", lambda t: t[:-1]) for op in CACHE_READERS),
    *((op, "scales", "none", constant(None)) for op in CACHE_READERS),
    *((op, "residual_v", "none", constant(None)) for op in CACHE_READERS),
    *((op, "residual_k", "one page", lambda t: t[:, :, :16]) for op in CACHE_READERS),
    *((op, "q", "no multiple of the kv heads", lambda t: t[..., :7, :]) for op in ("decode", "prefill")),
    *((op, "sink", "negative", constant(-1)) for op in CACHE_READERS),
    *((op, "windows", "negative", set_at(0, to=-1)) for op in CACHE_READERS),
    *((op, "windows", "other heads", lambda t: t[:1]) for op in CACHE_READERS),
    *((op, lens(op), "negative", set_at(0, to=-1)) for op in CACHE_READERS),
    *((op, lens(op), "more than the table", set_at(0, to=10**6)) for op in CACHE_READERS),
    *((op, "sealed", "too few", set_at(0, to=1)) for op in CACHE_READERS),
    *((op, "slot_table", "not resident", set_at(0, 0, 2, to=-1)) for op in CACHE_READERS),
    *((op, "slot_table", "out of range", set_at(0, 0, 2, to=10**6)) for op in CACHE_READERS),
    *((op, "block_table", "not held", set_at(0, 0, 2, to=-1)) for op in CACHE_READERS),
    *((op, "block_table", "out of range", set_at(0, 0, 2, to=10**6)) for op in CACHE_READERS),
    *((op, "block_table", "listed, not held", set_at(0, 1, slice(1, 4), to=-1)) for op in CACHE_READERS),
    *((op, "block_table", "below -1", set_at(0, 0, 2, to=-2)) for op in CACHE_READERS),
    *((op, "unit", "neither page nor token", constant(5)) for op in CACHE_READERS[:2]),
    *((op, "local_start", "none", constant(None)) for op in CACHE_READERS[:2]),
    *((op, "local_start", "negative", set_at(0, to=-1)) for op in CACHE_READERS[:2]),
    *((op, "lists", "descending", set_at(0, 1, 0, to=4)) for op in CACHE_READERS[:2]),
    *((op, "lists", "a local page", set_at(0, 1, 1, to=5)) for op in CACHE_READERS[:2]),
    *((op, "lists", "a sink page", set_at(0, 1, 0, to=0)) for op in CACHE_READERS[:2]),
    ("prefill", "lists", "descending", set_at(0, 1, 0, 0, to=4)),
    ("prefill", "lists", "a later page", set_at(0, 1, 0, 1, to=9)),
    ("prefill", "lists", "too few rows", lambda t: t[:, :, :0]),
    ("prefill", "v", "other tokens", lambda t: t[:-1]),
    ("prefill", "cu_seqlens_q", "ends early", set_at(2, to=3)),
    ("prefill", "cu_seqlens_q", "descends", set_at(1, to=5)),
    ("prefill", "cu_seqlens_k", "ends early", set_at(2, to=4)),
    ("prefill", "cu_seqlens_k", "fewer than queries", set_at(1, to=2)),
    ("prefill", "page_size", "not the cache's", constant(32)),
    ("prefill", "context_lens", "none", constant(None)),
    ("attention_mass", "lse", "other rows", lambda t: t[:, :, :1]),
    ("merge_states", "out_a", "head dim 8", lambda t: t[..., :8].contiguous()),
    ("merge_states", "out_b", "other rows", lambda t: t[:1]),
    ("merge_states", "lse_b", "other rows", lambda t: t[:1]),
]  # fmt: skip


def assert_rejected(op: str, name: str, change: Callable[[Any], Any], error: type[Exception], device: str) -> None:
    args = arguments(op, device)
    args[name] = change(args[name])
    before = [t.clone() for t in tensors(args)]
    message = re.escape(f"lserve_ext::{op}: {name}: expected")
    with pytest.raises(error, match=f"^{message} .*got "):
        call(op, args)
    with pytest.raises(RuntimeError, match=message):
        call_raw(op, args)
    assert all(same_bits(a, b) for a, b in zip(before, tensors(args), strict=True)), "written before the checks"


@pytest.mark.parametrize("op, name, change, error", list(wrong_tensors()))
@pytest.mark.gpu
def test_a_wrong_tensor_is_named(
    op: str, name: str, change: Callable[[Tensor], Tensor], error: type[Exception], device: str
) -> None:
    assert_rejected(op, name, change, error, device)


@pytest.mark.parametrize("op, name, what, change", WRONG_VALUES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_value_is_named(op: str, name: str, what: str, change: Callable[[Any], Any], device: str) -> None:
    assert_rejected(op, name, change, ValueError, device)


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_tensor_or_no_number_is_named(op: str) -> None:
    schema = raw_op(op)._schema.arguments
    for argument in schema:
        optional = isinstance(argument.type, torch.OptionalType)
        for wrong in ("x", [1, 2], None):
            if wrong is None and (optional or argument.name in PagedKV._fields):
                continue
            args = arguments(op)
            defaults = ("unit",) if op == "wanted_pages" else ("scale", "unit", "page_size")
            if wrong is None and op in (*CACHE_READERS, "wanted_pages") and argument.name in defaults:
                continue  # the wrapper's default
            args[argument.name] = wrong
            with pytest.raises(TypeError, match=rf"^lserve_ext::{op}: {argument.name}: expected ") as caught:
                call(op, args)
            assert "API call" not in str(caught.value)


def test_a_cache_without_a_buffer() -> None:
    args = arguments("append_kv")
    args["residual_k"] = None
    with pytest.raises(ValueError, match=r"^lserve_ext::append_kv: residual_v: expected residual_k and residual_v, or"):
        call("append_kv", args)
    args["residual_v"] = None
    with pytest.raises(ValueError, match=r"^lserve_ext::append_kv: stats: expected None without a residual buffer"):
        call("append_kv", args)
    scales = torch.zeros(len(args["k_pool"]), 2, args["k_pool"].shape[1], 2)
    moments = args["stats"]
    args |= {"stats": None, "scales": scales, "moments": moments}
    with pytest.raises(ValueError, match=r"^lserve_ext::append_kv: moments: expected None without a residual buffer"):
        call("append_kv", args)
    args["moments"] = None
    call("append_kv", args)
    assert scales.any()
    torch.library.opcheck(raw_op("append_kv"), tuple(args[a.name] for a in raw_op("append_kv")._schema.arguments))
    for changes, message in (
        (
            {"slot_table": args["slot_table"][..., :6], "block_table": args["block_table"][..., :6]},
            "at least 8 columns",
        ),
        ({"slot_table": torch.full_like(args["slot_table"], 3)}, "a slot of its own for every page, got 3 for two"),
        ({"slot_table": torch.full_like(args["slot_table"], 10**6)}, r"slot_table: expected -1\.\.22, got 1000000"),
    ):
        with pytest.raises(ValueError, match=message):
            call("append_kv", args | changes)
    args = arguments("append_kv")
    with pytest.raises(TypeError, match=r"^lserve_ext::append_kv: kv: expected a PagedKV, got NoneType"):
        ops.append_kv(args["k"], args["v"], args["cu_seqlens_k"], args["context_lens"], None)  # type: ignore[arg-type]


def to_meta(args: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in args.items()}


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_are_checked_as_others_are(op: str) -> None:
    want = _flat(call(op, arguments(op)))
    got = _flat(call(op, to_meta(arguments(op))))
    assert [(x.shape, x.dtype) for x in want] == [(x.shape, x.dtype) for x in got]
    assert all(x.is_meta for x in got)


@pytest.mark.parametrize("op, name, change, error", [p for p in wrong_tensors() if p.values[2] is not gaps_inside])
def test_wrong_meta_tensors_are_named(op: str, name: str, change: Callable[[Tensor], Tensor], error: Any) -> None:
    args = arguments(op)
    args[name] = change(args[name])
    with pytest.raises(error, match=rf"^lserve_ext::{op}: "):
        call(op, to_meta(args))


@pytest.mark.parametrize("op", [op for op in OPS if op != "gather_pages"])
def test_one_meta_tensor_among_others_is_refused(op: str) -> None:
    for name in [name for name, x in arguments(op).items() if isinstance(x, Tensor)]:
        args = arguments(op)
        if len(tensors(args)) == 1:
            continue
        args[name] = args[name].to("meta")
        before = [t.clone() for t in tensors(args)]
        with pytest.raises(TypeError, match=rf"^lserve_ext::{op}: \w+: expected the device of the other arguments"):
            call(op, args)
        assert all(a.is_meta or same_bits(a, b) for a, b in zip(before, tensors(args), strict=True))


def test_groups_that_do_not_divide_are_refused_of_meta_tensors_too() -> None:
    for group in (0, 5):
        with pytest.raises(ValueError, match="group: expected a divisor"):
            ops.page_stats(torch.zeros(1, 16, 64, device="meta"), group)
        with pytest.raises(ValueError, match="group: expected a divisor"):
            ops.page_moments(torch.zeros(1, 16, 64, device="meta"), group)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 0)])
def test_queries_without_channels(shape: tuple[int, ...]) -> None:
    args = arguments("decode")
    args |= {"q": torch.zeros(shape)}
    del args["scale"], args["unit"]
    with pytest.raises(ValueError, match=r"^lserve_ext::decode: q: expected "):
        call("decode", args)


def test_no_queries_put_mass_on_nothing() -> None:
    args = arguments("attention_mass")
    args |= {"q": args["q"][:, :0], "lse": args["lse"][:, :0]}
    assert not call("attention_mass", args).any()


def test_what_is_written_has_memory_of_its_own() -> None:
    def refused(**changes: Tensor) -> None:
        args = arguments("append_kv") | changes
        before = [t.clone() for t in tensors(args)]
        with pytest.raises(ValueError, match="expected memory of its own"):
            call("append_kv", args)
        assert all(same_bits(a, b) for a, b in zip(before, tensors(args), strict=True))

    args = arguments("append_kv")
    refused(v_pool=args["k_pool"], k_pool=args["k_pool"])
    refused(residual_v=args["residual_k"], residual_k=args["residual_k"])
    refused(residual_k=args["residual_k"], k=args["residual_k"][0, :, :30].transpose(0, 1))

    # K and V of a block side by side, as other engines keep them, are two places.
    both = torch.zeros(args["k_pool"].shape[0], 2, *args["k_pool"].shape[1:], dtype=torch.uint8)
    call("append_kv", arguments("append_kv") | {"k_pool": both[:, 0], "v_pool": both[:, 1]})
    assert both[:, 0].any() and both[:, 1].any()


def test_gathering_within_one_pool() -> None:
    pool = torch.arange(12.0).view(6, 2)
    ops.gather_pages(pool, ints([0, 1]), pool, ints([4, 5]))
    assert pool[4:].equal(pool[:2])
    with pytest.raises(ValueError, match="src_ids: expected rows that this call does not write, got 1 at"):
        ops.gather_pages(pool, ints([0, 1]), pool, ints([1, 2]))


@pytest.mark.parametrize("op", OPS_OF_FLOATS)
def test_forward_mode_gradients_are_refused(op: str) -> None:
    from torch.autograd import forward_ad

    args = arguments(op)
    name = next(name for name, x in args.items() if isinstance(x, Tensor) and x.is_floating_point())
    with forward_ad.dual_level():
        args[name] = forward_ad.make_dual(args[name], torch.ones_like(args[name]))
        with pytest.raises(RuntimeError, match="no gradient"):
            call(op, args)


@pytest.mark.gpu
def test_debug_mode_refuses_what_is_not_finite(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("append_kv", device)
    args["v"][0, 0, 3] = math.inf
    kv = ops.PagedKV(*(args[name] for name in ops.PagedKV._fields))
    before = [t.clone() for t in tensors(args)]
    monkeypatch.setattr(ops, "_DEBUG", True)
    with pytest.raises(ValueError, match=r"^lserve_ext::append_kv: v: expected finite numbers"):
        ops.append_kv(args["k"], args["v"], args["cu_seqlens_k"], args["context_lens"], kv)
    for a, b in zip(before, tensors(args), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_table_too_narrow_is_named(device: str) -> None:
    """Both tables end before the page that is due."""
    args = arguments("append_kv", device)
    for name in ("block_table", "slot_table"):
        args[name] = args[name][..., :6]
    before = [t.clone() for t in tensors(args)]
    with pytest.raises(ValueError, match=r"^lserve_ext::append_kv: (block|slot)_table: expected .*got "):
        call("append_kv", args)
    assert all(same_bits(a, b) for a, b in zip(before, tensors(args), strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.gpu
def test_mixed_dtypes_are_rejected(dtype: torch.dtype, device: str) -> None:
    args = arguments("decode", device)
    args["q"] = args["q"].to(torch.float16)
    with pytest.raises(TypeError, match=r"lserve_ext::decode: \w+: expected dtype"):
        call("decode", args)


@pytest.mark.parametrize("op", OPS_OF_FLOATS)
@pytest.mark.gpu
def test_there_is_no_autograd(op: str, device: str) -> None:
    args = arguments(op, device)
    name = next(n for n, t in args.items() if isinstance(t, Tensor) and t.is_floating_point())
    args[name] = args[name].detach().requires_grad_()
    for function in (call, call_raw):
        with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
            function(op, args)
    with torch.no_grad():
        call(op, args)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.gpu
def test_inference_mode(op: str, device: str) -> None:
    want = _flat(call(op, arguments(op, device)))
    with torch.inference_mode():
        got = _flat(call(op, arguments(op, device)))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------------------------------------- threads


def everything(case: Case) -> list[Tensor]:
    """All ops once over a cache of the case's tokens, built by the ops."""
    kv = build(case.shape, case.lengths.tolist(), heads=case.heads).kv
    (k, cu), (v, _) = pack(case.k), pack(case.v)
    ops.append_kv(k, v, cu, torch.zeros_like(case.lengths), kv._replace(sealed=torch.zeros_like(kv.sealed)))
    q, windows = case.queries(), case.windows(DENSE, 2, 0)
    results: list[Tensor] = [kv.k_pool, kv.v_pool]
    lists, start = case.lists(sink=1, local=1, count=3)
    if kv.stats is not None:
        scores = ops.page_scores(q, kv.stats, kv.block_table, kv.sealed)
        lists, start = ops.select_pages(scores, case.lengths, kv.sealed, case.shape.page_size, 1, 1, 3)
        results += [kv.stats, scores, lists, start]
    out, lse = ops.decode(q, Mask(windows, lists, start, sink=1), kv, case.lengths)
    mass = ops.attention_mass(q[:, None], lse[:, None], Mask(windows, lists, start, sink=1), kv, case.lengths)
    counts = halves(case.lengths.tolist(), 0.3, str(mass.device))
    tokens, _ = ops.select_tokens(mass, case.lengths, kv.sealed, counts, case.shape.page_size, 40)
    q_all = k.repeat_interleave(case.shape.group, dim=1)
    windows = case.windows(DENSE, 2, 1)
    return [*results, out, lse, mass, tokens, *ops.prefill(q_all, k, v, cu, cu, Mask(windows, sink=1), page_size=16)]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.usefixtures("restored_threads")
def test_the_number_of_threads_changes_no_bit(shape: Shape) -> None:
    case = build(shape, [333, 1, 64, 200])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(case))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_two_runs_are_equal(shape: Shape) -> None:
    case = build(shape, [300, 20])
    assert all(same_bits(a, b) for a, b in zip(everything(case), everything(case), strict=True))


def test_two_python_threads_at_once() -> None:
    cases = [build(shape, [150 + 7 * i, 40], seed=i) for i, shape in enumerate(SMALL * 2)]
    want = [everything(case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(everything, cases), want, strict=True):
                assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
