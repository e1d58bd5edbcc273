"""Pages that come back from the layers' inputs: the same keys and values but for rounding."""

from __future__ import annotations

import contextlib
import copy
import gc
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from test_cache import CONFIGS, P
from test_cache_faults import Interrupt, interrupted_at
from test_placement import slot_bytes

from lserve_ext import SparseConfig
from lserve_ext.hf import SparseCache
from lserve_ext.placement import Traffic
from lserve_ext.tiers import DiskTier

MODELS = ["llama", "qwen3", "opt", "gpt_neox"]


def make(kind: str) -> Any:
    """A tiny model with as many kv heads as query heads."""
    if kind == "llama":
        return _tiny.llama(kv_heads=4, attn_implementation="lserve")
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 258,
                              "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": None}  # fmt: skip
    fields |= {
        "qwen3": {"num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 96},  # with norms of keys
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 0},  # with biases, without rotary embedding
        "gpt_neox": {"intermediate_size": 96},  # with rotary embedding of a part of the channels
    }[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation="lserve").train(False)


def caches(model: Any, name: str, disk: Any, slots: int = 120, frames: int = 16) -> list[SparseCache]:
    """One that holds everything on the device, and one whose pages are recomputed."""
    config = CONFIGS[name].replace(streaming_heads=None)
    limits = {"device_bytes": slots * slot_bytes(name), "host_bytes": frames * slot_bytes(name), "disk_dir": disk}
    return [
        SparseCache(model.config, config),
        SparseCache(model.config, config.replace(recompute=True, **limits), model),
    ]


IDS = torch.randint(0, 258, (2, 200), generator=torch.Generator().manual_seed(0))


def forward(model: Any, cache: SparseCache, from_: int, to: int, rows: int = 2, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS[:rows, from_:to], use_cache=True, **_tiny.cached(cache), **more).logits
    return logits


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Of float32 arithmetic in another order."""
    torch.testing.assert_close(a, b, atol=tolerance * float(a.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_logits(kind: str, tmp_path: Path) -> None:
    """In prefill in chunks and in decode; and what is on the disk is the inputs. (Dense, because rounding may pick
    another token where two are nearly tied.)"""
    model = make(kind)
    plain, tiered = caches(model, "dense", tmp_path)
    for from_, to in ((0, 70), (70, 150), *((i, i + 1) for i in range(150, 180))):
        close(forward(model, plain, from_, to), forward(model, tiered, from_, to))
    moved = tiered.traffic()
    assert moved.recomputed > 100 and moved.loaded == 0
    assert moved.written == 2 * 2 * (180 // P - 1)  # one record a page, of all heads
    assert tiered.phase == 3


def test_the_very_keys_and_values(tmp_path: Path) -> None:
    """What is recomputed against what was stored, page by page; INT8 codes differ by at most one, and rarely."""
    for name in ("dense", "dense-int8"):
        model = make("llama")
        config = CONFIGS[name]
        limits = {"device_bytes": 1 << 20, "host_bytes": 4 * slot_bytes(name), "disk_dir": tmp_path}
        plain = SparseCache(model.config, config)
        tiered = SparseCache(model.config, config.replace(recompute=True, **limits), model)
        for cache in (plain, tiered):
            forward(model, cache, 0, 100)
        for ours, theirs in zip(plain.ours, tiered.ours, strict=True):
            assert ours.kv is not None and theirs.kv is not None
            want, found = ours.kv.state(), theirs.kv.state()
            before = tiered.traffic().recomputed
            assert before > 0
            for part in ("pool.k", "pool.v"):
                if name == "dense":
                    close(want[part], found[part], 1e-5)
                else:
                    off = (want[part].int() - found[part].int()).abs()
                    assert off.max() <= 1 and off.float().mean() < 1e-2
            if name == "dense-int8":
                assert torch.equal(want["pool.stats"], found["pool.stats"])  # which never left the device


def test_beams_crops_forks_copies_and_files(tmp_path: Path) -> None:
    model = make("llama")
    both = caches(model, "dense", tmp_path / "kv")

    def compare(from_: int, to: int) -> None:
        close(*(forward(model, cache, from_, to) for cache in both))

    compare(0, 90)
    for cache in both:
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.crop(-5)
    compare(85, 120)
    for cache in both:
        cache.crop(-40)  # into pages whose inputs are on the disk
    compare(80, 130)
    originals, both = both, [cache.fork() for cache in both]
    for i in range(130, 150):
        compare(i, i + 1)
    both = originals
    compare(130, 160)
    both = [copy.deepcopy(cache) for cache in originals]
    compare(160, 190)
    for i, cache in enumerate(originals):
        cache.save(tmp_path / f"{i}.safetensors")
    both = [SparseCache.load(tmp_path / f"{i}.safetensors", model.config) for i in range(2)]
    compare(160, 180)
    assert not list((tmp_path / "kv").iterdir())


@pytest.mark.parametrize("name", ["h2o", "alisa"])
def test_presets_that_select(name: str, tmp_path: Path) -> None:
    """They run, recompute, and attend as many tokens."""
    model = make("llama")
    both = caches(model, name, tmp_path)
    for from_, to in ((0, 150), *((i, i + 1) for i in range(150, 170))):
        assert forward(model, both[1], from_, to).isfinite().all()
        forward(model, both[0], from_, to)
    assert both[1].traffic().recomputed > 50 and both[0].attended() == both[1].attended()


def test_a_padded_batch(tmp_path: Path) -> None:
    model = make("llama")
    both = caches(model, "dense", tmp_path)
    mask = torch.ones(2, 160, dtype=torch.int64)
    mask[0, :30] = 0
    close(*(forward(model, cache, 0, 150, attention_mask=mask[:, :150])[1] for cache in both))
    for i in range(150, 160):
        close(*(forward(model, cache, i, i + 1, attention_mask=mask[:, : i + 1]) for cache in both))
    assert both[1].traffic().recomputed > 0


def test_modules_are_watched_as_long_as_there_is_a_cache(tmp_path: Path) -> None:
    model = make("llama")
    hooks = lambda: sum(len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    cache = caches(model, "dense", tmp_path)[1]
    assert hooks() == before + 2
    forward(model, cache, 0, 60)
    fork = cache.fork()
    del cache
    gc.collect()
    assert hooks() == before + 2
    forward(model, fork, 60, 100)
    del fork
    gc.collect()
    assert hooks() == before


def test_without_recomputation_nothing_is_watched(tmp_path: Path) -> None:
    model = make("llama")
    plain, tiered = caches(model, "dense", tmp_path)
    forward(model, plain, 0, 60)
    assert plain._given == {} and plain.traffic() == Traffic()
    forward(model, tiered, 0, 60)
    assert tiered._given == {}


def test_what_cannot_pay_is_refused(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"device_bytes": 1 << 20, "host_bytes": 1 << 16, "disk_dir": tmp_path, "recompute": True}
    gqa = _tiny.llama(kv_heads=2, attn_implementation="lserve")
    with pytest.raises(
        ValueError, match=r"recompute: expected layers whose input is smaller .* 128 bytes .* against 128"
    ):
        SparseCache(gqa.config, SparseConfig.dense(**limits), gqa)
    model = make("llama")
    with pytest.raises(ValueError, match="model: expected a model, whose inputs to keep, got NoneType"):
        SparseCache(model.config, SparseConfig.dense(**limits))
    with pytest.raises(ValueError, match=r"model: expected None without config.recompute, got LlamaForCausalLM"):
        SparseCache(model.config, SparseConfig.dense(), model)
    with pytest.raises(ValueError, match=r"SparseConfig.recompute: expected False without disk_dir, got True"):
        SparseConfig.dense(recompute=True)
    with pytest.raises(TypeError, match=r"SparseConfig.recompute: expected True or False, got 1"):
        SparseConfig.dense(recompute=1, device_bytes=1, host_bytes=1, disk_dir="x")
    with pytest.raises(ValueError, match=r"recompute: expected an attention module with layer_idx 0 "):
        SparseCache(model.config, SparseConfig.dense(**limits), torch.nn.Linear(1, 1))


@pytest.mark.parametrize("failure", ["_read", "_write"])
def test_a_model_goes_on_after_a_failure(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that fails has not happened; inputs that were not written are KV again, which still lies in a frame."""
    model = make("llama")
    plain, tiered = caches(model, "dense", tmp_path)
    close(*(forward(model, cache, 0, 120) for cache in (plain, tiered)))

    def broken(*args: Any) -> Any:
        raise OSError("broken")

    failures = 0
    for i in range(120, 160):
        found = None
        with monkeypatch.context() as patch:
            patch.setattr(DiskTier, failure, broken)
            try:
                found = forward(model, tiered, i, i + 1)
            except OSError:
                failures += 1
        while found is None:
            with contextlib.suppress(OSError):  # of a write that had begun before
                found = forward(model, tiered, i, i + 1)
        close(forward(model, plain, i, i + 1), found)
    assert failures


def test_an_interrupt_at_any_line(tmp_path: Path) -> None:
    """Of a step that seals pages and writes their inputs: it has happened or not, and what follows is right."""
    model = make("llama")
    plain, tiered = caches(model, "dense", tmp_path)
    first = 15 * P - 1  # the next step seals
    for cache in (plain, tiered):
        forward(model, cache, 0, first)
    count, done = 0, False
    while not done:
        count += 5
        cache, same = tiered.fork(), plain.fork()
        try:
            with interrupted_at(count) as reached:
                forward(model, cache, first, first + 1)
                done = reached() < count  # else it came where a __del__ was called, which nothing gets out of
        except Interrupt:
            pass
        held = cache.get_seq_length()
        assert held in (first, first + 1)
        if held > first:
            forward(model, same, first, held)
        for i in range(held, held + 2):
            close(forward(model, same, i, i + 1), forward(model, cache, i, i + 1))
        del cache, same
    assert count > 200 and tiered.traffic().recomputed > 100


def test_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    model = make("llama")
    both = caches(model, "dense", tmp_path)
    for from_, to in ((0, 60), (60, 120), *((i, i + 1) for i in range(120, 150))):
        with torch.inference_mode(to % 20 < 10):
            close(*(forward(model, cache, from_, to).clone() for cache in both))
    assert both[1].traffic().recomputed > 0
