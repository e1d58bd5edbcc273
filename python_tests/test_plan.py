"""The cost model: what it says of bytes is what caches hold and move, and its schedules are the best there are."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import _tiny
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import CONFIGS
from test_placement import slot_bytes

from lserve_ext import SparseConfig, cli, schedule
from lserve_ext.config import PRESETS
from lserve_ext.hf import SparseCache
from lserve_ext.machine import FIGURES, Figure, Profile
from lserve_ext.plan import Model, Plan, known_models, locality
from lserve_ext.schedule import Costs, Paper, Schedule, Workload, search, seconds

H100, V100 = Profile.load("h100-pcie5"), Profile.load("v100-20gbs")


def profile(**figures: float) -> Profile:
    """A machine on which everything takes one second a byte, but for these figures."""
    values = dict.fromkeys(FIGURES, 1.0) | {name.replace("__", "."): value for name, value in figures.items()}
    return Profile("test", "cuda", {name: Figure("x", "nominal", ((0, x),), "test") for name, x in values.items()})


# ---- models


def test_llama_3_at_128k_takes_17_gigabytes() -> None:
    """GQA is counted: with as many kv heads as query heads it would be 67."""
    model = Model.load("llama-3-8b")
    assert model.kv_bytes(131072) == 2 * 32 * 8 * 128 * 2 * 131072 == 17_179_869_184
    assert 8.0e9 < model.parameters < 8.1e9 and model.weight_bytes == 2 * model.parameters


@pytest.mark.parametrize("name", known_models())
def test_known_models(name: str) -> None:
    model = Model.load(name)
    size, unit = name.rsplit("-", 1)[1][:-1], name[-1]
    assert model.parameters == pytest.approx(float(size) * {"b": 1e9, "m": 1e6}[unit], rel=0.05)
    assert sum(rows * columns * count for rows, columns, count in model.matrices) <= model.parameters
    assert model.head_dim * model.heads == model.hidden


def test_matrices_are_those_that_a_token_is_multiplied_with() -> None:
    """Embeddings are looked up; a head that is tied to them is a product all the same."""
    for tied in (False, True):
        made = _tiny.llama(tie_word_embeddings=tied)
        linear = [tuple(m.weight.shape) for m in made.modules() if isinstance(m, torch.nn.Linear)]
        model = Model.from_config(made.config, torch.float32)
        assert sorted(itertools.chain(*([(a, b)] * count for a, b, count in model.matrices))) == sorted(linear)
        assert model.parameters == sum(p.numel() for p in made.parameters())


def test_no_language_model() -> None:
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="model: expected a language model with attention, got vit"):
        Model.from_config(ViTConfig(), name="vit")


# ---- bytes of real caches


def run(name: str, tokens: int, batch: int, **limits: Any) -> tuple[SparseCache, Plan]:
    model = _tiny.llama(attn_implementation="lserve")
    config = CONFIGS[name].replace(**({"streaming_heads": 1.0} if name == "streaming" else {"streaming_heads": None}))
    config = config.replace(**limits)
    cache = SparseCache(model.config, config)
    ids = torch.randint(0, 258, (batch, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, : tokens - 20], use_cache=True, **_tiny.cached(cache))
        for i in range(tokens - 20, tokens):
            model(ids[:, i : i + 1], use_cache=True, **_tiny.cached(cache))
    figures = {"device_bytes": 1e12, "host_bytes": 1e12, "disk_bytes": 1e12}
    return cache, Plan(Model.from_config(model.config, torch.float32), config, profile(**figures))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [40, 170])
@pytest.mark.parametrize("name", ["dense", "dense-int8", "streaming", "pages", "h2o", "alisa"])
def test_bytes_are_those_of_a_cache(name: str, tokens: int, batch: int) -> None:
    """To the byte, in every phase."""
    cache, plan = run(name, tokens, batch)
    assert plan.predict(tokens, batch).phase == 1
    assert cache.memory()["device"].used == plan.predict(tokens, batch).bytes["device"]
    cache, plan = run(name, tokens, batch, device_bytes=80 * slot_bytes(name))
    held, found = cache.memory(), plan.predict(tokens, batch)
    assert plan.page_bytes == slot_bytes(name)
    assert held["host"].used == plan.held(tokens) * batch * plan.page_bytes
    assert found.bytes.get("host", held["host"].used) == held["host"].used
    assert held["device"].used <= found.bytes["device"] <= plan.resident(tokens, batch) + 80 * slot_bytes(name)
    if plan.held(tokens) * batch > 40:
        frames = {
            "device_bytes": 80 * slot_bytes(name),
            "host_bytes": 30 * slot_bytes(name),
            "disk_dir": "memory://plan",
        }
        cache, plan = run(name, tokens, batch, **frames)
        found = plan.predict(tokens, batch)
        assert found.phase == (1 if plan.held(tokens) * batch <= 80 else 3)
        assert found.bytes.get("host", 0) <= 30 * slot_bytes(name)
        assert found.phase == 1 or cache.memory()["host"].used == found.bytes["host"]


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.7, 1.0])
def test_bytes_that_a_dense_step_moves(share: float, layers: int) -> None:
    """Each layer keeps a share of the slots; the rest is fetched in every step, as many bytes as predicted."""
    tokens, (_, plan) = 200, run("dense-int8", 170, 1)
    plan = Plan(dataclasses.replace(plan.model, layers=layers), plan.config, plan.profile)
    slots = int(share * plan.held(tokens))
    model = _tiny.llama(attn_implementation="lserve", layers=layers)
    cache = SparseCache(model.config, plan.config.replace(device_bytes=slots * plan.page_bytes))
    ids = torch.randint(0, 258, (1, tokens + 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, : tokens - 10], use_cache=True, **_tiny.cached(cache))
        for i in range(tokens - 10, tokens + 5):
            before = cache.traffic()
            model(ids[:, i : i + 1], use_cache=True, **_tiny.cached(cache))
            moved = (cache.traffic() - before).fetched * plan.page_bytes
    held = plan.held(tokens + 5)
    assert held == plan.held(tokens + 1)  # no page was sealed for some steps
    predicted = Plan(plan.model, cache.config, plan.profile).predict(tokens + 5)
    assert moved == predicted.moved.get("fetch", 0) and (moved > 0) == (share < 1)


def test_bytes_that_tokens_by_themselves_take() -> None:
    """Lists of tokens, and the pages that are sealed, each of which becomes local once. (A prompt would want all pages
    of a head at once.)"""
    tokens, (_, plan) = 400, run("alisa", 200, 1)
    slots, P = plan.held(tokens) // 6, plan.config.page_size
    model = _tiny.llama(attn_implementation="lserve", layers=2)
    cache = SparseCache(model.config, plan.config.replace(device_bytes=slots * plan.page_bytes))
    ids = torch.randint(0, 258, (1, tokens + P), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in range(tokens + P):
            if i == tokens:
                before = cache.traffic()
            model(ids[:, i : i + 1], use_cache=True, **_tiny.cached(cache))
    moved, heads = cache.traffic() - before, plan.others
    assert (
        moved.rows == sum(heads * round(0.1 * n) for n in range(tokens + 1, tokens + P + 1)) and moved.fetched == heads
    )
    found = Plan(plan.model, cache.config, plan.profile).predict(tokens + P // 2).moved["fetch"]
    assert found == pytest.approx((moved.fetched + moved.rows / P) * plan.page_bytes / P, rel=0.02)


# ---- predictions


def test_phases_begin_where_something_does_not_fit_any_more() -> None:
    model = Model.load("llama-3-8b")
    plan = Plan(model, SparseConfig.dense(device_bytes=10**9, host_bytes=4 * 10**9, disk_dir="/kv"), H100)
    p1, p2 = plan.switches()
    assert p1 is not None and p2 is not None and p1 < p2
    phases = [plan.predict(c).phase for c in (p1 - 1, p1, p2 - 1, p2)]
    assert phases == [1, 2, 2, 3]
    assert plan.predict(p1 - 1).alpha == 0 < plan.predict(p1).alpha < plan.predict(p2).alpha < 1
    assert plan.predict(p2 - 1).bytes["host"] <= 4 * 10**9


def test_what_does_not_fit_is_said() -> None:
    model = Model.load("llama-3-8b")
    never = Plan(model, SparseConfig.dense(), H100, tiers=False).predict(1 << 20)
    assert never.phase == 0 and never.rate == 0 and never.binds == "device memory too small"
    small = {name: figure for name, figure in H100.figures.items() if name not in ("load", "disk_bytes")}
    host = Plan(model, SparseConfig.dense(host_bytes=10**9, device_bytes=10**9), Profile("x", "cuda", small))
    assert host.predict(1 << 20).binds == "host memory too small"


def test_recomputing_pays_where_the_input_is_smaller_and_the_link_is_slow() -> None:
    """MHA at 16 bits, all heads wanting the same tokens; never with GQA, never for heads with pages of their own."""
    mha, gqa, alisa = Model.load("opt-6.7b"), Model.load("llama-3-8b"), SparseConfig.alisa(kv_dtype="auto")
    pays = Plan(mha, alisa, H100).choice
    assert pays.pays and pays.why.startswith("recomputing pays") and pays.input_bytes * 2 == pays.kv_bytes
    assert pays.load is not None and pays.reload is not None and pays.reload < pays.load
    never = Plan(gqa, alisa, H100).choice
    assert not never.pays and "a layer's input takes 8,704 bytes a token, its KV 4,096" in never.why
    own = Plan(mha, SparseConfig.quest(), H100).choice
    assert not own.pays and "each head wants pages of its own" in own.why
    link = Figure("bytes/s", "nominal", ((0, 4e9),), "test")
    slow = dataclasses.replace(V100, figures={**V100.figures, "fetch": link})
    assert Plan(mha, alisa, slow).choice.pays and Plan(mha, alisa, slow).choice.load is None


def test_a_prefix_that_has_left_the_device() -> None:
    """Token ids never beat host memory over a fast link; over a slow one they do (break-even 32 GB/s, Llama-2-7B)."""
    mha = dataclasses.replace(Model.load("llama-3-8b"), kv_heads=32, name="llama-2-7b, about")
    there = Plan(mha, SparseConfig.dense(), H100).prefix(8192)
    assert there["fetch"] < there["ids"] and there["fetch"] < there["inputs"] < there["load"]
    found = {}
    for rate in (4e9, 100e9):
        link = Figure("bytes/s", "nominal", ((0, rate),), "test")
        found[rate] = Plan(
            mha, SparseConfig.dense(), dataclasses.replace(H100, figures={**H100.figures, "fetch": link})
        )
    slow, fast = (plan.prefix(8192) for plan in found.values())
    assert slow["ids"] < slow["fetch"] and fast["fetch"] < fast["ids"] == slow["ids"]
    assert there.keys() - Plan(mha, SparseConfig.dense(), V100).prefix(8192).keys() <= {"load", "inputs"}
    twice = Plan(mha, SparseConfig.dense(), H100).prefix(16384)
    assert 2 * there["ids"] < twice["ids"] < 4 * there["ids"] and twice["fetch"] > 1.99 * there["fetch"]


def test_inputs_on_the_disk_take_less_and_are_there_sooner() -> None:
    limits: dict[str, Any] = {"device_bytes": 10**9, "host_bytes": 2 * 10**9, "disk_dir": "/kv"}
    config = SparseConfig.alisa(kv_dtype="auto", **limits)
    loads, recomputes = (
        Plan(Model.load("opt-6.7b"), config.replace(recompute=on), H100).predict(5000) for on in (False, True)
    )
    assert loads.phase == recomputes.phase == 3 and loads.beta == 0 < recomputes.beta < 1
    assert recomputes.bytes["disk"] < 0.6 * loads.bytes["disk"]
    assert recomputes.step < loads.step and recomputes.seconds["load"] == 0 < recomputes.seconds["recompute"]


def test_locality_is_what_was_measured() -> None:
    curve = locality(1)
    for slots, missed in curve.points:
        assert curve.at(slots) == pytest.approx(missed)
    assert curve.at(8) < curve.points[-1][1] and locality(4).at(1) > curve.at(1) and locality(5) == locality(4)


@pytest.mark.parametrize("name", PRESETS)
def test_longer_contexts_and_larger_batches_never_get_cheaper(name: str) -> None:
    options = {"streaming_heads": 0.5} if name == "duo" else {}
    plan = Plan(Model.load("llama-3-8b"), SparseConfig.preset(name, **options), H100)
    steps = [plan.predict(1 << n).step for n in range(10, 20) if plan.predict(1 << n).phase]
    assert steps == sorted(steps) and len(steps) > 5
    steps = [plan.predict(1 << 14, batch).step for batch in (1, 2, 4, 8)]
    assert steps == sorted(steps)


# ---- ALISA's schedules


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_search_is_as_good_as_brute_force(data: st.DataObject) -> None:
    """Over all steps p1 and p2 and a grid of alpha and beta."""
    steps, prompt = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 20))
    positive = st.floats(0.01, 10)
    tokens = prompt + np.arange(1.0, steps + 1)
    share = data.draw(st.floats(0.05, 0.5))
    costs = Costs(
        tokens, tokens * share, tokens * share, np.full(steps, data.draw(positive)), data.draw(st.floats(1, 30)),
        data.draw(st.floats(0, 30)), data.draw(positive), data.draw(positive), data.draw(positive),
    )  # fmt: skip
    best, grid = np.inf, np.arange(17) / 16
    for p1 in range(steps + 1):
        for p2, alpha in itertools.product(range(p1, steps + 1), grid):
            for beta in grid[grid <= alpha]:
                best = min(best, float(seconds(costs, Schedule(alpha, beta, p1, p2)).sum()))
    found = search(costs)
    assert found is not None
    mine = float(seconds(costs, found).sum())
    assert np.isfinite(mine) and mine <= best * (1 + 1e-9)
    assert 0 <= found.beta <= found.alpha <= 1 and 0 <= found.p1 <= found.p2 <= steps
    assert [found.phase(i) for i in range(steps)] == sorted(found.phase(i) for i in range(steps))


def test_a_schedule_that_does_not_fit_costs_infinitely_much() -> None:
    tokens = np.array([10.0, 11.0])
    costs = Costs(tokens, tokens / 10, tokens / 10, np.ones(2), 10, 1, 1, 1, 1)
    assert np.isinf(seconds(costs, Schedule(0, 0, 2, 2))).tolist() == [False, True]
    assert (
        np.isinf(seconds(costs, Schedule(0.5, 0, 0, 2))).all()
        and np.isfinite(seconds(costs, Schedule(0.5, 0.5, 0, 0))).all()
    )


def test_methods_on_paper() -> None:
    """What fits costs the same everywhere; then each of ALISA's ideas makes a batch faster, and never slower."""
    model = Model.load("opt-6.7b", torch.float16)
    small, large = Workload(4, 128, 512), Workload(64, 128, 512)
    paper, int8 = Paper(model, V100), Paper(model, V100, kv_bits=8)
    rates = {method: paper.throughput(small, method) for method in schedule.METHODS}
    assert rates["static"] == rates["static, CPU attends"] == pytest.approx(rates["paging"], rel=1e-3)
    assert rates["static, SWA"] == rates["scheduled"]  # nothing is away, so there is nothing to schedule
    static, attends, swa, scheduled, paging = (paper.throughput(large, method) for method in schedule.METHODS)
    assert static < attends < swa < scheduled < int8.throughput(large, "scheduled") and paging < scheduled
    with pytest.raises(ValueError, match=r"method: expected one of static, .*, got 'x'"):
        paper.throughput(small, "x")
    assert Paper(Model.load("llama-33b", torch.float16), V100).throughput(small, "paging") == 0


# ---- the command


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "llama-3-8b", "--context", "131072", "4194304", "--preset", "lserve"]) == 0
    shown = capsys.readouterr().out
    assert "17.18 GB" in shown and "phase II begins at" in shown and "recomputing never pays" in shown
    for arguments, text in (
        (["--machine", "nowhere"], "profile: expected a file or one of"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--context", "0"], "--context: expected at least 1, got 0"),
        (["--model", "."], "model: expected a folder, a hub name or one of"),
        (["--preset", "lserve", "--config", "x"], "--config: expected no --preset beside it"),
    ):
        assert cli.main(["plan", *arguments]) == 2
        assert text in capsys.readouterr().err
