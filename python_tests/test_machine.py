"""A machine in figures: what is measured, what a file may say, and what comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lserve_ext import cli, machine
from lserve_ext.machine import FIGURES, Figure, Profile


def test_a_curve() -> None:
    figure = Figure("bytes/s", "measured", ((1024, 10.0), (4096, 30.0)))
    assert [figure.at(x) for x in (0, 1, 1024, 2048, 4096, 1e9)] == pytest.approx([10, 10, 10, 20, 30, 30])
    assert Figure("s", "nominal", ((0, 2.5),)).at(12345) == 2.5


def test_seconds() -> None:
    figures = {"fetch": Figure("bytes/s", "measured", ((1000, 100.0), (10000, 400.0)))}
    profile = Profile("tiny", "cpu", figures)
    assert profile.seconds("fetch", 800, 1000) == 8 and profile.seconds("fetch", 800, 10000) == 2
    assert profile.seconds("load", 0) == 0
    with pytest.raises(ValueError, match=r"profile 'tiny': expected a figure 'load' \(bytes/s from the disk"):
        profile.figure("load")


def test_a_measured_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure is there, of a size that a machine can have; and comes back from the file."""
    out = tmp_path / "machine.json"
    assert cli.main(["profile", "--name", "here", "--disk", str(tmp_path / "kv"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    profile = Profile.load(out)
    assert set(profile.figures) == set(FIGURES) and profile.name == "here"
    assert all(figure.how == "measured" and name in shown for name, figure in profile.figures.items())
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    assert not list((tmp_path / "kv").iterdir())
    for name in ("memory", "linear.float32", "attend.auto", "fetch"):
        assert 1e8 < profile.figure(name, 1 << 20) < 1e13, name
    for name in ("layer", "layer.slots", "layer.frames", "layer.packed"):
        assert 0 < profile.figure(name) < 1, name
    assert profile.figure("fetch", 8192) <= 4 * profile.figure("memory")


@pytest.mark.parametrize("name", machine.shipped())
def test_shipped_profiles(name: str) -> None:
    profile = Profile.load(name)
    assert profile.name == name and set(FIGURES) - set(profile.figures) <= {
        "load",
        "store",
        "layer.frames",
        "disk_bytes",
        "recompute.float32",
        "recompute.bfloat16",
    }
    for figure in profile.figures.values():
        assert (figure.how == "nominal") == bool(figure.source)
    assert profile.device == "cuda" or all(figure.how == "measured" for figure in profile.figures.values())


def test_bad_profiles(tmp_path: Path) -> None:
    good = Profile("x", "cpu", {"layer": Figure("s", "measured", ((0, 1.0),))}).to_dict()
    curve, of_layer = good["figures"]["layer"], "Profile.figures.layer: "
    bad = [
        ({**good, "device": "tpu"}, "Profile.device: expected 'cpu' or 'cuda', got 'tpu'"),
        ({**good, "format": 9}, "Profile.format: expected 1, got 9"),
        ({**good, "figures": {"speed": curve}}, "Profile.figures: expected .*, got 'speed'"),
        ({**good, "figures": {"layer": {**curve, "how": "guessed"}}}, of_layer + "how: expected 'measured'"),
        ({**good, "figures": {"layer": {**curve, "points": [[0, -1]]}}}, of_layer + "points: expected"),
        ({**good, "figures": {"layer": {**curve, "points": [[2, 1], [1, 1]]}}}, of_layer + "points: expected"),
        ({**good, "figures": {"layer": {"unit": "s"}}}, of_layer + "'points'"),
        ({**good, "figures": []}, "Profile: expected the fields device, figures, name"),
        ({"name": "x"}, "Profile: expected the fields device, figures, name, got name"),
    ]  # fmt: skip
    for fields, text in bad:
        with pytest.raises(ValueError, match=text):
            Profile.from_dict(fields)
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"bad\.json: "):
            Profile.load(path)
    with pytest.raises(ValueError, match=r"profile: expected a file or one of .*h100-pcie5.*, got 'nowhere'"):
        Profile.load("nowhere")
    assert cli.main(["profile", "--out", str(tmp_path)]) == 2
