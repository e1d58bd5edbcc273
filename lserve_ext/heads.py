"""Which heads stream: patterns of scored heads. `calibrate` makes them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files

_SHIPPED = Path(__file__).parent / "data"
_FORMAT = 1  # of files


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

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        scores = [list(row) for row in self.scores]
        return {"format": _FORMAT, "fraction": self.fraction, "metadata": dict(self.metadata), "scores": scores}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HeadPattern:
        """The inverse of `to_dict`; format, fraction and metadata may be left out."""
        fields = files.without_format(fields, "HeadPattern", _FORMAT)
        unknown = sorted(set(fields) - {"fraction", "metadata", "scores"})
        if unknown or "scores" not in fields:
            raise ValueError(f"HeadPattern: expected the fields scores, fraction, metadata, got {sorted(fields)}")
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, a layer a line."""
        rows = ",\n".join("    " + json.dumps(row) for row in self.scores)
        fields = {"format": _FORMAT, "fraction": self.fraction, "metadata": dict(self.metadata)}
        head = json.dumps(fields, indent=2).removesuffix("\n}")
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
    streaming_heads: HeadPattern | str | os.PathLike[str] | float | None,
    num_layers: int,
    num_heads: int,
    used: Sequence[int] | None = None,
) -> list[tuple[bool, ...] | bool]:
    """Which kv heads of a model stream, from a `SparseConfig.streaming_heads`: a layer's heads, or one value for them.

    Args:
        num_layers, num_heads: of the model.
        used: layers with full attention, which a pattern must have scores for; by default all.
    """
    if streaming_heads is None or streaming_heads in (0, 1):
        return [bool(streaming_heads)] * num_layers
    if isinstance(streaming_heads, HeadPattern):
        pattern = streaming_heads
    elif isinstance(streaming_heads, (str, os.PathLike)):
        pattern = HeadPattern.load(streaming_heads)
    else:
        raise ValueError(
            f"streaming_heads: expected a HeadPattern or its file, got the fraction {streaming_heads!r}: which heads "
            "stream is never guessed. Make a pattern with `lserve calibrate` and pass it, or pass None (no head) or "
            "1.0 (all)"
        )
    if (pattern.num_layers, pattern.num_heads) != (num_layers, num_heads):
        raise ValueError(
            f"streaming_heads: expected a pattern of {num_layers} layers x {num_heads} kv heads, "
            f"got {pattern.num_layers} x {pattern.num_heads}"
        )
    missing = [layer for layer in (used if used is not None else range(num_layers)) if not pattern.scores[layer]]
    if missing:
        raise ValueError(
            f"streaming_heads: expected scores for every layer with full attention, got none for {missing}"
        )
    return list(pattern._streaming())


def of_rank(streaming: Sequence[bool] | bool, heads: int, rank: int) -> Sequence[bool]:
    """A tensor parallel rank's part of one layer's entry in `resolve`: which of its kv heads stream.

    Args:
        heads: kv heads that the rank holds, a contiguous part of the layer's.
        rank: counted within the heads; with more ranks than kv heads, several hold the same.
    """
    if isinstance(streaming, bool):
        return [streaming] * heads
    if heads == 0 or len(streaming) % heads:
        raise ValueError(f"streaming_heads: expected {len(streaming)} kv heads or an equal share of them, got {heads}")
    first = rank % (len(streaming) // heads) * heads
    return streaming[first : first + heads]
