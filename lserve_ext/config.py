"""What is attended and how it is stored: one frozen dataclass, and the published methods as presets of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from . import files
from .heads import HeadPattern
from .scorers import SCORERS, Budget, Function, PageScores, Scorer
from .sequences import Pages

_OPTIONAL = (
    "moments_group",
    "prefill_sink_tokens",
    "prefill_local_tokens",
    "budget_tokens",
    "max_tokens",
    "device_bytes",
    "host_bytes",
    "disk_bytes",
)

_OF_DECODE = ("budget_tokens", "kv_sparsity", "reuse_interval")
"""Fields that what is stored does not depend on, so long as there is a selection at all."""
_FORMAT = 2  # of files
PRESETS = ("dense", "streaming", "duo", "quest", "h2o", "lserve", "alisa", "moments")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Every head attends sink, list and local; this says how long each is. All lengths are in tokens.

    page_size             tokens of a page, the unit of storage
    stats_group           keys that share one min and max; divides page_size
    moments_group         keys that share one mean and deviation, with a scorer that takes them; divides page_size;
                          None: all of a page
    kv_dtype              "auto" keeps the model's dtype, "int8" quantises pages
    sink_tokens           first tokens of a sequence, always attended
    local_tokens          newest tokens, always attended
    prefill_sink_tokens   the same for streaming heads in prefill; None: as sink_tokens
    prefill_local_tokens  the same for streaming heads in prefill; None: as local_tokens
    budget_tokens         what a retrieval head attends in decode, sink and local included; None: all
    kv_sparsity           the share of tokens it does not attend, in place of budget_tokens (unit "token" only)
    reuse_interval        decode steps that share one selection
    scorer                "minmax": bounds of pages; "moments": mean and deviation in their place; "mass": accumulated
                          attention of tokens; "decayed_mass": the same, forgetting, one set of tokens a layer; any
                          other name that `scorers.register` knows; or a callable with the arguments and result of
                          `ops.page_scores`
    unit                  what a list holds, "page" or "token"; half of a budget of tokens is local
    streaming_heads       heads that keep sink and local only: None (no head), a HeadPattern, its file or the name of a
                          shipped one, or a fraction (1.0: every head; others need a pattern)
    dense_layers          the first n layers attend everything
    device_bytes          the most that pages of all layers may take on the device, statistics and the newest tokens not
                          counted; the others lie in host memory until they are attended. None: all lie on the device
    host_bytes            the most that pages may take in host memory, beside device_bytes; the others lie on the disk
    disk_dir              a folder on that disk, or a URL that fsspec knows; nothing is left there. None: no disk
    disk_bytes            the most that pages may take there; None: what it has room for
    recompute             what lies there are the inputs of attention layers, from which keys and values are recomputed
    max_tokens            tokens a sequence to reserve memory for, so that torch.compile makes one graph of a decode
                          step; None: memory grows on demand
    """

    page_size: int = 64
    stats_group: int = 16
    moments_group: int | None = None
    kv_dtype: Literal["auto", "int8"] = "auto"
    sink_tokens: int = 128
    local_tokens: int = 256
    prefill_sink_tokens: int | None = None
    prefill_local_tokens: int | None = None
    budget_tokens: int | None = None
    kv_sparsity: float | None = None
    reuse_interval: int = 1
    scorer: str | PageScores = "minmax"
    unit: Literal["page", "token"] = "page"
    streaming_heads: HeadPattern | str | os.PathLike[str] | float | None = None
    dense_layers: int = 0
    max_tokens: int | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    disk_dir: str | os.PathLike[str] | None = None
    recompute: bool = False

    # ---- presets: any field is an override --------------------------------------------------------------------------
    @classmethod
    def dense(cls, **overrides: Any) -> SparseConfig:
        """Every head attends everything."""
        return cls(**overrides)

    @classmethod
    def streaming(cls, **overrides: Any) -> SparseConfig:
        """StreamingLLM: every head keeps sink and local."""
        return cls(**_merge(overrides, streaming_heads=1.0))

    @classmethod
    def duo(cls, **overrides: Any) -> SparseConfig:
        """DuoAttention: a pattern of streaming heads, the others dense."""
        return cls(**_merge(overrides, streaming_heads=0.5))

    @classmethod
    def quest(cls, **overrides: Any) -> SparseConfig:
        """Quest: small pages selected by their min and max at every step."""
        fields = {"page_size": 16, "sink_tokens": 0, "local_tokens": 16, "budget_tokens": 2048, "dense_layers": 2}
        return cls(**_merge(overrides, **fields))

    @classmethod
    def h2o(cls, **overrides: Any) -> SparseConfig:
        """H2O: the newest tokens and those of the largest accumulated attention, per head."""
        return cls(**_merge(overrides, unit="token", scorer="mass", sink_tokens=0, budget_tokens=1024))

    @classmethod
    def lserve(cls, **overrides: Any) -> SparseConfig:
        """LServe: half the heads streaming, the others on reusable lists of INT8 pages."""
        return cls(**_merge(overrides, streaming_heads=0.5, budget_tokens=4096, reuse_interval=4, kv_dtype="int8"))

    @classmethod
    def alisa(cls, **overrides: Any) -> SparseConfig:
        """ALISA: sparse window attention over INT8 tokens, one set of tokens a layer."""
        fields = {"unit": "token", "scorer": "decayed_mass", "sink_tokens": 0, "kv_sparsity": 0.8, "kv_dtype": "int8"}
        return cls(**_merge(overrides, **fields))

    @classmethod
    def moments(cls, **overrides: Any) -> SparseConfig:
        """This project's own: every head on lists of small INT8 pages, picked by mean and deviation of their keys."""
        fields = {"page_size": 32, "scorer": "moments", "budget_tokens": 4096, "reuse_interval": 4, "kv_dtype": "int8"}
        return cls(**_merge(overrides, **fields))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SparseConfig:
        """The preset of that name."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        make: Callable[..., SparseConfig] = getattr(cls, name)
        return make(**overrides)

    def stores_as(self, other: SparseConfig) -> bool:
        """Whether a cache under the one may go on under the other: they differ in how much decode attends, and how
        often it selects, at most."""
        fields = [f.name for f in dataclasses.fields(self) if f.name not in _OF_DECODE]
        same = all(getattr(self, name) == getattr(other, name) for name in fields)
        return same and self.selects == other.selects

    def replace(self, **overrides: Any) -> SparseConfig:
        """A copy with some fields changed. One of budget_tokens and kv_sparsity takes the other's place."""
        return type(self)(**_merge(overrides, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}))

    # ---- what the cache reads ---------------------------------------------------------------------------------------
    @property
    def sink_pages(self) -> int:
        """Sink pages in decode."""
        return math.ceil(self.sink_tokens / self.page_size)

    @property
    def local_pages(self) -> int:
        """Local pages in decode, the page of the query included. Two at least, which are not sealed yet."""
        return max(2, math.ceil(self.local_tokens / self.page_size))

    @property
    def prefill_sink_pages(self) -> int:
        """Sink pages of streaming heads in prefill."""
        tokens = self.sink_tokens if self.prefill_sink_tokens is None else self.prefill_sink_tokens
        return math.ceil(tokens / self.page_size)

    @property
    def prefill_local_pages(self) -> int:
        """Local pages of streaming heads in prefill, the page of the query included."""
        tokens = self.local_tokens if self.prefill_local_tokens is None else self.prefill_local_tokens
        return max(2, math.ceil(tokens / self.page_size))

    @property
    def selects(self) -> bool:
        """Whether retrieval heads follow a list in decode; otherwise they are dense."""
        return self.budget_tokens is not None or bool(self.kv_sparsity)

    @property
    def list_pages(self) -> int:
        """Length of a list of pages: the budget less sink and local."""
        if self.budget_tokens is None:
            return 0
        return self.budget_tokens // self.page_size - self.sink_pages - self.local_pages

    @property
    def max_pages(self) -> int | None:
        """Pages a sequence to reserve; None: memory grows on demand."""
        return None if self.max_tokens is None else math.ceil(self.max_tokens / self.page_size)

    @property
    def pages(self) -> Pages:
        """When pages are sealed, and freed by streaming heads."""
        longest = max(self.local_pages, self.prefill_local_pages)
        return Pages(self.page_size, max(self.sink_pages, self.prefill_sink_pages), self.local_pages, longest)

    @property
    def budget(self) -> Budget:
        """What a scorer may pick. Half of a budget of tokens is local."""
        token = self.unit == "token"
        return Budget(
            page_size=self.page_size,
            sink=self.sink_pages,
            local=self.local_pages,
            picks=self.list_pages if not token else None if self.budget_tokens is None else self.budget_tokens // 2,
            ratio=(1.0 - self.kv_sparsity) / 2 if token and self.kv_sparsity is not None else None,
            reuse_interval=self.reuse_interval,
        )

    def make_scorer(self) -> Scorer | None:
        """The policy of layers whose retrieval heads follow lists; None if they are dense."""
        if not self.selects:
            return None
        if callable(self.scorer):
            return Function(self.budget, self.scorer)
        return SCORERS[self.scorer](self.budget)

    @property
    def packs(self) -> bool:
        """Whether listed tokens can be fetched without their pages: no sink is beside them, and keys are on no grid of
        their page."""
        return self.unit == "token" and not self.sink_pages and not (self.needs_stats and self.kv_dtype == "int8")

    @property
    def needs_stats(self) -> bool:
        """Whether pages keep the min and max of their key groups, for scores or as the grid of INT8 keys."""
        return self.unit == "page" and (self.kv_dtype == "int8" or (self.selects and not self.needs_moments))

    @property
    def needs_moments(self) -> bool:
        """Whether pages keep the mean and deviation of their key groups."""
        if not self.selects or callable(self.scorer):
            return False
        return SCORERS[self.scorer].keeps == "moments"

    # ---- JSON -------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        if callable(self.scorer):
            raise self._error("scorer", "a name, because a callable has no JSON form", TypeError)
        fields = {"format": _FORMAT} | {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(self.streaming_heads, HeadPattern):
            fields["streaming_heads"] = self.streaming_heads.to_dict()
        elif isinstance(self.streaming_heads, os.PathLike):
            fields["streaming_heads"] = os.fspath(self.streaming_heads)
        if self.disk_dir is not None:
            fields["disk_dir"] = os.fspath(self.disk_dir)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SparseConfig:
        """The inverse of `to_dict`; fields left out have their defaults, or beside "preset", those of a preset."""
        if not isinstance(fields, Mapping):
            raise TypeError(f"SparseConfig: expected a mapping of fields, got {fields!r:.80}")
        fields = dict(files.without_format(fields, "SparseConfig", _FORMAT))
        preset = fields.pop("preset", None)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"SparseConfig: expected the fields {', '.join(known)}, got {name!r}")
        streaming = fields.get("streaming_heads")
        if isinstance(streaming, Mapping):
            fields["streaming_heads"] = HeadPattern.from_dict(streaming)
        return cls(**fields) if preset is None else cls.preset(preset, **fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON."""
        files.write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseConfig:
        """Reads JSON. Errors name the file."""
        fields = files.read_json(files.read_text(path, "SparseConfig"), "SparseConfig", path)
        try:
            return cls.from_dict(fields)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None

    # ---- validation -------------------------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        for name in ("page_size", "stats_group", "moments_group", "reuse_interval", "budget_tokens", "max_tokens"):
            self._check_int(name, 1)
        for name in ("sink_tokens", "local_tokens", "prefill_sink_tokens", "prefill_local_tokens", "dense_layers"):
            self._check_int(name, 0)
        self._check_name("kv_dtype", "auto", "int8")
        self._check_name("unit", "page", "token")
        if not callable(self.scorer):
            self._check_name("scorer", *SCORERS)
        for name in ("stats_group", "moments_group"):
            if self.page_size % (getattr(self, name) or self.page_size):
                raise self._error(name, f"a divisor of page_size {self.page_size}")
        self._check_tiers()
        self._check_streaming()
        self._check_selection()

    def _check_tiers(self) -> None:
        for name in ("device_bytes", "host_bytes", "disk_bytes"):
            self._check_int(name, 1, 2**63)
        if self.host_bytes is not None and self.max_tokens is not None:
            raise self._error("host_bytes", "None beside max_tokens, which reserves memory for all pages")
        above = {"host_bytes": "device_bytes", "disk_dir": "host_bytes", "disk_bytes": "disk_dir"}
        for name, needed in above.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise self._error(name, f"None without {needed}")
        if self.disk_dir is not None and not isinstance(self.disk_dir, (str, os.PathLike)):
            raise self._error("disk_dir", "a folder or a URL", TypeError)
        if not isinstance(self.recompute, bool):
            raise self._error("recompute", "True or False", TypeError)
        if self.recompute and self.disk_dir is None:
            raise self._error("recompute", "False without disk_dir")

    def _check_streaming(self) -> None:
        if self.streaming_heads is None or isinstance(self.streaming_heads, (HeadPattern, str, os.PathLike)):
            return
        if isinstance(self.streaming_heads, bool) or not isinstance(self.streaming_heads, (int, float)):
            raise self._error("streaming_heads", "None, a HeadPattern, its file or a fraction", TypeError)
        if not 0 <= self.streaming_heads <= 1:
            raise self._error("streaming_heads", "a fraction from 0 to 1")

    def _check_selection(self) -> None:
        if self.kv_sparsity is not None:
            if isinstance(self.kv_sparsity, bool) or not isinstance(self.kv_sparsity, (int, float)):
                raise self._error("kv_sparsity", "a number from 0 up to 1", TypeError)
            if not 0 <= self.kv_sparsity < 1:
                raise self._error("kv_sparsity", "a number from 0 up to 1")
            if self.budget_tokens is not None:
                raise self._error("kv_sparsity", f"None beside budget_tokens {self.budget_tokens}")
            if self.unit == "page":
                raise self._error("kv_sparsity", "None with unit 'page', which takes budget_tokens")
        names = [name for name, scorer in SCORERS.items() if scorer.unit == self.unit]
        fits = self.scorer in names if isinstance(self.scorer, str) else self.unit == "page"
        if self.selects and not fits:
            known = " or ".join([*map(repr, names), *(["a callable"] if self.unit == "page" else [])])
            raise self._error("scorer", f"{known} with unit {self.unit!r}")
        if self.selects and self.unit == "token" and self.sink_tokens:
            raise self._error("sink_tokens", "0 with unit 'token', where heavy tokens take the sink's place")
        forced = (self.sink_pages + self.local_pages) * self.page_size
        if self.budget_tokens is not None and self.unit == "page" and self.budget_tokens < forced:
            raise self._error("budget_tokens", f"at least {forced}, the tokens of the sink and local pages")

    def _check_int(self, name: str, least: int, end: int = 2**31) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(name, f"an int of at least {least}", TypeError)
        if value < least:
            raise self._error(name, f"an int of at least {least}")
        if value >= end:
            raise self._error(name, f"an int of at most {end - 1}")

    def _check_name(self, name: str, *names: str) -> None:
        if getattr(self, name) not in names:
            raise self._error(name, "one of " + ", ".join(map(repr, names)))

    def _error(self, name: str, expected: str, kind: type[Exception] = ValueError) -> Exception:
        return kind(f"SparseConfig.{name}: expected {expected}, got {getattr(self, name)!r}")


def _merge(overrides: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """fields with overrides over them; a budget takes the place of a sparsity and the other way round."""
    for given, dropped in (("budget_tokens", "kv_sparsity"), ("kv_sparsity", "budget_tokens")):
        if overrides.get(given) is not None:
            fields.pop(dropped, None)
    return {**fields, **overrides}
