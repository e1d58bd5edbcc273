"""HeadPattern: the quantile, files, tensor parallel slices; and calibration on models of known behaviour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve_ext import HeadPattern
from lserve_ext.heads import resolve, shipped

shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))


@st.composite
def patterns(draw: st.DrawFn) -> HeadPattern:
    layers, heads = draw(shapes)
    score = st.sampled_from([0.0, 0.25, 1.0]) | st.floats(-10, 10)  # the former: ties
    rows = draw(st.lists(st.lists(score, min_size=heads, max_size=heads), min_size=layers, max_size=layers))
    return HeadPattern(tuple(map(tuple, rows)), draw(st.floats(0, 1)), {"model": "m"})


@given(patterns())
def test_the_share_of_streaming_heads_is_exact_and_they_have_the_lowest_scores(pattern: HeadPattern) -> None:
    cells = [
        (score, layer, head, pattern.streaming(layer)[head])
        for layer, row in enumerate(pattern.scores)
        for head, score in enumerate(row)
    ]
    assert sum(cell[3] for cell in cells) == round(pattern.fraction * len(cells))
    streams = [cell[:3] for cell in cells if cell[3]]
    retrieves = [cell[:3] for cell in cells if not cell[3]]
    assert not streams or not retrieves or max(streams) < min(retrieves)


def test_ties_go_by_layer_then_head() -> None:
    pattern = HeadPattern(((1.0,) * 3,) * 2, 0.5)
    assert [pattern.streaming(layer) for layer in range(2)] == [(True, True, True), (False, False, False)]
    assert pattern.with_fraction(1 / 3).streaming(0) == (True, True, False)


@given(patterns())
def test_files_hold_every_bit(pattern: HeadPattern) -> None:
    assert HeadPattern.from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern


def test_save_and_load(tmp_path: Path) -> None:
    pattern = HeadPattern(((0.1, 1 / 3), (2.0, -1e-30)), 0.3, {"model": "m", "samples": 4})
    pattern.save(tmp_path / "heads.json")
    assert HeadPattern.load(tmp_path / "heads.json") == pattern
    assert HeadPattern.load(str(tmp_path / "heads.json")).metadata == {"model": "m", "samples": 4}


def test_duo_attentions_published_tables_load_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(
        "1.000000000000000000e+00\t2.5e-01\n0.000000000000000000e+00\t9.0e-01\n"
    )
    pattern = HeadPattern.load(tmp_path / "full_attention_heads.tsv")
    assert pattern.scores == ((1.0, 0.25), (0.0, 0.9)) and pattern.fraction == 0.5
    assert [pattern.streaming(layer) for layer in range(2)] == [(False, True), (True, False)]


@given(pattern=patterns(), world=st.integers(1, 6))
def test_slices_of_the_ranks_put_together_are_the_whole(pattern: HeadPattern, world: int) -> None:
    if pattern.num_heads % world:
        with pytest.raises(ValueError, match=f"expected a world that divides {pattern.num_heads} heads, got {world}"):
            pattern.slice(0, world)
        return
    parts = [pattern.slice(rank, world) for rank in range(world)]
    for layer in range(pattern.num_layers):
        assert sum((part.streaming(layer) for part in parts), ()) == pattern.streaming(layer)


def test_slice_wants_a_rank_of_the_world() -> None:
    with pytest.raises(ValueError, match="expected a rank from 0 to 1, got 2"):
        HeadPattern(((0.0, 1.0),)).slice(2, 2)


def test_resolve() -> None:
    pattern = HeadPattern(((0.0, 1.0), (1.0, 0.0)))
    assert resolve(None, 2, 2) == resolve(0.0, 2, 2) == [(False, False)] * 2
    assert resolve(1.0, 2, 3) == [(True, True, True)] * 2
    assert resolve(pattern, 2, 2) == [(True, False), (False, True)]
    with pytest.raises(ValueError, match=r"expected a pattern of 2 layers x 3 kv heads, got 2 x 2"):
        resolve(pattern, 2, 3)
    with pytest.raises(ValueError, match=r"got the fraction 0.5: which heads stream is never guessed.*lserve calibrate"):
        resolve(0.5, 2, 2)


def test_resolve_reads_files(tmp_path: Path) -> None:
    HeadPattern(((0.0, 1.0),)).save(tmp_path / "heads.json")
    assert resolve(tmp_path / "heads.json", 1, 2) == resolve(str(tmp_path / "heads.json"), 1, 2) == [(True, False)]


def test_the_shipped_pattern_loads_by_name() -> None:
    assert "smollm2-135m-instruct" in shipped()
    pattern = HeadPattern.load("smollm2-135m-instruct")
    assert (pattern.num_layers, pattern.num_heads) == (30, 3)
    assert sum(map(sum, resolve("smollm2-135m-instruct", 30, 3))) == 45


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a shipped pattern \(smollm2-135m-instruct\), got 'no-such'"):
        HeadPattern.load("no-such")
    with pytest.raises(ValueError, match=r"scores: expected one or more rows of one length, got 2 of lengths \[1, 2\]"):
        HeadPattern(((1.0,), (1.0, 2.0)))
    with pytest.raises(ValueError, match=r"scores: expected one or more rows of one length, got 0"):
        HeadPattern(())
    with pytest.raises(ValueError, match="scores: expected finite numbers"):
        HeadPattern(((float("nan"),),))
    with pytest.raises(TypeError, match="scores: expected rows of numbers, got 'ab'"):
        HeadPattern("ab")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fraction: expected a number from 0 to 1, got 2"):
        HeadPattern(((1.0,),), 2)
    with pytest.raises(TypeError, match="fraction: expected a number from 0 to 1, got 'half'"):
        HeadPattern(((1.0,),), "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the fields scores, fraction, metadata, got 'gates'"):
        HeadPattern.from_dict({"gates": []})
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.tsv").write_text("1.0\tx\n")
    for name in ("bad.json", "bad.tsv"):
        with pytest.raises(ValueError, match=f"expected JSON or a TSV of gates in .*{name}"):
            HeadPattern.load(tmp_path / name)
