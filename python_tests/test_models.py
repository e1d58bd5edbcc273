"""Model families of transformers with tiny random weights: SDPA's tokens, or a refusal that says why.

    python python_tests/test_models.py > docs/models.md     the table of all of them

What `transformers` has no family for (an older release) is skipped.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lserve_ext import HeadPattern, SparseCache, SparseConfig, models
from lserve_ext.hf import cache_argument

MARGIN = 1e-4  # of the two best logits: below it, either token is right
OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
VOCABULARY, PROMPT, PADDING, NEW = 96, 35, 11, 20

# Whatever of these a family's config has. Windows and chunks are shorter than the prompt.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "n_group": 1, "topk_group": 1, "ffn_dim": 96, "word_embed_proj_dim": 64, "sliding_window": 16,
    "attention_chunk_size": 16, "initializer_range": 0.2, "init_std": 0.2, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_n_heads": 4,
    "mamba_d_head": 32, "mamba_d_state": 16, "mamba_d_ssm": 128, "mamba_num_heads": 4, "mamba_head_dim": 32,
    "ssm_state_size": 16, "n_groups": 1, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_expand": 2, "d_model": 64,
    "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512,
    "rotary_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "first_k_dense_replace": 1, "num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2, "block_ff_dim": 96,
    "conv_L_cache": 3, "lru_width": 64, "attention_window_size": 16, "num_nextn_predict_layers": 0,
    "is_decoder": True, "n_shared_experts": 1,
}  # fmt: skip
_FULL, _LINEAR = "full_attention", "linear_attention"
_MLA = {"num_key_value_heads": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama-d20": {"head_dim": 20},
    "bamba": {"attn_layer_indices": [1, 3]},
    "axk1": _MLA,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "falcon": {"alibi": False},
    "gemma2-nocap": {"attn_logit_softcapping": None},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3n_text": {"num_hidden_layers": 6, "intermediate_size": [96] * 6, "layer_types": None,
                     "activation_sparsity_pattern": None},
    "gemma4_text-h16": {"num_hidden_layers": 6, "global_head_dim": 16},
    "gemma4_text": {"num_hidden_layers": 6},
    "gemma4_text-shared": {"num_hidden_layers": 18, "num_kv_shared_layers": 6, "global_head_dim": 16},
    "glm4_moe_lite": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hrm_text": {"initializer_range": 0.02},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL], "num_dense_layers": 1},
    "minicpm3": _MLA,
    "mistral-nowindow": {"sliding_window": None},
    "mistral-far": {"sliding_window": 512},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "attention"]},
    "qwen3_next": {"layer_types": [_LINEAR, _FULL] * 2},
    "qwen3_5_text": {"layer_types": [_LINEAR, _FULL] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
}  # fmt: skip

EQUAL = [
    "llama", "llama-d20", "afmoe", "apertus", "arcee", "bamba", "bart", "bert", "biogpt", "bitnet", "codegen", "cohere",
    "cohere2", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_h1", "flex_olmo", "gemma", "gemma2-nocap",
    "gemma3_text", "gemma3n_text", "gemma4_text-h16", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "lfm2", "lfm2_moe", "llama4_text", "mimo_v2_flash", "mistral-far",
    "mistral-nowindow", "mixtral-nowindow", "modernbert-decoder", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2",
    "olmo3", "olmoe", "opt", "pegasus", "persimmon", "phi", "phi3-nowindow", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "roberta", "seed_oss", "smollm3", "stablelm", "starcoder2-nowindow",
    "whisper",
]  # fmt: skip
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ["big_bird", "bloom", "falcon", "gpt_neo", "gpt_neox_japanese", "mpt", "megatron-bert", "mvp", "rembert",
         "roformer", "rwkv", "trocr", "xglm", "xlnet"],
        "is not supported by .*: this model has its own attention",
    ),
    **dict.fromkeys(["minicpm3", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"], "multi-head latent attention"),
    **dict.fromkeys(["ministral", "mistral", "mixtral", "phi3"], r"full attention in.*sliding_window = None"),
    "mamba": "expected the config of a model with attention",
    "diffllama": "models that change values between cache and attention",
    "doge": "full attention in some layer",
    "gemma2": "does not support softcap",
    "gemma4_text": "expected heads of at most 256 channels, got 512",
    "gemma4_text-shared": "uses the attention mask itself",
    "jetmoe": "changes keys between cache and attention",
    "minimax": "by transformers: MiniMax uses cache of its own",
}  # fmt: skip


def family(name: str) -> str:
    return name.partition("-")[0] if name not in CONFIG_MAPPING else name


def make(name: str) -> Any:
    """A tiny model of a family, with random weights."""
    kind = type(CONFIG_MAPPING[family(name)]().get_text_config(decoder=True))
    known = set(vars(kind()))
    for cls in kind.__mro__:
        known |= set(getattr(cls, "__annotations__", {})) | set(inspect.signature(cls.__init__).parameters)
    fields = {field: value for field, value in SMALL.items() if field in known} | OVERRIDES.get(name, {})
    if name.endswith("-nowindow"):
        fields["sliding_window"] = None
    torch.manual_seed(0)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    return (cls[0] if isinstance(cls, tuple) else cls)(kind(**fields)).eval()


def prompt() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: Any, implementation: str, cache: Any, **options: Any) -> Any:
    model.set_attn_implementation(implementation)
    options |= {"max_new_tokens": NEW, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return model.generate(**prompt(), **options, **cache_argument(model, cache))


def difference(want: Any, got: Any) -> str | None:
    """The first token that differs where the model itself is sure."""
    for row, (a, b) in enumerate(zip(want.sequences, got.sequences, strict=True)):
        for place in (a != b).nonzero()[:1]:
            best = want.scores[int(place) - PROMPT][row].topk(2).values
            if best[0] - best[1] > MARGIN:
                return f"row {row}, token {int(place) - PROMPT}, margin {float(best[0] - best[1]):.2g}"
    return None


def outcome(name: str) -> tuple[str, str]:
    """("equal", layers that are ours) or ("refused", why) or ("differs", where)."""
    model = make(name)
    try:
        want = generate(model, "sdpa", DynamicCache(config=model.config))
    except ValueError as error:
        if "cache of its own" in str(error):
            return "refused", f"by transformers: {error}"
        if "does not support" not in str(error):
            raise
        want = generate(model, "eager", DynamicCache(config=model.config))
    try:
        # As `from_pretrained` does it: models that cannot change their attention refuse only there.
        fresh = type(model)._from_config(model.config, attn_implementation="lserve")
        fresh.load_state_dict(model.state_dict())
        model = fresh.eval()
        cache = SparseCache(model.config, SparseConfig.dense(page_size=8, stats_group=4))
        got = generate(model, "lserve", cache)
    except (ValueError, RuntimeError) as error:
        return "refused", str(error)
    other = generate(model, "lserve", DynamicCache(config=model.config))
    for which, tokens in (("SparseCache", got), ("DynamicCache", other)):
        if where := difference(want, tokens):
            return "differs", f"{which}: {where}"
    return "equal", f"{len(cache.ours)} of {len(cache.layers)}"


def known(name: str) -> None:
    if family(name) not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family(name)}")


@pytest.mark.parametrize("name", EQUAL)
def test_a_family_gives_the_tokens_of_sdpa(name: str) -> None:
    known(name)
    kind, details = outcome(name)
    if OLDER and "this model has its own attention" in details:
        pytest.skip(details)
    assert kind == "equal", details


@pytest.mark.skipif(OLDER, reason="the texts are those of today's transformers")
@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_by_name(name: str) -> None:
    known(name)
    kind, details = outcome(name)
    assert kind == "refused" and re.search(REFUSED[name], details), (kind, details)


# ---- hybrid models: what holds for a cache holds for the mixture


# A window and sinks; windows; linear attention; convolutions; attention and a state space in one layer.
MIXTURES = ("gpt_oss", "gemma3_text", "qwen3_next", "lfm2", "falcon_h1")
IN_PLACE = ("qwen3_next", "lfm2", "falcon_h1")  # their linear layers overwrite their state


def loaded(name: str) -> tuple[Any, SparseCache]:
    model = make(name)
    model.set_attn_implementation("lserve")
    return model, SparseCache(model.config, SparseConfig.dense(page_size=8, stats_group=4))


def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, **cache_argument(model, cache), use_cache=True).logits
    return logits


@pytest.mark.parametrize("name", MIXTURES)
def test_beams_of_a_mixture(name: str) -> None:
    model, cache = loaded(name)
    got = generate(model, "lserve", cache, num_beams=3)
    want = generate(model, "eager", DynamicCache(config=model.config), num_beams=3)
    assert torch.equal(want.sequences, got.sequences)
    assert cache.batch_size == 6


@pytest.mark.parametrize("name", MIXTURES)
def test_forks_and_copies_of_a_mixture_go_on_alike(name: str) -> None:
    model, cache = loaded(name)
    ids = prompt()["input_ids"][:1]
    step(model, cache, ids)
    twins = [cache.fork(), copy.deepcopy(cache)]
    other = step(model, cache, ids[:, :3])
    for twin in twins:
        torch.testing.assert_close(step(model, twin, ids[:, :3]), other, atol=2e-4, rtol=1e-4)
        assert twin.get_seq_length() == PROMPT + 3


@pytest.mark.parametrize("name", MIXTURES)
def test_memory_of_a_mixture_counts_all_layers(name: str) -> None:
    model, cache = loaded(name)
    step(model, cache, prompt()["input_ids"])
    ours = sum(layer.kv.memory().used for layer in cache.ours if layer.kv is not None)
    assert 0 < ours < cache.memory()["device"].used
    assert 0 < cache.attended()[0] == cache.attended()[1]


@pytest.mark.parametrize("name", MIXTURES)
def test_what_transformers_layers_cannot_do_is_refused_whole(name: str, tmp_path: Path) -> None:
    model, cache = loaded(name)
    step(model, cache, prompt()["input_ids"][:1])
    before = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="whose states are transformers' own"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
    ids = prompt()["input_ids"][:1, :5]
    torch.testing.assert_close(step(model, cache, ids), step(model, before, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_interrupted_forward_of_a_mixture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken back, in transformers' layers too; or the cache says that it is dead."""
    model, cache = loaded(name)
    ids = prompt()["input_ids"][:1]
    step(model, cache, ids)
    clean = copy.deepcopy(cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[-1], "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            step(model, cache, ids[:, :3])
    assert cache.get_seq_length() == PROMPT
    if name in IN_PLACE:
        for call in (lambda: step(model, cache, ids[:, :3]), cache.fork, lambda: cache.crop(-1)):
            with pytest.raises(RuntimeError, match="cannot be taken back"):
                call()
        cache.reset()
        step(model, cache, ids)
    torch.testing.assert_close(step(model, cache, ids[:, :3]), step(model, clean, ids[:, :3]), atol=2e-4, rtol=1e-4)


def test_layers_that_are_left_out() -> None:
    """One in the middle never takes part; the last one is missing; one is left out for a forward."""
    model, ids = make("llama"), prompt()["input_ids"][:1]
    model.set_attn_implementation("lserve")
    del model.model.layers[1]
    cache = SparseCache(model.config)
    for n in (20, 1, 3):
        step(model, cache, ids[:, :n])
    assert [layer.seen for layer in cache.ours] == [24, 0, 24, 24]

    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[2]])  # for one forward
    step(model, cache, ids[:, :2])
    model.model.layers = layers
    with pytest.raises(RuntimeError, match=r"expected 26 columns in layer 2.* got 24: an earlier forward has left"):
        step(model, cache, ids[:, :2])
    assert cache.get_seq_length() == 26

    model.model.layers = layers[:1]
    shallow = SparseCache(model.config)
    step(model, shallow, ids)
    with pytest.warns(UserWarning, match="ended at layer 0 of 4"):
        step(model, shallow, ids)


def test_patterns_skip_the_layers_that_are_not_ours() -> None:
    model, _ = loaded("gpt_oss")
    scores = [[], [0.0, 1.0], [], [1.0, 0.0]]
    sparse = SparseConfig.duo(streaming_heads=HeadPattern(scores), page_size=8, stats_group=4)
    cache = SparseCache(model.config, sparse)
    step(model, cache, prompt()["input_ids"])
    assert [layer.index for layer in cache.ours] == [1, 3]
    assert [list(layer.pattern) for layer in cache.ours] == [[True, False], [False, True]]
    with pytest.raises(ValueError, match=r"scores for every layer with full attention, got none for \[3\]"):
        SparseCache(model.config, sparse.replace(streaming_heads=HeadPattern([[], [0.0, 1.0], [0.0, 1.0], []])))


def test_encoders_of_a_vision_language_model_keep_sdpa() -> None:
    text = make("llama").config
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95, image_token_id=95)
    ids, pixels = torch.tensor([[1, *[95] * 4, *range(5, 30)]]), torch.randn(1, 3, 16, 16)
    outs = []
    for implementation in ("sdpa", "lserve", {"text_config": "lserve", "vision_config": "sdpa"}):
        torch.manual_seed(0)
        cls = transformers.LlavaForConditionalGeneration
        model = cls._from_config(config, attn_implementation=implementation).eval()
        dense = SparseConfig.dense(page_size=8, stats_group=4)
        cache = DynamicCache(config=model.config) if implementation == "sdpa" else SparseCache(model.config, dense)
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            outs.append(model.generate(ids, pixel_values=pixels, **options, **cache_argument(model, cache)))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.skipif(OLDER, reason="cross attention reads the cache in another way there")
def test_cross_attention_that_reads_the_cache_is_refused() -> None:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

    fields = {field: SMALL[field] for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads",
              "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = MllamaTextConfig(**fields, cross_attention_layers=[1], rope_parameters=rope)
    model = MllamaForCausalLM._from_config(config, attn_implementation="lserve").eval()
    cache = SparseCache(config)
    ids = prompt()["input_ids"][:1]
    step(model, cache, ids)
    with pytest.raises(RuntimeError, match=r"reads the keys of layer \d from the cache itself"):
        step(model, cache, ids[:, :1])


# ---- the table

HEAD = f"""# Models

transformers {transformers.__version__}, tiny random weights, a batch of two with padding on the left, greedy. *equal*:
with `SparseCache` (dense preset) and with `DynamicCache`, the tokens are those of SDPA; layers with full attention are
ours, the others transformers'. *refused*: at load, when the cache is made or in the first forward, with this text. A
name behind a hyphen is a change of the family's config. Made by `python python_tests/test_models.py`.

| family | | layers that are ours, or why not |
|---|---|---|"""


def test_a_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read leaves nothing behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    weights = tmp_path / "tiny.gguf"
    weights.write_bytes(b"no model")
    with pytest.raises(Exception):  # noqa: B017, PT011 - transformers' own
        models.converted(weights)
    assert list((tmp_path / "caches" / "lserve_ext").iterdir()) == []
    made = tmp_path / "caches" / "lserve_ext" / "tiny-8"
    made.mkdir()
    assert models.converted(weights) == made


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(HEAD)
    for name in sys.argv[1:] or [*EQUAL, *REFUSED]:
        print(f"| {name} | {' | '.join(outcome(name))} |", flush=True)
