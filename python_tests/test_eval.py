"""Configs side by side: tasks with known answers, recall, bytes, and runs that are gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _cases import SMALL, Shape, build
from torch import Tensor

from lserve_ext import HeadPattern, SparseCache, SparseConfig, cli, ops, reference
from lserve_ext.ops import Mask

pytest.importorskip("transformers")

from lserve_ext.eval import generate, ruler
from lserve_ext.eval.evaluate import Evaluation, Settings, summary
from lserve_ext.eval.recall import Recall

TEXT = _tiny.text()


@pytest.fixture(scope="module")
def model() -> Any:
    made = _tiny.llama(attn_implementation="lserve")
    made.config._name_or_path = "tiny"
    return made


# ---- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2000, 2048, 3500])
@pytest.mark.parametrize("name", ruler.TASKS)
def test_a_task_hides_its_answers(name: str, length: int) -> None:
    tokenizer = _tiny.tokenizer()
    made = [ruler.prompt(name, tokenizer, length, depth=0.3, seed=seed, text=TEXT) for seed in (1, 1, 2)]
    assert torch.equal(made[0].ids, made[1].ids) and made[0].answers == made[1].answers != made[2].answers
    for prompt in made:
        assert 0.9 * length < prompt.ids.shape[1] <= length
        text = tokenizer.decode(prompt.ids[0], skip_special_tokens=True)
        assert all(answer in text for answer in prompt.answers) == (name != "json")
        parts = [part for answer in prompt.answers for part in (answer.split('"') if name == "json" else [answer])]
        assert all(part.strip(":}, ") in text for part in parts)
        assert prompt.score(" ".join(prompt.answers).upper()) == 1 and prompt.score(text[-20:]) == 0
        assert prompt.score(prompt.answers[0]) == pytest.approx(1 / len(prompt.answers))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_stands_at_its_depth(depth: float) -> None:
    prompt = ruler.prompt("niah_single_2", _tiny.tokenizer(), 3000, depth=depth, text=TEXT)
    text = _tiny.tokenizer().decode(prompt.ids[0])
    assert text.index(prompt.answers[0]) / len(text) == pytest.approx(depth, abs=0.12)


def test_lists_of_words_hold_what_they_say() -> None:
    prompt = ruler.prompt("ruler_cwe", _tiny.tokenizer(), 3500, text=TEXT)
    words = _tiny.tokenizer().decode(prompt.ids[0]).split()
    counts = {word: words.count(word) for word in words if word.isalpha()}
    assert all(counts[answer] == 10 for answer in prompt.answers)
    coded = ruler.prompt("ruler_fwe", _tiny.tokenizer(), 3500)
    words = _tiny.tokenizer().decode(coded.ids[0]).split()
    ranks = sorted({word for word in words if len(word) == 6 and word.islower()}, key=words.count, reverse=True)
    assert list(coded.answers) == ranks[:3]


def test_tasks_that_there_are_not_and_texts_that_are_too_short() -> None:
    with pytest.raises(ValueError, match="task: expected one of passkey, niah_single_1"):
        ruler.prompt("niah", _tiny.tokenizer(), 1000)
    for name in ruler.TASKS:
        with pytest.raises(ValueError, match="length: expected"):
            ruler.prompt(name, _tiny.tokenizer(), 40, text=TEXT)


# ---- recall ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["page", "token"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_recall_is_the_softmax_mass_that_is_attended(shape: Shape, unit: str) -> None:
    """Against weights in float64, a head at a time, and the best of all lists of that length."""
    case, P = build(shape, [7 * shape.page_size + 5, 12 * shape.page_size]), shape.page_size
    if unit == "page":
        sink, (lists, local_start) = 1, case.lists(sink=1, local=2, count=3)
    else:
        sink, (lists, local_start) = 0, case.token_lists(ratio=0.4, max_picks=30)
    mask = Mask(case.windows(ops.LISTED, 3, ops.LISTED), lists, local_start, sink, P if unit == "page" else 1)
    q, G = case.queries(), shape.group
    with Recall() as recall:
        ops.decode(q, mask, case.kv, case.lengths)
    attended, best = [], []
    for b, n in enumerate(case.lengths.tolist()):
        for h in (0, 2):
            k, _ = reference.history(case.kv, b, h, n)
            logits = q[b, h * G : (h + 1) * G].double() @ k.double().T * shape.head_dim**-0.5
            weights = logits.softmax(1).sum(0) / G  # [n]
            size, at = mask.unit or P, torch.arange(n)
            start = int(local_start[b]) * size
            forced, listed = (at < sink * P) | (at >= start), lists[b, h][lists[b, h] >= 0].long()
            free = torch.where(forced, 0, weights)
            units = torch.nn.functional.pad(free, (0, -n % size)).view(-1, size).sum(1)
            attended.append(float(weights[forced].sum() + units[listed].sum()))
            best.append(float(weights[forced].sum() + units.sort(descending=True).values[: len(listed)].sum()))
    (share,) = recall.layers
    assert share is not None and share.attended < share.oracle < 1
    assert share.attended == pytest.approx(sum(attended) / 4, abs=2e-3)
    assert share.oracle == pytest.approx(sum(best) / 4, abs=2e-3)
    assert recall.calls == {"decode": 1}


# ---- runs -----------------------------------------------------------------------------------------------------------

SMALL_PAGES: dict[str, Any] = {"page_size": 16, "sink_tokens": 16, "local_tokens": 32}
CONFIGS = {
    "dense": SparseConfig.dense(),
    "ample": SparseConfig.lserve(streaming_heads=None, budget_tokens=1024, kv_dtype="auto", **SMALL_PAGES),
    "few": SparseConfig.lserve(streaming_heads=None, budget_tokens=96, kv_dtype="auto", **SMALL_PAGES),
    "half": SparseConfig.lserve(streaming_heads=HeadPattern([[0.0, 1.0]] * 2), budget_tokens=96, **SMALL_PAGES),
    "h2o": SparseConfig.h2o(budget_tokens=64, page_size=16),
}
SETTINGS = Settings(("text", "generation", "passkey"), (500, 600), samples=3, positions=40, new_tokens=20, chunk=200)


def evaluation(model: Any, out: Path | None, settings: Settings = SETTINGS, names: Any = CONFIGS) -> Evaluation:
    return Evaluation(model, _tiny.tokenizer(), {name: CONFIGS[name] for name in names}, settings, out, TEXT)


def without_times(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [{name: x for name, x in result.items() if name != "tokens_per_second"} for result in results]
    return sorted(kept, key=lambda r: (r["length"], r["task"], r["sample"], list(CONFIGS).index(r["config"])))


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("eval") / "eval.json"
    return out, evaluation(model, out).run()


def test_what_is_found(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    _, results = whole
    assert len(results) == len(CONFIGS) * 2 * (1 + 1 + 3)
    found = {(r["config"], r["length"]): r for r in results if r["task"] == "text"}
    for length in (500, 600):
        dense, ample, few, half, h2o = (found[name, length] for name in CONFIGS)
        assert dense["kl"] == 0 and dense["divergence"] is None and dense["recall"] is None
        assert ample["kl"] < 1e-6 < few["kl"] < half["kl"] and few["divergence"] is not None
        assert ample["recall"] == pytest.approx([1, 1], abs=1e-4)
        for result in (few, half, h2o):
            assert all(0 < a < b < 1 for a, b in zip(result["recall"], result["oracle"], strict=True))
            assert result["read_bytes"] < dense["read_bytes"] and len(result["kl_quarters"]) == 4
        assert ample["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4) != few["perplexity"]
        assert few["calls"]["decode"] == few["calls"]["append_kv"] == 2 >= few["calls"]["page_scores"] > 0
        assert "page_scores" not in dense["calls"] and h2o["calls"]["select_tokens"] == 2
        assert half["kv_bytes"] < few["kv_bytes"]
    generated = [r for r in results if r["task"] == "generation"]
    assert {r["divergence"] for r in generated if r["config"] in ("dense", "ample")} == {None}
    assert any(r["divergence"] is not None for r in generated if r["config"] == "half")
    keys = [r for r in results if r["task"] == "passkey"]
    assert {r["depth"] for r in keys} == {0, 0.5, 1} and all(r["score"] in (0, 1) for r in keys)
    same = [[r["output"] for r in keys if r["config"] == name] for name in ("dense", "ample")]
    assert same[0] == same[1]


def test_a_table_and_pictures(whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    from lserve_ext.eval import plots

    rows = summary(whole[1], 500)
    assert [row[0] for row in rows] == ["config", *CONFIGS] and len({len(row) for row in rows}) == 1
    assert rows[1][1].endswith("100%") and rows[1][2] == "0.0e+00"
    pytest.importorskip("matplotlib")
    paths = plots.save(whole[1], tmp_path)
    assert sorted(path.name for path in paths) == ["generation.png", "pareto.png", "passkey.png"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_a_run_that_was_cut_short_goes_on(
    model: Any, whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of some interrupts the file is whole, and in the end it says what an undisturbed run says."""
    out, prefill = tmp_path / "eval.json", generate.prefill
    left, interrupts = 0, 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return prefill(*args, **kwargs)

    monkeypatch.setattr(generate, "prefill", failing)
    while interrupts < 20:
        left = 7
        try:
            results = evaluation(model, out).run()
            break
        except KeyboardInterrupt:
            interrupts += 1
            json.loads(out.read_text())
    assert 3 <= interrupts < 20 and without_times(results) == without_times(whole[1])
    assert without_times(json.loads(out.read_text())["results"]) == without_times(whole[1])


def test_lengths_and_configs_are_added_to_a_file(
    model: Any, whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    few = Settings(("text",), (500,), samples=3, positions=40, new_tokens=20, chunk=200)
    evaluation(model, out, few, ["dense", "few"]).run()
    assert len(evaluation(model, out, few, ["dense", "half"]).run()) == 3
    results = evaluation(model, out).run()
    assert without_times(results) == without_times(whole[1])
    assert json.loads(out.read_text())["configs"].keys() == CONFIGS.keys()


def test_a_file_of_something_else(model: Any, whole: tuple[Path, list[dict[str, Any]]]) -> None:
    out, before = whole[0], whole[0].read_bytes()
    with pytest.raises(ValueError, match=r"eval.json: expected results with samples 2, got 3"):
        evaluation(model, out, Settings(samples=2, lengths=(500,), positions=40, new_tokens=20, chunk=200))
    other = {"dense": CONFIGS["dense"], "few": CONFIGS["ample"]}
    with pytest.raises(ValueError, match=r"expected results of 'few' as it is now"):
        Evaluation(model, _tiny.tokenizer(), other, SETTINGS, out, TEXT)
    with pytest.raises(ValueError, match="tasks: expected some of text, generation, passkey"):
        Settings(tasks=("needle",))
    with pytest.raises(ValueError, match="text: expected at least 640 tokens, got 300"):
        Evaluation(model, _tiny.tokenizer(), CONFIGS, SETTINGS, None, TEXT[:300])
    assert out.read_bytes() == before


# ---- bytes ----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_step(model: Any) -> None:
    """Counted by hand: 700 tokens and one, two layers of two heads of 16 channels in float32, pages of 16."""
    ids = torch.randint(0, 258, (1, 701), generator=torch.Generator().manual_seed(0))
    tokens, sealed, residual = 701, 42, 701 - 42 * 16
    listed = (1 + 3) * 16  # sink and list; both local pages are in the residual buffer

    def read(config: SparseConfig) -> float:
        cache = SparseCache(model.config, config)
        with torch.inference_mode():
            generate.prefill(model, ids[:, :700], cache)
            generate.forward(model, ids[:, 700:], cache)
        return cache.read_bytes()

    row, layers = 2 * 16 * 4, 2
    assert read(CONFIGS["dense"]) == layers * 2 * tokens * row
    stats = sealed * 2 * 16 * 4 / 4  # a min and a max, every fourth step
    assert read(CONFIGS["few"]) == layers * 2 * ((listed + residual) * row + stats)
    coded = 2 * 16 + 8 + 2 * 16 * 4 / 16  # INT8, the scale of V, and the grid of a group of keys
    assert read(CONFIGS["half"]) == layers * ((listed + 16) * coded + 2 * residual * row + stats)
    cache_of_h2o = 32 + max(32, residual)  # heavy tokens, and local ones; keys are read once more for their mass
    assert read(CONFIGS["h2o"]) == layers * 2 * cache_of_h2o * row * 1.5


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    _tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    CONFIGS["few"].save(tmp_path / "own.json")
    arguments = [
        "eval", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--lengths", "700",
        "--presets", "quest,alisa", "--budgets", "128", "256", "--positions", "20", "--tasks", "text,ruler_vt",
        "--samples", "1", "--configs", str(tmp_path / "own.json"), "--out", str(tmp_path / "eval.json"),
    ]  # fmt: skip
    assert cli.main([*arguments, "--plots", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    names = ["dense", "quest, 128", "quest, 256", "alisa", "own"]
    lines = [line for line in out.splitlines() if line.startswith(tuple(names))]
    assert [line.split("  ")[0] for line in lines] == names and "ruler_vt" in out
    assert (tmp_path / "pareto.png").exists() and not (tmp_path / "passkey.png").exists()
    assert cli.main(arguments) == 0  # nothing is run again
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(names))] == lines
    for wrong, message in {
        ("--presets", "fast"): "preset: expected one of",
        ("--tasks", "needle"): "tasks: expected some of",
        ("--lengths", "5000"): "--lengths: expected at most",
        ("--budgets", "0"): "--budgets: expected at least 1, got 0",
        ("--plots", "/nowhere"): "--plots: expected a folder that exists",
        ("--samples", "3"): "expected results with samples 3, got 1",
    }.items():
        assert cli.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
