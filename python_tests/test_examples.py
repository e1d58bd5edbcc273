"""The worked examples of the papers, as a reader would check them by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _cases import F32, Shape, build, ints, normal
from torch import Tensor

from lserve_ext import ops, reference
from lserve_ext.ops import DENSE, LISTED, Mask

pytestmark = pytest.mark.gpu

BOTH = pytest.mark.parametrize("module", [ops, reference], ids=["kernels", "reference"])


def statistics_of(pages: list[list[tuple[list[int], list[int]]]]) -> Tensor:
    """[blocks, P/L, 2, 16] from (minimum, maximum) of the first channels of every group."""

    def row(channels: list[int]) -> list[float]:
        return [float(x) for x in channels] + [0.0] * (16 - len(channels))

    return torch.tensor([[[row(low), row(high)] for low, high in groups] for groups in pages])


@BOTH
def test_four_pages_of_which_two_are_kept(module: Any, device: str) -> None:
    """LServe and Quest: of scores 37, 40, 78 and 30, a budget of two pages keeps pages 1 and 2."""
    # q = (3, -2, 1): a channel adds q·max where q > 0, and q·min where q < 0.
    q = torch.tensor([[[3.0, -2.0, 1.0, *[0.0] * 13]]], device=device)
    stats = statistics_of(
        [
            [([1, -4, 0], [9, 2, 2])],  # 27 + 8 + 2 = 37
            [([-5, -6, 1], [8, 0, 4])],  # 24 + 12 + 4 = 40
            [([0, -12, -1], [16, -9, 6])],  # 48 + 24 + 6 = 78
            [([2, 0, 3], [7, 5, 9])],  # 21 - 0 + 9 = 30
        ]
    ).to(device)
    table, sealed = ints([[[0, 1, 2, 3, -1, -1]]], device), ints([4], device)
    scores = module.page_scores(q, stats, table, sealed)
    assert scores[0, 0].tolist() == [37.0, 40.0, 78.0, 30.0, -math.inf, -math.inf]
    pages, start = module.select_pages(scores, ints([6 * 16], device), sealed, 16, 0, 1, 2)
    assert pages.tolist() == [[[1, 2]]]
    assert start.tolist() == [4]


@BOTH
def test_a_page_is_as_important_as_its_best_group_for_its_best_head(module: Any, device: str) -> None:
    """Hierarchical pages: two groups a page, two query heads a kv head; the maximum of all four bounds."""
    q = torch.tensor([[[1.0] + [0.0] * 15, [-1.0] + [0.0] * 15]], device=device)
    stats = statistics_of([[([-3], [2]), ([-1], [5])], [([-9], [-4]), ([0], [1])]]).to(device)
    scores = module.page_scores(q, stats, ints([[[1, 0]]], device), ints([2], device))
    assert scores.tolist() == [[[9.0, 5.0]]]  # averaging the two queries first would give 0 for both


WORDS = torch.tensor([[[0.1, 0.3, 0.2, 0.4, 0.6, 0.05, 0.1, 0.35]]])


@BOTH
def test_eight_words_two_local_two_global(module: Any, device: str) -> None:
    """ALISA: half of the budget for the newest tokens, half for the largest sums of attention."""
    tokens, start = module.select_tokens(
        WORDS.to(device), ints([8], device), ints([6], device), ints([2], device), 1, 2
    )
    assert start.tolist() == [6]
    assert tokens.tolist() == [[[3, 4]]]  # .4 and .6, although the local .35 beats all others


@BOTH
def test_the_residual_buffer_widens_the_local_half(module: Any, device: str) -> None:
    """The same words in pages of 2 tokens, of which two are sealed: the newest four are local whatever they weigh."""
    tokens, start = module.select_tokens(
        WORDS.to(device), ints([8], device), ints([2], device), ints([2], device), 2, 2
    )
    assert start.tolist() == [4]
    assert tokens.tolist() == [[[1, 3]]]


@BOTH
def test_a_selection_serves_four_steps(module: Any, device: str) -> None:
    """LServe: select once, reuse for four steps, here across the border of a page.

    The list keeps its local_start: the page that leaves the window meanwhile is still attended, and so is the new one.
    """
    shape = Shape(64, 16, 8, 2, F32, "auto")
    n = 6 * 16 - 2  # the third step starts page 6
    case = build(shape, [n], heads=1, device=device, room=2)
    kv, held = case.kv, n
    k, v = case.k[0], case.v[0]
    pages = start = None
    for step in range(4):
        q = normal(50 + step, 1, 2, 64, device=device)
        new_k, new_v = normal(60 + step, 1, 1, 64, device=device), normal(70 + step, 1, 1, 64, device=device)
        module.append_kv(new_k, new_v, ints([0, 1], device), ints([held], device), kv)
        k, v, held = torch.cat([k, new_k]), torch.cat([v, new_v]), held + 1
        if pages is None:
            scores = module.page_scores(q, kv.stats, kv.block_table, kv.sealed)
            pages, start = module.select_pages(scores, ints([held], device), kv.sealed, 16, 1, 1, 2)
            assert start.tolist() == [4]
        kv = kv._replace(sealed=ints([max(int(kv.sealed[0]), held // 16 - 1)], device))
        out, _ = module.decode(q, Mask(ints([LISTED], device), pages, start, sink=1), kv, ints([held], device))

        listed = [t for page in pages[0, 0].tolist() for t in range(page * 16, (page + 1) * 16)]
        attended = [*range(16), *listed, *range(64, held)]
        want, _ = reference.attend(q[0], k[attended, 0], v[attended, 0], 64**-0.5)
        torch.testing.assert_close(out[0].double(), want, rtol=1e-5, atol=2e-6)
    assert held == 98 and int(kv.sealed[0]) == 5


def test_alisa_attends_what_its_algorithm_says(device: str) -> None:
    """Algorithm 1, token by token, against select_tokens on the literal sums."""
    n, ratio = 40, 0.4
    q, k, v = (normal(s, n, heads, 16, device=device) for s, heads in ((1, 4), (2, 2), (3, 2)))
    _, weights = reference.sparse_window_attention(q, k, v, ratio)
    for t in range(n):
        half = max(1, round((t + 1) * ratio / 2))
        attended = weights[t].nonzero().flatten().tolist()
        assert attended[-min(half, t + 1) :] == list(range(max(0, t + 1 - half), t + 1))
        assert len(attended) == min(2 * half, t + 1)
        if round((t + 1) * ratio / 2) == half and t + 1 >= 2 * half:
            sums = weights[max(0, t - half) : t].sum(0).float().reshape(1, 1, n)
            lengths = ints([t + 1], device)
            tokens, start = ops.select_tokens(sums, lengths, lengths, ints([half], device), 1, half)
            assert tokens[0, 0].tolist() == attended[:-half] and start.tolist() == [t + 1 - half]
    torch.testing.assert_close(weights.sum(1), torch.full((n,), 4.0, dtype=torch.float64, device=device))


def test_alisa_without_sparsity_is_attention(device: str) -> None:
    """Ratio 2: half of it already covers every token."""
    q, k, v = (normal(s, 20, heads, 16, device=device) for s, heads in ((1, 4), (2, 2), (3, 2)))
    out, _ = reference.sparse_window_attention(q, k, v, 2.0)
    bounds = ints([0, 20], device)
    want, _ = ops.prefill(q, k, v, bounds, bounds, Mask(ints([DENSE, DENSE], device)))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=2e-6)
