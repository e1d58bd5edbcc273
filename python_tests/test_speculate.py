"""Drafts on sparse lists, verified densely: the tokens of dense attention, or their distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from _tiny import cached, llama
from torch import Tensor

from lserve_ext import SparseConfig
from lserve_ext.hf import SparseCache, speculate

SMALL: dict[str, Any] = {"page_size": 8, "stats_group": 4, "sink_tokens": 8, "local_tokens": 16}
CONFIGS = {
    "dense": SparseConfig.dense(**SMALL),
    "lserve": SparseConfig.lserve(streaming_heads=None, kv_dtype="auto", budget_tokens=40, **SMALL),
    "moments": SparseConfig.moments(kv_dtype="auto", budget_tokens=40, **SMALL),
    "quest": SparseConfig.quest(budget_tokens=48, dense_layers=1),
    "h2o": SparseConfig.h2o(budget_tokens=24, page_size=8, stats_group=4),
}
CONFIGS["lserve, slots"] = CONFIGS["lserve"].replace(device_bytes=64 << 10)
CONFIGS["lserve, reserved"] = CONFIGS["lserve"].replace(max_tokens=256)


@pytest.fixture(scope="module")
def model() -> Any:
    made = llama(initializer_range=0.1)
    made.set_attn_implementation("lserve")
    return made


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 258, (1, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: Tensor, cache: SparseCache, new: int, **options: Any) -> Tensor:
    out: Tensor = model.generate(ids, max_new_tokens=new, pad_token_id=1, **cached(cache), **options)
    return out


@pytest.mark.parametrize("draft_tokens", [1, 3, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_dense_attention(model: Any, name: str, draft_tokens: int) -> None:
    """Prompts of all lengths around a page, one token included; pages are sealed by drafts that are taken back."""
    for length in (1, 2, 17, 90):
        ids, counts = prompt(length, length), Counter[str]()
        want = generated(model, ids, SparseCache(model.config, CONFIGS["dense"]), 40, do_sample=False)
        cache = SparseCache(model.config, CONFIGS[name])
        options = {"custom_generate": speculate, "draft_tokens": draft_tokens, "counts": counts}
        got = generated(model, ids, cache, 40, do_sample=False, **options)
        assert torch.equal(got, want)
        assert cache.get_seq_length() == got.shape[1] - 1
        assert counts["drafted"] == draft_tokens * counts["rounds"] and counts["accepted"] <= counts["drafted"]
        assert counts["rounds"] + counts["accepted"] >= 40
        if name == "dense":
            assert counts["accepted"] == counts["drafted"]


def test_sparse_drafts_are_rejected_at_times(model: Any) -> None:
    """Otherwise the comparison with dense tokens would say nothing of verification."""
    counts, sparse = Counter[str](), Counter[str]()
    for seed in range(6):
        ids = prompt(150, seed)
        cache = SparseCache(model.config, CONFIGS["moments"])
        generated(model, ids, cache, 40, do_sample=False, custom_generate=speculate, counts=counts)
        want, got = (generated(model, ids, SparseCache(model.config, CONFIGS[name]), 40, do_sample=False)
                     for name in ("dense", "moments"))  # fmt: skip
        sparse["other"] += int(not torch.equal(want, got))
    assert 0 < counts["accepted"] < counts["drafted"] and sparse["other"] > 0


def test_turns_go_on_from_the_same_cache(model: Any) -> None:
    """Of which only a token or two may be new, that a decode step would attend sparsely."""
    caches = [SparseCache(model.config, CONFIGS[name]) for name in ("dense", "lserve")]
    ids = prompt(60)
    for new in (1, 2, 3, 20):
        ids = torch.cat([ids, prompt(new, new)], 1)
        want = generated(model, ids, caches[0], 9, do_sample=False)
        got = generated(model, ids, caches[1], 9, do_sample=False, custom_generate=speculate, draft_tokens=5)
        assert torch.equal(got, want)
        ids = got


def test_int8_tokens_are_nearly_those_of_dense_attention(model: Any) -> None:
    """Its pages are sealed a few tokens earlier."""
    ids, same = prompt(150), 0
    for seed in range(8):
        ids = prompt(150, seed)
        int8 = {"kv_dtype": "int8"}
        want = generated(model, ids, SparseCache(model.config, CONFIGS["dense"].replace(**int8)), 30, do_sample=False)
        cache = SparseCache(model.config, CONFIGS["lserve"].replace(**int8))
        same += int(torch.equal(generated(model, ids, cache, 30, do_sample=False, custom_generate=speculate), want))
    assert same >= 6


def test_a_stop_within_a_draft(model: Any) -> None:
    ids = prompt(90)
    want = generated(model, ids, SparseCache(model.config, CONFIGS["dense"]), 40, do_sample=False)
    for at in (0, 1, 5, 11):
        stop = int(want[0, 90 + at])
        cache, options = SparseCache(model.config, CONFIGS["lserve"]), {"do_sample": False, "eos_token_id": stop}
        got = generated(model, ids, cache, 40, custom_generate=speculate, draft_tokens=4, **options)
        first = want[0, 90:].tolist().index(stop)
        assert got[0].tolist() == want[0, : 91 + first].tolist() and cache.get_seq_length() == got.shape[1] - 1


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "temperature": 0.6}], ids=str)
def test_samples_follow_the_same_distribution(options: dict[str, Any]) -> None:
    """Of the second and third tokens, over a vocabulary of ten: within what chance allows."""
    small = llama(vocab_size=10, initializer_range=0.2)
    small.set_attn_implementation("lserve")
    ids = prompt(90) % 7 + 3
    config = SparseConfig.moments(kv_dtype="auto", **(SMALL | {"budget_tokens": 24, "sink_tokens": 0}))
    torch.manual_seed(0)
    draws, base = 300, SparseCache(small.config, CONFIGS["dense"])
    with torch.no_grad():
        small(ids[:, :-1], **cached(base))
    counts, found = Counter[str](), torch.zeros(2, 10, 10)
    sparse = SparseCache(small.config, config)
    with torch.no_grad():
        small(ids[:, :-1], **cached(sparse))
    for _ in range(draws):
        for i, (cache, extra) in enumerate(
            [(base, {}), (sparse, {"custom_generate": speculate, "draft_tokens": 2, "counts": counts})]
        ):
            out = generated(small, ids, cache.fork(), 3, do_sample=True, **({"top_k": 0} | options), **extra)
            found[i, out[0, 91], out[0, 92]] += 1
    assert 0 < counts["accepted"] < counts["drafted"]
    a, b = found.flatten(1)
    often = a + b > 10
    chi = ((a - b) ** 2 / (a + b).clamp(min=1))[often].sum()
    freedom = int(often.sum())
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, f"chi-squared {chi:.0f} of {freedom} cells"


def bad(model: Any) -> list[tuple[str, dict[str, Any]]]:
    ids, lserve = prompt(20), SparseCache(model.config, CONFIGS["lserve"])
    from transformers import DynamicCache

    streaming = SparseCache(model.config, SparseConfig.streaming(**SMALL))
    return [
        ("cache: expected a SparseCache, got DynamicCache", cached(DynamicCache(config=model.config))),
        ("cache: expected one without streaming heads", cached(streaming)),
        ("input_ids: expected one sequence", {"inputs": ids.repeat(2, 1), **cached(lserve)}),
        ("draft_tokens: expected 1 to the page size 8, got 0", {"draft_tokens": 0, **cached(lserve)}),
        ("draft_tokens: expected 1 to the page size 8, got 9", {"draft_tokens": 9, **cached(lserve)}),
        ("draft_tokens: expected an int, got 2.0", {"draft_tokens": 2.0, **cached(lserve)}),
        ("attention_mask: expected no padding", {"attention_mask": torch.ones_like(ids).index_fill(
            1, torch.tensor([0]), 0), **cached(lserve)}),
        ("return_dict_in_generate: expected False", {"return_dict_in_generate": True, **cached(lserve)}),
    ]  # fmt: skip


def test_what_cannot_be_done_is_refused(model: Any) -> None:
    for message, options in bad(model):
        with pytest.raises(ValueError, match=f"^speculate: {message}"):
            model.generate(**({"inputs": prompt(20), "max_new_tokens": 3, "pad_token_id": 1} | options),
                           custom_generate=speculate)  # fmt: skip
