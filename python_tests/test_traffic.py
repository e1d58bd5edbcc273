"""What CUDA kernels move, counted by the emulator: what is attended, once, and nothing else; and without conflicts."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _cases import BF16, F16, SINK, WINDOW, Shape, build

from lserve_ext import _C, ops
from lserve_ext.ops import DENSE, Mask

if not hasattr(ctypes.CDLL(_C.__file__), "simt_start"):
    pytest.skip("needs the emulator: CMake's LSERVE_TWIN", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import traffic

TILE = 16  # keys that a warp of decode copies together
SECTOR = 32  # bytes that memory is read in
LENGTHS = [300, 90, 17, 0]
SHAPES = [
    Shape(128, 64, 16, 4, BF16, "auto"),
    Shape(64, 16, None, 2, F16, "auto"),
    Shape(128, 32, 16, 4, BF16, "int8"),
    Shape(64, 16, None, 4, BF16, "int8"),
]


def copied(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes, and distinct sectors."""
    stats = traffic.counted(call)
    return stats.copied_bytes, stats.copied_sectors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [DENSE, WINDOW, 0], ids=["dense", "streaming", "list"])
def test_decode_copies_what_it_attends(shape: Shape, window: int) -> None:
    """Keys and values, of codes their grids too: what `bench/kernels.py` counts. Of a list, no page more."""
    case = build(shape, LENGTHS)
    p, d, item = shape.page_size, shape.head_dim, shape.dtype.itemsize
    lists, start = case.lists(sink=SINK, local=1, count=2)
    want = 0
    for b, n in enumerate(LENGTHS):
        pages, sealed = -(-n // p), int(case.kv.sealed[b])
        for h in range(case.heads):
            first = {DENSE: 0, 0: min(int(start[b]), sealed)}.get(window, min(pages - window, sealed))
            listed = lists[b, h].tolist() if window == 0 else []
            attended = {*range(min(SINK, pages)), *(page for page in listed if page >= 0), *range(max(first, 0), pages)}
            for page in attended:
                tokens = min(p, n - page * p)
                if page >= sealed or shape.kv_dtype == "auto":
                    want += tokens * 2 * d * item
                elif shape.stats_group:
                    want += tokens * (2 * d + 8) + tokens // TILE * 2 * d * item
                else:
                    want += tokens * (2 * d + 16)
    mask = Mask(case.windows(*[window] * case.heads), lists, start, sink=SINK)
    size, sectors = copied(lambda: ops.decode(case.queries(), mask, case.kv, case.lengths))
    assert size == want
    assert sectors * SECTOR == size  # whole sectors, and none twice


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_decode_copies_listed_tokens(shape: Shape) -> None:
    case = build(shape, LENGTHS)
    lists, start = case.token_lists(ratio=0.5, max_picks=100)
    tokens = int((lists >= 0).sum()) + case.heads * int((case.lengths - start).sum())
    mask = Mask(case.windows(*[0] * case.heads), lists, start, unit=1)
    size, sectors = copied(lambda: ops.decode(case.queries(), mask, case.kv, case.lengths))
    assert size == tokens * 2 * shape.head_dim * shape.dtype.itemsize and sectors * SECTOR == size


def test_page_scores_copy_statistics_of_sealed_pages() -> None:
    shape = SHAPES[0]
    case = build(shape, LENGTHS)
    assert case.kv.stats is not None
    pages = case.heads * int(case.kv.sealed.sum())
    size, sectors = copied(lambda: ops.page_scores(case.queries(), case.kv.stats, case.kv.block_table, case.kv.sealed))
    assert size == pages * case.kv.stats[0].nbytes and sectors * SECTOR == size


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_attention_mass_copies_keys_once(shape: Shape) -> None:
    """And the queries of every 64 tokens that anybody attends."""
    case = build(shape, LENGTHS)
    q = case.queries(rows=3)
    lse = q.new_zeros(q.shape[:3]).float()
    mask = Mask(case.windows(*[DENSE] * case.heads))
    size, _ = copied(lambda: ops.attention_mass(q, lse, mask, case.kv, case.lengths))
    row = shape.head_dim * shape.dtype.itemsize
    queries = sum(min(n, 3) * -(-n // 64) for n in LENGTHS) * shape.group
    assert size == case.heads * (sum(LENGTHS) + queries) * row


# Bytes that pass between memory and caches, over those that a case cannot do without. What is more than 1.08: partial
# results of splits, and grids of single tokens, of which a sector holds four.
MOVED = {"prefill drafts": 1.25, "prefill drafts, int8": 1.4, "decode tokens, int8": 1.2, "decode streaming, int8": 1.1}
MOVED |= {"attention_mass step, int8": 1.12, "attention_mass prompt, int8": 1.12}
# Those that pass between caches and registers or shared memory. Tiles of queries, of which prefill and the mass of many
# have several, read keys once each.
READ = {"decode": 1.3, "decode tokens, int8": 1.7, "page_scores": 1.15, "attention_mass step": 1.4}
SMALL = 64 * 1024  # of which lengths and tables are much


@pytest.mark.parametrize(("name", "kv"), traffic.CASES)
def test_moves_what_the_benchmark_counts(name: str, kv: str) -> None:
    work = traffic.work_of(name, kv)
    stats, label = traffic.counted(work.call), name + (", int8" if kv == "int8" else "")
    needed = work.reads + work.writes
    assert stats.ldmatrix_conflicts == 0
    # What single lanes do, each in a turn of its own, counts as done together.
    assert stats.shared_conflicts <= stats.shared_wavefronts // 100
    if needed > SMALL:
        assert (stats.first_read_sectors + stats.written_sectors) * SECTOR <= needed * MOVED.get(label, 1.08)
        limit = READ.get(label) or next((READ[key] for key in READ if name.startswith(key)), float("inf"))
        assert stats.read_sectors * SECTOR <= needed * limit
