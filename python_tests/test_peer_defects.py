"""Defects found in other implementations, one test each, named after what it protects.

At the level of ops; the cache's own side of the first, fifth and seventh is tested with the cache.
"""

from __future__ import annotations

import pytest
import torch
from _cases import (
    BF16,
    F16,
    F32,
    SHAPES,
    Case,
    Shape,
    assert_attention,
    build,
    empty_kv,
    free_past,
    ints,
    normal,
    pack,
    same_bits,
    sequence,
)

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, Mask, PagedKV

pytestmark = pytest.mark.gpu

SHAPE = Shape(64, 16, 8, 4, F32, "auto")


def step(case: Case, held: int, kv: PagedKV, seed: int, device: str) -> tuple[torch.Tensor, PagedKV]:
    """Appends one token to the only sequence: its query, and the cache after it."""
    heads = case.heads
    k, v = (normal(seed + i, 1, heads, case.shape.head_dim, dtype=case.shape.dtype, device=device) for i in (0, 1))
    ops.append_kv(k, v, ints([0, 1], device), ints([held], device), kv)
    sealed = max(int(kv.sealed[0]), (held + 1) // case.shape.page_size - 1)
    q = normal(seed + 2, 1, heads * case.shape.group, case.shape.head_dim, dtype=case.shape.dtype, device=device)
    return q, kv._replace(sealed=ints([sealed], device))


def test_a_reused_list_sees_the_newest_page(device: str) -> None:
    """1: a list chosen before a page border lacked the page after it for up to interval - 1 steps."""
    case = build(SHAPE, [6 * 16 - 1], heads=1, device=device, room=4)
    lists, start = case.lists(sink=1, local=1, count=2)
    kv, held = case.kv, 6 * 16 - 1
    for i in range(40):  # across two borders
        q, kv = step(case, held, kv, 1000 + 10 * i, device)
        held += 1
        args = (Mask(ints([0], device), lists, start, sink=1), kv, ints([held], device))
        assert_attention(ops.decode(q, *args), reference.decode, q, *args)
        assert kv.residual_v is not None
        kv.residual_v[0, 0, (held - 1) % 32] += 100  # the newest token matters
        changed, _ = ops.decode(q, *args)
        kv.residual_v[0, 0, (held - 1) % 32] -= 100
        assert not torch.allclose(changed, ops.decode(q, *args)[0])


def test_prompt_of_an_exact_multiple_of_the_page_size(device: str) -> None:
    """2: at the first decode step after such a prompt, heads were scrambled by a wrong row stride."""
    for n in (16, 32, 64, 128):
        case = build(SHAPE, [n], heads=3, device=device, room=2)
        q, kv = step(case, n, case.kv, 5, device)
        args = (Mask(case.windows(DENSE, 1, DENSE), sink=1), kv, ints([n + 1], device))
        out, lse = ops.decode(q, *args)
        assert_attention((out, lse), reference.decode, q, *args)
        assert kv.stats is not None
        scores = ops.page_scores(q, kv.stats, kv.block_table, kv.sealed)
        torch.testing.assert_close(scores, reference.page_scores(q, kv.stats, kv.block_table, kv.sealed))


def test_a_ragged_batch_uses_each_sequence_s_own_length(device: str) -> None:
    """3: the host took the longest length of the batch where the kernel took each one's: a wrong page was forced."""
    lengths = [333, 17, 64, 65, 200]
    case = build(SHAPE, lengths, heads=2, device=device)
    q, windows = case.queries(), case.windows(0, 2)
    assert case.kv.stats is not None
    scores = ops.page_scores(q, case.kv.stats, case.kv.block_table, case.kv.sealed)
    lists, start = ops.select_pages(scores, case.lengths, case.kv.sealed, 16, 1, 2, 3)
    assert start.tolist() == [min((n - 1) // 16 - 1, max(n // 16 - 1, 0)) if n > 16 else 0 for n in lengths]
    out, _ = ops.decode(q, Mask(windows, lists, start, sink=1), case.kv, case.lengths)
    for b in range(case.batch):
        one, i = sequence(case, b), slice(b, b + 1)
        assert one.kv.stats is not None
        alone = ops.page_scores(q[i], one.kv.stats, one.kv.block_table, one.kv.sealed)
        own, own_start = ops.select_pages(alone, one.lengths, one.kv.sealed, 16, 1, 2, 3)
        assert torch.equal(own, lists[i])
        assert same_bits(ops.decode(q[i], Mask(windows, own, own_start, sink=1), one.kv, one.lengths)[0], out[i])


def test_a_recycled_block_forgets_its_old_statistics(device: str) -> None:
    """4: minimum and maximum were merged into what a recycled page, or the last group, had left behind."""
    shape = Shape(64, 16, 4, 4, BF16, "int8")
    kv = empty_kv(shape, [3], heads=2, device=device)
    for t in (kv.stats, kv.scales):
        assert t is not None
        t.fill_(1e4)  # the last owner's
        t[:, :, ::2] = -1e4
    kv.k_pool.fill_(7)
    k = normal(1, 64, 2, 64, dtype=BF16, device=device)
    held = 0
    for size in (1, 13, 1, 1, 20, 28):
        ops.append_kv(k[held : held + size], k[held : held + size], ints([0, size], device), ints([held], device), kv)
        held += size
        kv = kv._replace(sealed=ints([max(0, held // 16 - 1)], device))
    assert kv.stats is not None
    for page in range(3):
        for h in range(2):
            want = reference.page_stats(k[None, page * 16 : (page + 1) * 16, h], 4)[0]
            assert torch.equal(kv.stats[int(kv.block_table[0, h, page])], want)


def test_a_streaming_window_moves_with_every_page(device: str) -> None:
    """5: the ring of a streaming head was rotated by the host and by the kernel: a wrong page was read."""
    case = build(SHAPE, [3], heads=1, device=device, room=14)
    kv, held, k, v = case.kv, 3, case.k[0], case.v[0]
    for i in range(150):
        q, kv = step(case, held, kv, 100 + 3 * i, device)
        assert kv.residual_k is not None and kv.residual_v is not None
        k = torch.cat([k, kv.residual_k[0, :, held % 32][None]])
        v = torch.cat([v, kv.residual_v[0, :, held % 32][None]])
        held += 1
        now = free_past(Case(kv, ints([held], device), [k], [v], SHAPE), 0, 2, 1)
        out, _ = ops.decode(q, Mask(now.windows(2), sink=1), now.kv, now.lengths)
        local = min(max(0, (held - 1) // 16 - 1), int(now.kv.sealed[0])) * 16
        tokens = [*range(min(16, local)), *range(local, held)]
        want, _ = reference.attend(q[0], k[tokens, 0], v[tokens, 0], 64**-0.5)
        torch.testing.assert_close(out[0].double(), want, rtol=1e-5, atol=3e-6)


def test_a_constant_key_divides_by_nothing(device: str) -> None:
    """6: the quantiser divided by a range of zero."""
    for shape in (SHAPES[1], SHAPES[8]):
        kv = empty_kv(shape, [1], heads=1, device=device)
        flat = torch.full((32, 1, shape.head_dim), 0.3, device=device)
        ops.append_kv(flat, flat, ints([0, 32], device), ints([0], device), kv)
        kv, q = kv._replace(sealed=ints([1], device)), normal(1, 1, shape.group, shape.head_dim, device=device)
        assert kv.scales is not None
        slot = int(kv.slot_table[0, 0, 0])
        assert kv.scales[slot, ..., 0].eq(0).all() and not kv.k_pool[slot].any() and not kv.v_pool[slot].any()
        out, lse = ops.decode(q, Mask(ints([DENSE], device)), kv, ints([32], device))
        torch.testing.assert_close(out, torch.full_like(out, 0.3))
        assert lse.isfinite().all()


def test_one_request_never_meets_the_selection_of_another(device: str) -> None:
    """7: the selection was kept in the layer, so that a second request was served the first one's pages."""
    cases = [build(SHAPE, [n], heads=2, device=device, seed=n) for n in (300, 130)]

    def select(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        assert case.kv.stats is not None
        scores = ops.page_scores(case.queries(), case.kv.stats, case.kv.block_table, case.kv.sealed)
        return ops.select_pages(scores, case.lengths, case.kv.sealed, 16, 1, 1, 3)

    alone = [ops.decode(c.queries(), Mask(c.windows(0, 0), *select(c), sink=1), c.kv, c.lengths)[0] for c in cases]
    selections = [select(c) for c in cases]  # both before any decode
    together = [
        ops.decode(c.queries(), Mask(c.windows(0, 0), *s, sink=1), c.kv, c.lengths)[0]
        for c, s in reversed(list(zip(cases, selections, strict=True)))
    ]
    assert all(same_bits(a, b) for a, b in zip(alone, reversed(together), strict=True))


def test_any_head_dimension_page_size_and_dtype(device: str) -> None:
    """9: one head dimension, one page size, one dtype; others read illegal addresses."""
    for head_dim in (16, 48, 112, 192, 256):
        for page_size, group in ((1, 1), (3, 1), (20, 5), (128, 32)):
            for dtype in (F32, BF16, F16):
                shape = Shape(head_dim, page_size, group, 2, dtype, "int8")
                case = build(shape, [3 * page_size + 1], heads=1, device=device, seed=head_dim)
                q, args = case.queries(), (Mask(case.windows(DENSE)), case.kv, case.lengths)
                assert_attention(ops.decode(q, *args), reference.decode, q, *args)


def test_the_sink_is_attended_whatever_is_selected(device: str) -> None:
    """9: nothing forced the first page into the selection."""
    case = build(SHAPE, [200], heads=1, device=device)
    assert case.kv.stats is not None
    q = case.queries()
    scores = ops.page_scores(q, case.kv.stats, case.kv.block_table, case.kv.sealed)
    scores[0, 0, 0] = -1e30  # the worst page of all
    lists, start = ops.select_pages(scores, case.lengths, case.kv.sealed, 16, 1, 1, 2)
    assert 0 not in lists
    _, lse = ops.decode(q, Mask(case.windows(0), lists, start, sink=1), case.kv, case.lengths)
    mass = ops.attention_mass(
        q[:, None], lse[:, None], Mask(case.windows(0), lists, start, sink=1), case.kv, case.lengths
    )
    assert (mass[0, 0, :16] > 0).all()


# ---------------------------------------------------------------------------------------------- found elsewhere


def test_grouped_queries_are_not_averaged(device: str) -> None:
    """Opposite query heads average to nothing; the bound must hold for each."""
    case = build(SHAPE, [100], heads=1, device=device)
    q = case.queries()
    q[:, 1], q[:, 3] = -q[:, 0], -q[:, 2]
    assert case.kv.stats is not None
    scores = ops.page_scores(q, case.kv.stats, case.kv.block_table, case.kv.sealed)[0, 0, :5]
    logits = (q[0] @ case.k[0][:80, 0].T).amax(0).reshape(5, 16).amax(1)
    assert (scores >= logits).all() and (logits > 1).all()


def test_every_kv_head_has_pages_of_its_own(device: str) -> None:
    """One set of pages for all heads loses what the others need."""
    scores = torch.zeros(1, 3, 10, device=device)
    scores[0, 0, [2, 3]], scores[0, 1, [6, 7]], scores[0, 2, [2, 7]] = 1.0, 1.0, 1.0
    pages, _ = ops.select_pages(scores, ints([11 * 16], device), ints([10], device), 16, 1, 1, 2)
    assert pages.tolist() == [[[2, 3], [6, 7], [2, 7]]]


def test_selection_of_any_number_of_candidates(device: str) -> None:
    """A candidate buffer of fixed size returned a wrong set, silently."""
    scores = torch.zeros(1, 1, 100_000, device=device)
    scores[0, 0, 99_990:] = 1.0
    pages, _ = ops.select_pages(scores, ints([100_001], device), ints([100_000], device), 1, 0, 1, 5000)
    assert pages[0, 0].tolist() == [*range(4990), *range(99_990, 100_000)]


def test_pads_are_not_context(device: str) -> None:
    """Only a sequence's own tokens are packed: a batch of unequal prompts is each prompt alone."""
    lengths = [37, 5, 80]
    case = build(SHAPE, lengths, heads=2, device=device)
    (k, cu), (v, _) = pack(case.k), pack(case.v)
    q = normal(3, sum(lengths), 8, 64, device=device)
    out, _ = ops.prefill(q, k, v, cu, cu, Mask(case.windows(DENSE, 1), sink=1), page_size=16)
    for b, n in enumerate(lengths):
        rows, bounds = slice(int(cu[b]), int(cu[b + 1])), ints([0, n], device)
        alone, _ = ops.prefill(
            q[rows], k[rows], v[rows], bounds, bounds, Mask(case.windows(DENSE, 1), sink=1), page_size=16
        )
        assert same_bits(alone, out[rows])
