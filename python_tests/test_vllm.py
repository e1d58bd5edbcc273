"""The plugin for vLLM: beside vLLM's own attention, and beside this project's cache in transformers."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lserve_ext import HeadPattern, SparseCache, SparseConfig, scorers
from lserve_ext.vllm import settings
from lserve_ext.vllm.pages import ALIGNMENT, Page

# ---- without vLLM ---------------------------------------------------------------------------------------------------


def asked(given: Any) -> Any:
    """A configuration of vLLM with a key of ours."""
    return types.SimpleNamespace(additional_config={} if given is None else {settings.KEY: given})


def test_nothing_is_asked_for_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    assert settings.sparse_config(asked(None)) is None
    assert settings.sparse_config(types.SimpleNamespace(additional_config=object())) is None


def test_a_config_by_fields_preset_file_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.sparse_config(asked({})) == SparseConfig()
    assert settings.sparse_config(asked({"page_size": 32})) == SparseConfig(page_size=32)
    moments = {"preset": "moments", "budget_tokens": 1024, "streaming_heads": 1.0}
    wanted = SparseConfig.moments(budget_tokens=1024, streaming_heads=1.0)
    assert settings.sparse_config(asked(moments)) == wanted
    assert settings.sparse_config(asked({"preset": "h2o", "kv_sparsity": 0.5})) == SparseConfig.h2o(kv_sparsity=0.5)
    pattern = HeadPattern(((0.1, 0.2), (0.3, 0.4)), 0.25)
    given = json.loads(json.dumps({"preset": "duo", "streaming_heads": pattern.to_dict()}))
    assert settings.sparse_config(asked(given)) == SparseConfig.duo(streaming_heads=pattern)
    wanted.save(tmp_path / "config.json")
    assert settings.sparse_config(asked(str(tmp_path / "config.json"))) == wanted
    monkeypatch.setenv(settings.VARIABLE, str(tmp_path / "config.json"))
    assert settings.sparse_config(asked(None)) == wanted
    assert settings.sparse_config(asked({})) == SparseConfig()  # what stands nearer wins


@pytest.mark.parametrize(
    "given, message",
    [
        ({"budget": 5}, "expected the fields .*, got 'budget'"),
        ({"preset": "quests"}, "preset: expected one of dense, .*, got 'quests'"),
        ({"preset": "quest", "budget_tokens": 1}, "budget_tokens: expected at least"),
        (5, "expected fields of a SparseConfig or its file, got 5"),
        ("/nowhere/config.json", "/nowhere/config.json"),
    ],
)
def test_a_config_that_there_cannot_be(given: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        settings.sparse_config(asked(given))


def test_the_range_of_versions() -> None:
    assert settings.is_tested("0.32.0") and settings.is_tested("0.32.1rc2+cpu")
    for version in ("0.31.9", "0.33.0", "1.0"):
        with pytest.raises(RuntimeError, match=rf"expected vLLM 0.32 or newer, before 0.33, got {version}"):
            settings.check_version(version)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_config.use_mla": True}, "without multi-head latent attention"),
        ({"model_config.is_hybrid": True}, "whose layers all have attention"),
        ({"parallel_config.decode_context_parallel_size": 2}, "--decode-context-parallel-size: expected 1"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config: expected none"),
        ({"cache_config.block_size": 16}, "--block-size: expected lserve's page_size 64, or none, got 16"),
    ],
)
def test_engines_that_are_refused(changes: dict[str, Any], message: str) -> None:
    def engine() -> Any:
        model = types.SimpleNamespace(use_mla=False, is_encoder_decoder=False, is_attention_free=False, is_hybrid=False)
        return types.SimpleNamespace(
            model_config=model,
            cache_config=types.SimpleNamespace(user_specified_block_size=True, block_size=64, cache_dtype="auto"),
            parallel_config=types.SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=None,
            kv_transfer_config=None,
        )

    settings.check_engine(engine(), SparseConfig())
    refused = engine()
    for name, value in changes.items():
        owner, _, field = name.rpartition(".")
        setattr(getattr(refused, owner) if owner else refused, field, value)
    with pytest.raises(ValueError, match=message):
        settings.check_engine(refused, SparseConfig())


@pytest.mark.parametrize("preset", ["dense", "lserve", "moments", "quest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 80])
def test_the_parts_of_a_page_are_apart(preset: str, dtype: torch.dtype, dim: int) -> None:
    page = Page.of(SparseConfig.preset(preset, streaming_heads=None), dim, dtype)
    assert page.bytes % ALIGNMENT == 0
    before = 32  # bytes that are another's
    memory = torch.zeros(before + 3 * page.bytes, dtype=torch.uint8)
    pools = page.pools(memory.untyped_storage(), memory.device, before)
    assert all(len(pool) == 3 for pool in pools.values())
    # Each byte of a page belongs to one part at most, and those of another page are left alone.
    seen = torch.zeros(page.bytes, dtype=torch.bool)
    for pool in pools.values():
        memory.zero_()
        pool[1] = torch.ones_like(pool[1]) if pool.dtype == torch.uint8 else torch.full_like(pool[1], -1)
        assert not memory[: before + page.bytes].any() and not memory[before + 2 * page.bytes :].any()
        own = memory[before + page.bytes : before + 2 * page.bytes] != 0
        assert own.any() and not (own & seen).any()
        seen |= own
    codes = 2 * page.size * dim * (1 if page.is_int8 else dtype.itemsize)
    assert page.bytes == codes if preset == "dense" else page.bytes > codes


# ---- with vLLM ------------------------------------------------------------------------------------------------------

LAYERS, HEADS, VOCABULARY, CHUNK = 3, 4, 512, 256
SCORES = ((0.1, 0.9, 0.3, 0.7), (0.2, 0.8, 0.95, 0.05), (0.5, 0.6, 0.4, 0.35))
PATTERN = HeadPattern(SCORES, 0.5).to_dict()
WINDOW = {"sink_tokens": 32, "local_tokens": 64}
SPARSE = {
    "streaming": {"preset": "streaming", "page_size": 32, **WINDOW},
    "duo": {"preset": "duo", "page_size": 32, "streaming_heads": PATTERN, **WINDOW},
    "duo, a quarter": {"preset": "duo", "page_size": 16, "streaming_heads": {**PATTERN, "fraction": 0.25}, **WINDOW},
    "quest": {"preset": "quest", "budget_tokens": 128, "sink_tokens": 32, "local_tokens": 64, "dense_layers": 1},
    "moments": {"preset": "moments", "kv_dtype": "auto", "budget_tokens": 256, **WINDOW},
    "lserve": {
        "preset": "lserve",
        "page_size": 32,
        "kv_dtype": "auto",
        "budget_tokens": 256,
        "streaming_heads": PATTERN,
        **WINDOW,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random Llama whose best token is seldom in doubt."""
    pytest.importorskip("vllm")
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=2048))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0.0, 0.15)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), eos_token="w1").save_pretrained(path)
    return str(path)


@pytest.fixture
def engine(folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes engines in this process, one at a time, from a SparseConfig's fields; None: vLLM's own attention."""
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    living: list[Any] = []

    def close() -> None:
        while living:
            living.pop().llm_engine.engine_core.shutdown()
            gc.collect()

    def make(given: Any = None, **changes: Any) -> Any:
        fields = {
            "model": folder,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_batched_tokens": CHUNK,
            "max_num_seqs": 16,
            "seed": 0,
        }
        additional = {} if given is None else {settings.KEY: given}
        close()
        living.append(LLM(**fields | changes, additional_config=additional))
        return living[-1]

    yield make
    close()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def generate(llm: Any, tokens: list[list[int]], **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    fields = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    return list(
        llm.generate([{"prompt_token_ids": ids} for ids in tokens], SamplingParams(**fields | sampling), use_tqdm=False)
    )


def texts(outputs: list[Any]) -> list[list[list[int]]]:
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def manager(llm: Any) -> Any:
    """Who keeps the books of blocks."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager


def free_blocks(llm: Any) -> int:
    return int(manager(llm).block_pool.get_num_free_blocks())


@pytest.mark.slow
def test_dense_gives_the_tokens_of_vllm(engine: Any) -> None:
    """Greedy, sampled, several a prompt, log-probabilities; ragged batches in chunks; prefixes that are cached; and
    memory so small that requests are put off and begun anew."""
    ragged = prompts(1, 5, 31, 32, 33, 64, 65, 127, 200, 255, 256, 257, 300, 400, 500, 700)
    shared = [ragged[-1][:600] + tail for tail in prompts(8, 40, 77)]
    found = []
    for given in (None, {"page_size": 32}):
        llm = engine(given, block_size=32)
        outputs = [
            texts(generate(llm, ragged)),
            texts(generate(llm, prompts(1, 20, 33), temperature=1.0, seed=5, n=3)),  # vLLM's chunks take no seeds
            texts(generate(llm, shared)),
            texts(generate(llm, shared)),
        ]
        logprobs = generate(llm, ragged[5:9], logprobs=3, prompt_logprobs=1)
        every = free_blocks(llm)
        llm = engine(given, block_size=32, num_gpu_blocks_override=48)
        small = generate(llm, ragged, max_tokens=60)
        outputs.append(texts(small))
        found.append((outputs, [one.outputs[0].logprobs for one in logprobs], every))
        assert free_blocks(llm) == 47  # and one that is nobody's
    (stock, stock_logprobs, blocks), (ours, our_logprobs, our_blocks) = found
    assert ours == stock and our_blocks == blocks
    for theirs, mine in zip(stock_logprobs, our_logprobs, strict=True):
        for a, b in zip(theirs, mine, strict=True):
            assert a.keys() == b.keys()
            assert all(abs(a[token].logprob - b[token].logprob) < 1e-3 for token in a)


@pytest.mark.slow
def test_a_config_by_variable(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put where other processes and vLLM's cache of compiled code find it."""
    config = SparseConfig.preset("moments", budget_tokens=1024)
    config.save(tmp_path / "config.json")
    monkeypatch.setenv(settings.VARIABLE, str(tmp_path / "config.json"))
    found = engine().llm_engine.vllm_config
    assert settings.sparse_config(found) == config and found.cache_config.block_size == 32
    assert SparseConfig.from_dict(found.additional_config[settings.KEY]) == config


@pytest.mark.slow
def test_beams(engine: Any) -> None:
    """Of dense attention those of vLLM. vLLM forks a beam by a prompt whose prefix is cached."""
    from vllm.sampling_params import BeamSearchParams

    found = []
    for given in (None, {"page_size": 32}):
        llm = engine(given, skip_tokenizer_init=False, max_logprobs=8)
        sampling = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
        outputs = llm.beam_search([{"prompt_token_ids": ids} for ids in prompts(31, 100, 300)], sampling)
        found.append([[list(beam.tokens) for beam in output.sequences] for output in outputs])
    assert found[0] == found[1]


def in_transformers(folder: str, given: Any, tokens: list[list[int]], new: int) -> list[list[list[int]]]:
    """What this project's cache makes of the same prompts, each alone."""
    from transformers import AutoModelForCausalLM

    config = settings.sparse_config(asked(given))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="lserve", dtype=torch.float32)
    found = []
    for ids in tokens:
        cache, chunks = SparseCache(model.config, config), torch.tensor([ids]).split(CHUNK, 1)
        with torch.inference_mode():
            for chunk in chunks:
                logits = model(chunk, past_key_values=cache).logits
            made: list[int] = []
            while len(made) < new:
                made.append(int(logits[0, -1].argmax()))
                logits = model(torch.tensor([made[-1:]]), past_key_values=cache).logits
        found.append([made])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gives_the_tokens_of_our_cache_in_transformers(engine: Any, folder: str, name: str) -> None:
    """Also in a batch, in other chunks, and from a cached prefix. Lengths begin a list where the cache begins one."""
    given, ids = SPARSE[name], prompts(4, 64, 68, 128, 240, 300, 700)  # 240: where the list is full while it decodes
    expected = in_transformers(folder, given, ids, 40)
    llm = engine(given)
    free = free_blocks(llm)
    for _ in range(2):  # the second time, most of it is cached
        outputs = generate(llm, ids, max_tokens=40)
        assert texts(outputs) == expected
        assert free_blocks(llm) == free
    assert outputs[-1].num_cached_tokens >= 640
    groups = manager(llm).kv_cache_config.kv_cache_groups
    assert len(groups) == {"duo": 2, "lserve": 2, "duo, a quarter": 4}.get(name, 1)
    assert sorted(name for group in groups for name in group.layer_names) == sorted(
        f"model.layers.{layer}.self_attn.attn.head{head}" for layer in range(LAYERS) for head in range(HEADS)
    )


@pytest.mark.slow
def test_compiled_by_vllm(engine: Any, folder: str) -> None:
    """As `vllm serve` runs a model unless it is told not to."""
    given, ids = SPARSE["lserve"], prompts(64, 300)
    llm = engine(given, enforce_eager=False)
    assert llm.llm_engine.vllm_config.compilation_config.mode
    assert texts(generate(llm, ids, max_tokens=40)) == in_transformers(folder, given, ids, 40)


@pytest.mark.slow
def test_no_list_is_made_that_would_name_every_page(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    scores = scorers.MinMax.page_scores

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return scores(*args)

    monkeypatch.setattr(scorers.MinMax, "page_scores", staticmethod(counted))
    llm = engine(SPARSE["lserve"])
    generate(llm, prompts(64, 231))  # the budget is 256, and a list begins at 256 at the latest
    assert not calls
    generate(llm, prompts(64, 236))
    assert len(calls) == LAYERS


@pytest.mark.slow
def test_streaming_blocks_are_given_back(engine: Any, folder: str) -> None:
    """A prompt of 1,000 tokens and its answer fit into blocks for 400, whatever their number while it runs."""
    given, ids = SPARSE["streaming"], prompts(990)
    blocks = 400 // 32
    llm = engine(given, num_gpu_blocks_override=blocks, max_num_batched_tokens=128, max_num_seqs=1)
    assert texts(generate(llm, ids, max_tokens=30)) == in_transformers(folder, given, ids, 30)
    assert free_blocks(llm) == blocks - 1


@pytest.mark.slow
def test_requests_that_are_put_off(engine: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With streaming heads only, what was computed twice is the same: windows of prefill and decode are equal."""
    from vllm.v1.core.sched.scheduler import Scheduler

    put_off, original = [], Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        put_off.append(request)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    given, ids = SPARSE["streaming"], prompts(*[60] * 8)
    llm = engine(given, num_gpu_blocks_override=16, max_model_len=160, max_num_batched_tokens=64)
    assert texts(generate(llm, ids, max_tokens=90)) == in_transformers(folder, given, ids, 90)
    assert free_blocks(llm) == 15 and put_off
    put_off.clear()
    llm = engine(SPARSE["lserve"], num_gpu_blocks_override=34, max_model_len=400)
    outputs = generate(llm, prompts(*[100] * 8), max_tokens=200)
    assert all(len(output.outputs[0].token_ids) == 200 for output in outputs)
    assert free_blocks(llm) == 33 and put_off


@pytest.mark.slow
def test_int8_is_near(engine: Any) -> None:
    """To the log-probabilities of the same config in float32, and takes less than half of its memory, INT8's scales
    and the statistics included."""
    ids, found, blocks = prompts(64, 300, 700), [], []
    for kv_dtype in ("auto", "int8"):
        llm = engine({**SPARSE["lserve"], "kv_dtype": kv_dtype})
        outputs = generate(llm, ids, logprobs=5, max_tokens=1)
        found.append([output.outputs[0].logprobs[0] for output in outputs])
        blocks.append(free_blocks(llm))
    assert blocks[1] > 2 * blocks[0]
    for exact, near in zip(*found, strict=True):
        known = exact.keys() & near.keys()
        assert len(known) >= 3
        assert all(abs(exact[token].logprob - near[token].logprob) < 0.1 for token in known)
    assert any(
        exact[token].logprob != near[token].logprob
        for exact, near in zip(*found, strict=True)
        for token in exact.keys() & near.keys()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["streaming", "lserve"])
def test_two_ranks_give_the_tokens_of_one(engine: Any, folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallel: each rank has its own heads, of which other ones stream."""
    ids = prompts(64, 300, 700)
    expected = in_transformers(folder, SPARSE[name], ids, 24)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm = engine(SPARSE[name], tensor_parallel_size=2, distributed_executor_backend="mp")
    assert texts(generate(llm, ids)) == expected


@pytest.mark.slow
def test_what_is_not_supported_is_refused_at_the_start(engine: Any) -> None:
    for given, changes, message in (
        ({"budget": 5}, {}, "expected the fields .*, got 'budget'"),
        ({"preset": "h2o"}, {}, "unit: expected 'page' under vLLM, got 'token'"),
        ({"max_tokens": 5}, {}, "max_tokens: expected None under vLLM"),
        ({"preset": "quest", "reuse_interval": 3}, {}, "reuse_interval: expected a divisor of page_size 16"),
        ({"page_size": 32}, {"block_size": 64}, "--block-size: expected lserve's page_size 32, or none, got 64"),
        ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype: expected 'auto'"),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config: expected",
        ),
        (
            {"preset": "duo", "streaming_heads": "smollm2-135m-instruct"},
            {},
            "expected a pattern of 3 layers x 4 kv heads",
        ),
        ({"preset": "duo"}, {}, "never guessed"),
    ):
        with pytest.raises(Exception, match=message):
            engine(given, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("Mistral", {"sliding_window": 64}, "without a sliding window"),
        ("Gemma2", {}, "without a (sliding window|soft cap)"),
        ("GptOss", {}, "without (attention sinks|a sliding window)"),
    ],
)
def test_models_that_are_not_supported(
    engine: Any, tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **fields)
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=message):
        engine({}, model=str(tmp_path), load_format="dummy", dtype="bfloat16")


@pytest.mark.slow
def test_a_server_with_many_requests_some_of_which_are_cancelled(folder: str, tmp_path: Path) -> None:
    """64 at a time, every third of which leaves early: the others get the tokens that they get alone, no block is held
    afterwards, and memory does not grow from one round to the next."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", port]
    command += ["--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--max-num-batched-tokens", "512", "--max-num-seqs", "16", "--no-enable-prefix-caching"]
    command += ["--num-gpu-blocks-override", "200", "--additional-config", json.dumps({settings.KEY: SPARSE["lserve"]})]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )

    def figure(name: str) -> float:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            return float(re.findall(rf"^vllm:{name}{{.*}} (\S+)$", answer.read().decode(), re.MULTILINE)[0])

    def resident() -> int:
        """KiB of the server's processes."""
        pids = subprocess.run(
            ["pgrep", "-g", str(server.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        status = "".join(Path(f"/proc/{pid}/status").read_text() for pid in pids)
        return sum(map(int, re.findall(r"VmRSS:\s+(\d+)", status)))

    ids = prompts(*(200 + 8 * i for i in range(64)))

    async def ask(client: openai.AsyncOpenAI, i: int) -> list[int]:
        """The tokens of an answer; every third client goes away after a few."""
        fields = {"max_tokens": 32, "temperature": 0.0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
        stream = await client.completions.create(model=folder, prompt=ids[i], stream=True, **fields)
        found: list[int] = []
        async for part in stream:
            found += part.choices[0].token_ids or []
            if i % 3 == 0 and len(found) >= 3:
                await stream.close()
                break
        return found

    async def ask_all() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=300) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(len(ids))))

    try:
        for _ in range(180):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                figure("kv_cache_usage_perc")
                break
            except OSError:
                time.sleep(1)
        sizes, rounds = [], []
        for _ in range(3):
            rounds.append(asyncio.run(ask_all()))
            for _ in range(50):
                if not figure("num_requests_running") + figure("num_requests_waiting"):
                    break
                time.sleep(0.2)
            assert figure("kv_cache_usage_perc") == 0.0
            sizes.append(resident())
        expected = in_transformers(folder, SPARSE["lserve"], ids[:12], 32)
        for found in rounds:
            assert all(len(tokens) == 32 for i, tokens in enumerate(found) if i % 3)
            assert [tokens for i, tokens in enumerate(found[:12]) if i % 3] == [
                answer[0] for i, answer in enumerate(expected) if i % 3
            ]
        assert sizes[2] < 1.02 * sizes[1]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.mark.slow
def test_the_benchmark_of_servers(folder: str, tmp_path: Path) -> None:
    out, script = tmp_path / "found.json", Path(__file__).parents[1] / "bench" / "vllm_bench.py"
    command = [sys.executable, str(script), "--model", folder, "--engines", "vLLM", "dense", "--cells", "2x128"]
    command += ["--new", "4", "--rounds", "1", "--dtype", "float32", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())["results"]
    assert [result["engine"] for result in results] == ["vLLM", "dense"]
    assert all(result["tpot_ms"] > 0 for result in results)


@dataclasses.dataclass
class Pool:
    """Of cached blocks."""

    cached: dict[Any, int]
    hash_block_size: int
    null_block: int = -1

    def get_cached_block(self, block_hash: Any, group_ids: list[int]) -> list[int] | None:
        return [self.cached[block_hash]] * len(group_ids) if block_hash in self.cached else None


def test_the_longest_prefix_that_is_cached() -> None:
    """Beside a search through all of them."""
    pytest.importorskip("vllm")
    from lserve_ext.vllm.blocks import StreamingHeadManager, head_spec

    page = Page(16, 16, torch.float32, False, 0, None)
    generator = torch.Generator().manual_seed(0)
    for trial in range(300):
        ranges = ((1, 12), (0, 4), (1, 5))
        count, sink, local = (int(torch.randint(*ends, (1,), generator=generator)) for ends in ranges)
        missing = torch.rand(count, generator=generator) < 0.25
        pool = Pool({i: 100 + i for i in range(count) if not missing[i]}, 16)
        step = 1 + trial % 2
        blocks, length = StreamingHeadManager.find_longest_cache_hit(
            list(range(count)), 16 * count, [0, 1], pool, head_spec(page, sink, local), False, 16 * step
        )

        def needed(end: int, sink: int = sink, local: int = local) -> set[int]:
            return {*range(min(sink, end)), *range(max(0, end - local + 1), end)}

        ends = [end for end in range(0, count + 1, step) if all(i in pool.cached for i in needed(end))]
        assert length == 16 * max(ends)
        assert blocks[0] == blocks[1] == [100 + i if i in needed(max(ends)) else -1 for i in range(max(ends))]


if os.environ.get("LSERVE_REQUIRE_VLLM") == "1":
    import vllm  # noqa: F401  (a gate that skipped everything would be no gate)
