"""`LayerCache`: what it stores and frees, and that no way of getting to a state shows in it."""

from __future__ import annotations

import copy
import gc
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lserve_ext import LayerCache, SparseConfig, ops, reference
from lserve_ext.blocks import Pool, empty_blocks
from lserve_ext.ops import Mask
from lserve_ext.scorers import PREFILL_QUERIES, Mass, Selection
from lserve_ext.sequences import Sequences, Step

P, H, G, D = 8, 2, 3, 16
SMALL: dict[str, Any] = {"page_size": P, "stats_group": 4, "sink_tokens": P, "local_tokens": 2 * P}

CONFIGS = {
    "dense": SparseConfig.dense(**SMALL),
    "dense-int8": SparseConfig.dense(kv_dtype="int8", **SMALL),
    "streaming": SparseConfig.preset("streaming", **SMALL),
    "pages": SparseConfig.lserve(streaming_heads=None, budget_tokens=6 * P, **SMALL),
    "moments": SparseConfig.lserve(streaming_heads=None, budget_tokens=6 * P, scorer="moments", **SMALL),
    "half": SparseConfig.lserve(budget_tokens=6 * P, **SMALL),  # head 0 streams
    "h2o": SparseConfig.h2o(budget_tokens=24, page_size=P, stats_group=4),
    "alisa": SparseConfig.alisa(page_size=P, stats_group=4),
}


def streams(name: str) -> list[bool]:
    return {"streaming": [True] * H, "half": [True, False]}.get(name, [False] * H)


def make(name: str, batch: int = 1, dtype: torch.dtype = torch.float32) -> LayerCache:
    return LayerCache(CONFIGS[name], streams(name), False, torch.empty(batch, H, 1, D, dtype=dtype))


def tokens(count: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, count, D, generator=rng) for heads in (H * G, H, H))  # type: ignore[return-value]


def attend(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, pads: list[int] | None = None) -> Tensor:
    """What a padded batch [B, heads, T, D] attends: [B, T, Hq, D]."""
    (B, _, T, _), pads = k.shape, pads or [0] * len(k)
    columns = torch.arange(T) >= torch.tensor(pads)[:, None]
    new, (k, v) = [T - pad for pad in pads], (x.transpose(1, 2)[columns] for x in (k, v))
    if T == 1:
        return cache.attend(q[:, :, 0], k, v, new, D**-0.5)[:, None]
    out = cache.attend(q.transpose(1, 2)[columns], k, v, new, D**-0.5)
    return out.new_zeros(B, T, *out.shape[1:]).index_put_((columns,), out)


def feed(cache: LayerCache, qkv: tuple[Tensor, Tensor, Tensor], cuts: list[int]) -> Tensor:
    """Attends tokens [0, cuts[0]), [cuts[0], cuts[1]), ...; the output of all of them."""
    parts = zip([0, *cuts[:-1]], cuts, strict=True)
    return torch.cat([attend(cache, *(x[:, :, a:b] for x in qkv)) for a, b in parts], 1)


def contents(cache: LayerCache) -> list[Tensor]:
    """What the cache holds of every sequence and head, in order; physical blocks and stale rows left out."""
    kv, found = cache.kv, []
    assert kv.residual_k is not None and kv.residual_v is not None
    for b, n in enumerate(cache.lengths):
        sealed = int(kv.sealed[b])
        rows = torch.arange(sealed * P, n) % (2 * P)
        found += [kv.residual_k[b, :, rows], kv.residual_v[b, :, rows]]
        for h in range(H):
            blocks = kv.block_table[b, h, :sealed]
            if cache._streaming[h]:  # what lies between sink and window is about to be freed, or already is
                blocks = torch.cat([blocks[:1], blocks[max(1, n // P - cache.sequences.window) :]])
            found.append(blocks >= 0)
            found += [pool[blocks[blocks >= 0].long()] for pool in kv[:4] if pool is not None]
    return found


def assert_same(a: LayerCache, b: LayerCache) -> None:
    assert a.lengths == b.lengths
    for x, y in zip(contents(a), contents(b), strict=True):
        assert torch.equal(x, y)


def audit(*caches: LayerCache) -> None:
    """Every block in use is referred to as often as tables name it; all others are free."""
    pool = caches[0]._pool
    pool.settle()  # mends what an interrupt has left
    counts = np.zeros(pool.allocator.capacity, np.int64)
    assert all(cache._pool is pool for cache in caches)
    for table in {id(cache._state.blocks): cache._state.blocks.ids for cache in caches}.values():
        np.add.at(counts, table[table >= 0], 1)
    assert np.array_equal(counts, pool.allocator._references)
    assert sorted(pool.allocator._free) == np.flatnonzero(counts == 0).tolist()


CUTS = {
    "one_shot": [53],
    "chunks": [3, 8, 11, 27, 53],
    "whole_pages": [8, 16, 32, 48, 53],
    "token_by_token": list(range(1, 54)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_the_way_that_tokens_came_does_not_show(name: str, cuts: list[int]) -> None:
    one, other = make(name), make(name)
    feed(one, tokens(53), [53])
    feed(other, tokens(53), cuts)
    assert_same(one, other)
    audit(other)


@pytest.mark.parametrize("length", [1, P - 1, P, P + 1, 2 * P, 3 * P, 5 * P, 5 * P + 3])
def test_dense_attention_is_causal_attention(length: int) -> None:
    """Prompts of exact multiples of the page size among them, then decode across page boundaries."""
    q, k, v = tokens(length + 2 * P)
    out = feed(make("dense"), (q, k, v), [length, *range(length + 1, length + 2 * P + 1)])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_streaming_attends_sink_and_local_however_it_is_fed(cuts: list[int]) -> None:
    q, k, v = tokens(53)
    out = feed(make("streaming"), (q, k, v), cuts)
    t, j = torch.arange(53)[:, None], torch.arange(53)
    seen = (j <= t) & ((j < P) | (j // P > t // P - 2))  # sink: one page; local: two pages
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2), atol=2e-6, rtol=2e-5)


def test_streaming_heads_give_their_blocks_back() -> None:
    cache = make("streaming")
    q, k, v = tokens(64 * P)
    feed(cache, (q, k, v), [20 * P])
    after_prefill = cache.memory()
    feed(cache, tuple(x[:, :, 20 * P :] for x in (q, k, v)), list(range(1, 44 * P)))  # type: ignore[arg-type]
    later = cache.memory()
    assert later.used <= after_prefill.used
    assert cache._pool.allocator.peak <= H * 5  # sink, and local with two pages of slack: never the whole prompt
    audit(cache)


def test_pools_grow_by_half_and_max_tokens_reserves() -> None:
    reserved = LayerCache(CONFIGS["dense"].replace(max_tokens=40 * P), [False] * H, False, torch.empty(1, H, 1, D))
    before = reserved.memory().reserved
    feed(reserved, tokens(40 * P), [40 * P])
    assert reserved.memory().reserved == before
    grown = make("dense")
    feed(grown, tokens(40 * P), list(range(1, 40 * P + 1)))
    assert grown.memory().reserved < 1.6 * grown.memory().used


# ---- crop


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("removed", [1, 5, P])
def test_a_crop_within_the_raw_buffer_is_exact(name: str, removed: int) -> None:
    """P tokens at least are raw; what follows then is as if the removed tokens had never been."""
    length, (q, k, v) = 6 * P + 5, tokens(9 * P)
    plain, cropped = make(name), make(name)
    feed(plain, (q, k, v), [length - removed])
    for x, y in zip((detour := [q.clone(), k.clone(), v.clone()]), tokens(P, seed=9), strict=True):
        x[:, :, length - removed : length] = y[:, :, :removed]
    feed(cropped, tuple(detour), [length])  # type: ignore[arg-type]
    cropped.crop(removed)
    rest = tuple(x[:, :, length - removed :] for x in (q, k, v))
    feed(plain, rest, [2 * P])  # type: ignore[arg-type]
    feed(cropped, rest, [2 * P])  # type: ignore[arg-type]
    if name in ("h2o", "alisa"):
        assert plain.lengths == cropped.lengths
    else:
        assert_same(plain, cropped)
    audit(cropped)


@pytest.mark.parametrize("left", [0, 1, P - 1, P, 2 * P + 3])
def test_a_deep_crop_unseals_the_page_that_is_cut(left: int) -> None:
    length, (q, k, v) = 6 * P + 5, tokens(8 * P)
    plain, cropped = make("dense"), make("dense")
    if left:
        feed(plain, (q, k, v), [left])
    feed(cropped, (q, k, v), [length])
    cropped.crop(length - left)
    assert cropped.lengths == [left]
    rest = tuple(x[:, :, left:] for x in (q, k, v))
    steps = [8 * P - left - 3, *range(8 * P - left - 2, 8 * P - left + 1)]
    torch.testing.assert_close(feed(plain, rest, steps), feed(cropped, rest, steps))  # type: ignore[arg-type]
    audit(cropped)


@pytest.mark.parametrize("local", [0, P, 2 * P])
def test_a_crop_does_not_change_what_is_attended(local: int) -> None:
    """The newest two pages are attended whether or not a crop has left them sealed."""
    config = CONFIGS["pages"].replace(local_tokens=local, kv_dtype="auto", reuse_interval=1)
    qkv, outs = tokens(12 * P), []
    for detour in (0, 4):
        cache = LayerCache(config, [True, False], False, torch.empty(1, H, 1, D))
        feed(cache, qkv, [10 * P - 1])
        if detour:
            attend(cache, *(x[:, :, :detour] for x in tokens(detour, seed=8)))
            cache.crop(detour)
        outs.append(feed(cache, tuple(x[:, :, 10 * P - 1 :] for x in qkv), list(range(1, P))))  # type: ignore[arg-type]
    torch.testing.assert_close(*outs)


def test_a_crop_to_nothing_is_as_new() -> None:
    config = CONFIGS["streaming"].replace(prefill_local_tokens=6 * P)
    new, cropped = (LayerCache(config, [True] * H, False, torch.empty(1, H, 1, D)) for _ in range(2))
    feed(cropped, tokens(2 * P + 1, seed=1), [2 * P, 2 * P + 1])
    cropped.crop(2 * P + 1)
    cuts = list(range(4, 20 * P + 1, 4))
    torch.testing.assert_close(feed(new, tokens(20 * P), cuts), feed(cropped, tokens(20 * P), cuts))


def test_a_deep_crop_of_int8_quantises_one_page_twice() -> None:
    q, k, v = tokens(6 * P)
    cache = make("dense-int8")
    feed(cache, (q, k, v), [6 * P])
    cache.crop(3 * P + 4)  # cuts page 2
    assert cache.kv.residual_k is not None and cache.kv.stats is not None
    got = cache.kv.residual_k[0, :, torch.arange(2 * P, 2 * P + 4) % (2 * P)]
    step = (k[0, :, 2 * P : 3 * P].amax(1) - k[0, :, 2 * P : 3 * P].amin(1)) / 255
    assert bool(((got - k[0, :, 2 * P : 2 * P + 4]).abs() <= step[:, None] / 2 + 1e-6).all())
    assert not torch.equal(got, k[0, :, 2 * P : 2 * P + 4])


def test_a_crop_beyond_what_streaming_heads_hold_changes_nothing() -> None:
    cache = make("half")
    feed(cache, tokens(12 * P), [12 * P])
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="streaming heads still hold"):
        cache.crop(8 * P)
    assert_same(before, cache)
    audit(cache)


# ---- batches


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_of_a_ragged_batch_is_as_if_alone(name: str) -> None:
    """Left padding never enters the cache."""
    count, pads = 4 * P + 3, [0, P + 2, 4 * P]
    q, k, v = tokens(count + 6, batch=3)
    batch = make(name, 3)
    outs = [attend(batch, q[:, :, :count], k[:, :, :count], v[:, :, :count], pads)]
    outs += [attend(batch, *(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(count, count + 6)]
    for row, pad in enumerate(pads):
        alone = make(name)
        cuts = [count - pad, *range(count - pad + 1, count - pad + 7)]
        want = feed(alone, tuple(x[row : row + 1, :, pad:] for x in (q, k, v)), cuts)  # type: ignore[arg-type]
        got = torch.cat(outs, 1)[row : row + 1]
        assert torch.equal(got[:, pad:], want)
        assert bool((got[:, :pad] == 0).all())
    assert batch.lengths == [count + 6 - pad for pad in pads]


def test_a_chunk_of_one_pad_token() -> None:
    q, k, v = tokens(3, batch=2)
    cache = make("pages", 2)
    for t in range(3):
        out = attend(cache, *(x[:, :, t : t + 1] for x in (q, k, v)), [0, int(t < 2)])
        assert bool((out[1] == 0).all()) == (t < 2)
    assert cache.lengths == [3, 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_move_with_their_blocks(name: str) -> None:
    """Beams: a sequence may repeat, vanish and move; the blocks of the lost ones are free again."""
    q, k, v = tokens(6 * P + 8, batch=3)
    cache = make(name, 3)
    feed(cache, (q, k, v), [6 * P, 6 * P + 1])
    singles = [make(name) for _ in range(3)]
    for row, single in enumerate(singles):
        feed(single, tuple(x[row : row + 1] for x in (q, k, v)), [6 * P, 6 * P + 1])  # type: ignore[arg-type]
    cache.take_rows(torch.tensor([2, 0, 0, 2]))
    audit(cache)
    picked = [copy.deepcopy(singles[row]) for row in (2, 0, 0, 2)]
    q, k, v = tokens(P + 3, batch=4, seed=4)
    got = feed(cache, (q, k, v), list(range(1, P + 4)))
    for row, single in enumerate(picked):
        want = feed(single, tuple(x[row : row + 1] for x in (q, k, v)), list(range(1, P + 4)))  # type: ignore[arg-type]
        assert torch.equal(got[row : row + 1], want)
    audit(cache)
    with pytest.raises(ValueError, match=r"rows: expected sequences 0\.\.3"):
        cache.take_rows(torch.tensor([4]))
    cache.take_rows(torch.tensor([], dtype=torch.int64))
    assert cache._pool.allocator.used == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fork_shares_blocks_and_goes_its_own_way(name: str) -> None:
    cache = make(name)
    q, k, v = tokens(5 * P + 2)
    feed(cache, (q, k, v), [5 * P, 5 * P + 1, 5 * P + 2])
    used = cache._pool.allocator.used
    twin, deep = cache.fork(), copy.deepcopy(cache)
    assert cache._pool.allocator.used == used and deep._pool is not cache._pool
    audit(cache, twin)
    more = tokens(3 * P, seed=5)
    want = feed(deep, more, list(range(1, 3 * P + 1)))
    feed(cache, tokens(3 * P, seed=6), list(range(1, 3 * P + 1)))  # the other branch must not be seen
    assert torch.equal(want, feed(twin, more, list(range(1, 3 * P + 1))))
    audit(cache, twin)
    del cache
    gc.collect()
    audit(twin)


def test_a_failed_append_leaves_no_block_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make("dense")
    feed(cache, tokens(3 * P), [3 * P])
    before = copy.deepcopy(cache)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "append_kv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            feed(cache, tokens(4 * P, seed=1), [4 * P])
    assert_same(before, cache)
    audit(cache)


def test_a_failure_while_blocks_are_taken_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them have been found already."""
    cache, qkv = make("streaming", 2), tokens(40 * P, batch=2)
    feed(cache, tuple(x[:, :, : 3 * P] for x in qkv), [3 * P])  # type: ignore[arg-type]

    def failing(count: int) -> list[int]:
        cache._pool.allocator._free[: count // 2] = []
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache._pool.allocator, "allocate", failing)
        with pytest.raises(MemoryError):
            feed(cache, tuple(x[:, :, 3 * P : 6 * P] for x in qkv), [3 * P])  # type: ignore[arg-type]
    audit(cache)
    feed(cache, tuple(x[:, :, 3 * P :] for x in qkv), [27 * P, 37 * P])  # type: ignore[arg-type]
    audit(cache)


def test_a_failed_growth_leaves_the_pool_as_it_was() -> None:
    class Failing(dict[str, Tensor]):
        sets = 0

        def __setitem__(self, name: str, tensor: Tensor) -> None:
            self.sets += 1
            if self.sets == 2:
                raise MemoryError
            super().__setitem__(name, tensor)

    cache, qkv = make("dense"), tokens(20 * P)
    feed(cache, tuple(x[:, :, : 3 * P] for x in qkv), [3 * P])  # type: ignore[arg-type]
    cache._pool.tensors = Failing(cache._pool.tensors)
    with pytest.raises(MemoryError):
        feed(cache, tuple(x[:, :, 3 * P : 9 * P] for x in qkv), [6 * P])  # type: ignore[arg-type]
    feed(cache, tuple(x[:, :, 3 * P : 9 * P] for x in qkv), [6 * P])  # type: ignore[arg-type]
    audit(cache)


def test_layers_may_share_a_pool() -> None:
    pool = Pool(CONFIGS["pages"], torch.empty(0, D), 0)
    like, qkvs = torch.empty(1, H, 0, D), [tokens(20 * P + 3, seed=seed) for seed in range(2)]
    cuts = [12 * P, *range(12 * P + 1, 20 * P + 4)]
    layers = [LayerCache(CONFIGS["pages"], [False] * H, False, like, pool) for _ in qkvs]
    parts = [[], []]  # type: list[list[Tensor]]
    for a, b in zip([0, *cuts[:-1]], cuts, strict=True):  # in turns, so that their blocks lie among each other
        for layer, qkv, part in zip(layers, qkvs, parts, strict=True):
            part.append(attend(layer, *(x[:, :, a:b] for x in qkv)))
    for part, qkv in zip(parts, qkvs, strict=True):
        assert torch.equal(torch.cat(part, 1), feed(make("pages"), qkv, cuts))
    audit(*layers)


def test_a_deepcopy_holds_no_blocks_of_forks() -> None:
    cache = make("dense")
    feed(cache, tokens(10 * P), [10 * P])
    twin, copied = cache.fork(), copy.deepcopy(cache)
    audit(cache, twin)
    audit(copied)


@pytest.mark.parametrize("name", ["pages", "half"])
def test_a_step_that_fails_after_its_append_is_taken_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the token would be appended twice when the step is tried again."""
    plain, interrupted, qkv = make(name), make(name), tokens(9 * P)
    feed(plain, qkv, [6 * P, *range(6 * P + 1, 9 * P + 1)])
    feed(interrupted, tuple(x[:, :, : 6 * P] for x in qkv), [6 * P])  # type: ignore[arg-type]
    for t in range(6 * P, 9 * P):
        step = tuple(x[:, :, t : t + 1] for x in qkv)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "decode", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                feed(interrupted, step, [1])  # type: ignore[arg-type]
        assert interrupted.lengths == [t]
        audit(interrupted)
        feed(interrupted, step, [1])  # type: ignore[arg-type]
    assert_same(plain, interrupted)


def test_keys_of_another_shape_are_refused() -> None:
    cache = make("dense")
    q, k, v = tokens(4)
    with pytest.raises(ValueError, match=r"k: expected \[4, 2, 16\], as the cache holds"):
        attend(cache, q, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match=r"new: expected the tokens of 1 sequences, got \[4, 4\]"):
        cache.attend(q, k, v, [4, 4], 1.0)
    other = Step(make("dense").sequences, [4])
    with pytest.raises(ValueError, match="new: expected a step that begins with this layer's sequences"):
        cache.attend(q, k, v, other, 1.0)


# ---- reusable selections


def count_selections(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    chosen: list[Tensor] = []
    select = ops.select_pages

    def spy(*args: Any) -> tuple[Tensor, Tensor]:
        pages, local_start = select(*args)
        chosen.append(pages)
        return pages, local_start

    monkeypatch.setattr(ops, "select_pages", spy)
    return chosen


def test_a_selection_serves_four_steps_and_misses_nothing_at_a_page_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers' defect 1: with a reused list, the page that has left the window since is still attended."""
    chosen = count_selections(monkeypatch)
    cache, seen = make("pages"), []
    decode = ops.decode

    def spy(q: Tensor, mask: Mask, kv: Any, seq_lens: Tensor, **kw: Any) -> Any:
        n = int(seq_lens[0])
        assert mask.lists is not None and mask.local_start is not None
        for h in range(H):
            positions = reference.attended(
                n - 1, int(mask.windows[h]), P, int(kv.sealed[0]), sink=mask.sink, picks=mask.lists[0, h].tolist(),
                start=int(mask.local_start[0]), unit=mask.unit,
            )  # fmt: skip
            assert len(set(positions)) == len(positions), "a token attended twice"
            newest = set(range(max(0, (n - 1) // P - 1) * P, n))  # local: two pages
            assert newest <= set(positions) and set(range(P)) <= set(positions)
            seen.append(len(positions))
        return decode(q, mask, kv, seq_lens, **kw)

    monkeypatch.setattr(ops, "decode", spy)
    qkv = tokens(20 * P)
    feed(cache, qkv, [12 * P, *range(12 * P + 1, 20 * P + 1)])
    assert len(chosen) == 8 * P / 4
    assert max(seen) <= 6 * P + 2 * P  # the budget, and what the residual buffer adds


def test_lists_are_dropped_by_prefill_and_kept_per_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers' defect 7: a second request must not meet the first one's pages."""
    chosen = count_selections(monkeypatch)
    first, second = make("pages"), make("pages")
    for seed, cache in enumerate((first, second)):
        feed(cache, tokens(12 * P + 1, seed=seed), [12 * P, 12 * P + 1])
    assert len(chosen) == 2 and not torch.equal(chosen[0], chosen[1])
    feed(first, tokens(3, seed=3), [2, 3])  # a turn of two tokens, then decode
    assert len(chosen) == 3


def test_streaming_blocks_are_addressed_by_page_not_by_ring() -> None:
    """Peers' defect 5: after the window has moved far, the heads still read the pages that they mean."""
    cache, (q, k, v) = make("streaming"), tokens(30 * P + 3)
    got = feed(cache, (q, k, v), [30 * P, *range(30 * P + 1, 30 * P + 4)])[:, -1]
    keep = torch.cat([torch.arange(P), torch.arange(29 * P, 30 * P + 3)])
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k[:, :, keep], v[:, :, keep], enable_gqa=True)
    torch.testing.assert_close(got[:, None], want.transpose(1, 2), atol=2e-6, rtol=2e-5)


def test_alisa_keeps_one_set_of_tokens_a_layer() -> None:
    cache = make("alisa")
    feed(cache, tokens(20 * P + 1), [20 * P, 20 * P + 1])
    lists, local_start = cache._state.selection.lists, cache._state.selection.local_start
    assert lists is not None and local_start is not None
    assert torch.equal(lists[:, 0], lists[:, 1])
    k = round((20 * P + 1) * 0.2 / 2)
    picked = lists[0, 0][lists[0, 0] >= 0]
    assert len(picked) == k and int(picked.max()) < int(local_start[0])
    attended, held = cache.attended()
    assert held == H * (20 * P + 1) and attended < held / 4


@pytest.mark.parametrize("n", range(1, 60))
def test_a_share_of_the_tokens_is_rounded_half_to_even(n: int) -> None:
    """alisa's 20%, half of it local: n/10 picked."""
    scorer = SparseConfig.alisa().make_scorer()
    assert isinstance(scorer, Mass)
    picks = int(scorer._counts(torch.tensor([n], dtype=torch.int32)))
    assert picks == round(n / 10) or (n % 10 == 5 and abs(picks - n / 10) == 0.5)  # a half is no float32


@pytest.mark.parametrize("queries", [1, 2, 63, 64, 65])
def test_decayed_mass_forgets_with_every_query(queries: int) -> None:
    """1 - 1/k a query, k tokens being picked; as many as a prefill observes take the place of all before."""
    scorer = SparseConfig.alisa(kv_sparsity=None, budget_tokens=20).make_scorer()
    assert scorer is not None
    sequences = Sequences.empty(CONFIGS["alisa"].pages, 1)
    on = Step(sequences, [100]).on(torch.device("cpu"))
    before, mass = torch.rand(1, 1, 4), torch.rand(1, H, 6)
    got = scorer.observe(Selection(mass=before), mass, on, queries).mass
    kept = 0.0 if queries >= PREFILL_QUERIES else 0.9**queries
    want = mass.sum(1, keepdim=True) + torch.nn.functional.pad(before, (0, 2)) * kept
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no Linux")
@pytest.mark.parametrize("count", [0, 3, 1000, 5000])
def test_large_pools_ask_for_huge_pages(count: int) -> None:
    """All of their whole stretches of 2 MiB."""
    blocks, huge = empty_blocks(torch.empty(0, 64, 16), count), 2**21
    assert blocks.shape == (count, 64, 16) and blocks.dtype == torch.float32 and blocks.is_contiguous()
    start, end = -(-blocks.data_ptr() // huge) * huge, (blocks.data_ptr() + blocks.nbytes) // huge * huge
    advised, first, last = 0, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):  # of a mapping
            first, last = (int(x, 16) for x in head.split("-"))
        elif head == "VmFlags:" and "hg" in rest:
            advised += max(min(last, end) - max(first, start), 0)
    assert advised == max(end - start, 0)


def test_a_pool_knows_what_its_tables_name() -> None:
    pool, none, two = Pool(CONFIGS["dense"], torch.empty(0, D), 2), np.full(2, -1), np.ones(2, bool)
    a = pool.table(none, two)
    b = pool.table(np.array([a.ids[0], -1, -1, -1]), np.array([False, True, True, True]))
    assert len({*a.ids.tolist(), *b.ids.tolist()}) == 5 and pool.allocator.used == 5 and pool.allocator.peak == 5
    first = int(a.ids[0])
    del a
    assert pool.allocator.used == 4  # b names the first one, too
    del b
    assert pool.allocator.used == 0 and pool.allocator.peak == 5
    c = pool.table(np.full(pool.allocator.capacity, -1), np.ones(pool.allocator.capacity, bool))
    assert first in c.ids and pool.allocator.used == pool.allocator.capacity
