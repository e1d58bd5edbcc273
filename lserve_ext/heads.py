"""Which heads stream: patterns of scored heads, and a training-free way to make one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files

_SHIPPED = Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class HeadPattern:
    """A score for every kv head of a model; the `fraction` of them with the lowest scores streams.

    scores    [layers][heads]; the higher, the more a head needs far tokens; no heads for layers of a hybrid model that
              have no full attention
    fraction  share of streaming heads over all layers, so that their number varies by layer
    metadata  where the scores come from: model, method
    """

    scores: tuple[tuple[float, ...], ...]
    fraction: float = 0.5
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)):
            raise TypeError(f"HeadPattern.fraction: expected a number from 0 to 1, got {self.fraction!r}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"HeadPattern.fraction: expected a number from 0 to 1, got {self.fraction!r}")
        try:
            rows = tuple(tuple(float(score) for score in row) for row in self.scores)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"HeadPattern.scores: expected rows of numbers, got {self.scores!r:.80}") from None
        widths = sorted({len(row) for row in rows if row})
        if len(widths) != 1:
            raise ValueError(
                f"HeadPattern.scores: expected rows of one length, got {len(rows)} rows of lengths {widths}"
            )
        if not all(math.isfinite(score) for row in rows for score in row):
            raise ValueError("HeadPattern.scores: expected finite numbers, got NaN or infinity")
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"HeadPattern.metadata: expected a mapping, got {self.metadata!r:.80}")
        object.__setattr__(self, "scores", rows)
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def num_layers(self) -> int:
        return len(self.scores)

    @property
    def num_heads(self) -> int:
        """Kv heads of a layer with full attention."""
        return max(map(len, self.scores))

    def streaming(self, layer: int) -> tuple[bool, ...]:
        """Which heads of a layer stream: exactly round(fraction * heads of the model) do; of equal scores, the first in
        (layer, head) order."""
        return self._streaming()[layer]

    def _streaming(self) -> list[tuple[bool, ...]]:
        order = sorted((score, layer, head) for layer, row in enumerate(self.scores) for head, score in enumerate(row))
        chosen = {(layer, head) for _, layer, head in order[: round(self.fraction * len(order))]}
        return [tuple((layer, head) in chosen for head in range(len(row))) for layer, row in enumerate(self.scores)]

    def with_fraction(self, fraction: float) -> HeadPattern:
        """The same scores, cut elsewhere."""
        return dataclasses.replace(self, fraction=fraction)

    def slice(self, rank: int, world: int) -> HeadPattern:
        """The heads that one of `world` tensor parallel ranks holds: a contiguous part of every layer.

        Which of them stream is decided over the whole model, so scores become 0 (streaming) and 1.
        """
        if not 0 <= rank < world:
            raise ValueError(f"HeadPattern.slice: expected a rank from 0 to {world - 1}, got {rank}")
        if self.num_heads % world:
            raise ValueError(f"HeadPattern.slice: expected a world that divides {self.num_heads} heads, got {world}")
        width = self.num_heads // world
        rows = [row[rank * width : (rank + 1) * width] for row in self._streaming()]
        count = sum(map(sum, rows))
        scores = tuple(tuple(0.0 if streams else 1.0 for streams in row) for row in rows)
        return HeadPattern(scores, count / (len(rows) * width), self.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        scores = [list(row) for row in self.scores]
        return {"fraction": self.fraction, "metadata": dict(self.metadata), "scores": scores}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HeadPattern:
        """The inverse of `to_dict`; fraction and metadata may be left out."""
        unknown = sorted(set(fields) - {"fraction", "metadata", "scores"})
        if unknown or "scores" not in fields:
            raise ValueError(f"HeadPattern: expected the fields scores, fraction, metadata, got {sorted(fields)}")
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, a layer a line."""
        rows = ",\n".join("    " + json.dumps(row) for row in self.scores)
        head = json.dumps({"fraction": self.fraction, "metadata": dict(self.metadata)}, indent=2).removesuffix("\n}")
        files.write_text(path, f'{head},\n  "scores": [\n{rows}\n  ]\n}}\n')

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> HeadPattern:
        """Reads a file of `save`, DuoAttention's published TSV (a row of gates a layer), or a shipped one by name."""
        path = Path(source)
        if not path.is_file():
            path = _SHIPPED / f"{os.fspath(source)}.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"HeadPattern: expected a file or the name of a shipped pattern ({', '.join(shipped())}), "
                f"got {os.fspath(source)!r}"
            )
        text = files.read_text(path, "HeadPattern")
        try:
            if not text.lstrip().startswith("{"):
                return cls(_parse_tsv(text, path), metadata={"method": "DuoAttention gates", "file": path.name})
            return cls.from_dict(files.read_json(text, "HeadPattern", path))
        except (TypeError, ValueError) as error:
            raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from None


def _parse_tsv(text: str, path: Path) -> tuple[tuple[float, ...], ...]:
    try:
        return tuple(tuple(float(gate) for gate in line.split("\t")) for line in text.splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f"HeadPattern: expected JSON or a TSV of gates in {str(path)!r}, got {error}") from None


def shipped() -> list[str]:
    """Names of the patterns that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def resolve(
    streaming: HeadPattern | str | os.PathLike[str] | float | None,
    num_layers: int,
    num_heads: int,
    used: Sequence[int] | None = None,
) -> list[tuple[bool, ...] | bool]:
    """Which kv heads of a model stream, from a `SparseConfig.streaming`: a layer's heads, or one value for all of them.

    Args:
        num_layers, num_heads: of the model.
        used: layers with full attention, which a pattern must have scores for; by default all.
    """
    if streaming is None or streaming in (0, 1):
        return [bool(streaming)] * num_layers
    if isinstance(streaming, HeadPattern):
        pattern = streaming
    elif isinstance(streaming, (str, os.PathLike)):
        pattern = HeadPattern.load(streaming)
    else:
        raise ValueError(
            f"streaming: expected a HeadPattern or its file, got the fraction {streaming!r}: which heads stream is "
            "never guessed. Make a pattern with `lserve calibrate` and pass it, or pass None (no head) or 1.0 (all)"
        )
    if (pattern.num_layers, pattern.num_heads) != (num_layers, num_heads):
        raise ValueError(
            f"streaming: expected a pattern of {num_layers} layers x {num_heads} kv heads, "
            f"got {pattern.num_layers} x {pattern.num_heads}"
        )
    missing = [layer for layer in (used if used is not None else range(num_layers)) if not pattern.scores[layer]]
    if missing:
        raise ValueError(f"streaming: expected scores for every layer with full attention, got none for {missing}")
    return list(pattern._streaming())


def calibrate(
    model: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    length: int = 4096,
    samples: int = 4,
    sink_tokens: int = 128,
    local_tokens: int = 256,
    fraction: float = 0.5,
    seed: int = 0,
) -> HeadPattern:
    """A pattern for a model without training: how much a head's output changes when it keeps sink and local only.

    A sample is a long text with pass keys in it that are recited at its end. The score of a kv head is
    ||full - streaming|| / ||full|| of the outputs of its query heads where the keys are recited, averaged over samples.
    Hidden states stay exact, so one forward pass a sample measures every head.

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        text: what pass keys are hidden in; by default the reference of the Python language.
        length: tokens of a sample; many more than sink and local.
        samples: forward passes.
        sink_tokens, local_tokens: what a streaming head keeps.
        fraction: of streaming heads in the pattern; `HeadPattern.with_fraction` cuts the same scores elsewhere.
        seed: of keys and places.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    from . import demo

    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if length <= sink_tokens + local_tokens:
        raise ValueError(f"length: expected more than sink and local, {sink_tokens + local_tokens}, got {length}")
    sink, window = -(-sink_tokens // _PAGE), max(1, -(-local_tokens // _PAGE))
    errors: dict[int, Tensor] = {}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with tqdm(total=samples * layers, unit=" layers") as bar:
        for i in range(samples):
            ids, measured = demo.passkey_recital(tokenizer, length, _NAMES, seed=seed + i, text=text)
            meter = _Meter(measured.to(model.device), sink, window, bar.update)
            with torch.inference_mode(), _attention(model, meter):
                model.base_model(ids.to(model.device), use_cache=False)
            for layer, error in meter.errors.items():
                errors[layer] = errors.get(layer, torch.zeros(())) + error / samples
    if not errors:
        raise ValueError("model: expected full attention in some layer, got none")
    scores = tuple(tuple(round(x, 6) for x in errors[i].tolist()) if i in errors else () for i in range(layers))
    source = str(getattr(model.config, "_name_or_path", ""))
    metadata = {
        "model": Path(source).name if Path(source).exists() else source,
        "method": "||full - streaming|| / ||full|| where hidden pass keys are recited",
        "length": length,
        "samples": samples,
        "sink_tokens": sink_tokens,
        "local_tokens": local_tokens,
        "seed": seed,
    }
    return HeadPattern(scores, fraction, metadata)


_NAMES = ("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry")
_PAGE = 64


class _Meter:
    """An attention function that attends everything, and measures what streaming heads would have changed."""

    def __init__(self, measured: Tensor, sink: int, window: int, progress: Callable[[], object]) -> None:
        self.errors: dict[int, Tensor] = {}  # of a layer: [kv heads]
        self._measured, self._sink, self._window, self._progress = measured, sink, window, progress

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        from . import hf, ops
        from .cache import with_sinks

        full, _ = hf.attention(module, query, key, value, attention_mask, scaling, **kwargs)  # [1, T, Hq, D]
        self._progress()
        if not isinstance(attention_mask, hf.AttentionMask) or not attention_mask.is_causal():
            return full, None  # a window: transformers' own
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        H, T = k.shape[1], k.shape[0]
        rows = self._measured.nonzero()[:, 0]
        first = int(rows[0])
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (T - first, T))
        windows = torch.full((H,), self._window, dtype=torch.int32, device=q.device)
        rule: dict[str, Any] = {"sink": self._sink, "page_size": _PAGE, "scale": scaling}
        sinks = next((kwargs[name] for name in hf.SINKS if kwargs.get(name) is not None), None)
        streaming, _ = with_sinks(*ops.prefill(q[first:], k, v, cu_q, cu_k, windows, **rule), sinks)
        exact = full[0, rows].reshape(len(rows), H, -1).double()
        change = streaming[rows - first].reshape(len(rows), H, -1).double() - exact
        norms = [x.square().sum((0, 2)).sqrt() for x in (change, exact)]
        layer: Any = module.layer_idx
        self.errors[layer] = (norms[0] / norms[1].clamp_min(1e-30)).cpu()
        return full, None


@contextlib.contextmanager
def _attention(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """The model with another attention function, which nobody else sees, and which is gone afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from . import hf

    before, name = model.config._attn_implementation, f"lserve_calibrate_{id(function)}"
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, hf.mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]
