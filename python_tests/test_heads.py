"""HeadPattern: the quantile, files, tensor parallel slices; and calibration on models of known behaviour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lserve_ext import HeadPattern
from lserve_ext.calibrate import calibrate
from lserve_ext.heads import of_rank, resolve, shipped

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
def test_parts_of_the_ranks_put_together_are_the_whole(pattern: HeadPattern, world: int) -> None:
    rows = [pattern.streaming(layer) for layer in range(pattern.num_layers)]
    if pattern.num_heads % world:
        with pytest.raises(ValueError, match=f"expected {pattern.num_heads} kv heads or an equal share of them"):
            of_rank(rows[0], pattern.num_heads + 1, 0)
        return
    for row in rows:
        parts = [of_rank(row, pattern.num_heads // world, rank) for rank in range(world)]
        assert sum(map(tuple, parts), ()) == row
    assert of_rank(True, 3, 1) == [True] * 3


def test_resolve() -> None:
    pattern = HeadPattern(((0.0, 1.0), (1.0, 0.0)))
    assert resolve(None, 2, 2) == resolve(0.0, 2, 2) == [False] * 2
    assert resolve(1.0, 2, 3) == [True] * 2
    assert resolve(pattern, 2, 2) == [(True, False), (False, True)]
    with pytest.raises(ValueError, match=r"expected a pattern of 2 layers x 3 kv heads, got 2 x 2"):
        resolve(pattern, 2, 3)
    with pytest.raises(ValueError, match=r"got the fraction 0.5: which heads stream is never.*lserve calibrate"):
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
    with pytest.raises(ValueError, match=r"scores: expected rows of one length, got 2 rows of lengths \[1, 2\]"):
        HeadPattern(((1.0,), (1.0, 2.0)))
    with pytest.raises(ValueError, match=r"scores: expected rows of one length, got 0 rows"):
        HeadPattern(())
    with pytest.raises(ValueError, match="scores: expected finite numbers"):
        HeadPattern(((float("nan"),),))
    with pytest.raises(TypeError, match="scores: expected rows of numbers, got 'ab'"):
        HeadPattern("ab")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fraction: expected a number from 0 to 1, got 2"):
        HeadPattern(((1.0,),), 2)
    with pytest.raises(TypeError, match="fraction: expected a number from 0 to 1, got 'half'"):
        HeadPattern(((1.0,),), "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected the fields scores, fraction, metadata, got \['gates'\]"):
        HeadPattern.from_dict({"gates": []})
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.tsv").write_text("1.0\tx\n")
    for name in ("bad.json", "bad.tsv"):
        with pytest.raises(ValueError, match=f"expected JSON.* in .*{name}"):
            HeadPattern.load(tmp_path / name)


# ---- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_measures_every_head_and_leaves_the_model_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, known = _tiny.llama(), list(ALL_ATTENTION_FUNCTIONS)
    before = model.config._attn_implementation
    pattern = calibrate(model, _tiny.tokenizer(), text=_tiny.text(), length=3000, samples=2, fraction=0.25)
    assert (pattern.num_layers, pattern.num_heads, pattern.fraction) == (2, 2, 0.25)
    assert all(score > 0 for row in pattern.scores for score in row)
    assert pattern.metadata["samples"] == 2
    assert model.config._attn_implementation == before and list(ALL_ATTENTION_FUNCTIONS) == known
    assert "4/4" in capsys.readouterr().err  # the progress bar


def test_calibration_repeats_and_the_seed_matters() -> None:
    model, tokenizer, text = _tiny.llama(), _tiny.tokenizer(), _tiny.text()
    scores = [calibrate(model, tokenizer, text=text, length=3000, samples=1, seed=seed).scores for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("steps", [0, 12])
@pytest.mark.parametrize("far", [0, 1, 2])
def test_the_head_that_looks_far_back_has_the_highest_score(far: int, steps: int) -> None:
    """Queries and keys are constants: 0 in one kv head, which so attends evenly to everything; in the others so large
    that after rotary embedding only the nearest tokens count."""
    model = _tiny.llama(layers=1, kv_heads=3, num_attention_heads=6, hidden_size=96, attention_bias=True)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.view(3, -1).copy_(torch.full((3, 1), 10.0).index_fill(0, torch.tensor(far), 0.0))
    given = {"text": _tiny.text(), "length": 3000, "samples": 1, "fraction": 2 / 3, "steps": steps}
    pattern = calibrate(model, _tiny.tokenizer(), **given)
    assert max(range(3), key=pattern.scores[0].__getitem__) == far
    assert pattern.streaming(0) == tuple(head != far for head in range(3))


def test_training_leaves_the_model_as_it_was_and_repeats() -> None:
    model = _tiny.llama()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (x.clone(), x.requires_grad) for name, x in model.named_parameters()}
    given = {"text": _tiny.text(), "length": 2200, "steps": 3}
    with torch.no_grad():
        first, second = (calibrate(model, _tiny.tokenizer(), **given) for _ in range(2))
    assert first == second and first.metadata["steps"] == 3 and "samples" not in first.metadata
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name][0]) and x.requires_grad == before[name][1] and x.grad is None
    assert model.config._attn_implementation == "sdpa"


def test_a_gate_of_one_is_the_model_and_a_gate_of_zero_streams() -> None:
    """Against the cache: with all gates at 0, hidden states are those of `SparseConfig.streaming`."""
    from lserve_ext import SparseCache, SparseConfig
    from lserve_ext import calibrate as module

    model = _tiny.llama()
    ids = torch.randint(0, 258, (1, 900), generator=torch.Generator().manual_seed(0))
    gated = module._Gated(sink=2, window=4)
    with torch.no_grad(), module._attention(model, gated):
        whole = model.base_model(ids, use_cache=False).last_hidden_state
        gated.streams = True
        same = model.base_model(ids, use_cache=False).last_hidden_state
        for gate in gated.gates.values():
            gate.zero_()
        streamed = model.base_model(ids, use_cache=False).last_hidden_state
    model.set_attn_implementation("lserve")
    with torch.no_grad():
        cache = SparseCache(model.config, SparseConfig.streaming())
        want = model.base_model(ids, use_cache=True, **_tiny.cached(cache)).last_hidden_state
    assert torch.allclose(same, whole, atol=1e-5) and not torch.allclose(streamed, whole, atol=1e-2)
    assert torch.allclose(streamed, want, atol=1e-4)


def test_calibration_wants_a_text_of_that_length() -> None:
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        calibrate(_tiny.llama(), _tiny.tokenizer(), steps=-1)
    with pytest.raises(ValueError, match="length: expected more than sink and local, 384, got 300"):
        calibrate(_tiny.llama(), _tiny.tokenizer(), length=300)
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        calibrate(_tiny.llama(), _tiny.tokenizer(), samples=0)
    with pytest.raises(ValueError, match=r"length: expected .* tokens with this text, got 3000"):
        calibrate(_tiny.llama(), _tiny.tokenizer(), text="short", length=3000, samples=1)


BAD_FILES = {
    "null metadata": ('{"scores": [[1.0]], "metadata": null}', TypeError, "metadata: expected a mapping"),
    "deep": ('{"scores": ' + "[" * 100_000, ValueError, "expected JSON in"),
    "huge": ('{"scores": [[' + "9" * 400 + "]]}", TypeError, "scores: expected rows of numbers"),
    "rows": ('{"scores": [[1.0], [1.0, 2.0]]}', ValueError, "scores: expected rows of one length"),
    "null": ('{"scores": null}', TypeError, "scores: expected rows of numbers"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_malformed_pattern_names_file_and_field(what: str, tmp_path: Path) -> None:
    text, kind, message = BAD_FILES[what]
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(kind, match=message) as caught:
        HeadPattern.load(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    pattern = HeadPattern(((0.0, 1.0),))
    pattern.save(tmp_path / "heads.json")
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "heads.json").read_bytes())
    assert HeadPattern.load(tmp_path / "bom.json") == pattern


def test_a_full_disk_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "heads.json"
    HeadPattern(((0.0, 1.0),)).save(path)
    before = path.read_bytes()

    def full(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            HeadPattern(((1.0, 0.0),)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_calibration_skips_the_layers_that_are_not_ours() -> None:
    """A hybrid model with sinks: windows in every other layer, which stay transformers'."""
    import transformers

    fields = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 16, "vocab_size": 258, "num_hidden_layers": 4, "max_position_embeddings": 4096,
              "sliding_window": 64, "num_local_experts": 2, "num_experts_per_tok": 1}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**fields, bos_token_id=0, eos_token_id=None)
    ).eval()
    pattern = calibrate(model, _tiny.tokenizer(), text=_tiny.text(800), length=2500, samples=1)
    assert [len(row) for row in pattern.scores] == [0, 2, 0, 2]
    assert all(score > 0 for row in pattern.scores for score in row)
    assert sum(map(sum, map(pattern.streaming, range(4)))) == 2
