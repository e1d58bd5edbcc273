"""Where blocks lie changes nothing but the time: with a limit on the device, results are the same to the bit."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import CONFIGS, SMALL, D, G, H, P, attend, audit, feed, tokens
from test_cache import streams as streams_of

from lserve_ext import LayerCache, SparseConfig, ops, placement
from lserve_ext.blocks import Pool
from lserve_ext.hf import SparseCache
from lserve_ext.placement import Slots, TieredPool
from lserve_ext.resident import Resident
from lserve_ext.tiers import ALIGNMENT

NAMES = ["dense", "dense-int8", "streaming", "pages", "moments", "half", "h2o", "alisa"]


def make(name: str, batch: int, slots: int | None, frames: int | None = None, disk: Any = None) -> LayerCache:
    """A layer with room for so many pages on the device and in host memory; None: for all."""
    config, like = CONFIGS[name], torch.empty(batch, H, 1, D)
    if slots is not None:
        config = config.replace(device_bytes=slots * slot_bytes(name))
    if frames is not None:
        config = config.replace(host_bytes=frames * slot_bytes(name), disk_dir=disk)
    return LayerCache(config, streams_of(name), False, like)


def slot_bytes(name: str) -> int:
    return placement.slot_bytes(Pool(CONFIGS[name], torch.empty(1, H, 1, D), 0))


@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_placement_changes_nothing(data: st.DataObject) -> None:
    """Any preset, batch, prompt, number of slots that a head fits in, and number of frames, with a tier below them:
    prefill in chunks, then decode."""
    name, batch = data.draw(st.sampled_from(NAMES)), data.draw(st.integers(1, 3))
    prompt, steps = data.draw(st.integers(1, 12 * P)), data.draw(st.integers(1, 3 * P))
    pages = (prompt + steps) // P + 1
    slots = data.draw(st.integers(pages, batch * H * pages))
    cuts = sorted(data.draw(st.sets(st.integers(1, prompt), max_size=3)) | {prompt})
    qkv = tokens(prompt + steps, batch, data.draw(st.integers(0, 3)))
    cuts += range(prompt + 1, prompt + steps + 1)
    frames = data.draw(st.one_of(st.none(), st.integers(1, batch * H * pages)))
    limited = make(name, batch, slots, frames, "memory://placement")
    assert torch.equal(feed(make(name, batch, None), qkv, cuts), feed(limited, qkv, cuts))
    memory = limited.pool.tiers()
    blocks = int((limited.kv.block_table >= 0).sum())
    assert memory["device"].used <= memory["device"].reserved
    if frames is None:
        assert memory["host"].used == blocks * slot_bytes(name)
    else:
        assert memory["host"].peak <= memory["host"].reserved == frames * slot_bytes(name)
        assert memory["host"].used // slot_bytes(name) + memory["disk"].used // ALIGNMENT >= blocks


@pytest.mark.parametrize("frames", [None, 9])
@pytest.mark.parametrize("name", NAMES)
def test_batch_operations_and_forks(name: str, frames: int | None, tmp_path: Path) -> None:
    """Beams, crops, forks, copies and several turns, a cache with tiers beside one without."""
    compare_programs(name, frames, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_home_in_another_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: pages are made on the device and handed over to slabs, which grow."""
    monkeypatch.setattr(placement, "is_far", lambda like: True)
    compare_programs(name, None, tmp_path)
    cache = make(name, 2, 40)
    feed(cache, tokens(150, 2), [100, 150])
    memory = cache.pool.tiers()["host"]
    assert cache.pool.slabs is not None and memory.used == int((cache.kv.block_table >= 0).sum()) * slot_bytes(name)
    assert memory.used <= memory.reserved <= 3 * memory.used


def compare_programs(name: str, frames: int | None, tmp_path: Path) -> None:
    caches = [make(name, 2, None), make(name, 2, 17, frames, tmp_path)]
    qkv = tokens(200, 2)

    def both(from_: int, to: int, rows: int = 2) -> None:
        parts = [x[:rows, :, from_:to] for x in qkv]
        found = [attend(cache, *parts) for cache in caches]
        assert torch.equal(*found)

    both(0, 60)
    for i in range(60, 75):
        both(i, i + 1)
    forks = [cache.fork() for cache in caches]
    for i, rows in enumerate(([1, 0], [0, 0], [1, 1], [0, 1])):
        for cache in caches:
            cache.take_rows(torch.tensor(rows))
        both(75 + i, 76 + i)
    for cache in caches:
        cache.crop(3)
    both(76, 96)
    originals, caches[:] = list(caches), forks  # which go on from where they were
    for i in range(75, 90):
        both(i, i + 1)
    caches[:] = [copy.deepcopy(cache) for cache in originals]
    both(96, 97)
    caches[:] = originals
    both(96, 97)
    for cache in caches:
        cache.take_rows(torch.tensor([1]))
    for i in range(97, 130):
        both(i, i + 1, rows=1)


@pytest.mark.parametrize("name", ["dense", "dense-int8", "pages", "h2o", "alisa"])
@pytest.mark.parametrize("frames", [None, 9])
def test_blocks_that_get_other_contents(name: str, frames: int | None, tmp_path: Path) -> None:
    """After a deep crop new pages lie in the blocks of old ones, whose copies are still in slots and on the disk."""
    caches = [make(name, 1, None), make(name, 1, 40, frames, tmp_path)]
    qkv, others = tokens(150), tokens(150, seed=1)
    for cache in caches:
        feed(cache, qkv, [100, *range(101, 150), 150])
        cache.crop(80)
    found = [feed(cache, tuple(x[:, :, 70:] for x in others), [20, *range(21, 81)]) for cache in caches]  # type: ignore[arg-type]
    assert torch.equal(*found)


def test_a_list_that_is_reused_moves_nothing() -> None:
    config = SparseConfig.lserve(streaming_heads=None, budget_tokens=6 * P, **SMALL)
    limit = 2 * H * 6 * slot_bytes("pages")  # twice the budget
    cache = LayerCache(config.replace(device_bytes=limit), [False] * H, False, torch.empty(1, H, 1, D))
    qkv = tokens(400)
    feed(cache, tuple(x[:, :, :320] for x in qkv), [320])  # type: ignore[arg-type]
    slots: Slots = cache.pool.slots
    moved = []
    for i in range(320, 400):
        before, age = int(slots.fetched), cache.age
        attend(cache, *(x[:, :, i : i + 1] for x in qkv))
        sealed = (i + 1) % P == 0
        if 0 < age < config.reuse_interval and not sealed:
            assert int(slots.fetched) == before
        moved.append(int(slots.fetched) - before)
    assert max(moved) > 0 and sum(moved) < 0.5 * int(slots.wanted)


def test_no_room_for_a_head() -> None:
    cache, qkv = make("dense", 1, 5), tokens(200)
    feed(cache, tuple(x[:, :, :48] for x in qkv), [48])  # type: ignore[arg-type]
    attend(cache, *(x[:, :, 48:88] for x in qkv))  # five sealed pages before it
    want, have = (f"{n * slot_bytes('dense'):,}" for n in (10, 5))
    with pytest.raises(ValueError, match=f"device_bytes: expected at least {want}, for the 10 pages .*, got {have}"):
        attend(cache, *(x[:, :, 88:89] for x in qkv))
    assert cache.lengths == [88]


def test_bad_limits() -> None:
    with pytest.raises(ValueError, match=r"SparseConfig.device_bytes: expected an int of at least 1, got 0"):
        SparseConfig.dense(device_bytes=0)
    with pytest.raises(TypeError, match=r"SparseConfig.device_bytes: expected an int of at least 1, got 1.5"):
        SparseConfig.dense(device_bytes=1.5)
    with pytest.raises(ValueError, match=r"SparseConfig.host_bytes: expected None beside max_tokens"):
        SparseConfig.dense(device_bytes=100, host_bytes=100, max_tokens=100)
    with pytest.raises(ValueError, match=r"device_bytes: expected at least the 1,024 bytes of one page, got 1,000"):
        LayerCache(SparseConfig.dense(device_bytes=1000, **SMALL), [False] * H, False, torch.empty(1, H, 1, D))


def test_one_limit_is_for_layers_of_one_kind() -> None:
    shared = placement.SharedPool(SparseConfig.dense(device_bytes=2**20, **SMALL), 2)
    pool = shared.pool(torch.empty(1, H, 1, D))
    assert (
        shared.pool(torch.empty(2, 1, 0, D)) is pool and copy.deepcopy(shared).pool(torch.empty(1, H, 1, D)) is not pool
    )
    with pytest.raises(ValueError, match=r"device_bytes: expected layers of \(16, .* got one of \(32, "):
        shared.pool(torch.empty(1, H, 1, 2 * D))


def test_an_interrupt_between_resolving_and_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that say more than they hold are not believed."""
    for name in ("pages", "dense", "alisa"):
        caches = [make(name, 1, None), make(name, 1, 24)]
        qkv = tokens(200)
        prompt = tuple(x[:, :, :150] for x in qkv)
        assert torch.equal(*(feed(cache, prompt, [150]) for cache in caches))  # type: ignore[arg-type]

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ops, "gather_pages", interrupt)
            with pytest.raises(KeyboardInterrupt):
                attend(caches[1], *(x[:, :, 150:151] for x in qkv))
        for i in range(150, 160):
            assert torch.equal(*(attend(cache, *(x[:, :, i : i + 1] for x in qkv)) for cache in caches))


def model_cache(model: Any, name: str, share: float | None, frames: int | None = None) -> SparseCache:
    pattern = {"streaming_heads": 1.0} if name == "streaming" else {}
    if name == "half":
        pattern = {"streaming_heads": None}
    config = CONFIGS[name].replace(**pattern)
    if share is not None:
        whole = 2 * 2 * (160 // P) * slot_bytes(name)  # 2 layers, 2 heads
        config = config.replace(device_bytes=int(share * whole))
    if frames is not None:
        config = config.replace(host_bytes=frames * slot_bytes(name), disk_dir="memory://model")
    return SparseCache(model.config, config)


@pytest.mark.parametrize("share, frames", [(0.3, None), (1.0, None), (0.3, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_a_model(name: str, share: float, frames: int | None, tmp_path: Any) -> None:
    """Logits of a model with a limit, in several turns, with crops, beams, a fork, a copy and a file between them."""
    model = _tiny.llama(attn_implementation="lserve")
    ids = torch.randint(0, 258, (2, 160), generator=torch.Generator().manual_seed(0))
    caches = [model_cache(model, name, None), model_cache(model, name, share, frames)]

    def both(from_: int, to: int) -> None:
        with torch.no_grad():
            found = [model(ids[:, from_:to], use_cache=True, **_tiny.cached(cache)).logits for cache in caches]
        assert torch.equal(*found)

    both(0, 70)
    for i in range(70, 90):
        both(i, i + 1)
    for cache in caches:
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 1]))
    both(85, 100)
    forks = [cache.fork() for cache in caches]
    for i in range(100, 110):
        both(i, i + 1)
    originals, caches = caches, forks
    both(100, 101)
    caches = [copy.deepcopy(cache) for cache in originals]
    both(110, 111)
    memory = caches[1].memory()
    assert set(memory) == {"device", "host"} | ({"disk"} if frames else set()) and memory["host"].used > 0
    limit = caches[1].config.device_bytes
    residual = sum(layer.kv.residual_bytes for layer in caches[1].ours if layer.kv is not None)
    pool = next(layer.kv.pool for layer in caches[1].ours if layer.kv is not None)
    stats = pool.allocator.capacity * (pool.block_bytes - slot_bytes(name))
    assert limit is not None and memory["device"].reserved <= limit + residual + stats
    for i, cache in enumerate(originals):
        cache.save(tmp_path / f"{i}.safetensors")
    caches = [SparseCache.load(tmp_path / f"{i}.safetensors", model.config) for i in range(2)]
    both(110, 111)
    caches = originals
    both(110, 125)


def test_a_step_that_wants_more_than_there_is_finds_some_of_it() -> None:
    """Layers take turns, so slots used longest ago are those that come next: each layer keeps a share."""
    model = _tiny.llama(layers=4, attn_implementation="lserve")
    cache = model_cache(model, "pages", 0.25)
    ids = torch.randint(0, 258, (1, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :100], use_cache=True, **_tiny.cached(cache))
        before = cache.traffic()
        for i in range(100, 160):
            model(ids[:, i : i + 1], use_cache=True, **_tiny.cached(cache))
    wanted, fetched, *_ = cache.traffic() - before
    pool = next(layer.kv.pool for layer in cache.ours if layer.kv is not None)
    assert pool.slots.count < wanted / 60 and fetched < 0.7 * wanted


@pytest.mark.parametrize("name", ["dense", "dense-int8"])
def test_the_next_layer_is_brought_beside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: while a layer computes, what the next one wanted is copied. That one finds all of it, and mostly
    does not look."""
    monkeypatch.setattr(placement, "is_far", lambda like: True)
    model = _tiny.llama(layers=4, attn_implementation="lserve")
    ids = torch.randint(0, 258, (1, 160), generator=torch.Generator().manual_seed(0))
    unlimited, cache = model_cache(model, name, None), model_cache(model, name, 0.6)
    missed, looked = list[int](), list[int]()  # of each fetch
    fetch, resolve, resolved = placement.Slots.fetch, placement.Slots._resolve, [0]

    def spy(self: placement.Slots, *args: Any) -> None:
        before = self.fetched, resolved[0]
        fetch(self, *args)
        missed.append(self.fetched - before[0])
        looked.append(resolved[0] - before[1])

    def count(self: placement.Slots, *args: Any) -> Any:
        resolved[0] += 1
        return resolve(self, *args)

    monkeypatch.setattr(placement.Slots, "fetch", spy)
    monkeypatch.setattr(placement.Slots, "_resolve", count)
    with torch.no_grad():
        for i in range(100, 160):
            part = ids[:, :100] if i == 100 else ids[:, i : i + 1]
            found = [model(part, use_cache=True, **_tiny.cached(c)).logits for c in (unlimited, cache)]
            assert torch.equal(*found)
    fetched = cache.traffic().fetched
    assert fetched > 60 and sum(missed[-160:]) < 0.2 * fetched and sum(looked[-160:]) < 60


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_in_and_out_of_inference_mode(name: str, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "is_far", lambda like: far)
    model = _tiny.llama(attn_implementation="lserve")
    ids = torch.randint(0, 258, (1, 100), generator=torch.Generator().manual_seed(0))
    found = []
    for share in (None, 0.5):
        cache, logits = model_cache(model, name, share), []
        for i in range(60, 100):
            with torch.inference_mode(i % 20 < 10), torch.no_grad():
                part = ids[:, :60] if i == 60 else ids[:, i : i + 1]
                logits.append(model(part, use_cache=True, **_tiny.cached(cache)).logits[:, -1].clone())
        found.append(torch.stack(logits))
    assert torch.equal(*found)


@pytest.mark.parametrize("frames", [None, 8])
@pytest.mark.parametrize("name", ["pages", "alisa", "dense"])
def test_beams(name: str, frames: int | None) -> None:
    model = _tiny.llama(attn_implementation="lserve")
    ids = torch.randint(3, 258, (1, 90), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False}
    caches = model_cache(model, name, None), model_cache(model, name, 0.7, frames)
    assert torch.equal(*(model.generate(ids, **_tiny.cached(cache), **options) for cache in caches))


def test_resident_alone() -> None:
    """The functions over pages that come in rounds, against the ops over all of them."""
    cache = make("dense", 2, None)  # the last four queries stand in two pages
    qkv = tokens(122, 2)
    feed(cache, qkv, [122])
    config = CONFIGS["dense"].replace(device_bytes=15 * slot_bytes("dense"))
    kv, n = cache.kv, torch.tensor([122, 122], dtype=torch.int32)
    pool = TieredPool(config, torch.empty(1, H, 1, D), cache.pool.allocator.capacity)
    pool.tensors = cache.pool.tensors
    resident = Resident(pool)
    resident.slot_table = torch.full_like(kv.block_table, -1)
    mask = ops.Mask(torch.tensor([ops.DENSE, 3], dtype=torch.int32), sink=1)
    q = qkv[0][:, :, -4:].transpose(1, 2).contiguous()
    found, want = (a.decode(q[:, -1], mask, kv, n) for a in (resident, ops))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    lse = torch.randn(2, 4, H * G)
    assert torch.equal(*(a.attention_mass(q, lse, mask, kv, n) for a in (resident, ops)))


@pytest.mark.slow
@pytest.mark.parametrize("frames", [None, 20])
@pytest.mark.parametrize("name", ["dense-int8", "pages", "h2o"])
def test_a_soak(name: str, frames: int | None, tmp_path: Path) -> None:
    """Ten thousand steps with crops, forks and batch operations: memory stays what it was, and no block is lost."""
    cache, rng = make(name, 2, 60, frames, tmp_path), torch.Generator().manual_seed(0)
    qkv, held = tokens(1000, 2), []
    feed(cache, tuple(x[:, :, :100] for x in qkv), [100])  # type: ignore[arg-type]
    most = 3 * 2 * H * (200 // P + 1)  # blocks of the cache and two forks
    for step in range(10_000):
        i = int(torch.randint(0, 1000, (1,), generator=rng))
        attend(cache, *(x[:, :, i : i + 1] for x in qkv))
        if step % 97 == 96:
            cache.crop(97)
        if step % 101 == 0:
            held = [*held[-1:], cache.fork()]
        if step % 211 == 0:
            cache.take_rows(torch.randint(0, 2, (2,), generator=rng))
        if step % 1000 == 999:
            gc.collect()
            audit(cache, *held)
            assert cache.pool.allocator.capacity <= 1.5 * most
            tiers = cache.pool.tiers()
            assert tiers["device"].used <= tiers["device"].reserved
            if frames is not None:
                assert tiers["host"].used <= tiers["host"].reserved == frames * slot_bytes(name)
                assert tiers["disk"].used <= 1.5 * most * ALIGNMENT
    assert cache.lengths == [100 + 10_000 - 10_000 // 97 * 97] * 2
