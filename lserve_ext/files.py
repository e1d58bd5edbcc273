"""Files that are written whole or not at all, and JSON from anybody."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
