"""Files that are written whole or not at all, and JSON and tensors from anybody."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Tensors:
    """Tensors that a file held, asked for by name. Whatever does not fit is a ValueError that names it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def expect(self, name: str, condition: Any, expected: str, got: object) -> None:
        """Raises if the condition is false."""
        if not bool(condition):
            raise ValueError(f"{name}: expected {expected}, got {got}")

    def only(self, known: Collection[str]) -> None:
        """No tensors but these."""
        for name in sorted(set(self.tensors) - set(known)):
            self.expect(name, False, "no such tensor", list(self.tensors[name].shape))

    def take(self, name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        """A tensor of that shape (None: any size) and dtype."""
        self.expect(name, name in self, "a tensor", "none")
        x = self.tensors[name]
        fits = len(shape) == x.dim() and all(a in (None, b) for a, b in zip(shape, x.shape, strict=True))
        wanted = f"{list(shape)} of {dtype}".replace("None", "*")
        self.expect(name, fits and x.dtype == dtype, wanted, f"{list(x.shape)} of {x.dtype}")
        return x

    def within(self, name: str, x: np.ndarray | int, low: Any, high: Any) -> None:
        """Numbers from low to high."""
        inside = (np.asarray(x) >= low) & (np.asarray(x) <= high)
        self.expect(name, inside.all(), f"{np.min(low)}..{np.max(high)}", np.asarray(x)[~inside][:4].tolist())

    def finite(self, name: str, x: Tensor) -> None:
        """Neither NaN nor infinity."""
        self.expect(name, torch.isfinite(x).all(), "finite numbers", "NaN or infinity")


def write_beside(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Calls `write` with the name of a file beside `path`, which then takes its place: a full disk or an interrupt
    costs nothing that was there before."""
    target = Path(path)
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        write(beside)
        umask = os.umask(0)
        os.umask(umask)
        Path(beside).chmod(0o666 & ~umask)  # as `open` would have made it
        Path(beside).replace(target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8, whole or not at all."""
    write_beside(path, lambda beside: Path(beside).write_text(text, encoding="utf-8"))


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """Reads UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is something else. FileNotFoundError, IsADirectoryError, PermissionError: as the system says.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: expected UTF-8 text in {os.fspath(path)!r}, got {error.reason}") from None


def without_format(fields: Mapping[str, Any], what: str, version: int) -> dict[str, Any]:
    """The fields but "format", which a file may leave out.

    Raises:
        ValueError: it is another version.
    """
    if fields.get("format", version) != version:
        got = f"{fields['format']!r:.40}: written by another version of lserve_ext"
        raise ValueError(f"{what}.format: expected {version}, got {got}")
    return {name: value for name, value in fields.items() if name != "format"}


def read_json(text: str, what: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected JSON in {os.fspath(path)!r}, got {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{what}: expected a JSON object in {os.fspath(path)!r}, got {type(fields).__name__}")
    return fields
