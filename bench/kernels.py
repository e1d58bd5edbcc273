"""Microbenchmarks of every op: median microseconds, rate, and share of what this machine can do at all.

    python bench/kernels.py --quick                     one shape, short context: half a minute on two slow cores
    python bench/kernels.py --only decode --tokens 32768 --dtypes float32
    python bench/kernels.py --full --save               4K to 128K tokens, batches; bench/results/kernels-<machine>.json
                                                        and a roofline plot beside it
    python bench/kernels.py --full --save --device cuda

Before each call of an op or of a peer, the same threads sum (for ops that write much: copy) a stretch of memory that
no cache holds. That leaves the caches cold, as a model's other layers do, and is the ceiling, taken in the same moments
as what is compared with it. Share: the time that the op's bytes must take at that rate, or its operations at the rate
of torch's matmul (in the op's dtype or in float32, whichever is faster), over the time that the op takes. Bytes are
those that must be read and written once, with statistics, scales, raw pages and tables. Peers do the same work in torch
on the same tensors, or on as many contiguous ones where a name does not say that it gathers them (where installed, ONNX
Runtime on a CPU, FlexAttention, flash-attn, flashinfer on a GPU); those of INT8 read the model's dtype, but for ONNX
Runtime's. With --threads 1, CPU time is taken, which other processes on
a shared machine do not stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Any

import onnx_peer
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lserve_ext import __version__, ops
from lserve_ext.blocks import empty_blocks
from lserve_ext.machine import COLD, Machine
from lserve_ext.ops import DENSE, Mask, PagedKV

SHAPES = {"llama3-8b": (32, 8, 128), "llama2-7b": (32, 32, 128), "mha": (32, 32, 64), "smollm2": (9, 3, 64)}  # Hq, H, D
P, L = 64, 16  # tokens a page, and a group of statistics
SINK, LOCAL = 2, 4  # pages
BUDGET = 4096  # tokens that a head reads when it follows a list of pages, or half of a shorter context
CHUNK, DRAFTS = 256, 8  # new tokens of a chunk, or of drafts, over a cache
TAIL = 64  # last queries of a prompt whose attention mass is taken
LARGEST = {"cpu": 4 * 2**30, "cuda": 24 * 2**30}  # bytes of keys and values; what has more is skipped
QUICK = {"shapes": ["llama3-8b"], "tokens": [2048], "prompt": 512, "dtypes": ["bfloat16"], "cold": 128, "limit": 1.0}
FULL = {
    "cpu": {"tokens": [4096, 32768, 131072], "batches": [1, 8], "cold": 1024},
    "cuda": {"tokens": [4096, 32768, 131072, 2**20], "batches": [1, 16, 64], "prompt": 16384, "dtypes": ["bfloat16"]},
}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """One call, the bytes and operations that it cannot do without, and who else does the same."""

    call: Call
    reads: int
    writes: int
    flops: int = 0
    peers: dict[str, Call] = field(default_factory=dict)


def size(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def held(x: Tensor) -> Tensor:
    """A copy in memory as caches have it."""
    return empty_blocks(x, len(x)).copy_(x)


class Layer:
    """One attention layer's full cache.

    The pages of a head lie in random order within its own stretch of the pools, so an unquantised pool seen as
    [B, H, tokens, D] holds for SDPA the same keys, only permuted.
    """

    def __init__(self, shape: str, tokens: int, batch: int, dtype: str, kv: str, prompt: int, device: str):
        self.Hq, self.H, self.D = SHAPES[shape]
        self.B, self.n, self.M, self.prompt = batch, tokens, tokens // P, min(prompt, tokens) // P * P
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.int8, self.device = kv == "int8", device
        self.k, self.v = (held(self.normal(batch, self.H, tokens, self.D)) for _ in "kv")
        self.residual_k, self.residual_v = (self.normal(batch, self.H, 2 * P, self.D) for _ in "kv")
        self.k_pages, self.v_pages = self.k.view(-1, P, self.D), self.v.view(-1, P, self.D)
        heads = torch.arange(batch * self.H, device=device).view(batch, self.H, 1)
        self.table = self.ints(heads * self.M + torch.rand(batch, self.H, self.M, device=device).argsort(-1))
        self.sealed, self.lengths = self.ints([self.M - 1] * batch), self.ints([tokens] * batch)
        self.budget = min(BUDGET, tokens // 2) // P * P

    def ints(self, values: Any) -> Tensor:
        return torch.as_tensor(values).to(self.device, torch.int32)

    def normal(self, *shape: int) -> Tensor:
        """Random values; a stretch of odd length repeats, because drawing gigabytes would take longer than the rest."""
        count = math.prod(shape)
        some = torch.randn(min(count, 2**20 - 3), device=self.device).to(self.dtype)
        return some.repeat(-(-count // len(some)))[:count].view(shape)

    @cached_property
    def stats(self) -> Tensor:
        return held(ops.page_stats(self.k_pages, L))

    def kv(self, stats: bool = True) -> PagedKV:
        """With statistics or, for lists of tokens, without: INT8 keys then have a grid of their own."""
        k, v, grid, scales = self.k_pages, self.v_pages, self.stats if stats else None, None
        if self.int8:
            k, v, scales = map(held, ops.quantize_kv(k, v, grid))
        return PagedKV(k, v, grid, scales, self.table, self.table, self.residual_k, self.residual_v, self.sealed)

    def read(self, kv: PagedKV, tokens: int, values: bool = True) -> int:
        """Bytes that attention of every head over the raw page and `tokens - P` older tokens reads."""
        token = self.D * kv.k_pool.element_size() * (1 + values)
        if kv.scales is not None:
            token += 8 * values + (8 if kv.stats is None else 2 * self.D * self.dtype.itemsize // L)
        raw = P * self.D * self.dtype.itemsize * (1 + values)
        return self.B * self.H * ((tokens - P) * token + raw + 8 * (tokens // P))

    def packed(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v of n new tokens a sequence, and cu_seqlens_k."""
        q, k, v = (self.normal(self.B * n, heads, self.D) for heads in (self.Hq, self.H, self.H))
        return q, k, v, self.ints(torch.arange(self.B + 1) * n)

    def draw(self, first: int, last: int, count: int) -> Tensor:
        """Lists [B, H, count] of distinct units between first and last, ascending."""
        drawn = torch.rand(self.B, self.H, last - first, device=self.device).topk(count).indices
        return self.ints(drawn.sort(-1).values + first)


CASES: dict[str, Callable[[Layer], Work]] = {}
# Run with every kind of pools, the rest once.
READS_POOLS = ("append_kv", "decode", "attention_mass", "prefill chunk", "prefill drafts")


def case(*variants: str) -> Callable[[Callable[..., Work]], Callable[..., Work]]:
    """Adds a function, named like its op, to CASES: once, or for every variant, which it is then given."""

    def add(build: Callable[..., Work]) -> Callable[..., Work]:
        for variant in variants:
            CASES[f"{build.__name__} {variant}"] = partial(build, variant=variant)
        if not variants:
            CASES[build.__name__] = build
        return build

    return add


def new_pages(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    count = layer.B * layer.H * layer.prompt // P
    return layer.k_pages[:count], layer.v_pages[:count], layer.stats[:count]


@case()
def page_stats(layer: Layer) -> Work:
    k, _, stats = new_pages(layer)
    peers = {"aminmax": lambda: k.unflatten(1, (-1, L)).aminmax(dim=2)}
    return Work(lambda: ops.page_stats(k, L), size(k), size(stats), peers=peers)


@case()
def page_moments(layer: Layer) -> Work:
    k, _, _ = new_pages(layer)
    return Work(lambda: ops.page_moments(k, P), size(k), 2 * size(k) // P)


@case()
def quantize_kv(layer: Layer) -> Work:
    pages = new_pages(layer)
    return Work(lambda: ops.quantize_kv(*pages), size(*pages), size(*ops.quantize_kv(*pages)))


@case()
def dequantize_kv(layer: Layer) -> Work:
    k, v, stats = new_pages(layer)
    k8, v8, scales = ops.quantize_kv(k, v, stats)
    call = partial(ops.dequantize_kv, k8, v8, stats, scales, layer.dtype)
    return Work(call, size(k8, v8, stats, scales), size(k, v))


@case("prompt", "step", "unbuffered")
def append_kv(layer: Layer, variant: str) -> Work:
    """A prompt into an empty cache; or one token, which seals nothing, also without a residual buffer."""
    kv, lengths, n = layer.kv(), layer.lengths, 1
    if variant == "unbuffered":
        lengths = lengths - 1  # into the last page
        scales = None if kv.scales is None else kv.scales.new_empty(len(kv.scales), 2, P, 2)
        kv = kv._replace(stats=None, moments=None, scales=scales, residual_k=None, residual_v=None)
    if variant == "prompt":
        lengths, n = torch.zeros_like(lengths), layer.prompt
        kv = kv._replace(sealed=lengths)
    _, k, v, cu = layer.packed(n)
    pages = max(n // P - 1, 0)
    writes = size(kv.k_pool, kv.v_pool, kv.stats, kv.scales) * pages // layer.M + size(k, v) * min(n, 2 * P) // n
    if kv.residual_k is None:
        writes = size(kv.k_pool, kv.v_pool, kv.scales) * n // (layer.M * P)
    return Work(lambda: ops.append_kv(k, v, cu, lengths, kv), size(k, v), writes)


@case()
def wanted_pages(layer: Layer) -> Work:
    """A budget's worth of listed pages of every head."""
    B, H, K = layer.B, layer.H, layer.budget // P - SINK - LOCAL
    lists = layer.ints(torch.arange(SINK, SINK + K).expand(B, H, K)).contiguous()
    start = layer.sealed - LOCAL
    mask = Mask(layer.ints(torch.zeros(H)), lists, start, sink=SINK)
    call = partial(ops.wanted_pages, mask, layer.table, layer.sealed, layer.lengths - 1, P)
    return Work(call, size(layer.table, lists, start), size(layer.table))


@case("hits", "misses")
def resolve_pages(layer: Layer, variant: str) -> Work:
    """A budget's worth of pages of every head, in as many slots: all of them lie there; or none does."""
    B, H, K = layer.B, layer.H, layer.budget // P
    lists = [layer.ints(torch.arange(first, first + K).expand(B, H, K)).contiguous() for first in (0, K)]
    slots, use, clock = (layer.ints(torch.zeros(n)) for n in (B * H * K, B * H * K, 1))
    table, turns = torch.full_like(layer.table, -1), cycle(lists[:1] if variant == "hits" else lists)

    def call() -> None:
        ops.resolve_pages(next(turns), layer.table, table, slots, use, clock)

    return Work(call, 3 * size(lists[0]) + size(slots, use), 3 * size(lists[0]) + size(slots, use))


@case("pages", "tokens")
def gather_pages(layer: Layer, variant: str) -> Work:
    """A budget's worth of scattered pages or tokens of every head, into a pool of their own."""
    src = layer.k.view(-1, P if variant == "pages" else 1, layer.D)
    ids = torch.randperm(len(src), device=layer.device)[: layer.B * layer.H * layer.budget // src.shape[1]]
    src_ids, dst_ids, dst = layer.ints(ids), layer.ints(torch.arange(len(ids))), src[: len(ids)].clone()
    peers = {"index_select": lambda: torch.index_select(src, 0, ids, out=dst)}
    call = partial(ops.gather_pages, src, src_ids, dst, dst_ids)
    return Work(call, size(dst, src_ids, dst_ids), size(dst), peers=peers)


@case()
def page_scores(layer: Layer) -> Work:
    q, stats = layer.normal(layer.B, layer.Hq, layer.D), layer.stats
    call = partial(ops.page_scores, q, stats, layer.table, layer.sealed)
    return Work(call, size(q, stats, layer.table), size(layer.table), 2 * stats.numel() * layer.Hq // layer.H)


@case()
def select_pages(layer: Layer) -> Work:
    scores, count = torch.randn(layer.B, layer.H, layer.M, device=layer.device), layer.budget // P - SINK - LOCAL
    middle = scores[..., SINK : layer.M - LOCAL]
    call = partial(ops.select_pages, scores, layer.lengths, layer.sealed, P, SINK, LOCAL, count)
    return Work(call, size(middle), 4 * layer.B * layer.H * count, peers={"topk": lambda: middle.topk(count)})


@case()
def select_tokens(layer: Layer) -> Work:
    mass, count = torch.rand(layer.B, layer.H, layer.n, device=layer.device), layer.n // 10
    older, counts = mass[..., : layer.n - count], layer.ints([count] * layer.B)
    call = partial(ops.select_tokens, mass, layer.lengths, layer.sealed, counts, P, count)
    return Work(call, size(older), 4 * layer.B * layer.H * count, peers={"topk": lambda: older.topk(count)})


def installed_peers(layer: Layer, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Call]:
    """Dense attention of q [B, Hq, queries, D] over k, v [B, H, keys, D] by what else a machine may have."""
    peers: dict[str, Call] = {}
    if layer.device == "cpu" and layer.dtype == torch.float32 and q.shape[2] == 1:
        with suppress(ImportError):
            name = "ONNX Runtime INT8" if layer.int8 else "ONNX Runtime"
            peers[name], _ = onnx_peer.decode(q[:, :, 0], k, v, layer.int8)
    if layer.device != "cuda" or layer.dtype == torch.float32:
        return peers
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if q.shape[2] > 1:  # its decode kernel is another program
        n = q.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cuda") if causal else None
        flex = torch.compile(flex_attention)
        peers["FlexAttention"] = lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # [B, tokens, heads, D], as both want it
    with suppress(ImportError):
        from flash_attn import flash_attn_func, flash_attn_with_kvcache

        if q.shape[2] > 1:
            peers["flash-attn"] = lambda: flash_attn_func(*rows, causal=causal)
        else:
            peers["flash-attn"] = lambda: flash_attn_with_kvcache(*rows)
    with suppress(ImportError):
        from flashinfer import single_decode_with_kv_cache, single_prefill_with_kv_cache

        if layer.B == 1 and q.shape[2] > 1:
            one = [x[0] for x in rows]
            peers["flashinfer"] = lambda: single_prefill_with_kv_cache(*one, causal=causal)
        elif layer.B == 1:
            peers["flashinfer"] = lambda: single_decode_with_kv_cache(rows[0][0, 0], rows[1][0], rows[2][0])
    return peers


@case("dense", "streaming", "pages", "tokens")
def decode(layer: Layer, variant: str) -> Work:
    q, kv = layer.normal(layer.B, layer.Hq, layer.D), layer.kv(stats=variant != "tokens")
    window, read, start, lists, sink, unit = DENSE, layer.n, 0, None, SINK, P
    if variant == "streaming":
        window, read = LOCAL, (SINK + LOCAL) * P
    elif variant == "pages":
        window, read, start = 0, layer.budget, layer.M - LOCAL
        lists = layer.draw(SINK, start, read // P - SINK - LOCAL)
    elif variant == "tokens":  # ALISA's: a tenth local, a tenth anywhere before
        window, read, start, sink, unit = 0, layer.n // 10 * 2, layer.n - layer.n // 10, 0, 1
        lists = layer.draw(0, start, layer.n // 10)
    local_start = None if lists is None else layer.ints([start] * layer.B)
    mask = Mask(layer.ints([window] * layer.H), lists, local_start, sink, unit)
    k, v = layer.k[:, :, :read], layer.v[:, :, :read]
    peers: dict[str, Call] = {
        "SDPA": lambda: sdpa(q[:, :, None], k, v, enable_gqa=True),
        "SDPA grouped": lambda: sdpa(q.unflatten(1, (layer.H, -1)), k, v),
        **installed_peers(layer, q[:, :, None], k, v, causal=False),
    }
    if lists is not None:
        held = layer.n // unit
        sinks, local = layer.ints(torch.arange(sink)), layer.ints(torch.arange(start, held))
        parts = [sinks.expand(layer.B, layer.H, -1), lists, local.expand(layer.B, layer.H, -1)]
        heads = torch.arange(layer.B * layer.H, device=layer.device).view(layer.B, layer.H, 1)
        rows = (torch.cat(parts, -1) + heads * held).flatten()

        def gathered() -> None:
            both = (x.view(-1, unit * layer.D).index_select(0, rows).view_as(k) for x in (layer.k, layer.v))
            sdpa(q.unflatten(1, (layer.H, -1)), *both)

        peers["gather, SDPA grouped"] = gathered
    if variant == "pages":  # as engines do whose kernels know no lists: selected pages become a table of their own
        entries, dense = torch.cat(parts, -1).long(), Mask(layer.ints([DENSE] * layer.H))
        sealed, ends = layer.ints([read // P - 1] * layer.B), layer.ints([read] * layer.B)

        def compact() -> PagedKV:
            table = layer.table.gather(-1, entries)
            return kv._replace(block_table=table, slot_table=table, sealed=sealed)

        ready = compact()
        peers["dense kernel, compact table"] = lambda: ops.decode(q, dense, ready, ends)
        peers["dense kernel, compact table made"] = lambda: ops.decode(q, dense, compact(), ends)
    return Work(
        partial(ops.decode, q, mask, kv, layer.lengths),
        reads=layer.read(kv, read) + size(q, lists),
        writes=size(q),
        flops=4 * read * q.numel(),
        peers=peers,
    )


@case("step", "prompt")
def attention_mass(layer: Layer, variant: str) -> Work:
    """Of a decode step, or of the last queries of a prompt; all heads dense."""
    q = layer.normal(layer.B, 1 if variant == "step" else TAIL, layer.Hq, layer.D)
    kv, lse = layer.kv(stats=False), torch.full(q.shape[:-1], 8.0, device=layer.device)
    call = partial(ops.attention_mass, q, lse, Mask(layer.ints([DENSE] * layer.H)), kv, layer.lengths)
    reads = layer.read(kv, layer.n, values=False) + size(q, lse)
    return Work(call, reads, 4 * layer.B * layer.H * layer.n, 2 * layer.n * q.numel())


@case("dense", "half", "streaming", "chunk", "drafts")
def prefill(layer: Layer, variant: str) -> Work:
    """A prompt without a cache (causal; or sink and local only, in half of the heads or all), or tokens over one."""
    kv, lengths, held, n, peers = None, None, 0, layer.prompt, dict[str, Call]()
    if variant in ("chunk", "drafts"):
        kv, lengths, held, n = layer.kv(), layer.lengths, layer.n, CHUNK if variant == "chunk" else DRAFTS
    q, k, v, cu = layer.packed(n)
    streaming = {"half": layer.H // 2, "streaming": layer.H}.get(variant, 0)
    windows = torch.tensor([LOCAL] * streaming + [DENSE] * (layer.H - streaming))
    t = torch.arange(held, held + n)
    first = (t // P - windows[:, None] + 1).clamp(min=0)  # local page of each head and query
    attended = float((t + 1 - (first - first.clamp(max=SINK)) * P).sum()) / layer.H
    if variant in ("dense", "half"):
        qs, ks, vs = (x.unflatten(0, (layer.B, n)).transpose(1, 2) for x in (q, k, v))
        name = "SDPA causal" if variant == "dense" else "SDPA causal, all heads dense"
        peers[name] = lambda: sdpa(qs, ks, vs, is_causal=True, enable_gqa=True)
    if variant == "drafts":
        qs = q.unflatten(0, (layer.B, n)).transpose(1, 2)
        peers["SDPA over the cache alone"] = lambda: sdpa(qs, layer.k, layer.v, enable_gqa=True)
    if variant == "dense":
        peers |= installed_peers(layer, qs, ks, vs, causal=True)
    return Work(
        partial(ops.prefill, q, k, v, cu, cu, Mask(layer.ints(windows), sink=SINK), kv, lengths, page_size=P),
        reads=size(q, k, v) + (layer.read(kv, held) if kv else 0),
        writes=size(q),
        flops=round(4 * attended * q.numel() / n),
        peers=peers,
    )


@case()
def merge_states(layer: Layer) -> Work:
    a, b = (layer.normal(layer.B * layer.prompt, layer.Hq, layer.D) for _ in "ab")
    lse_a, lse_b = (torch.randn(a.shape[:-1], device=layer.device) for _ in "ab")
    return Work(partial(ops.merge_states, a, lse_a, b, lse_b), size(a, b, lse_a, lse_b), size(a, lse_a))


def measure(machine: Machine, work: Work, dtype: torch.dtype, rounds: int, limit: float) -> dict[str, Any]:
    """Medians of interleaved rounds after a warm-up: at least three, no more once `limit` seconds are over."""
    calls, copy = {"op": work.call, **work.peers}, 3 * work.writes > work.reads
    times, rates, matmuls = defaultdict[str, list[float]](list), list[float](), list[float]()
    begin = time.perf_counter()
    while len(times["op"]) <= 3 or (len(times["op"]) <= rounds and time.perf_counter() - begin < limit):
        for name, call in calls.items():
            rates.append(machine.bandwidth(copy))
            times[name].append(machine.kernel_seconds(call))
        if work.flops:
            matmuls.append(machine.matmul(*{dtype, torch.float32}))
    middle = {name: median(t[1:]) for name, t in times.items()}
    took, unit, amount, ceiling = middle.pop("op"), "GB/s", work.reads + work.writes, median(rates[len(calls) :])
    roofs = {"bandwidth": ceiling / 1e9}  # GB/s, GFLOP/s
    if work.flops:
        roofs["matmul"] = median(matmuls[1:]) / 1e9
        if work.flops / roofs["matmul"] > amount / roofs["bandwidth"]:
            unit, amount, ceiling = "GFLOP/s", work.flops, roofs["matmul"] * 1e9
    result = {"us": took * 1e6, "rate": amount / took / 1e9, "unit": unit, "ceiling": ceiling / 1e9}
    result |= {"share": amount / ceiling / took, "bytes": work.reads + work.writes, "flops": work.flops}
    return result | roofs | {"peers_us": {name: middle[name] * 1e6 for name in work.peers}}


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"defaults: {QUICK}")
    add("--full", action="store_true", help=f"defaults: {FULL}")
    add("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--tokens", nargs="+", type=int, default=[16384], help=f"held in the cache: multiples of {P}, from 1024 on")
    add("--prompt", type=int, default=2048, help="tokens of a prompt, in prefill and whatever new pages go through")
    add("--batches", nargs="+", type=int, default=[1])
    add("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16", "float32"])
    add("--kv", nargs="+", choices=["auto", "int8"], default=["auto", "int8"])
    add(
        "--cold",
        type=positive,
        help="MB that pass through the caches before each call, more than they hold",
    )
    add("--rounds", type=int, default=9, help="of which medians are taken")
    add("--limit", type=float, default=3.0, help="seconds for the rounds of a case; three are made in any case")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--save", action="store_true", help="write bench/results/kernels-<machine>.json")
    add("--out", type=Path, help="write this file")
    first = parser.parse_args()
    cold = {"cold": COLD[first.device] >> 20}
    parser.set_defaults(**cold | (QUICK if first.quick else FULL[first.device] if first.full else {}))
    options = parser.parse_args()
    if any(tokens % P or tokens < 1024 for tokens in options.tokens):
        parser.error(f"--tokens: expected multiples of {P}, from 1024 on, got {options.tokens}")
    return options


def plot(head: dict[str, Any], results: list[dict[str, Any]], path: Path) -> None:
    """Rooflines of the machine, and every op on them that has operations to count."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    counted = [r for r in results if r["flops"]]
    if not counted:
        return
    _, axes = plt.subplots(figsize=(9, 6))
    for dtype, style in zip(dict.fromkeys(r["dtype"] for r in counted), ("-", "--", ":"), strict=False):
        roofs = [r for r in counted if r["dtype"] == dtype]
        bandwidth, matmul = (median(r[key] for r in roofs) for key in ("bandwidth", "matmul"))
        edge = matmul / bandwidth
        x = [min(0.1, edge / 10), edge, max(edge * 10, 1000)]
        label = f"{dtype}: {bandwidth:.3g} GB/s, {matmul:.3g} GFLOP/s"
        axes.plot(x, [bandwidth * x[0], matmul, matmul], "k" + style, linewidth=1, label=label)
    for i, case_ in enumerate(dict.fromkeys(r["case"] for r in counted)):
        points = [(r["flops"] / r["bytes"], r["flops"] / r["us"] / 1e3) for r in counted if r["case"] == case_]
        axes.plot(*zip(*points, strict=True), "osD^v<>ph*"[i % 10], color=f"C{i % 10}", alpha=0.7, label=case_)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=head["machine"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plt.savefig(path, dpi=120, bbox_inches="tight")
    plt.close()


@torch.inference_mode()
def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name().replace(" ", "-") if options.device == "cuda" else platform.machine()
    head = {"lserve_ext": __version__, "torch": torch.__version__, "machine": name, "threads": options.threads}
    head |= {"cold_mb": options.cold, "page_size": P, "stats_group": L}
    print("  ".join(f"{key} {value}" for key, value in head.items()))
    print(
        f"{'op, shape, tokens x batch, dtype, pools':60}{'us':>11}{'rate':>9} {'':8}{'share':>6}  peers' us (speedup)"
    )
    machine, results = Machine(options.cold << 20, options.device), list[dict[str, Any]]()
    if options.save:
        options.out = options.out or Path(__file__).parent / "results" / f"kernels-{name}.json"
    axes = product(options.shapes, options.tokens, options.batches, options.dtypes, options.kv)
    for shape, tokens, batch, dtype, kv in axes:
        pools_only = "" if kv == options.kv[0] else READS_POOLS
        cases = [c for c in CASES if c.startswith(pools_only) and any(word in c for word in options.only)]
        _, H, D = SHAPES[shape]
        if 2 * batch * tokens * H * D * getattr(torch, dtype).itemsize > (largest := LARGEST[options.device]):
            print(f"{shape} {tokens} x {batch} {dtype} {kv}: skipped, more than {largest >> 30} GiB of keys and values")
            continue
        layer = Layer(shape, tokens, batch, dtype, kv, options.prompt, options.device)
        for c in cases:
            pools = kv if c.startswith(READS_POOLS) else ""
            line = f"{c:22}{shape:11}{tokens:>6} x {batch}  {dtype:9}{pools}"
            try:
                result = measure(machine, CASES[c](layer), layer.dtype, options.rounds, options.limit)
            except NotImplementedError:
                print(f"{line:60} no kernel for {options.device}")
                continue
            where = {"shape": shape, "tokens": tokens, "batch": batch, "dtype": dtype, "kv_dtype": pools}
            results.append({"op": c.split()[0], "case": c, **where, **result})
            peers = "  ".join(f"{name} {us:,.1f} ({us / result['us']:.2f}x)" for name, us in result["peers_us"].items())
            rate = f"{result['rate']:>9.3g} {result['unit']:8}{result['share']:>6.1%}"
            print(f"{line:60}{result['us']:>11,.1f}{rate}  {peers}", flush=True)
            if options.out:  # after every case: a run that is cut short leaves what it had
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n", encoding="utf-8")
    if options.out:
        plot(head, results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
