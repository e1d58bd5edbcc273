"""What this machine can do: a clock, the ceilings that benchmarks measure with it, a profile for the cost model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from . import files, ops
from .tiers import DiskTier

COLD = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Bytes that no cache holds, and that a device takes much longer to read than to start on."""
_AHEAD = 2_000_000  # cycles of a GPU, about a millisecond: longer than the CPU needs for an op's launches


class Machine:
    """A clock, sums and copies of memory that no cache holds, and matmuls.

    Args:
        cold: bytes that pass through the caches in one measurement of the bandwidth, more than they hold.
        device: "cpu" or "cuda".

    With one thread, CPU time is taken, which other processes on a shared machine do not stretch.
    """

    def __init__(self, cold: int, device: str) -> None:
        self.device = device
        self._cuda = device == "cuda"
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self._parts = cycle(torch.ones(4, cold // 8, 2, device=device).transpose(1, 2).contiguous().unbind())
        self._squares: dict[torch.dtype, torch.Tensor] = {}
        self._side = 8192 if self._cuda else 1024

    def seconds(self, call: Callable[[], Any]) -> float:
        """What one call takes whoever waits for it: on a GPU, with the time in which it waits for the CPU."""
        return self._seconds(call, ahead=False)

    def kernel_seconds(self, call: Callable[[], Any]) -> float:
        """The same without that time, as in a model whose kernels queue up: the CPU is given a start."""
        return self._seconds(call, ahead=True)

    def _seconds(self, call: Callable[[], Any], ahead: bool) -> float:
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if ahead:
                torch.cuda._sleep(_AHEAD)
            begin.record()
            call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        start = self._clock()
        _result = call()  # kept, because giving its memory back is not the call's time
        return self._clock() - start

    def bandwidth(self, copy: bool = False) -> float:
        """Bytes a second, of reading or of copying; afterwards no cache holds anything else."""
        part = next(self._parts)
        return part.nbytes / self.kernel_seconds(lambda: part[0].copy_(part[1]) if copy else part.sum())

    def matmul(self, *dtypes: torch.dtype) -> float:
        """Operations a second of torch's matmul of large squares, in the fastest of these dtypes."""
        for dtype in dtypes:
            if dtype not in self._squares:
                self._squares[dtype] = torch.randn(self._side, self._side, device=self.device).to(dtype)
        squares = [self._squares[dtype] for dtype in dtypes]
        times = [self.kernel_seconds(partial(torch.matmul, square, square)) for square in squares]
        return 2 * self._side**3 / min(times)


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a machine does, as a curve over the bytes of a unit (a page, a record, a copy), or as one number.

    Args:
        unit: of the values.
        how: "measured" or "nominal": by `lserve profile`, or as a vendor or a paper states it.
        points: (bytes of a unit, value), ascending; a single number stands at 0 bytes.
        source: of a nominal figure.
    """

    unit: str
    how: str
    points: tuple[tuple[float, float], ...]
    source: str = ""

    def __post_init__(self) -> None:
        if self.how not in ("measured", "nominal"):
            raise ValueError(f"how: expected 'measured' or 'nominal', got {self.how!r}")
        sizes, values = zip(*self.points, strict=True) if self.points else ((), ())
        if not self.points or list(sizes) != sorted(set(sizes)) or not all(math.isfinite(x) and x > 0 for x in values):
            raise ValueError(f"points: expected ascending sizes and positive values, got {self.points!r:.80}")

    def at(self, size: float = 0) -> float:
        """The value for units of that size: between two points on a line over the logarithm of the size, outside of
        them that of the nearest one."""
        sizes, values = zip(*self.points, strict=True)
        return float(np.interp(math.log(max(size, 1)), [math.log(max(x, 1)) for x in sizes], values))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = dataclasses.asdict(self) | {"points": [list(point) for point in self.points]}
        return {name: value for name, value in fields.items() if value != ""}

    @classmethod
    def from_dict(cls, name: str, fields: Any) -> Figure:
        """The inverse of `to_dict`. Raises ValueError, with the figure's name."""
        try:
            points = tuple((float(size), float(value)) for size, value in fields["points"])
            return cls(**{**fields, "points": points})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"Profile.figures.{name}: {error}") from None


FIGURES = {
    "memory": "bytes/s read from the device's memory",
    "host_memory": "bytes/s that the CPU reads from host memory",
    "matmul.float32": "operations/s of large matrix products",
    "matmul.bfloat16": "operations/s of large matrix products",
    "linear.float32": "bytes/s of weights, in rows of so many bytes, that one token is multiplied with",
    "linear.bfloat16": "bytes/s of weights, in rows of so many bytes, that one token is multiplied with",
    "recompute.float32": "operations/s of projections that an attention module makes again of its kept inputs",
    "recompute.bfloat16": "operations/s of projections that an attention module makes again of its kept inputs",
    "attend.auto": "bytes/s of KV that a decode step reads",
    "attend.int8": "bytes/s of INT8 KV that a decode step reads",
    "fetch": "bytes/s from host memory to the device, in units of so many bytes",
    "spill": "bytes/s from the device to host memory",
    "load": "bytes/s from the disk to host memory, past the page cache",
    "store": "bytes/s from host memory to the disk",
    "layer": "s of a decode step in a layer, whatever its sizes",
    "layer.mass": "the same where lists follow the attention mass",
    "layer.slots": "what device_bytes adds to it",
    "layer.frames": "what host_bytes adds to that",
    "layer.packed": "what device_bytes adds beyond that where tokens are copied side by side",
    "device_bytes": "bytes of the device's memory",
    "host_bytes": "bytes of host memory",
    "disk_bytes": "bytes that the disk has free",
}
"""What a profile says, and in which unit."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A machine in figures, for the cost model.

    Args:
        name: of the machine.
        device: "cpu" or "cuda".
        figures: by the names of `FIGURES`.
    """

    name: str
    device: str
    figures: Mapping[str, Figure]

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"Profile.device: expected 'cpu' or 'cuda', got {self.device!r}")
        for name in self.figures:
            if name not in FIGURES:
                raise ValueError(f"Profile.figures: expected {', '.join(FIGURES)}, got {name!r}")

    def figure(self, name: str, size: float = 0) -> float:
        """A value, for units of that size.

        Raises:
            ValueError: the profile does not have it.
        """
        if name not in self.figures:
            raise ValueError(f"profile {self.name!r}: expected a figure {name!r} ({FIGURES[name]}), got none")
        return self.figures[name].at(size)

    def seconds(self, name: str, size: float, unit: float = 0) -> float:
        """For so many bytes, or operations, in units of that size."""
        return size / self.figure(name, unit) if size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        figures = {name: figure.to_dict() for name, figure in self.figures.items()}
        return {"format": _FORMAT, "name": self.name, "device": self.device, "figures": figures}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Profile:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field or a figure is missing, unknown or of another kind.
        """
        fields = files.without_format(fields, "Profile", _FORMAT)
        expected = {"name", "device", "figures"}
        if set(fields) != expected or not isinstance(fields["figures"], Mapping):
            raise ValueError(f"Profile: expected the fields {', '.join(sorted(expected))}, got {', '.join(fields)}")
        figures = {name: Figure.from_dict(name, figure) for name, figure in fields["figures"].items()}
        return cls(str(fields["name"]), fields["device"], figures)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON."""
        files.write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Profile:
        """Reads the file of `save`, or, by its name, a profile that comes with the package."""
        known = shipped()
        if os.fspath(source) in known and not Path(source).exists():
            text = (resources.files(__package__) / "data" / "machines" / f"{source}.json").read_text("utf-8")
        else:
            try:
                text = files.read_text(source, "profile")
            except FileNotFoundError:
                names = ", ".join(known)
                raise ValueError(f"profile: expected a file or one of {names}, got {os.fspath(source)!r}") from None
        try:
            return cls.from_dict(files.read_json(text, "profile", source))
        except ValueError as error:
            raise ValueError(f"{os.fspath(source)}: {error}") from None


_FORMAT = 1  # of files


def shipped() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files(__package__) / "data" / "machines"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


# ---- lserve profile -------------------------------------------------------------------------------------------------

TOKENS = (64, 256)  # bytes of a token, which is copied but never stored alone
UNITS = (2048, 8192, 32768, 131072, 524288, 2097152)  # bytes
ROWS = (1024, 2048, 4096, 8192, 16384, 32768)  # bytes


def measure(
    name: str, disk: str | os.PathLike[str] | None = None, progress: Callable[[str], object] = lambda what: None
) -> Profile:
    """This machine in figures, in about a minute: medians of what the package itself does on it.

    Args:
        name: of the machine.
        disk: a folder on the disk to be measured; None: none is.
        progress: is told what comes next.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine, found = Machine(COLD[device], device), dict[str, list[tuple[float, float]]]()

    def take(figure: str, *points: tuple[float, float]) -> None:
        found[figure] = list(points)

    with torch.inference_mode():
        progress("memory")
        take("memory", (0, median(machine.bandwidth() for _ in range(9))))
        host = machine if device == "cpu" else Machine(COLD["cpu"], "cpu")
        take("host_memory", (0, median(host.bandwidth() for _ in range(9))))
        progress("matrix products")
        for dtype in (torch.float32, torch.bfloat16):
            machine.matmul(dtype)
            kind = str(dtype).removeprefix("torch.")
            take(f"matmul.{kind}", (0, median(machine.matmul(dtype) for _ in range(7))))
            take(f"linear.{kind}", *((size, _linear(machine, size, dtype)) for size in ROWS))
            take(f"recompute.{kind}", (0, _recomputed(machine, dtype)))
        progress("attention")
        for kind in ("auto", "int8"):
            take(f"attend.{kind}", (0, _attended(machine, kind)))
        progress("copies")
        take("fetch", *((unit, _copied(machine, unit, to_device=True)) for unit in (*TOKENS, *UNITS)))
        take("spill", *((unit, _copied(machine, unit, to_device=False)) for unit in UNITS))
        if disk is not None:
            for unit in UNITS:
                progress(f"disk, {unit:,} bytes")
                store, load = (median(rates) for rates in zip(*(_stored(unit, disk) for _ in range(5)), strict=True))
                found.setdefault("store", []).append((unit, store))
                found.setdefault("load", []).append((unit, load))
        progress("steps of a small model")
        for figure, seconds in _layers(machine).items():
            take(figure, (0, seconds))
    free = torch.cuda.mem_get_info()[1] if device == "cuda" else _host_bytes()
    take("device_bytes", (0, free))
    take("host_bytes", (0, _host_bytes()))
    if disk is not None:
        take("disk_bytes", (0, shutil.disk_usage(disk).free))
    figures = {figure: Figure(FIGURES[figure], "measured", tuple(points)) for figure, points in found.items()}
    return Profile(name, device, figures)


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _linear(machine: Machine, row: int, dtype: torch.dtype) -> float:
    """Bytes a second of weights in rows of so many bytes that one token is multiplied with, and that no cache holds."""
    size, columns = (64 << 20 if machine.device == "cuda" else 4 << 20), row // dtype.itemsize  # of one matrix
    count = (256 << 20) // size
    rows = size // row
    weights = torch.randn(count, rows, columns, device=machine.device).to(dtype)
    x = torch.randn(1, columns, device=machine.device).to(dtype)
    times = [machine.kernel_seconds(lambda: [torch.nn.functional.linear(x, w) for w in weights]) for _ in range(4)]
    return count * size / median(times[1:])


def _recomputed(machine: Machine, dtype: torch.dtype) -> float:
    """Operations a second of queries, keys and values of 8 pages that a layer with 8 heads of 64 channels makes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from . import SparseCache, SparseConfig
    from .hf import cache_argument
    from .hf.recompute import KeptInputs

    pages, P, width = 8, 64, 512
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, **sizes)
    model: Any = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="lserve").train(False)
    model.to(machine.device)
    cache, given = SparseCache(config, SparseConfig.dense()), list[Any]()
    kept = KeptInputs(model, [0], SparseCache, lambda cache, layer, rows: given.append(rows))
    model(torch.zeros(1, pages * P, dtype=torch.int64, device=machine.device), **cache_argument(model, cache))
    del kept
    rows, times = given[0].rows.view(pages, P, -1), list[float]()
    for _ in range(6):
        times.append(machine.seconds(lambda: given[0].recompute(rows)))
    return 2 * pages * P * width * 3 * width / median(times[1:])


def _attended(machine: Machine, kind: str) -> float:
    """Bytes a second of the pages that a decode step reads, of a layer with 8 heads of 64 channels: as many as a step
    with little to read would not show, and in the dtype that a GPU is used with."""
    from . import LayerCache, SparseConfig

    on_gpu = machine.device == "cuda"
    H, G, D, tokens = 8, 3, 64, 65536 if on_gpu else 4096
    config = SparseConfig.dense(kv_dtype=kind)
    options: dict[str, Any] = {"dtype": torch.bfloat16 if on_gpu else torch.float32, "device": machine.device}
    cache = LayerCache(config, [False] * H, True, torch.empty(1, H, 0, D, **options))
    k, v = torch.randn(2, tokens, H, D, **options)
    q = torch.randn(tokens, H * G, D, **options)
    cache.attend(q, k, v, [tokens], D**-0.5)
    kv, lengths = cache.kv, torch.tensor([tokens], dtype=torch.int32, device=machine.device)
    mask = ops.Mask(torch.full((H,), ops.DENSE, dtype=torch.int32, device=machine.device))
    pages, times = cache.pool.memory.used, []
    for _ in range(15):
        machine.bandwidth()  # afterwards no cache holds the pages
        times.append(machine.kernel_seconds(lambda: ops.decode(q[:1], mask, kv, lengths, scale=D**-0.5)))
    return pages / median(times)


def _copied(machine: Machine, unit: int, to_device: bool) -> float:
    """Bytes a second of `gather_pages` between host memory and the device, random units each."""
    count = max(4, min(4096, (32 << 20) // unit))
    host, there = torch.ones(count, unit, dtype=torch.uint8), torch.ones(count, unit, dtype=torch.uint8)
    if machine.device == "cuda":
        host, there = host.pin_memory(), there.cuda()
    src, dst = (host, there) if to_device else (there, host)
    order = torch.randperm(count).to(torch.int32)
    src_ids, dst_ids = (ids.to(machine.device) for ids in (order, torch.arange(count, dtype=torch.int32)))
    times = []
    for _ in range(7):
        machine.bandwidth()
        times.append(machine.kernel_seconds(lambda: ops.gather_pages(src, src_ids, dst, dst_ids)))
    return count * unit / median(times)


def _stored(unit: int, disk: str | os.PathLike[str]) -> tuple[float, float]:
    """Bytes a second of writing to and reading from a `DiskTier`, in records of so many bytes."""
    count = max(8, min(1024, (64 << 20) // unit))
    record: Any = np.random.default_rng(0).integers(0, 256, unit, np.uint8)
    into: Any = np.empty((count, unit), np.uint8)
    with DiskTier(disk, 2 * count * (unit + 8192), unit) as tier:
        start = time.perf_counter()
        tier.wait([tier.put(b"%d" % i, memoryview(record)) for i in range(count)])
        stored = time.perf_counter()
        order = np.random.default_rng(1).permutation(count)
        for first in range(0, count, 32):  # as many as a layer may miss in a step
            wanted = zip(order[first : first + 32], into[first : first + 32], strict=True)
            tier.wait(tier.get_many([(b"%d" % i, memoryview(row)) for i, row in wanted]))
        return count * unit / (stored - start), count * unit / (time.perf_counter() - stored)


def _layers(machine: Machine) -> dict[str, float]:
    """Seconds a layer of decode steps of a model so small that only calls count; configs take turns."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from . import SparseCache, SparseConfig
    from .hf import cache_argument

    layers = 8
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    config = LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **small)
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="lserve").train(False)
    model.to(machine.device)
    plain = SparseConfig.lserve(streaming_heads=None, budget_tokens=512)
    slots = plain.replace(device_bytes=1 << 20)
    configs = {"layer": plain, "layer.mass": SparseConfig.alisa(), "layer.slots": slots}
    configs["layer.frames"] = slots.replace(host_bytes=1 << 20)
    configs["layer.packed"] = SparseConfig.alisa(device_bytes=1 << 17)
    caches = {name: SparseCache(config, kind) for name, kind in configs.items()}
    token, times = torch.zeros(1, 1, dtype=torch.int64, device=machine.device), {name: list[float]() for name in caches}
    for cache in caches.values():
        model(token.expand(1, 1000), **cache_argument(model, cache), use_cache=True)
    for _ in range(60):
        for name, cache in caches.items():
            arguments = cache_argument(model, cache)
            times[name].append(machine.seconds(lambda: model(token, **arguments, use_cache=True)))  # noqa: B023
    found = {name: median(taken) / layers for name, taken in times.items()}
    adds = {
        "layer.packed": found["layer.mass"] + found["layer.slots"] - found["layer"],
        "layer.frames": found["layer.slots"],
        "layer.slots": found["layer"],
    }
    found |= {name: max(1e-7, found[name] - before) for name, before in adds.items()}
    return found
