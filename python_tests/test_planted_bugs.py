"""Bugs planted in the CUDA kernels, one at a time: at least one of the twin's builds must notice each of them.

A test of the tests, which takes half an hour: pytest python_tests/test_planted_bugs.py --planted-bugs
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SMALL = "python_tests/test_small.py"
WANTED = "python_tests/test_pages.py -k wanted"
RESOLVE = "python_tests/test_pages.py -k resolve_pages"
WITHOUT = "python_tests/test_pages.py -k append_without"
TRAFFIC = "python_tests/test_traffic.py"
MANY = "python_tests/test_mass.py -k many"
MASS = "python_tests/test_mass.py -k test_attention_mass"
DRAFTS = "python_tests/test_prefill.py -k few"
NUMBERS = "python_tests/test_pages.py -k any_number"
MOMENTS = "python_tests/test_pages.py -k page_moments"


class Bug(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: str = SMALL  # a file, and perhaps -k and an expression


BUGS = [
    Bug("the sum of weights is not rescaled", "softmax", "max[r] = largest, sum[r] *= factor[r];", "max[r] = largest;"),
    Bug(
        "nor is what was accumulated",
        "softmax",
        "x[0] *= factor[0], x[1] *= factor[0], x[2] *= factor[1], x[3] *= factor[1];",
        ";",
    ),
    Bug("a tile is used before it is there for all", "pipeline", "    Tile::publish();\n    Crew::sync();", ";"),
    Bug("a tile is used before its copies end", "pipeline", "cp_async_wait<kAhead - 1>", "cp_async_wait<kAhead>"),
    Bug(
        "a key table is overwritten while in use",
        "pipeline",
        "kTables = power_of_two(kAhead + 1 + kBatch);",
        "kTables = power_of_two(kAhead + 1 + kBatch) / 2;",
    ),
    Bug("keys after the query", "pipeline", "if (position > tokens.last) position = kMasked;", ""),
    Bug("the other half of the residual buffer", "paged_kv.h", "page % 2 * static_cast<int32_t>(kv.P) + row", "row"),
    Bug("a block taken for a slot", "paged_kv", "slot * kv.k_stride", "block * kv.k_stride"),
    Bug("the group of another token", "paged_kv.h", "row / kv.L", "row % kv.L"),
    Bug("bank conflicts", "pipeline", "(kD / kChunk | 1) * kChunk", "(kD / kChunk) * kChunk"),
    Bug(
        "keys in another order",
        "operands",
        "k.at(key + lane / 16 * 8 + lane % 8",
        "k.at(key + lane / 8 % 2 * 8 + lane % 8",
    ),
    Bug("grids of keys that are not there", "pipeline", "if (position == kMasked) t.v_grid", "if (false) t.v_grid"),
    Bug("channels in the order of codes", "decode", "      unpermute_channels(softmax);", "      ;"),
    Bug(
        "V's minimum is forgotten",
        "decode",
        "(softmax.out[step][e] + softmax.offset[e]) * share",
        "softmax.out[step][e] * share",
    ),
    Bug(
        "decode's sums are not rescaled",
        "transposed",
        "fmaf(sum[e], factor[e], s[e] + s[e + 2])",
        "sum[e] + s[e] + s[e + 2]",
    ),
    Bug(
        "nor are its outputs",
        "transposed",
        "x[0] *= factor[0], x[1] *= factor[1], x[2] *= factor[0], x[3] *= factor[1];",
        ";",
    ),
    Bug("a lane's copies are there, not the warp's", "warp_pipeline", "__syncwarp();  // tile i has", "// tile i has"),
    Bug("a stage in use is overwritten", "warp_pipeline", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
    Bug(
        "decode reads beyond the query",
        "warp_pipeline",
        "position > tokens.last ? kMasked : position",
        "position",
        "python_tests/test_decode.py -k test_decode",
    ),
    Bug(
        "codes where their statistics lie", "warp_pipeline", "if (next.block < 0) return {};", "next.slot = next.block;"
    ),
    Bug(
        "a grid of another group",
        "warp_pipeline",
        "row / kv.L",
        "row % kv.L",
        "python_tests/test_decode.py -k test_decode",
    ),
    Bug(
        "a grid in use while it is expanded",
        "decode",
        "store_vector(grid + kD + d, step);\n  }\n  __syncwarp();",
        "store_vector(grid + kD + d, step);\n  }",
    ),
    Bug(
        "bytes of another key",
        "transposed",
        "code_pair<__half>(word, odd, 2 + odd)",
        "code_pair<__half>(word, odd, 1 + odd)",
    ),
    Bug("queries of the next group", "decode", "row < heads ? queries", "row < kGroup ? queries"),
    Bug(
        "warps' results in use while written",
        "decode",
        "  __syncthreads();\n  for (int i = threadIdx.x; i < rows * kD",
        "  for (int i = threadIdx.x; i < rows * kD",
    ),
    Bug(
        "the last split is not joined",
        "merge",
        "for (int i = 0; i < splits; ++i) total",
        "for (int i = 0; i < splits - 1; ++i) total",
        "python_tests/test_decode.py -k over_many_chunks",
    ),
    Bug("a query does not attend itself", "prefill", "lane % 4 * 2 + e % 2] > query", "lane % 4 * 2 + e % 2] >= query"),
    Bug(
        "a tile across pages",
        "prefill",
        "min(min(begin + offset + kQueries, begin + span), start + of.queries)",
        "min(begin + offset + kQueries, start + of.queries)",
    ),
    Bug(
        "codes in use while they are unpacked",
        "prefill",
        "      __syncthreads();\n      attend({k, v}",
        "      attend({k, v}",
    ),
    Bug("a row too many", "prefill", "if (own < end && d < D)", "if (own <= end && d < D)"),
    Bug("neighbours that give what they keep", "prefill", "odd ? first : second, 1)", "odd ? second : first, 1)"),
    Bug(
        "values read one by one",
        "prefill",
        "values = load_vector<T, kN>(v.at(key, d));",
        "values = [&] { Vector<T, kN> x; for (int i = 0; i < kN; ++i) x.value[i] = *v.at(key, d + i); return x; }();",
        TRAFFIC,
    ),
    Bug("logits before they are there", "sm90/prefill", "wait_wgmma<first.value ? 0 : 1>();", "wait_wgmma<1>();"),
    Bug("a tile before it has come", "sm90/prefill", "cp_async_wait<1>();", "cp_async_wait<2>();"),
    Bug(
        "values overwritten while in use", "sm90/prefill", "handover.arrive_empty(i - 1);", "handover.arrive_empty(i);"
    ),
    Bug(
        "tables while they are filled",
        "sm90/prefill",
        "        pipeline.look_up(i);\n        Crew::sync();\n",
        "        pipeline.look_up(i);\n",
    ),
    Bug(
        "a tile unpacked over one in use",
        "sm90/prefill",
        "    memory.handover.wait_empty(i);\n",
        "",
    ),
    Bug("chunks in their natural order", "sm90/prefill", "(element % 64 / 8 ^ row % 8)", "element % 64 / 8"),
    Bug(
        "the last tile's values are left out",
        "sm90/prefill",
        "      add_values();\n      wait_for_values();",
        "      wait_for_values();",
    ),
    Bug(
        "raw rows overwritten while a page is sealed",
        "pages",
        "  if (own >= 2) return;\n  __syncthreads();",
        "  if (own >= 2) return;",
    ),
    Bug("rows of the other half", "pages", "(t / P - page) % 2 != 0", "(t / P - page) % 2 == 0"),
    Bug(
        "one row too few of the buffer",
        "pages",
        "min(before - page * P, P)",
        "min(before - page * P - 1, P)",
    ),
    Bug(
        "statistics lose a NaN",
        "pages",
        "low = x < low || x != x ? x : low;",
        "low = x < low ? x : low;",
        "python_tests/test_pages.py -k nan",
    ),
    Bug("a variance that is a sum", "pages", "squares[i] / static_cast<float>(count)", "squares[i]"),
    Bug(
        "moments of the page's first group", "pages", "store_moments<N>(k, i / parts * size,", "store_moments<N>(k, 0,"
    ),
    Bug("moments by slot", "pages", "block * a.moments_stride", "slot * a.moments_stride"),
    Bug("a value's grid for a key", "paged_kv.h", "slot, kv.P + row", "slot, row", WITHOUT),
    Bug(
        "stages of codes taken again",
        "sm90/prefill",
        "(pipeline, memory, coded)",
        "(pipeline, memory, 0)",
    ),
    Bug("a mask of another tile", "sm90/prefill", "memory.mask(i);\n      float", "memory.mask(i + 1);\n      float"),
    Bug("another head's row", "split_prefill", "row % tile.heads * a.q.stride1", "0", DRAFTS),
    Bug("a page's end is passed", "split_prefill", "origin + span), start", "origin + 2 * span), start", DRAFTS),
    Bug("a query's place taken for a row", "prefill", "position + row / heads", "position + row", DRAFTS),
    Bug("a split that nobody counts", "merge", ": (tokens + size - 1) / size", ": tokens / size", DRAFTS),
    Bug("few queries that go twice", "prefill", "is_split(a, of.queries) ? 0 : max", "false ? 0 : max", DRAFTS),
    Bug("splits of another sequence's row", "split_prefill", "first_row + row / tile.heads) *", "first_row) *", DRAFTS),
    Bug(
        "a kernel that does not wait for the one before",
        "select",
        "  join_stream();\n  const int64_t h = blockIdx.x, b",
        "  const int64_t h = blockIdx.x, b",
    ),
    Bug(
        "a query that is read before it is there",
        "decode",
        "  join_stream();\n  const DecodeQuery own(a, b, h);\n  if",
        "  const DecodeQuery own(a, b, h);\n  join_stream();\n  if",
    ),
    Bug(
        "codes before the split",
        "prefill",
        "tables, sequence, tokens, first, boundary",
        "tables, sequence, tokens, 0, boundary",
        DRAFTS,
    ),
    Bug("a row of a page that is past", "pages", "there = slot >= 0 && i <", "there = i <", WITHOUT),
    Bug("lanes that share no bounds", "pages", "distance = lanes / 2;", "distance = lanes / 4;"),
    Bug("a quotient that is not corrected", "convert", "i < 2; ++i) quotient", "i < 0; ++i) quotient", NUMBERS),
    Bug("means of batches are not joined", "pages", "fmaf(off, share, mean[i])", "mean[i]", MOMENTS),
    Bug("nor are their squares", "pages", "fmaf(off * off, share * static_cast<float>(done), apart)", "apart", MOMENTS),
    Bug("a sequence's first token is another's", "pages", "middle] <= token", "middle] < token", WITHOUT),
    Bug("a pair that should be passed over", "pages", "if (from < 0 || to < 0) continue;", "if (to < 0) continue;"),
    Bug("one token picked too many", "select", "min(a.counts[b], K)", "min(a.counts[b] + 1, K)"),
    Bug("a page just before the local ones", "mask.h", "end > e.local", "end >= e.local", WANTED),
    Bug("an entry of the next page", "mask.h", "e.list[next] < end", "e.list[next] <= end", WANTED),
    Bug("a warp that begins where the last one does", "resolve", "before += __popc(found);", ";", WANTED),
    Bug("a page that was freed", "resolve", "blocks[page] >= 0 && wants_page", "wants_page", WANTED),
    Bug("one page too many is kept", "resolve", ">= a.keep", "> a.keep", RESOLVE),
    Bug("a page that is wanted makes room", "resolve", "if (w.slot && !miss) a.last_use[*w.slot] = now;", ";", RESOLVE),
    Bug("the newest pages make room", "select", "return ~static_cast", "return static_cast", RESOLVE),
    Bug("a slot whatever lies there", "resolve", " && a.slot_blocks[*slot] == block", "", RESOLVE),
    Bug("a miss too far", "resolve", "(1u << lane) - 1", "(2u << lane) - 1", RESOLVE),
    Bug(
        "tables change while they are read", "resolve", "  __syncthreads();  // until here", "  // until here", RESOLVE
    ),
    Bug(
        "codes that follow the maximum of logits",
        "transposed",
        "exp2_approx(s[i] - base[i % 2]);",
        "exp2_approx(s[i] - max[i % 2]);",
        "python_tests/test_decode.py -k any_size",
    ),
    Bug(
        "codes that are not brought back",
        "decode",
        "softmax.finish_codes();",
        ";",
        "python_tests/test_decode.py -k test_decode",
    ),
    Bug(
        "one code of a pair twice",
        "convert",
        "0x4040 + i + 256 * j",
        "0x4040 + i + 256 * i",
        "python_tests/test_decode.py -k test_decode",
    ),
    Bug(
        "a page of the sink is picked",
        "select",
        "c.begin <= first + i && first + i < end",
        "first + i < end",
        "python_tests/test_select.py",
    ),
    Bug("a tie too many", "select", "tie < cut.ties", "tie <= cut.ties", "python_tests/test_select.py -k sort"),
    Bug(
        "NaN is the best score",
        "select",
        "ordered(value != value ? -INFINITY : value + 0.0f)",
        "ordered(value + 0.0f)",
        "python_tests/test_select.py -k sort",
    ),
    Bug(
        "bins are read while they are counted",
        "select",
        "    count_bins(c, cut, shift, own);\n    __syncthreads();",
        "    count_bins(c, cut, shift, own);",
    ),
    Bug(
        "the sign of q is lost",
        "select",
        "mma_m16n8k16<T>(scores, query.minus[2",
        "mma_m16n8k16<T>(scores, query.plus[2",
    ),
    Bug(
        "a probe too few",
        "paged_kv",
        "min(rest - whole, stride - 1)",
        "min(rest - whole, stride - 2)",
        "python_tests/test_decode.py -k over_many_chunks",
    ),
    Bug("a quarter of the queries", "mass", "lanes = 4; lanes < 32", "lanes = 16; lanes < 32"),
    Bug(
        "a query that attends nothing",
        "mass",
        "lse == -INFINITY ? INFINITY : lse",
        "lse == -INFINITY ? lse : lse",
        MASS,
    ),
    Bug(
        "rows of the batch before",
        "mass",
        "own.put(rows + row_of(step + kMassBatch)",
        "own.put(rows + row_of(step)",
        MANY,
    ),
    Bug("queries of the step before", "mass", "queries + step % 2 *", "queries + (step + 1) / 2 % 2 *", MANY),
    Bug("a listed page is not attended", "mass", "table.listed[key] ? -1 : table.unit[key]", "table.unit[key]"),
    Bug(
        "the other tile of two",
        "warp_pipeline",
        "lane / kWarpKeys == half",
        "lane / kWarpKeys != half",
        "python_tests/test_decode.py -k test_decode",
    ),
    Bug("rows that nobody attends are copied", "warp_pipeline", "at.row() < count};", "count > 0};", TRAFFIC),
    Bug("a grid of another tile", "prefill", "kD, Block>(pipeline.table_at(i)", "kD, Block>(pipeline.table_at(i + 1)"),
    Bug("the values of a panel twice", "sm90/prefill", "Tile::keys(step, panel)", "Tile::keys(step, 0)"),
    Bug("half of the queries is lost", "mass", "sums[key] + sums[kKeys + key]", "sums[key]"),
    Bug("the first local token is not attended", "mass", "unit >= reach.local", "unit > reach.local"),
    Bug(
        "an infinite value behind a mask",
        "prefill",
        "if (!Crew::sync_or(found)) return;",
        "return;",
        "python_tests/test_prefill.py -k later_token",
    ),
    Bug(
        "sums without headroom",
        "softmax",
        "shift = base + kHeadroom<T>;",
        "shift = base;",
        "python_tests/test_small.py -k largest",
    ),
]
BUILDS = {
    "plain": {"SIMT_ORDER": "forward", "SIMT_MAJOR": "8"},
    "SANITIZE": {"SIMT_ORDER": "reverse"},
    "RACES": {"SIMT_ORDER": "1"},
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sources, to be changed."""
    folder = tmp_path_factory.mktemp("planted")
    for name in ("csrc", "lserve_ext", "python_tests", "bench", "CMakeLists.txt", "pyproject.toml"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder)
    yield folder
    shutil.rmtree(folder)


def notices(folder: Path, build: str, tests: str) -> bool:
    """Whether the tests fail on a build of the copy."""
    target, path = folder / build, f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    if not (target / "build.ninja").exists():
        configure = [
            "cmake",
            "-S",
            ".",
            "-B",
            build,
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_FLAGS=-O1 -g",
        ]
        configure += ["-DLSERVE_TWIN=ON", f"-DLSERVE_{build}=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run([*configure, "--no-warn-unused-cli"], cwd=folder, check=True, env=environment)
    subprocess.run(["cmake", "--build", build], cwd=folder, check=True, env=environment)
    preload = {"plain": [], "SANITIZE": ["asan", "ubsan"], "RACES": ["tsan"]}[build]
    found = [subprocess.check_output(["c++", f"-print-file-name=lib{name}.so"], text=True).strip() for name in preload]
    environment |= {"PYTHONPATH": str(target / "package"), "LD_PRELOAD": ":".join(found), **BUILDS[build]}
    environment |= {
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    file, _, expression = tests.partition(" -k ")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        str(folder / file),
    ]
    command += ["-k", expression] if expression else []
    try:
        done = subprocess.run(command, cwd=target, env=environment, capture_output=True, timeout=600)
    except subprocess.TimeoutExpired:
        return True
    assert done.returncode != 5, f"no test was run: {tests}"
    return done.returncode != 0


def source(root: Path, bug: Bug) -> Path:
    """A header of kernels, or one that they share with the CPU (.h)."""
    return root / "csrc" / (bug.file if bug.file.endswith(".h") else f"cuda/{bug.file}.cuh")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what.replace(" ", "_"))
def test_a_planted_bug_applies_to_the_source_once(bug: Bug) -> None:
    """Without a build, so always: a bug that no longer fits proves nothing."""
    text = source(ROOT, bug).read_text()
    assert text.count(bug.old) == 1 and bug.new != bug.old


@pytest.mark.planted
def test_without_a_bug_nothing_is_noticed(copy: Path) -> None:
    for tests in sorted({bug.tests for bug in BUGS}):
        assert not notices(copy, "plain", tests)
    assert not notices(copy, "SANITIZE", SMALL) and not notices(copy, "RACES", SMALL)


@pytest.mark.planted
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what.replace(" ", "_"))
def test_a_planted_bug_is_noticed(bug: Bug, copy: Path) -> None:
    path = source(copy, bug)
    text = path.read_text()
    path.write_text(text.replace(bug.old, bug.new))
    try:
        by = next((build for build in BUILDS if notices(copy, build, bug.tests)), None)
    finally:
        path.write_text(text)
    assert by, "nobody noticed"
    print(f"{bug.what}: {by}")
