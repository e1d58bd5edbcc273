"""The command: doctor, and generate and calibrate end to end on a tiny model in a folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch

from lserve_ext import HeadPattern, SparseConfig, __version__, cli
from lserve_ext.config import PRESETS
from lserve_ext.eval.tasks import passkey_prompt, passkey_recital

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, a text and a pattern."""
    path = tmp_path_factory.mktemp("tiny")
    _tiny.llama(layers=3).save_pretrained(path)
    _tiny.tokenizer().save_pretrained(path)
    (path / "text.txt").write_text(_tiny.text(800))
    HeadPattern(((0.0, 1.0), (1.0, 0.0), (0.2, 0.8))).save(path / "heads.json")
    return path


def generate(folder: Path, *arguments: str) -> list[str]:
    model = ["--model", str(folder), "--text", str(folder / "text.txt")]
    return ["generate", *model, "--length", "900", "--new-tokens", "5", "--chunk", "256", *arguments]


def cells(out: str, row: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith(row))
    return [cell for cell in re.split(r"\s{2,}", line.removeprefix(row)) if cell]


@pytest.mark.parametrize("preset", PRESETS)
def test_generate_runs_every_preset(preset: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", preset, "--compare", "dense"]
    if preset in ("duo", "lserve"):
        arguments += ["--streaming-heads", str(folder / "heads.json")]
    if preset in ("quest", "h2o", "lserve", "moments"):
        arguments += ["--budget-tokens", "512"]
    assert cli.main(generate(folder, *arguments)) == 0
    out, err = capsys.readouterr()
    assert "900 tokens of text, the pass key" in out
    assert len(cells(out, "pass key found")) == 2
    dense, ours = (int(cell.replace(",", "")) for cell in cells(out, "KV bytes, device"))
    assert ours < dense or preset in ("dense", "quest", "h2o")  # a budget bounds what is read, not what is stored
    share = [int(cell.split("(")[1].rstrip("%)")) for cell in cells(out, "attended in decode")]
    assert share[0] == 100 and (share[1] < 100) == (preset != "dense")
    assert f"{preset}: prefill" in err and f"dense{' (compared)' * (preset == 'dense')}: decode" in err


def test_a_budget_above_the_context_agrees_with_dense(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(generate(folder, "--preset", "quest", "--budget-tokens", "4096", "--compare", "dense")) == 0
    assert cells(capsys.readouterr().out, "agreement with dense")[1].startswith("100% of tokens")


def test_fields_are_flags_and_a_file_holds_them_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SparseConfig.lserve(streaming_heads=None, budget_tokens=640).save(folder / "sparse.json")
    assert cli.main(generate(folder, "--config", str(folder / "sparse.json"), "--reuse-interval", "2")) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[3].strip() == "sparse.json"
    pages = int(cells(out, "attended in decode")[0].split()[0])
    assert 640 // 64 - 1 <= pages <= 640 // 64 + 2  # the residual buffer is not in the budget


def test_a_question_takes_the_place_of_the_pass_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(generate(folder, "--preset", "dense", "--question", "Why?")) == 0
    out = capsys.readouterr().out
    assert "pass key" not in out and "answer" in out


WRONG: dict[str, tuple[list[str], str]] = {
    "no pattern": (["--preset", "lserve"], "which heads stream is never guessed"),
    "field": (["--preset", "streaming", "--page-size", "0"], "SparseConfig.page_size: expected an int of at least 1"),
    "length": (["--preset", "dense", "--length", "9000"], "--length: expected at most 4091 for this model, got 9000"),
    "negative length": (["--preset", "dense", "--length", "-5"], "--length: expected at least 1, got -5"),
    "question": (["--preset", "dense", "--question", "why " * 2000], "--question: expected text, question and new"),
    "pattern file": (
        ["--preset", "streaming", "--streaming-heads", "no.json"],
        "expected a file or the name of a shipped",
    ),
    "pattern folder": (["--preset", "duo", "--streaming-heads", "{tmp}"], "expected a file or the name of a shipped"),
    "chunk 0": (["--preset", "dense", "--chunk", "0"], "--chunk: expected at least 1, got 0"),
    "chunk -1": (["--preset", "dense", "--chunk", "-1"], "--chunk: expected at least 1, got -1"),
    "depth nan": (["--preset", "dense", "--depth", "nan"], "--depth: expected a number from 0 to 1, got nan"),
    "depth 5": (["--preset", "dense", "--depth", "5"], "--depth: expected a number from 0 to 1, got 5"),
    "depth -1": (["--preset", "dense", "--depth", "-1"], "--depth: expected a number from 0 to 1, got -1"),
    "new tokens": (["--preset", "dense", "--new-tokens", "0"], "--new-tokens: expected at least 1, got 0"),
    "device": (["--preset", "dense", "--device", "cdua"], "--device: expected cpu, or cuda where there is one"),
    "another device": (["--preset", "dense", "--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
    "preset and config": (
        ["--preset", "dense", "--config", "{tmp}/c.json"],
        "--config: expected no --preset beside it",
    ),
    "config": (["--config", "{tmp}/none.json"], "none.json"),
    "config folder": (["--config", "{tmp}"], "Is a directory"),
    "config text": (["--config", "{tmp}/latin.txt"], "expected UTF-8 text in"),
    "config list": (["--config", "{tmp}/list.json"], "expected a JSON object in"),
    "config deep": (["--config", "{tmp}/deep.json"], "expected JSON in"),
    "config field": (["--config", "{tmp}/field.json"], "field.json: SparseConfig: expected the fields"),
    "config number": (["--config", "{tmp}/huge.json"], "huge.json: SparseConfig.page_size: expected"),
    "text": (["--preset", "dense", "--text", "{tmp}/none.txt"], "none.txt"),
    "text folder": (["--preset", "dense", "--text", "{tmp}"], "Is a directory"),
    "text latin": (["--preset", "dense", "--text", "{tmp}/latin.txt"], "--text: expected UTF-8 text in"),
    "text empty": (["--preset", "dense", "--text", "{tmp}/empty.txt"], "--text: expected a text, got"),
    "model": (["--preset", "dense", "--model", "{tmp}/none"], "--model: expected a folder or hub name with a model"),
    "model empty": (["--preset", "dense", "--model", "{tmp}"], "--model: expected a folder or hub name with a model"),
    "model file": (["--preset", "dense", "--model", "{tmp}/empty.txt"], "--model: expected a folder or hub name"),
}


@pytest.fixture(scope="module")
def clutter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are something else than what a flag wants."""
    path = tmp_path_factory.mktemp("clutter")
    (path / "latin.txt").write_bytes("détail".encode("latin-1") * 100)
    (path / "empty.txt").write_text(" \n")
    (path / "list.json").write_text("[1]")
    (path / "deep.json").write_text('{"a":' * 100_000)
    (path / "field.json").write_text('{"page": 3}')
    (path / "huge.json").write_text('{"page_size": ' + "9" * 40 + "}")
    (path / "c.json").write_text("{}")
    return path


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_ends_with_a_message(
    what: str, folder: Path, clutter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = WRONG[what]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(generate(folder, *(argument.replace("{tmp}", str(clutter)) for argument in arguments))) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(generate(folder, "--preset", "dense", "--device", "cuda")) == 2
    assert "--device: expected cpu, or cuda where there is one, got 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fraction", "nan"], "--fraction: expected a number from 0 to 1, got nan"),
        (["--samples", "0"], "--samples: expected at least 1, got 0"),
        (["--out", "{tmp}/none/heads.json"], "--out: expected a file in a folder that exists"),
        (["--out", "{tmp}"], "--out: expected a file in a folder that exists"),
        (["--length", "9000"], "--length: expected at most 4096 for this model, got 9000"),
        (["--text", "{tmp}/empty.txt"], "--text: expected a text"),
    ],
)
def test_calibrate_checks_before_it_works(
    arguments: list[str], message: str, folder: Path, clutter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.replace("{tmp}", str(clutter)) for argument in arguments]
    assert cli.main(["calibrate", "--model", str(folder), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and "layers" not in err  # no progress bar yet


def test_a_budget_as_it_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for flag in ("--budget", "--budget-tokens"):
        assert cli.main(generate(folder, "--preset", "quest", flag, "512")) == 0
        outs.append(cells(capsys.readouterr().out, "attended in decode"))
    assert outs[0] == outs[1]


def test_control_c_ends_with_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_load", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert cli.main(generate(folder, "--preset", "dense")) == 130
    assert capsys.readouterr().err == "\nlserve: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_takes(tmp_path: Path) -> None:
    elsewhere: dict[str, Any] = {
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": tmp_path,
        "env": os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    }
    command = [sys.executable, "-c", "import sys; from lserve_ext.cli import main; sys.exit(main(['doctor']))"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, **elsewhere)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, **elsewhere)
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_every_flag_has_help() -> None:
    parser = cli._parser()
    commands = next(action for action in parser._actions if isinstance(action.choices, dict)).choices
    for name, command in commands.items():  # type: ignore[union-attr]
        for action in command._actions:
            assert action.help and len(action.help) > 5, f"{name} {action.option_strings}"


def test_calibrate_writes_a_pattern_that_generate_takes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.json"
    samples = ["--length", "2500", "--samples", "1"]
    assert cli.main(["calibrate", "--model", str(folder), "--out", str(out), *samples]) == 0
    assert "* streams" in capsys.readouterr().out
    assert sum(map(sum, map(HeadPattern.load(out).streaming, range(3)))) == 3
    assert cli.main(generate(folder, "--preset", "duo", "--streaming-heads", str(out))) == 0


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert cells(out, "lserve_ext") == [__version__]
    for op in ("append_kv", "decode", "prefill", "select_tokens", "page_stats"):
        assert cells(out, op)[0] == "yes"
    assert "`lserve generate` would use the " in out


def test_help_explains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    out = capsys.readouterr().out
    assert "--budget-tokens" in out and "what a retrieval head attends in decode" in " ".join(out.split())


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_pass_key_stands_at_its_depth(depth: float) -> None:
    tokenizer, text = _tiny.tokenizer(), _tiny.text(800)
    ids, key = passkey_prompt(tokenizer, 1500, depth=depth, seed=3, text=text)
    assert ids.shape == (1, 1500) and ids[0, 0] == tokenizer.bos_token_id
    prompt = tokenizer.decode(ids[0])
    assert prompt.count(key) == 2 and prompt.endswith("secret pass key of this document is")
    assert abs(prompt.index("Here is the secret") / 1500 - depth * 0.8) < 0.12  # needle and question take a fifth
    assert passkey_prompt(tokenizer, 1500, depth=depth, seed=3, text=text)[1] == key
    assert passkey_prompt(tokenizer, 1500, depth=depth, seed=4, text=text)[1] != key


def test_a_recital_marks_the_tokens_that_predict_keys() -> None:
    tokenizer = _tiny.tokenizer()
    ids, predicts = passkey_recital(tokenizer, 2000, ["Ann", "Ben"], seed=1, text=_tiny.text(800))
    assert ids.shape == (1, 2000) and predicts.shape == (2000,)
    predicted = tokenizer.decode(ids[0, 1:][predicts[:-1]])
    keys = predicted.split()
    assert len(keys) == 2 and all(re.fullmatch(r"\d{5}", key) for key in keys)
    assert all(tokenizer.decode(ids[0]).count(key) == 3 for key in keys)


@pytest.mark.slow
def test_demo_finds_the_pass_key_in_a_smaller_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """The main job, on a real model: dense, lserve and alisa; and lserve with a tenth of its pages on the device."""
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert cells(out, "pass key found") == ["yes"] * 4
    dense, lserve, alisa, tenth = (int(cell.replace(",", "")) for cell in cells(out, "KV bytes, device"))
    assert tenth < lserve / 2 and cells(out, "answer")[1] == cells(out, "answer")[3]
    assert lserve < alisa < dense / 2  # lserve also leaves out what half of the heads do not keep
    shares = [int(cell.split("(")[1].rstrip("%)")) for cell in cells(out, "attended in decode")]
    assert shares[0] == 100 and shares[1] == shares[3] < 30 and shares[2] <= 50


def test_a_source_tree_that_is_not_built_says_so(tmp_path: Path) -> None:
    package = Path(cli.__file__).parent
    shutil.copytree(package, tmp_path / "lserve_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-c", "import lserve_ext"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "python setup.py build_ext --inplace" in done.stderr
