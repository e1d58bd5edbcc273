"""What only a GPU can show; the op tests, which are marked `gpu` too, run on it as they do on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _cases import BF16, Case, Shape, build, ints, normal, same_bits
from _tiny import cached, llama
from torch import Tensor

from lserve_ext import SparseCache, SparseConfig, ops
from lserve_ext.ops import DENSE, Mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHAPE = Shape(128, 64, 16, 4, BF16, "int8")
ROOM = 3  # pages


def cache(lengths: list[int], device: str = "cuda") -> Case:
    return build(SHAPE, lengths, device=device, columns=20, room=ROOM)


def new_token(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one more token a sequence."""
    dims, device = (case.batch, case.heads, SHAPE.head_dim), str(case.lengths.device)
    return (
        normal(seed, case.batch, case.heads * SHAPE.group, SHAPE.head_dim, dtype=BF16, device=device),
        normal(seed + 1, *dims, dtype=BF16, device=device),
        normal(seed + 2, *dims, dtype=BF16, device=device),
    )


def step(case: Case, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, windows: Tensor) -> tuple[Tensor, ...]:
    """All that a decode step of one layer does, over fixed tables. `sealed` is that from before the append."""
    kv, n = case.kv, case.lengths + 1
    ops.append_kv(k, v, cu, case.lengths, kv)
    scores = ops.page_scores(q, kv.stats, kv.block_table, kv.sealed, windows)
    lists, start = ops.select_pages(scores, n, kv.sealed, SHAPE.page_size, sink=1, local=2, count=4)
    out, lse = ops.decode(q, Mask(windows, lists, start, sink=1), kv, n)
    mass = ops.attention_mass(q[:, None], lse[:, None], Mask(windows, lists, start, sink=1), kv, n)
    return scores, lists, out, lse, mass


@pytest.mark.parametrize("limits", [{}, {"host_bytes": 40_000}])
@pytest.mark.parametrize("preset", ["dense", "lserve", "h2o", "alisa"])
def test_placement_changes_nothing(preset: str, limits: dict[str, int], tmp_path: Any) -> None:
    """Logits of a model whose pages live in host memory and on a disk, and of one that holds them all."""
    fields: dict[str, Any] = {"page_size": 8, "stats_group": 4, "local_tokens": 16}
    if preset == "lserve":
        fields |= {"streaming_heads": None, "budget_tokens": 48, "sink_tokens": 8}
    config = SparseConfig.preset(preset, **fields)
    model = llama(attn_implementation="lserve").cuda()
    tiers: dict[str, Any] = {"device_bytes": 100_000, **limits, **({"disk_dir": tmp_path} if limits else {})}
    caches = [SparseCache(model.config, config), SparseCache(model.config, config.replace(**tiers))]
    ids = torch.randint(0, 258, (2, 160), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        for from_, to in ((0, 70), (70, 120), *((i, i + 1) for i in range(120, 160))):
            logits = [model(ids[:, from_:to], use_cache=True, **cached(cache)).logits for cache in caches]
            assert torch.equal(*logits)
    assert caches[1].traffic().fetched > 0


def copy_case(to: Case, case: Case) -> None:
    to.lengths.copy_(case.lengths)
    for a, b in zip(to.kv, case.kv, strict=True):
        if a is not None:
            a.copy_(b)


def test_a_captured_step_serves_other_lengths() -> None:
    """Grids depend on shapes alone, and nothing waits for the GPU."""
    case = cache([700, 65, 1])
    q, k, v = new_token(case, 50)
    cu, windows = ints(range(case.batch + 1), "cuda"), case.windows(DENSE, 2, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(case, q, k, v, cu, windows)  # whatever is loaded or asked for once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, q, k, v, cu, windows)

    for seed, lengths in enumerate([[700, 65, 1], [63, 128, 590], [127, 0, 660]]):
        other, eager = cache(lengths), cache(lengths)
        for static, new in zip((q, k, v), new_token(other, 90 + seed), strict=True):
            static.copy_(new)
        copy_case(case, other)
        graph.replay()
        want = step(eager, q, k, v, cu, windows)
        assert all(same_bits(a, b) for a, b in zip(captured, want, strict=True))
        assert all(a is None or same_bits(a, b) for a, b in zip(case.kv, eager.kv, strict=True))


def test_ops_run_on_the_current_stream() -> None:
    """Peers' defect 8: a kernel on the default stream reads what a side stream has not written yet."""
    want_case, case = cache([700, 65, 1]), cache([700, 65, 1])
    arguments = new_token(case, 50)
    cu, windows = ints(range(case.batch + 1), "cuda"), case.windows(DENSE, 2, 0)
    want = step(want_case, *arguments, cu, windows)
    late = [torch.full_like(x, float("nan")) for x in arguments]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for static, new in zip(late, arguments, strict=True):
            static.copy_(new)
        got = step(case, *late, cu, windows)
    side.synchronize()
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device() -> None:
    """Kernels run where the tensors lie, whatever device is current."""
    case, want_case = cache([300, 64], "cuda:1"), cache([300, 64], "cuda:0")
    results = [
        step(c, *new_token(c, 50), ints(range(3), str(c.lengths.device)), c.windows(DENSE, 2, 0))
        for c in (case, want_case)
    ]
    assert torch.cuda.current_device() == 0
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(*results, strict=True))


def test_gather_from_pinned_memory() -> None:
    rows = normal(1, 9, 64, 128, dtype=BF16)
    src, dst = rows.pin_memory(), torch.zeros(5, 64, 128, dtype=BF16, device="cuda")
    ops.gather_pages(src, ints([7, -1, 2], "cuda"), dst, ints([0, 1, 4], "cuda"))
    assert same_bits(dst.cpu(), torch.stack([rows[7], *torch.zeros_like(rows[:3]), rows[2]]))
    back = torch.zeros_like(rows).pin_memory()
    ops.gather_pages(dst, ints([4, 0], "cuda"), back, ints([8, 3], "cuda"))
    torch.cuda.synchronize()
    assert same_bits(back[8], rows[2]) and same_bits(back[3], rows[7]) and not back[:3].any()
    with pytest.raises((RuntimeError, TypeError, ValueError), match="pinned host memory"):
        ops.gather_pages(rows, ints([0], "cuda"), dst, ints([0], "cuda"))


def test_debug_mode_checks_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_DEBUG", True)
    case = cache([300, 64])
    case.kv.slot_table[0, 1, 2] = 10**6
    with pytest.raises(ValueError, match="slot_table"):
        ops.decode(case.queries(), Mask(case.windows(DENSE, DENSE, DENSE)), case.kv, case.lengths)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = llama(layers=4, hidden_size=256, head_dim=64, num_attention_heads=4, initializer_range=0.05)
    yield made.to("cuda", torch.bfloat16)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("preset", ["dense", "lserve", "alisa"])
def test_generate_in_bfloat16(model: Any, preset: str) -> None:
    """Errors like those of SDPA; of the sparse presets too, whose budget is above the context."""
    ids = torch.randint(3, 250, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    config = {
        "dense": SparseConfig.dense(),
        "lserve": SparseConfig.lserve(streaming_heads=None, kv_dtype="auto"),
        "alisa": SparseConfig.alisa(kv_sparsity=0.0, kv_dtype="auto"),
    }[preset]
    logits = {}
    for implementation, kv in (("sdpa", None), ("lserve", SparseCache(model.config, config))):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(ids[:, :290], **cached(kv), use_cache=True)
            rows = [out.logits[:, -1]]
            for i in range(290, 300):
                out = model(ids[:, i : i + 1], **cached(out.past_key_values), use_cache=True)
                rows.append(out.logits[:, -1])
        logits[implementation] = torch.stack(rows).float()
    with torch.no_grad():
        model.float().set_attn_implementation("sdpa")
        exact = model(ids).logits[:, 289:300].transpose(0, 1).float()
        model.to(torch.bfloat16)
    error = {name: (x - exact).abs().max() for name, x in logits.items()}
    assert error["lserve"] <= 2 * error["sdpa"]
