"""lm-eval-harness over a `SparseCache`, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _tiny
import pytest

from lserve_ext import SparseConfig
from lserve_ext.eval.recall import Recall

lm_eval = pytest.importorskip("lm_eval", reason="needs lserve_ext[harness]")

from lm_eval.tasks import TaskManager  # noqa: E402

from lserve_ext.eval import harness, ruler  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, and a task of its own whose prompts are RULER's."""
    _tiny.llama().save_pretrained(tmp_path / "model")
    _tiny.tokenizer().save_pretrained(tmp_path / "model")
    tokenizer, rows = _tiny.tokenizer(), []
    for seed in range(3):
        prompt = ruler.prompt("ruler_vt", tokenizer, 700 + 150 * seed, seed=seed)
        text = tokenizer.decode(prompt.ids[0], skip_special_tokens=True)
        rows.append(json.dumps({"prompt": text, "answer": prompt.answers[0]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "own_vt.yaml").write_text(
        f"""
task: own_vt
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["@@"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
    )
    return tmp_path


def run(folder: Path, model: str, **arguments: Any) -> tuple[list[str], Recall]:
    """Outputs, and the calls of ops."""
    given = {
        "pretrained": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 3,
        "max_length": 2048,
    }
    with Recall() as recall:
        found = lm_eval.simple_evaluate(
            model=model, model_args=given | arguments, tasks=["own_vt"], log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder)),
        )  # fmt: skip
    samples = sorted(found["samples"]["own_vt"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples], recall


@pytest.mark.slow
def test_dense_gives_what_the_harness_gives_and_lists_are_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    theirs, _ = run(folder, "hf")
    dense, calls = run(folder, "lserve", preset="dense")
    assert dense == theirs and len(dense) == 3
    assert calls.calls["decode"] == calls.calls["append_kv"] - 2 and "page_scores" not in calls.calls
    sparse, calls = run(folder, "lserve", streaming_heads=None, budget_tokens=512, reuse_interval=1)
    assert calls.calls["page_scores"] == calls.calls["decode"] > 0 and sparse != dense
    SparseConfig.quest(budget_tokens=64).save(folder / "own.json")
    _, calls = run(folder, "lserve", config=str(folder / "own.json"))
    assert calls.calls["decode"] > 0


def test_wrong_fields() -> None:
    with pytest.raises(ValueError, match="preset: expected one of"):
        harness.LServe("nowhere", preset="fast")
    with pytest.raises(ValueError, match="budget_tokens: expected"):
        harness.LServe("nowhere", preset="quest", budget_tokens=-1)
