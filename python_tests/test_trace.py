"""What a run is recorded to want says, to the page, what the same run fetches with any number of slots."""

from __future__ import annotations

import _tiny
import pytest
import torch
from test_cache import CONFIGS, P
from test_placement import model_cache, slot_bytes

from lserve_ext import SparseConfig
from lserve_ext.hf import SparseCache
from lserve_ext.trace import Moved, Trace, moved_bytes

PARTS = (70, 30, *[1] * 60)  # of tokens
LAYERS, BATCH = 4, 2


def run(cache: SparseCache, trace: Trace | None = None, layers: int = LAYERS) -> list[Moved]:
    """Of each forward pass."""
    model = _tiny.llama(layers=layers, attn_implementation="lserve")
    ids = torch.randint(0, 258, (BATCH, sum(PARTS)), generator=torch.Generator().manual_seed(0))
    found = []
    with torch.no_grad():
        for part in ids.split(PARTS, 1):
            before = cache.traffic()
            if trace is None:
                model(part, use_cache=True, **_tiny.cached(cache))
            else:
                with trace:
                    model(part, use_cache=True, **_tiny.cached(cache))
            found.append(Moved(*(cache.traffic() - before)[:2]))
    return found


@pytest.mark.parametrize("name", ["dense", "dense-int8", "streaming", "pages", "half"])
def test_replay_is_the_run(name: str) -> None:
    """In prefill and decode, with room for one head's pages, for some and for all."""
    config = model_cache(_tiny.llama(layers=LAYERS), name, None).config
    trace = Trace(LAYERS)
    run(SparseCache(_tiny.llama(layers=LAYERS).config, config), trace)
    fetched = set()
    for slots in (4, 9, 14, 40) if name == "streaming" else (20, 33, 60, 97, 160, 400):
        cache = SparseCache(_tiny.llama(layers=LAYERS).config, config.replace(device_bytes=slots * slot_bytes(name)))
        moved = trace.replay(slots)
        assert moved == run(cache)
        fetched.add(sum(m.fetched for m in moved))
        assert moved_bytes(moved[-10:], 640) == sum(m.fetched for m in moved[-10:]) * 64
    assert len(fetched) > 2


def test_reuse_and_layers_that_are_dense() -> None:
    budget = {"budget_tokens": 6 * P, "sink_tokens": P, "local_tokens": 2 * P, "page_size": P, "stats_group": 4}
    config = SparseConfig.lserve(streaming_heads=None, reuse_interval=3, dense_layers=1, **budget)
    assert config.dense_layers == 1 and config.reuse_interval == 3
    trace = Trace(LAYERS)
    run(SparseCache(_tiny.llama(layers=LAYERS).config, config), trace)
    assert {w.is_same for w in trace.wants if w.is_step} == {False, True}
    for slots in (24, 50, 90):
        limited = config.replace(device_bytes=slots * slot_bytes("pages"))
        assert trace.replay(slots) == run(SparseCache(_tiny.llama(layers=LAYERS).config, limited))


def test_a_layer_alone_keeps_what_its_first_heads_want() -> None:
    model = _tiny.llama(layers=1)
    trace = Trace(1)
    run(SparseCache(model.config, CONFIGS["dense"]), trace, 1)
    for slots in (20, 33, 60):  # rounds of heads
        cache = SparseCache(model.config, CONFIGS["dense"].replace(device_bytes=slots * slot_bytes("dense")))
        moved = trace.replay(slots)
        assert moved == run(cache, layers=1) and moved[-1].fetched < moved[-1].wanted


def test_what_cannot_be_replayed() -> None:
    trace = Trace(LAYERS)
    with pytest.raises(ValueError, match=r"^unit: expected lists of pages, 8 tokens each, got 1"):
        run(SparseCache(_tiny.llama(layers=LAYERS).config, CONFIGS["alisa"]), trace)
    trace = Trace(LAYERS)
    run(SparseCache(_tiny.llama(layers=LAYERS).config, CONFIGS["dense"]), trace)
    with pytest.raises(ValueError, match=r"^slots: expected at least the 18 pages that a head attends, got 17"):
        trace.replay(17)
