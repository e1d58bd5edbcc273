"""`attn_implementation="lserve"` and `SparseCache` give SDPA's tokens, however a model is driven."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from _tiny import cached
from transformers import DynamicCache, StaticCache

from lserve_ext import SparseCache, SparseConfig

SMALL = {"page_size": 8, "stats_group": 4}  # short sequences then cross many pages
MARGIN = 1e-4  # of dense's two best logits: below it, either token is right

FIELDS = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "bos_token_id": 1,
    "max_position_embeddings": 512, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip
GQA = {"num_key_value_heads": 2, "intermediate_size": 96}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS, **GQA, head_dim=16)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**FIELDS, **GQA, sliding_window=None)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**FIELDS, **GQA)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**FIELDS, **GQA, head_dim=32)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**(FIELDS | {"init_std": 0.5}), ffn_dim=96, word_embed_proj_dim=64)
    ),
    "pythia": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**FIELDS, intermediate_size=96)),
}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return MODELS["llama"]().eval()


def prompts(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch padded on the left: lengths 17 + 2 pages, 5 fewer, ..."""
    ids = torch.randint(3, 96, (rows, 35), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 11 * row] = 0
    return ids * mask, mask


def generate(model: Any, implementation: str, cache: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    model.set_attn_implementation(implementation)
    torch.manual_seed(7)
    options = {"max_new_tokens": 24, "do_sample": False} | options
    options |= {"output_scores": True, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, **cached(cache), **options)


def assert_same_tokens(want: Any, got: Any, prompt: int) -> None:
    """Up to the first place where dense itself hardly decides."""
    for row, (a, b) in enumerate(zip(want.sequences, got.sequences, strict=True)):
        different = (a != b).nonzero()
        if len(different):
            step = int(different[0]) - prompt
            best = want.scores[step][row].topk(2).values
            assert best[0] - best[1] <= MARGIN, f"row {row}, step {step}: {a.tolist()} != {b.tolist()}"


def assert_alike(want: torch.Tensor, got: torch.Tensor) -> None:
    """Equal but for the model's own matrix products, whose last bits depend on where their operands lie in memory."""
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "returned_beams": {"num_beams": 4, "num_return_sequences": 2},
    "chunked_prefill": {"prefill_chunk_size": 6},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
}


def run_mode(model: Any, mode: str, implementation: str, cache: Any) -> tuple[Any, int]:
    ids, mask = prompts()
    if mode == "prompt_lookup":  # of one repetitive sequence, as transformers demands
        ids, mask = ids[:1].repeat(1, 3), mask[:1].repeat(1, 3)
    return generate(model, implementation, cache, ids, mask, **MODES[mode]), ids.shape[1]


@pytest.mark.parametrize("mode", MODES)
def test_dense_preset_gives_the_tokens_of_sdpa(any_model: Any, mode: str) -> None:
    want, prompt = run_mode(any_model, mode, "sdpa", DynamicCache(config=any_model.config))
    got, _ = run_mode(any_model, mode, "lserve", SparseCache(any_model.config, SparseConfig.dense(**SMALL)))
    if "beams" in mode:  # their scores are those of beams: only the tokens compare
        assert torch.equal(want.sequences, got.sequences)
    else:
        assert_same_tokens(want, got, prompt)


def test_several_turns_on_one_cache(any_model: Any) -> None:
    def talk(implementation: str, cache: Any) -> torch.Tensor:
        any_model.set_attn_implementation(implementation)
        ids, _ = prompts(1)
        for turn in range(3):
            mask = torch.ones_like(ids)
            ids = any_model.generate(ids, attention_mask=mask, **cached(cache), max_new_tokens=9, do_sample=False)
            ids = torch.cat([ids, torch.tensor([[5, 6, 7 + turn]])], 1)
        return ids

    want = talk("sdpa", DynamicCache(config=any_model.config))
    assert torch.equal(want, talk("lserve", SparseCache(any_model.config, SparseConfig.dense(**SMALL))))


# Every method, with a budget that binds at these lengths, and with one above them.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "streaming": ({"sink_tokens": 8, "local_tokens": 16}, {"local_tokens": 512}),
    "duo": ({"sink_tokens": 8, "local_tokens": 16}, {"local_tokens": 512}),
    "quest": ({"budget_tokens": 32}, {"budget_tokens": 512}),
    "h2o": ({"budget_tokens": 24}, {"budget_tokens": 512}),
    "lserve": (
        {"sink_tokens": 8, "local_tokens": 16, "budget_tokens": 32},
        {"local_tokens": 512, "budget_tokens": 1024},
    ),
    "alisa": ({}, {"kv_sparsity": 0.0}),
    "moments": (
        {"sink_tokens": 8, "local_tokens": 16, "budget_tokens": 32},
        {"local_tokens": 512, "budget_tokens": 1024},
    ),
}


def preset(model: Any, name: str, fields: dict[str, Any]) -> SparseConfig:
    from lserve_ext import HeadPattern

    if name in ("duo", "lserve"):
        text = model.config
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        scores = [[float((layer + head) % 2) for head in range(kv_heads)] for layer in range(text.num_hidden_layers)]
        fields = fields | {"streaming_heads": HeadPattern(scores)}
    size = {} if name == "quest" else SMALL
    return SparseConfig.preset(name, **(size | fields))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("mode", MODES)
def test_every_preset_runs_and_a_budget_above_the_context_is_dense(llama: Any, name: str, mode: str) -> None:
    binding, ample = PRESETS[name]
    cache = SparseCache(llama.config, preset(llama, name, binding))
    got, _ = run_mode(llama, mode, "lserve", cache)
    assert got.sequences.max() < 96
    attended, held = cache.attended()
    assert 0 < attended < held

    want, prompt = run_mode(llama, mode, "sdpa", DynamicCache(config=llama.config))
    cache = SparseCache(llama.config, preset(llama, name, ample | {"kv_dtype": "auto"}))
    got, _ = run_mode(llama, mode, "lserve", cache)
    if "beams" in mode:
        assert torch.equal(want.sequences, got.sequences)
    else:
        assert_same_tokens(want, got, prompt)


def test_int8_logits_stay_close(llama: Any) -> None:
    ids, mask = prompts()
    with torch.no_grad():
        llama.set_attn_implementation("sdpa")
        want = llama(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        llama.set_attn_implementation("lserve")
        cache = SparseCache(llama.config, SparseConfig.dense(kv_dtype="int8", **SMALL))
        for part in torch.arange(35).split(7):
            logits = llama(ids[:, part], attention_mask=mask[:, : part[-1] + 1], **cached(cache)).logits
    got = logits[:, -1]
    last = torch.stack([want[: int(n)][-1] for n in mask.sum(1).cumsum(0)])
    assert 1e-6 < float((got - last).norm() / last.norm()) < 2e-2


def test_without_a_cache_and_with_a_dynamic_one(llama: Any) -> None:
    ids, mask = prompts()
    with torch.no_grad():
        llama.set_attn_implementation("sdpa")
        want = llama(ids, attention_mask=mask, use_cache=False).logits
        dense = generate(llama, "sdpa", DynamicCache(config=llama.config), ids, mask)
        llama.set_attn_implementation("lserve")
        got = llama(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-4, rtol=2e-4)
    assert_same_tokens(dense, generate(llama, "lserve", DynamicCache(config=llama.config), ids, mask), 35)


def test_no_grad_and_inference_mode_mix(llama: Any) -> None:
    ids, _ = prompts(1)
    llama.set_attn_implementation("lserve")
    outputs = []
    for modes in ([torch.no_grad] * 3, [torch.inference_mode, torch.no_grad, torch.inference_mode]):
        cache = SparseCache(llama.config, SparseConfig.dense(**SMALL))
        for mode, part in zip(modes, ids.split(12, 1), strict=True):
            with mode():
                logits = llama(part, **cached(cache)).logits
        outputs.append(logits.clone())
    assert_alike(*outputs)


def test_two_models_side_by_side(llama: Any) -> None:
    torch.manual_seed(1)
    other = MODELS["qwen2"]().eval()
    ids, _ = prompts(1)
    alone, mixed = {}, {}
    for store, order in ((alone, [llama] * 8 + [other] * 8), (mixed, [llama, other] * 8)):
        caches = {m: SparseCache(m.config, preset(m, "quest", {"budget_tokens": 32})) for m in (llama, other)}
        tokens = {m: [ids] for m in (llama, other)}
        for m in order:
            m.set_attn_implementation("lserve")
            with torch.no_grad():
                tokens[m].append(m(tokens[m][-1], **cached(caches[m])).logits[:, -1:].argmax(-1))
        store.update({m: torch.cat(parts[1:], 1) for m, parts in tokens.items()})
    assert torch.equal(alone[llama], mixed[llama]) and torch.equal(alone[other], mixed[other])


class BoomError(Exception):
    pass


def boom(*args: Any, **kwargs: Any) -> Any:
    raise BoomError


@pytest.mark.parametrize("name", ["dense", "quest", "streaming"])
def test_an_exception_in_the_middle_of_a_forward_is_undone(
    llama: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, _ = prompts(1)
    llama.set_attn_implementation("lserve")
    sparse = SparseConfig.dense(**SMALL) if name == "dense" else preset(llama, name, PRESETS[name][0])

    def steps(fail_at: tuple[int, ...]) -> list[torch.Tensor]:
        cache, logits = SparseCache(llama.config, sparse), []
        for i, part in enumerate(ids.repeat(1, 3).split([20, 1, 1, 5, 78], 1)):
            with torch.no_grad():
                if i in fail_at:
                    layer = llama.model.layers[1].self_attn
                    with monkeypatch.context() as patch:
                        patch.setattr(layer, "forward", boom)
                        with pytest.raises(BoomError):
                            llama(part, **cached(cache))
                logits.append(llama(part, **cached(cache)).logits)
        return logits

    for want, got in zip(steps(()), steps((0, 1, 2, 3, 4)), strict=True):
        assert_alike(want, got)


def test_fork_deepcopy_and_files_go_on_alike(llama: Any, tmp_path: Any) -> None:
    ids, mask = prompts(2)
    llama.set_attn_implementation("lserve")
    cache = SparseCache(llama.config, preset(llama, "lserve", PRESETS["lserve"][0]).replace(reuse_interval=4))
    step = torch.tensor([[11], [12]])
    grow = lambda m: torch.cat([m, torch.ones_like(m[:, :1])], 1)  # noqa: E731
    with torch.no_grad():
        llama(ids, attention_mask=mask, **cached(cache))
        mask = grow(mask)
        llama(step, attention_mask=mask, **cached(cache))
        cache.save(tmp_path / "cache.safetensors")
        twins = [cache.fork(), copy.deepcopy(cache), SparseCache.load(tmp_path / "cache.safetensors", llama.config)]
        outputs = []
        for each in [cache, *twins]:
            grown, logits = mask, []
            for _ in range(20):  # seals pages, reselects
                grown = grow(grown)
                logits.append(llama(step, attention_mask=grown, **cached(each)).logits)
            outputs.append(torch.cat(logits, 1))
    for got in outputs[1:]:
        assert_alike(outputs[0], got)


def test_loading_a_file_that_is_none_of_ours(llama: Any, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"SparseCache.load: .*other.safetensors: expected a file of SparseCache.save"):
        SparseCache.load(tmp_path / "other.safetensors", llama.config)


# ---- what is not supported says so


def test_our_cache_under_another_attention(llama: Any) -> None:
    llama.set_attn_implementation("sdpa")
    for implementation in ("sdpa", "eager"):
        llama.set_attn_implementation(implementation)
        with torch.no_grad(), pytest.raises(RuntimeError, match="needs attn_implementation='lserve'"):
            llama(prompts(1)[0], **cached(SparseCache(llama.config)))


@pytest.mark.parametrize(
    "touch",
    [lambda x: x + 1, lambda x: 1 - x, lambda x: x[0], lambda x: x.shape, lambda x: torch.zeros(2) * x,
     lambda x: torch.cat([torch.zeros(2), x]), lambda x: torch.stack(tensors=(x, x)), bool, len, list, lambda x: ~x,
     lambda x: x == 0],
)  # fmt: skip
def test_whoever_touches_a_handle_gets_its_text(llama: Any, touch: Callable[[Any], Any]) -> None:
    from lserve_ext.hf import mask

    llama.set_attn_implementation("lserve")
    key, _ = SparseCache(llama.config).update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(RuntimeError, match="changes keys between cache and attention"):
        touch(key)
    with pytest.raises(RuntimeError, match="uses the attention mask itself"):
        touch(mask(1, 3, 3, config=llama.config))


def test_padding_on_the_right_is_refused(llama: Any) -> None:
    ids, mask = prompts()
    llama.set_attn_implementation("lserve")
    with torch.no_grad(), pytest.raises(ValueError, match="padding on the left only"):
        llama(ids, attention_mask=mask.flip(1), **cached(SparseCache(llama.config)))


def test_without_our_cache_whatever_is_not_causal_is_left_to_transformers(llama: Any) -> None:
    ids, mask = prompts()
    positions = torch.tensor([[*range(20), *range(15)]])
    calls: list[Callable[[], Any]] = [
        lambda: llama(ids, **cached(StaticCache(config=llama.config, max_cache_len=64))).logits,
        lambda: llama(ids[:1], position_ids=positions, use_cache=False).logits,  # packed sequences
        lambda: llama(ids, attention_mask=mask.flip(1), use_cache=False).logits[mask.flip(1).bool()],
    ]
    for call in calls:
        outputs = []
        for implementation in ("sdpa", "lserve"):
            llama.set_attn_implementation(implementation)
            with torch.no_grad():
                outputs.append(call())
        torch.testing.assert_close(outputs[0], outputs[1], atol=2e-4, rtol=2e-4)


def test_a_sliding_window_is_refused() -> None:
    config = transformers.MistralConfig(**FIELDS, **GQA, sliding_window=16)
    with pytest.raises(ValueError, match=r"config\.sliding_window = None"):
        SparseCache(config)


def test_a_window_that_no_position_reaches_does_not_count() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**FIELDS, **GQA, sliding_window=512)
    model = transformers.MistralForCausalLM(config).eval()
    want, prompt = run_mode(model, "greedy", "sdpa", DynamicCache(config=config))
    cache = SparseCache(config, SparseConfig.dense(**SMALL))
    assert len(cache.ours) == 3
    assert_same_tokens(want, run_mode(model, "greedy", "lserve", cache)[0], prompt)
    with torch.no_grad(), pytest.raises(ValueError, match="got a mask with a sliding window"):
        model(torch.full((3, 500), 5), **cached(cache))


@pytest.mark.parametrize("name", ["softcap", "head_mask"])
def test_unsupported_keywords_are_refused(llama: Any, name: str) -> None:
    from lserve_ext.hf import attention

    x = torch.zeros(1, 2, 3, 16)
    key, value = SparseCache(llama.config).update(x, x, 0)
    with pytest.raises(ValueError, match=f"does not support {name}"):
        attention(torch.nn.Module(), x, key, value, None, **{name: 30.0})


def test_gradients_are_refused(llama: Any) -> None:
    llama.set_attn_implementation("lserve")
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        llama(prompts(1)[0], use_cache=False)


def test_a_pattern_of_another_model_is_refused(llama: Any) -> None:
    from lserve_ext import HeadPattern

    with pytest.raises(ValueError, match="3 layers x 2 kv heads"):
        SparseCache(llama.config, SparseConfig.duo(streaming_heads=HeadPattern([[0.0, 1.0]])))
    with pytest.raises(ValueError, match="never guessed"):
        SparseCache(llama.config, SparseConfig.lserve())


def test_masks_that_contradict_the_cache_are_refused(llama: Any) -> None:
    llama.set_attn_implementation("lserve")
    ids, mask = prompts()
    cache = SparseCache(llama.config)
    with torch.no_grad():
        llama(ids, **cached(cache))  # nothing is padding
        longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        with pytest.raises(ValueError, match="the padding of earlier calls"):
            llama(ids[:, :1], attention_mask=longer, **cached(cache))
        with pytest.raises(ValueError, match=r"attention_mask: expected \[3, 36\]"):
            llama(ids[:, :1], attention_mask=mask, **cached(cache))


def test_autocast(llama: Any) -> None:
    ids, mask = prompts()
    outputs = []
    for implementation in ("sdpa", "lserve"):
        llama.set_attn_implementation(implementation)
        cache = SparseCache(llama.config) if implementation == "lserve" else DynamicCache(config=llama.config)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(llama(ids, attention_mask=mask, **cached(cache)).logits[:, -1].float())
    assert float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 0.1


def test_dense_layers_are_dense_in_every_head(llama: Any) -> None:
    ids, _ = prompts(1)
    llama.set_attn_implementation("lserve")
    streaming = SparseConfig.preset("streaming", sink_tokens=8, local_tokens=8, **SMALL)
    with torch.no_grad():
        outputs = [
            llama(ids, **cached(SparseCache(llama.config, sparse))).logits
            for sparse in (SparseConfig.dense(**SMALL), streaming.replace(dense_layers=3), streaming)
        ]
    assert_alike(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=0.1)


def test_batch_indices_are_those_of_a_tensor(llama: Any) -> None:
    llama.set_attn_implementation("lserve")
    cache = SparseCache(llama.config)
    with torch.no_grad():
        llama(prompts(3)[0], **cached(cache))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_select_indices([-1])
    assert cache.batch_size == 1 and cache.attended()[0] > 0


def test_crop_takes_minus_the_number_of_tokens(llama: Any) -> None:
    with pytest.raises(ValueError, match="minus the number"):
        SparseCache(llama.config).crop(3)


def test_another_batch_size_is_refused(llama: Any) -> None:
    llama.set_attn_implementation("lserve")
    cache = SparseCache(llama.config)
    with torch.no_grad():
        llama(prompts(1)[0], **cached(cache))
        with pytest.raises(ValueError, match=r"k: expected \[1, 2, T, 16\]"):
            llama(prompts(2)[0], **cached(cache))
        cache.reset()
        llama(prompts(2)[0], **cached(cache))
