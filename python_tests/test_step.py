"""A decode step of a model needs no host: what it copies to the device and reads back is counted. In reserved memory it
is one graph."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _tiny import cached
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lserve_ext
from lserve_ext import HeadPattern, SparseCache, SparseConfig, placement
from lserve_ext.blocks import Pool
from lserve_ext.hf import interface
from lserve_ext.reserved import ReservedResident

PACKAGE = str(Path(lserve_ext.__file__).parent)
P, LAYERS = 8, 4
SMALL: dict[str, Any] = {"page_size": P, "stats_group": 4, "sink_tokens": P, "local_tokens": 2 * P}
PRESETS = {
    "dense": SparseConfig.dense(page_size=P, stats_group=4),
    "int8": SparseConfig.dense(page_size=P, kv_dtype="int8", stats_group=4),
    "streaming": SparseConfig.streaming(**SMALL),
    "lserve": SparseConfig.lserve(budget_tokens=6 * P, streaming_heads=HeadPattern([[0.0, 1.0]] * LAYERS), **SMALL),
    "quest": SparseConfig.quest(budget_tokens=6 * 16),
    "moments": SparseConfig.moments(budget_tokens=6 * P, **SMALL),
    "h2o": SparseConfig.h2o(page_size=P, stats_group=4, budget_tokens=2 * P),
    "alisa": SparseConfig.alisa(page_size=P, stats_group=4, kv_sparsity=0.5),
}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train(False)
    model.set_attn_implementation("lserve")
    return model


class Traffic(TorchDispatchMode):
    """Counts what the package moves between host and device, as it would be if the tensors lay on a GPU: tensors made
    of host values, and values of tensors that Python sees."""

    TO_DEVICE = ("from_numpy", "tensor", "as_tensor")
    TO_HOST = ("numpy", "cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__len__")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for name in self.TO_DEVICE:
            patch.setattr(torch, name, self._counted(name, getattr(torch, name)))
        for name in self.TO_HOST:
            if name != "__len__":  # a shape, which the host knows
                patch.setattr(Tensor, name, self._counted(name, getattr(Tensor, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
                self.counts[name] += 1
            return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero"):
            frame = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back  # type: ignore[assignment]
            if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PRESETS)
def test_between_page_borders_nothing_moves(name: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of a padded batch, whose borders lie apart."""
    monkeypatch.setattr(interface, "_is_slow_to_read", lambda _: True)
    cache, prompt = SparseCache(llama.config, PRESETS[name]), torch.randint(3, 96, (2, 6 * P + 4))
    mask = torch.ones_like(prompt)
    mask[1, : P + 3] = 0
    borders, moved = [], []
    with torch.no_grad():
        x = llama(prompt, attention_mask=mask, **cached(cache)).logits[:, -1:].argmax(-1)
        for _ in range(3 * P):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            before = cache.ours[0].kv.lengths
            with monkeypatch.context() as patch, Traffic(patch) as traffic:
                x = llama(x, attention_mask=mask, **cached(cache)).logits[:, -1:].argmax(-1)
            after = cache.ours[0].kv.lengths
            size = PRESETS[name].page_size
            borders.append(any(a // size > b // size for a, b in zip(after, before, strict=True)))
            moved.append(traffic.counts)
    first = moved.pop(0)  # a step after a prefill may leave more pages than one behind
    borders.pop(0)
    assert sum(first.values()) < 8, first
    for border, counts in zip(borders, moved, strict=True):
        assert sum(counts.values()) <= 2 * border, counts  # one table for all layers, and the check of the masks
    assert any(borders) and not all(borders)


def test_a_wrong_mask_on_a_gpu_is_noticed_at_the_next_border(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_is_slow_to_read", lambda _: True)
    cache, prompt = SparseCache(llama.config, PRESETS["lserve"]), torch.randint(3, 96, (1, 3 * P + 1))
    with torch.no_grad():
        llama(prompt, **cached(cache))
        for n in range(3 * P + 2, 4 * P):
            mask = torch.ones(1, n, dtype=torch.int64)
            mask[0, 0] = n % 4 != 0  # now and then the first token is a pad token
            llama(prompt[:, :1], attention_mask=mask, **cached(cache))
        with pytest.raises(ValueError, match="attention_mask: expected the padding of earlier calls"):
            llama(prompt[:, :1], attention_mask=torch.ones(1, 4 * P), **cached(cache))
        cache.crop(-1)
        for n in range(4 * P - 1, 5 * P):
            llama(prompt[:, :1], attention_mask=torch.ones(1, n), **cached(cache))
        with pytest.raises(ValueError, match="a column for every token"):
            llama(prompt[:, :1], attention_mask=torch.ones(1, 9), **cached(cache))


# ---- reserved memory


TOKENS = 512


def padded_prompt() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of two sequences, one of them padded."""
    ids = torch.randint(3, 96, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def decoded(model: Any, cache: SparseCache, steps: int, forward: Callable[..., Any] | None = None) -> Tensor:
    """Greedy tokens [2, steps + 1] of the prompt, by positions that the caller counts."""
    ids, mask, positions = (x.to(model.device) for x in padded_prompt())
    with torch.no_grad():
        x = model(ids, attention_mask=mask, position_ids=positions, **cached(cache)).logits[:, -1:].argmax(-1)
        return torch.cat([x, continued(model, cache, x, mask, positions[:, -1:], steps, forward)], 1)


def continued(
    model: Any, cache: SparseCache, x: Tensor, mask: Tensor, positions: Tensor, steps: int,
    forward: Callable[..., Any] | None = None,
) -> Tensor:  # fmt: skip
    found = []
    for _ in range(steps):
        positions, mask = positions + 1, torch.cat([mask, mask.new_ones(2, 1)], 1)
        options = {} if cache.is_compileable else {"attention_mask": mask}
        logits = (forward or model)(x, position_ids=positions, use_cache=True, **options, **cached(cache)).logits
        x = logits[:, -1:].argmax(-1)
        found.append(x)
    return torch.cat(found, 1)


def reserved(name: str, tiers: bool = False) -> SparseConfig:
    """With all pages on the device, or with room for little more than a step of one layer may attend of them."""
    config = PRESETS[name].replace(max_tokens=TOKENS)
    if not tiers:
        return config
    pages = {"streaming": 4, "lserve": 6}.get(name, TOKENS // config.page_size)  # of a head
    page = placement.slot_bytes(Pool(config, torch.empty(1, 2, 1, 16), 0))
    return config.replace(device_bytes=int(2 * 2 * pages * 1.2) * page)


PLACES = pytest.mark.parametrize("place", ["device", "tiers", "far tiers"])


def where(place: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is a limit; `far`: host memory is treated as another one."""
    monkeypatch.setattr(placement, "is_far", lambda like: place == "far tiers")
    return place != "device"


@PLACES
@pytest.mark.parametrize("name", PRESETS)
def test_reserved_memory_gives_the_same_tokens(
    name: str, place: str, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = SparseCache(llama.config, PRESETS[name])
    cache = SparseCache(llama.config, reserved(name, where(place, monkeypatch)))
    assert cache.is_compileable and not growing.is_compileable
    assert torch.equal(decoded(llama, growing, 120), decoded(llama, cache, 120))
    assert cache.get_seq_length() == growing.get_seq_length() == 190
    assert cache.attended() == growing.attended()
    moved = cache.traffic()
    if place != "device":
        assert moved.wanted > 120 * LAYERS and cache.memory()["host"].used > 0
        assert 0 < moved.fetched < moved.wanted and (name == "streaming" or moved.fetched > 100)


@PLACES
@pytest.mark.parametrize("name", ["lserve", "quest", "moments", "h2o", "alisa"])
def test_a_fork_under_another_budget(name: str, place: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt serves several: each goes on as if it had read the prompt itself, in reserved memory or not."""
    tiers, (ids, mask, positions) = where(place, monkeypatch), padded_prompt()
    few: dict[str, dict[str, Any]] = {"quest": {"budget_tokens": 80}, "h2o": {"budget_tokens": P}}
    fewer = (few | {"alisa": {"kv_sparsity": 0.7}}).get(name, {"budget_tokens": 5 * P})

    def read(config: SparseConfig) -> SparseCache:
        cache = SparseCache(llama.config, config)
        llama(ids, attention_mask=mask, position_ids=positions, **cached(cache))
        return cache

    for config in (PRESETS[name], reserved(name, tiers)):
        other = config.replace(**fewer, reuse_interval=2)
        with torch.no_grad():
            first = read(config)
            caches = first.fork(), read(config), first.fork(other), read(other)
            a, b, c, d = (continued(llama, x, ids[:, -1:], mask, positions[:, -1:], 60) for x in caches)
        assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)
        assert caches[2].attended()[0] < caches[0].attended()[0]
        for fields in (
            {"stats_group": 2},
            {"dense_layers": 1},
            {"kv_sparsity": None, "budget_tokens": None},
        ):
            with pytest.raises(ValueError, match="config: expected the cache's own but for budget"):
                first.fork(config.replace(**fields))


@pytest.mark.parametrize("name", ["streaming", "lserve"])
def test_a_block_that_a_streaming_head_writes_again(name: str, llama: Any) -> None:
    """A slot, which nothing else has taken, holds its old page still; with crops between."""
    config = reserved(name, True)
    assert config.device_bytes is not None
    cache = SparseCache(llama.config, config.replace(device_bytes=20 * config.device_bytes))
    growing = SparseCache(llama.config, PRESETS[name])
    assert torch.equal(decoded(llama, growing, 120), decoded(llama, cache, 120))
    for turn in range(4):
        for c in (growing, cache):
            c.crop(-3)
        mask = torch.ones(2, int(growing.get_seq_length()), dtype=torch.int64)
        mask[1, :11] = 0
        x, at = torch.full((2, 1), 7 + turn), (mask.cumsum(1) - 1)[:, -1:]
        with torch.no_grad():
            want, got = (continued(llama, c, x, mask, at, 2 * P) for c in (growing, cache))
        assert torch.equal(want, got)


def test_phases_count_pages_that_are_held(llama: Any) -> None:
    """Not those to come, for which memory is reserved."""
    config = reserved("dense", True)
    cache = SparseCache(llama.config, config)
    phases = []
    for steps in (20, 120):
        cache.reset()
        decoded(llama, cache, steps)
        phases.append(cache.phase)
        slots = cache._tiered_pools()[0].slots.count
        pages = sum(int(n) // P - 1 for n in cache.ours[0].kv.lengths) * 2 * LAYERS
        assert phases[-1] == 1 + (pages > slots)
    assert phases == [1, 2]


@pytest.mark.parametrize("name", ["h2o", "alisa"])
def test_slots_for_packed_tokens_are_given_back(name: str, llama: Any) -> None:
    """They were reserved by decode steps of before; in reserved memory all slots are for pages."""
    growing, cache = SparseCache(llama.config, PRESETS[name]), SparseCache(llama.config, reserved(name, True))
    assert torch.equal(decoded(llama, growing, 60), decoded(llama, cache, 60))
    slots = cache._tiered_pools()[0].slots
    with torch.no_grad():
        for c in (growing, cache):
            c.crop(-3)
        slots.reserve(slots.count // 2)
        for c in (growing, cache):
            c.crop(-1)
        x, at = torch.full((2, 1), 7), torch.tensor([[126], [115]])
        mask = torch.ones(2, 126, dtype=torch.int64)
        mask[1, :11] = 0
        want, got = (continued(llama, c, x, mask, at, 2 * P) for c in (growing, cache))
    assert torch.equal(want, got) and slots.reserved == 0


@pytest.mark.parametrize("name", ["dense", "lserve", "alisa"])
def test_pages_of_the_next_layer_are_brought_while_one_computes(
    name: str, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its lists are known before it is reached; each layer's pages are looked for once."""
    config = reserved(name, True)
    cache, calls = SparseCache(llama.config, config), Counter[str]()
    decoded(llama, cache, 1)
    for method in ("_bring", "bring_ahead"):
        real = getattr(ReservedResident, method)

        def counted(*args: Any, _real: Any = real, _name: str = method, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(ReservedResident, method, counted)
    x, positions = torch.ones(2, 1, dtype=torch.int64), torch.tensor([[71], [60]])
    with torch.no_grad():
        for _ in range(8):
            positions = positions + 1
            llama(x, position_ids=positions, use_cache=True, **cached(cache))
    ahead = {"dense": 8, "lserve": 6, "alisa": 0}[name]  # steps that know their lists before they begin
    assert calls == Counter({"_bring": 8 * LAYERS, "bring_ahead": ahead * (LAYERS - 1)})


@PLACES
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_in_reserved_memory_moves_nothing_at_borders_either(
    name: str, place: str, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SparseCache(llama.config, reserved(name, where(place, monkeypatch)))
    decoded(llama, cache, 1)
    x, positions = torch.ones(2, 1, dtype=torch.int64), torch.tensor([[71], [60]])
    with torch.no_grad():
        for _ in range(3 * P):
            positions = positions + 1
            with monkeypatch.context() as patch, Traffic(patch) as traffic:
                llama(x, position_ids=positions, use_cache=True, **cached(cache))
            assert not traffic.counts


def compiled(model: Any, backend: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step: Callable[..., Any] = torch.compile(model.forward, fullgraph=True, backend=backend, dynamic=False)
    return step


@PLACES
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_is_one_graph_for_each_phase_of_the_reuse_interval(
    name: str, place: str, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 steps across page borders and selections: no graph break, no recompilation, the tokens of the eager run."""
    config = reserved(name, where(place, monkeypatch))
    cache = SparseCache(llama.config, config)
    got = decoded(llama, cache, 200, compiled(llama, "eager"))
    phases = config.reuse_interval if config.selects else 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == phases
    assert torch.equal(got, decoded(llama, SparseCache(llama.config, PRESETS[name]), 200))
    # A second cache of the same shape finds the graphs ready.
    again = torch.compile(llama.forward, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(got[:, :6], decoded(llama, SparseCache(llama.config, config), 5, again))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == phases


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "lserve"])
def test_a_step_compiles_with_inductor(name: str, llama: Any) -> None:
    got = decoded(llama, SparseCache(llama.config, reserved(name)), 40, compiled(llama, "inductor"))
    assert torch.equal(got, decoded(llama, SparseCache(llama.config, PRESETS[name]), 40))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["dense", "lserve"])
def test_generate_compiles_as_it_does_for_a_static_cache(name: str, options: dict[str, Any], llama: Any) -> None:
    ids, mask, _ = padded_prompt()
    options = options | {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    compile_config = transformers.CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    want = llama.generate(ids, **cached(SparseCache(llama.config, PRESETS[name])), **options)
    torch.manual_seed(0)
    cache = SparseCache(llama.config, reserved(name))
    got = llama.generate(ids, **cached(cache), **options, compile_config=compile_config)
    vars(llama).pop("_compiled_call", None)
    assert torch.equal(got, want)
    if "num_beams" not in options:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (4 if name == "lserve" else 1)


@PLACES
@pytest.mark.parametrize("name", PRESETS)
def test_what_the_host_does_between_steps(
    name: str, place: str, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop, batch operations, forks, copies, files and another turn, beside a cache that grows."""

    def both(action: Callable[[SparseCache], Any]) -> None:
        nonlocal growing, cache
        growing, cache = (action(x) or x for x in (growing, cache))

    def saved(x: SparseCache) -> SparseCache:
        x.save(tmp_path / "cache.safetensors")
        return SparseCache.load(tmp_path / "cache.safetensors", llama.config)

    growing = SparseCache(llama.config, PRESETS[name])
    cache = SparseCache(llama.config, reserved(name, where(place, monkeypatch)))
    assert torch.equal(decoded(llama, growing, 21), decoded(llama, cache, 21))
    turn = torch.randint(3, 96, (2, 13), generator=torch.Generator().manual_seed(3))

    def swapped_twice(x: SparseCache) -> None:
        x.reorder_cache(torch.tensor([1, 0]))
        x.reorder_cache(torch.tensor([1, 0]))

    actions: list[Callable[[SparseCache], Any]] = [
        lambda x: x.memory() and None, lambda x: x.crop(-3), swapped_twice, copy.deepcopy, lambda x: x.fork(), saved,
    ]  # fmt: skip
    columns = 0
    for action in actions:
        both(action)
        assert growing.get_seq_length() == cache.get_seq_length()
        columns = int(growing.get_seq_length())
        mask = torch.ones(2, columns, dtype=torch.int64)
        mask[1, :11] = 0
        x, at = torch.full((2, 1), 7), (mask.cumsum(1) - 1)[:, -1:]
        with torch.no_grad():
            want, got = (continued(llama, c, x, mask, at, 2 * P) for c in (growing, cache))
        assert torch.equal(want, got), action
    mask = torch.ones(2, columns + 2 * P + 13, dtype=torch.int64)
    mask[1, :11] = 0
    at = (mask.cumsum(1) - 1)[:, -13:]
    with torch.no_grad():
        want, got = (llama(turn, attention_mask=mask, position_ids=at, **cached(c)).logits for c in (growing, cache))
        assert torch.equal(want, got)
        want, got = (continued(llama, c, turn[:, :1], mask, at[:, -1:], 2 * P) for c in (growing, cache))
    assert torch.equal(want, got)


@PLACES
@pytest.mark.parametrize("name", ["dense", "lserve", "alisa"])
def test_an_interrupted_step_in_reserved_memory(
    name: str, place: str, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reserved(name, where(place, monkeypatch))
    plain, cache = (SparseCache(llama.config, config) for _ in range(2))
    decoded(llama, plain, 9)
    decoded(llama, cache, 9)
    x, at, calls = torch.full((2, 1), 7), torch.tensor([[79], [68]]), 0
    decode = lserve_ext.ops.decode

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(lserve_ext.ops, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llama(x, position_ids=at, **cached(cache))
        if name == "alisa":  # the first layers' mass has taken the step in
            for action in (cache.memory, lambda: llama(x, position_ids=at, **cached(cache)), lambda: cache.crop(-1)):
                with pytest.raises(RuntimeError, match=r"the last step was interrupted.*call reset"):
                    action()
            cache.reset()
            decoded(llama, cache, 3)
            return
        want, got = (continued(llama, c, x, torch.ones(2, 79), at - 1, TOKENS - 79) for c in (plain, cache))
        assert torch.equal(want, got)  # to the last token that there is room for
        for c in (plain, cache):
            with pytest.raises(ValueError, match="max_tokens: expected at most 512 tokens a sequence, got one more"):
                continued(llama, c, x, torch.ones(2, TOKENS), at, 1)


def test_a_save_that_fails_leaves_a_reserved_cache_as_it_was(llama: Any, tmp_path: Path) -> None:
    config = PRESETS["lserve"].replace(max_tokens=TOKENS, scorer=lserve_ext.ops.page_scores)
    cache = SparseCache(llama.config, config)
    decoded(llama, cache, 5)
    with pytest.raises(TypeError, match="a callable has no JSON form"):
        cache.save(tmp_path / "cache.safetensors")
    assert isinstance(cache.get_seq_length(), Tensor)  # still on the device


def test_the_end_of_reserved_memory(llama: Any) -> None:
    config = PRESETS["lserve"].replace(max_tokens=10 * P - 3)  # whole pages are reserved
    for forward in (llama, compiled(llama, "eager")):
        cache = SparseCache(llama.config, config)
        decoded(llama, cache, 10 * P - 70, forward)
        with pytest.raises(Exception, match=r"max_tokens: expected at most 80 tokens a sequence, got"):  # noqa: PT012
            x, at = torch.full((2, 1), 7), torch.tensor([[80], [69]])
            with torch.no_grad():
                forward(x, position_ids=at, use_cache=True, **cached(cache))
            cache.memory()
    long = torch.ones(1, 81, dtype=torch.int64)
    with torch.no_grad(), pytest.raises(ValueError, match="max_tokens: expected at most 80 tokens a sequence, as are"):
        llama(long, **cached(SparseCache(llama.config, config)))


def test_streaming_heads_take_constant_memory(llama: Any) -> None:
    caches = [SparseCache(llama.config, PRESETS["streaming"].replace(max_tokens=n)) for n in (100 * P, 1000 * P)]
    for cache in caches:
        decoded(llama, cache, 3 * P)
    few, many = (cache.memory()["device"] for cache in caches)
    assert few.reserved == many.reserved and few.peak == many.peak


@pytest.mark.gpu
@pytest.mark.parametrize("tiers", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_in_a_cuda_graph(name: str, tiers: bool, llama: Any, device: str) -> None:
    """200 replays, across page borders and all phases of the reuse interval: the tokens of eager steps that have
    everything on the device and grow."""
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    model, config = copy.deepcopy(llama).to(device), reserved(name, tiers)
    ids, mask, positions = (x.to(device) for x in padded_prompt())
    want = decoded(model, SparseCache(model.config, PRESETS[name]), 200).cpu()
    cache, phases = SparseCache(model.config, config), config.reuse_interval if config.selects else 1
    with torch.no_grad():
        x = model(ids, attention_mask=mask, position_ids=positions, **cached(cache)).logits[:, -1:].argmax(-1)
        at, found, graphs = positions[:, -1:] + 1, [x.clone()], []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(phases):  # eagerly, which also warms up
                x.copy_(model(x, position_ids=at, use_cache=True, **cached(cache)).logits[:, -1:].argmax(-1))
                at.add_(1)
                found.append(x.clone())
        torch.cuda.synchronize()
        for _ in range(phases):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x.copy_(model(x, position_ids=at, use_cache=True, **cached(cache)).logits[:, -1:].argmax(-1))
                at.add_(1)
            graphs.append(graph)
        for i in range(200 - phases):
            graphs[i % phases].replay()
            found.append(x.clone())
    assert torch.equal(torch.cat(found, 1).cpu(), want)
