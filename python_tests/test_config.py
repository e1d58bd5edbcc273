"""SparseConfig: presets, overrides, what the cache reads from it, JSON, messages."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve_ext import HeadPattern, SparseConfig
from lserve_ext.config import PRESETS

PATTERN = HeadPattern(((0.5, 1.0), (0.25, 0.0)), 0.25, {"model": "m"})

overrides = st.fixed_dictionaries(
    {},
    optional={
        "kv_dtype": st.sampled_from(["auto", "int8"]),
        "sink_tokens": st.integers(0, 64),
        "local_tokens": st.integers(0, 200),
        "prefill_sink_tokens": st.none() | st.integers(0, 300),
        "prefill_local_tokens": st.none() | st.integers(0, 10_000),
        "budget_tokens": st.integers(400, 10_000),
        "reuse_interval": st.integers(1, 16),
        "streaming_heads": st.none() | st.floats(0, 1) | st.just("heads.json") | st.just(PATTERN),
        "dense_layers": st.integers(0, 40),
        "max_tokens": st.none() | st.integers(1, 10**6),
    },
)


@pytest.mark.parametrize("name", PRESETS)
@given(fields=overrides)
def test_json_round_trip_of_every_preset(name: str, fields: dict[str, Any]) -> None:
    if name in ("h2o", "alisa"):
        fields.pop("sink_tokens", None)  # lists of tokens have none
    config = SparseConfig.preset(name, **fields)
    assert all(getattr(config, field) == value for field, value in fields.items())
    assert SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {"format", *(field.name for field in dataclasses.fields(SparseConfig))}


@pytest.mark.parametrize("name", PRESETS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    config = SparseConfig.preset(name, streaming_heads=PATTERN)
    config.save(tmp_path / "config.json")
    assert SparseConfig.load(tmp_path / "config.json") == config
    assert hash(SparseConfig.load(tmp_path / "config.json")) == hash(config)


def test_fields_left_out_of_json_have_their_defaults() -> None:
    assert SparseConfig.from_dict({"kv_dtype": "int8"}) == SparseConfig(kv_dtype="int8")


def test_a_path_becomes_text_in_json() -> None:
    assert SparseConfig(streaming_heads=Path("heads.json")).to_dict()["streaming_heads"] == "heads.json"


def test_presets_are_the_published_methods() -> None:
    dense, lserve, quest = SparseConfig.dense(), SparseConfig.lserve(), SparseConfig.quest()
    assert not dense.selects and not dense.needs_stats and dense.streaming_heads is None and dense.kv_dtype == "auto"
    assert SparseConfig.preset("streaming") == SparseConfig.streaming() == SparseConfig(streaming_heads=1.0)
    assert SparseConfig.duo().streaming_heads == 0.5 and not SparseConfig.duo().selects
    assert (quest.page_size, quest.stats_group, quest.dense_layers) == (16, 16, 2)
    assert (quest.sink_pages, quest.local_pages) == (0, 2)
    assert quest.list_pages == 2048 // 16 - 2 and quest.needs_stats and quest.reuse_interval == 1
    assert (lserve.page_size, lserve.stats_group, lserve.sink_pages, lserve.local_pages) == (64, 16, 2, 4)
    assert (lserve.list_pages, lserve.reuse_interval, lserve.kv_dtype) == (4096 // 64 - 6, 4, "int8")
    h2o, alisa = SparseConfig.h2o(), SparseConfig.alisa()
    assert (h2o.unit, h2o.scorer, h2o.budget.picks, h2o.budget.ratio, h2o.sink_pages) == ("token", "mass", 512, None, 0)
    assert (alisa.unit, alisa.scorer, alisa.budget.picks, alisa.kv_dtype) == ("token", "decayed_mass", None, "int8")
    assert alisa.budget.ratio == pytest.approx(0.1)
    assert h2o.selects and alisa.selects and not h2o.needs_stats and not alisa.needs_stats


def test_needs_stats() -> None:
    assert SparseConfig(kv_dtype="int8").needs_stats  # the grid of the keys
    assert SparseConfig(budget_tokens=1024).needs_stats  # the scores
    assert not SparseConfig(kv_dtype="int8", unit="token").needs_stats


@given(
    page=st.sampled_from([1, 16, 64, 96]),
    sink=st.integers(0, 300),
    local=st.integers(0, 300),
    spare=st.integers(0, 1000),
)
def test_pages_cover_the_tokens_and_stay_in_the_budget(page: int, sink: int, local: int, spare: int) -> None:
    budget = (-(-sink // page) + max(2, -(-local // page))) * page + spare
    config = SparseConfig(page_size=page, stats_group=1, sink_tokens=sink, local_tokens=local, budget_tokens=budget)
    assert config.sink_pages * page >= sink > (config.sink_pages - 1) * page
    assert config.local_pages * page >= local and config.local_pages >= 2
    attended = (config.sink_pages + config.local_pages + config.list_pages) * page
    assert budget - page < attended <= budget
    assert (config.prefill_sink_pages, config.prefill_local_pages) == (config.sink_pages, config.local_pages)


def test_prefill_has_its_own_windows() -> None:
    config = SparseConfig.lserve(prefill_sink_tokens=65, prefill_local_tokens=8192)
    assert (config.prefill_sink_pages, config.prefill_local_pages, config.local_pages) == (2, 128, 4)
    assert SparseConfig.lserve(prefill_local_tokens=0).prefill_local_pages == 2


def test_a_budget_and_a_sparsity_take_each_others_place() -> None:
    alisa = SparseConfig.alisa(budget_tokens=512)
    assert alisa.kv_sparsity is None and alisa.budget.picks == 256
    assert SparseConfig.h2o(kv_sparsity=0.5).budget_tokens is None
    assert alisa.replace(kv_sparsity=0.9).budget_tokens is None
    assert alisa.replace(max_tokens=9) == SparseConfig.alisa(budget_tokens=512, max_tokens=9)


INT0, INT1, SHARE = "expected an int of at least 0", "expected an int of at least 1", "expected a number from 0 up to 1"
TOKENS = {"unit": "token"}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"page_size": 0}, ValueError, f"page_size: {INT1}, got 0"),
    ({"page_size": "64"}, TypeError, f"page_size: {INT1}, got '64'"),
    ({"page_size": True}, TypeError, f"page_size: {INT1}, got True"),
    ({"stats_group": 24}, ValueError, "stats_group: expected a divisor of page_size 64, got 24"),
    ({"moments_group": 24}, ValueError, "moments_group: expected a divisor of page_size 64, got 24"),
    ({"moments_group": 0}, ValueError, f"moments_group: {INT1}, got 0"),
    ({"sink_tokens": -1}, ValueError, f"sink_tokens: {INT0}, got -1"),
    ({"sink_tokens": None}, TypeError, f"sink_tokens: {INT0}, got None"),
    ({"local_tokens": 2.5}, TypeError, f"local_tokens: {INT0}, got 2.5"),
    ({"prefill_sink_tokens": -1}, ValueError, f"prefill_sink_tokens: {INT0}, got -1"),
    ({"prefill_local_tokens": "all"}, TypeError, f"prefill_local_tokens: {INT0}, got 'all'"),
    ({"reuse_interval": 0}, ValueError, f"reuse_interval: {INT1}, got 0"),
    ({"dense_layers": -1}, ValueError, f"dense_layers: {INT0}, got -1"),
    ({"max_tokens": 0}, ValueError, f"max_tokens: {INT1}, got 0"),
    ({"budget_tokens": 0}, ValueError, f"budget_tokens: {INT1}, got 0"),
    (
        {"budget_tokens": 383},
        ValueError,
        "budget_tokens: expected at least 384, the tokens of the sink and local pages, got 383",
    ),
    ({"kv_dtype": "int4"}, ValueError, "kv_dtype: expected one of 'auto', 'int8', got 'int4'"),
    ({"unit": "block"}, ValueError, "unit: expected one of 'page', 'token', got 'block'"),
    ({"scorer": "max"}, ValueError, "scorer: expected one of 'minmax', 'moments', 'mass', 'decayed_mass', got 'max'"),
    (
        {"scorer": "mass", "budget_tokens": 512},
        ValueError,
        "scorer: expected 'minmax' or 'moments' or a callable with unit 'page', got 'mass'",
    ),
    (
        {"budget_tokens": 512, **TOKENS},
        ValueError,
        "scorer: expected 'mass' or 'decayed_mass' with unit 'token', got 'minmax'",
    ),
    ({"kv_sparsity": 1.0, **TOKENS}, ValueError, f"kv_sparsity: {SHARE}, got 1.0"),
    ({"kv_sparsity": "80%", **TOKENS}, TypeError, f"kv_sparsity: {SHARE}, got '80%'"),
    (
        {"kv_sparsity": 0.8},
        ValueError,
        "kv_sparsity: expected None with unit 'page', which takes budget_tokens, got 0.8",
    ),
    (
        {"kv_sparsity": 0.8, "budget_tokens": 512, **TOKENS},
        ValueError,
        "kv_sparsity: expected None beside budget_tokens 512, got 0.8",
    ),
    (
        {"scorer": "mass", "budget_tokens": 512, **TOKENS},
        ValueError,
        "sink_tokens: expected 0 with unit 'token', where heavy tokens take the sink's place, got 128",
    ),
    ({"streaming_heads": 1.5}, ValueError, "streaming_heads: expected a fraction from 0 to 1, got 1.5"),
    (
        {"streaming_heads": [1]},
        TypeError,
        "streaming_heads: expected None, a HeadPattern, its file or a fraction, got [1]",
    ),
]


@pytest.mark.parametrize("fields, error, message", BAD, ids=[message.split(",")[0] for _, _, message in BAD])
def test_messages_name_the_field_what_was_expected_and_what_came(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape('SparseConfig.' + message)}$"):
        SparseConfig(**fields)


def test_files_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    for kind, fields in ((SparseConfig, {"page_size": 64}), (HeadPattern, {"scores": [[0.0, 1.0]]})):
        kind.from_dict(fields)  # the format may be left out
        path = tmp_path / "old.json"
        path.write_text(json.dumps({"format": 77, **fields}))
        with pytest.raises(
            ValueError, match=rf"old.json.*{kind.__name__}.format: expected \d, got 77: written by another"
        ):
            kind.load(path)
    with pytest.raises(ValueError, match="got 'streaming'"):
        SparseConfig.from_dict({"streaming": 1.0})  # its name in format 1


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of dense, .*, got 'sparse'"):
        SparseConfig.preset("sparse")
    with pytest.raises(ValueError, match=r"expected the fields page_size, .*, got 'pagesize'"):
        SparseConfig.from_dict({"pagesize": 64})
    with pytest.raises(TypeError, match=r"expected a mapping of fields, got \[1\]"):
        SparseConfig.from_dict([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bugdet"):
        SparseConfig.lserve(bugdet=1)


def test_a_callable_scorer_has_no_json_form() -> None:
    config = SparseConfig(scorer=lambda *args: args[0], budget_tokens=1024)
    assert config.needs_stats
    with pytest.raises(TypeError, match=r"SparseConfig.scorer: expected a name, because a callable has no JSON form"):
        config.to_dict()


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseConfig().page_size = 32  # type: ignore[misc]
