"""Which heads stream: patterns of scored heads, and a training-free way to make one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHIPPED = Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class HeadPattern:
    """A score for every kv head of a model; the `fraction` of them with the lowest scores streams.

    scores    [layers][heads]; the higher, the more a head needs far tokens
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
        except (TypeError, ValueError):
            raise TypeError(f"HeadPattern.scores: expected rows of numbers, got {self.scores!r:.80}") from None
        widths = sorted({len(row) for row in rows})
        if len(widths) != 1 or widths == [0]:
            raise ValueError(f"HeadPattern.scores: expected one or more rows of one length, got {len(rows)} of lengths {widths}")
        if not all(math.isfinite(score) for row in rows for score in row):
            raise ValueError("HeadPattern.scores: expected finite numbers, got NaN or infinity")
        object.__setattr__(self, "scores", rows)
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def num_layers(self) -> int:
        return len(self.scores)

    @property
    def num_heads(self) -> int:
        """Kv heads of a layer."""
        return len(self.scores[0])

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
        return {"fraction": self.fraction, "metadata": dict(self.metadata), "scores": [list(row) for row in self.scores]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HeadPattern:
        """The inverse of `to_dict`; fraction and metadata may be left out."""
        unknown = sorted(set(fields) - {"fraction", "metadata", "scores"})
        if unknown or "scores" not in fields:
            raise ValueError(f"HeadPattern: expected the fields scores, fraction, metadata, got {', '.join(map(repr, fields))}")
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, a layer a line."""
        rows = ",\n".join("    " + json.dumps(row) for row in self.scores)
        head = json.dumps({"fraction": self.fraction, "metadata": dict(self.metadata)}, indent=2).removesuffix("\n}")
        Path(path).write_text(f'{head},\n  "scores": [\n{rows}\n  ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> HeadPattern:
        """Reads a file of `save`, DuoAttention's published TSV (a row of gates a layer), or a shipped pattern by name."""
        path = Path(source)
        if not path.is_file():
            path = _SHIPPED / f"{os.fspath(source)}.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"HeadPattern: expected a file or the name of a shipped pattern ({', '.join(shipped())}), got {os.fspath(source)!r}"
            )
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("{"):
            return cls(_parse_tsv(text, path), metadata={"method": "DuoAttention gates", "file": path.name})
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"HeadPattern: expected JSON or a TSV of gates in {str(path)!r}, got {error}") from None


def _parse_tsv(text: str, path: Path) -> tuple[tuple[float, ...], ...]:
    try:
        return tuple(tuple(float(gate) for gate in line.split("\t")) for line in text.splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f"HeadPattern: expected JSON or a TSV of gates in {str(path)!r}, got {error}") from None


def shipped() -> list[str]:
    """Names of the patterns that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def resolve(
    streaming: HeadPattern | str | os.PathLike[str] | float | None, num_layers: int, num_heads: int
) -> list[tuple[bool, ...]]:
    """Which kv heads of a model stream, [layers][heads], from a `SparseConfig.streaming`."""
    if streaming is None or streaming in (0, 1):
        return [(bool(streaming),) * num_heads] * num_layers
    if isinstance(streaming, HeadPattern):
        pattern = streaming
    elif isinstance(streaming, (str, os.PathLike)):
        pattern = HeadPattern.load(streaming)
    else:
        raise ValueError(
            f"streaming: expected a HeadPattern or its file, got the fraction {streaming!r}: which heads stream is never "
            "guessed. Make a pattern with `lserve calibrate` and pass it, or pass None (no streaming heads) or 1.0 (all)"
        )
    if (pattern.num_layers, pattern.num_heads) != (num_layers, num_heads):
        raise ValueError(
            f"streaming: expected a pattern of {num_layers} layers x {num_heads} kv heads, "
            f"got {pattern.num_layers} x {pattern.num_heads}"
        )
    return pattern._streaming()
