"""Tiers below the device: what is put there comes back, or an error says what does not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import lserve_ext
from lserve_ext import tiers
from lserve_ext.tiers import (
    ALIGNMENT,
    BadRecordError,
    DiskTier,
    FsspecTier,
    Tier,
    TierFullError,
    TierTimeoutError,
)

RECORD = 5000
STRIDE = 2 * ALIGNMENT
Make = Callable[..., Tier]


def record(seed: int, size: int = RECORD) -> memoryview:
    return memoryview(np.random.default_rng(seed).integers(0, 256, size, np.uint8))


def key(i: int) -> bytes:
    return b"model:f32:%d" % i


def read(tier: Tier, i: int, size: int = RECORD) -> bytes:
    into = bytearray(size)
    tier.wait([tier.get(key(i), memoryview(into))])
    return bytes(into)


@pytest.fixture(params=["disk", "local", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Tiers of one kind over one folder; all of them are closed at the end."""
    made: list[Tier] = []

    def new(limit: int = 100 * STRIDE, record_bytes: int = RECORD, **options: Any) -> Tier:
        kind = request.param
        folder = f"/{tmp_path.name}" if kind == "memory" else str(tmp_path / "tier")
        if kind == "disk":
            made.append(DiskTier(folder, limit, record_bytes, **options))
        else:
            fs = fsspec.filesystem("file" if kind == "local" else "memory")
            made.append(FsspecTier(fs, folder, limit, record_bytes, **options))
        return made[-1]

    yield new
    for tier in made:
        tier.close()


def test_what_is_put_comes_back(make: Make) -> None:
    """In any order, while other records are written and deleted; what is used is counted."""
    tier, rng = make(limit=40 * STRIDE), np.random.default_rng(0)
    held: dict[int, int] = {}
    for step in range(400):
        i = int(rng.integers(0, 60))
        if i not in held and len(held) < 30:
            held[i] = int(rng.integers(1, RECORD + 1))
            tier.put(key(i), record(i, held[i]))
        elif i in held and step % 3:
            assert read(tier, i, held[i]) == bytes(record(i, held[i]))
        elif i in held:
            tier.delete(key(i))
            del held[i]
        assert tier.exists(key(i)) == (i in held)
    while tier.poll():
        pass
    assert tier.used == len(held) * tier.stride
    for i, size in held.items():
        assert read(tier, i, size) == bytes(record(i, size))


def test_many_at_once_and_from_many_threads(make: Make) -> None:
    tier = make()
    wrong = []

    def work(first: int) -> None:
        tier.wait([tier.put(key(i), record(i)) for i in range(first, first + 20)])
        into = [bytearray(RECORD) for _ in range(20)]
        tier.wait([tier.get(key(first + i), memoryview(x)) for i, x in enumerate(into)])
        wrong.extend(i for i, x in enumerate(into) if x != record(first + i))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 20, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and tier.used == 60 * tier.stride


def test_a_get_follows_its_put(make: Make) -> None:
    tier = make()
    into = bytearray(RECORD)
    tier.put(key(1), record(1))
    tier.wait([tier.get(key(1), memoryview(into))])
    assert into == record(1)
    assert tier.put(key(1), record(2)).future.result(5) is None  # a record never changes
    assert read(tier, 1) == bytes(record(1))


def test_the_limit(make: Make) -> None:
    tier = make(limit=3 * STRIDE + 100)
    for i in range(3):
        tier.put(key(i), record(i))
    with pytest.raises(
        TierFullError, match=r"expected at most 24,676 bytes, .* got a record of 8,192 on top of 24,576"
    ):
        tier.put(key(3), record(3))
    assert not tier.exists(key(3)) and tier.used == 3 * STRIDE
    tier.wait([tier.put(key(0), record(0))])  # is there
    while tier.poll():
        pass
    tier.delete(key(1))
    tier.wait([tier.put(key(3), record(3))])
    assert [read(tier, i) for i in (0, 2, 3)] == [bytes(record(i)) for i in (0, 2, 3)]


def test_bad_arguments(make: Make) -> None:
    with pytest.raises(ValueError, match="limit: expected at least the 8,192 bytes of one record, got 8,000"):
        make(limit=8000)
    with pytest.raises(ValueError, match="record_bytes: expected at least 1, got 0"):
        make(record_bytes=0)
    tier = make()
    with pytest.raises(ValueError, match=r"record: expected 1..5000 bytes, got 5001"):
        tier.put(key(0), record(0, RECORD + 1))
    with pytest.raises(ValueError, match=r"record: expected 1..5000 bytes, got 0"):
        tier.put(key(0), record(0, 0))
    with pytest.raises(BadRecordError, match="expected record 'model:f32:0', which is not there"):
        read(tier, 0)
    tier.put(key(0), record(0))
    with pytest.raises(ValueError, match="into: expected the 5000 bytes of record 'model:f32:0', got 10"):
        read(tier, 0, 10)
    tier.close()
    with pytest.raises(RuntimeError, match="is closed"):
        read(tier, 0)
    with pytest.raises(RuntimeError, match="is closed"):
        tier.put(key(1), record(1))


def test_nothing_is_left(make: Make, tmp_path: Path) -> None:
    tier = make()
    tier.wait([tier.put(key(i), record(i)) for i in range(5)])
    tier.close()
    assert make().used == 0 and not list(tmp_path.glob("tier/*"))


def test_kept_records_are_found_again(make: Make) -> None:
    tier = make(keep=True)
    tier.wait([tier.put(key(i), record(i)) for i in range(6)])
    tier.delete(key(2))
    tier.close()
    tier = make(keep=True)
    assert tier.used == 5 * tier.stride and not tier.exists(key(2))
    assert all(read(tier, i) == bytes(record(i)) for i in (0, 1, 3, 4, 5))
    tier.wait([tier.put(key(7), record(7)), tier.put(key(0), record(9))])
    assert read(tier, 7) == bytes(record(7)) and read(tier, 0) == bytes(record(0))
    tier.close()
    tier = make(keep=True, limit=2 * STRIDE)  # the bound holds after a restart
    assert tier.used <= 2 * STRIDE
    held = [i for i in range(8) if tier.exists(key(i))]
    assert len(held) == 2 and all(read(tier, i) == bytes(record(i)) for i in held)


def test_a_record_past_its_deadline(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, gate, reading = make(deadline=(0.1, 0.0)), threading.Event(), type(make())._read
    tier.wait([tier.put(key(0), record(0))])

    def slow(self: Tier, places: Any, sizes: Any) -> Iterator[memoryview]:
        gate.wait(10)
        return reading(self, places, sizes)

    monkeypatch.setattr(type(tier), "_read", slow)
    into = bytearray(RECORD)
    pending = tier.get(key(0), memoryview(into))
    with pytest.raises(TierTimeoutError, match=r"expected 5,000 bytes within 0.1 s, got no record 'model:f32:0'"):
        tier.wait([pending])
    gate.set()
    pending.future.result(10)
    assert into == bytes(RECORD)  # it came too late to be delivered
    assert read(tier, 0) == bytes(record(0))


def test_a_write_that_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    tier.wait([tier.put(key(0), record(0))])

    def broken(*args: Any) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(type(tier), "_write", broken)
        with pytest.raises(OSError, match="broken"):
            tier.wait([tier.put(key(1), record(1))])
        assert tier.poll() == 0  # somebody has been told
        tier.put(key(2), record(2)).future.exception()
    with pytest.raises(OSError, match="broken"):
        tier.poll()
    assert tier.poll() == 0 and not tier.exists(key(1)) and tier.used == tier.stride
    tier.wait([tier.put(key(1), record(1))])
    assert read(tier, 0) == bytes(record(0)) and read(tier, 1) == bytes(record(1))


def test_a_read_that_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    tier.put(key(0), record(0))

    def broken(*args: Any) -> memoryview:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(type(tier), "_read", broken)
        with pytest.raises(OSError, match="broken"):
            read(tier, 0)
    assert read(tier, 0) == bytes(record(0))


def spoil(kind: str, path: Path, at: int, size: int) -> None:
    with path.open("r+b") as file:
        if kind == "truncated":
            file.truncate(at + size)
        else:
            file.seek(at + size)
            byte = file.read(1)
            file.seek(at + size)
            file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("at", [0, 10, 20, 30, 40, 41, RECORD + tiers.HEADER.size - 1])
@pytest.mark.parametrize("kind", ["flipped", "truncated"])
@pytest.mark.parametrize("where", ["disk", "local"])
def test_a_bad_record(where: str, kind: str, at: int, tmp_path: Path) -> None:
    """A flipped bit or a missing end, anywhere in the header or the record; its neighbours are as they were."""
    fs = fsspec.filesystem("file")

    def new() -> Tier:
        if where == "disk":
            return DiskTier(tmp_path, 100 * STRIDE, RECORD, keep=True)
        return FsspecTier(fs, str(tmp_path), 100 * STRIDE, RECORD, keep=True)

    with new() as tier:
        tier.wait([tier.put(key(i), record(i)) for i in range(4)])
        place = tier._entries[tiers._digest(key(3))].place
        path, start = (tmp_path / "kept.lserve", place * STRIDE) if where == "disk" else (Path(place), 0)
        other = next(i for i in range(3))
        spoil(kind, path, start, at)
        with pytest.raises(BadRecordError, match=r"record 'model:f32:3'.*expected .*, got"):
            read(tier, 3)
        behind = kind == "truncated" and where == "disk"  # whatever lies behind it in the file is gone, too
        if not behind:
            assert read(tier, other) == bytes(record(other))
        if not behind:
            tier.delete(key(3))
            tier.wait([tier.put(key(3), record(3))])
            assert read(tier, 3) == bytes(record(3))


def test_a_file_that_vanished(tmp_path: Path) -> None:
    with FsspecTier(fsspec.filesystem("file"), str(tmp_path), 100 * STRIDE, RECORD) as tier:
        tier.wait([tier.put(key(i), record(i)) for i in range(2)])
        Path(tier._entries[tiers._digest(key(0))].place).unlink()
        with pytest.raises(BadRecordError, match="expected record 'model:f32:0', which is not there any more"):
            read(tier, 0)
        assert read(tier, 1) == bytes(record(1))
        tier.delete(key(0))


def test_one_tier_keeps_records_in_a_folder(tmp_path: Path) -> None:
    with DiskTier(tmp_path, 100 * STRIDE, RECORD, keep=True) as tier:
        tier.wait([tier.put(key(0), record(0))])
        with pytest.raises(RuntimeError, match="expected no other tier that is open there, got one"):
            DiskTier(tmp_path, 100 * STRIDE, RECORD, keep=True)
        assert read(tier, 0) == bytes(record(0))
        with DiskTier(tmp_path, 100 * STRIDE, RECORD) as other:  # one that keeps nothing is welcome
            assert not other.exists(key(0))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.lserve"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DiskTier(tmp_path, 100 * STRIDE, RECORD) as tier:
        tier.wait([tier.put(key(0), record(0))])

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TierFullError, match="expected room for 8,192 bytes more, got: No space left on device"):
            tier.put(key(1), record(1))
        assert tier.used == STRIDE and not tier.exists(key(1)) and read(tier, 0) == bytes(record(0))


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={10 * STRIDE}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to be allowed to mount a file system")
    try:
        with DiskTier(tmp_path, 100 * STRIDE, RECORD) as tier:
            for i in range(5):
                tier.put(key(i), record(i))
            with pytest.raises(TierFullError, match="No space left on device"):
                [tier.put(key(i), record(i)) for i in range(5, 20)]
            held = [i for i in range(20) if tier.exists(key(i))]
            assert len(held) >= 5 and all(read(tier, i) == bytes(record(i)) for i in held)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_without_direct_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def without(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return opening(path, flags, *args)

    monkeypatch.setattr(os, "open", without)
    with DiskTier(tmp_path, 100 * STRIDE, RECORD) as tier:
        assert not tier.is_direct
        tier.wait([tier.put(key(0), record(0))])
        assert read(tier, 0) == bytes(record(0))


KILLED = """
import sys, time
from lserve_ext.tiers import DiskTier
tiers = [DiskTier(sys.argv[1], 1 << 20, 5000, keep=keep) for keep in (False, True)]
for tier in tiers:
    tier.wait([tier.put(b"%d" % i, memoryview(bytes(5000))) for i in range(5)])
print("ready", flush=True)
while True:
    tiers[1].put(b"%f" % time.time(), memoryview(bytes(5000)))
"""


def test_a_killed_process_leaves_nothing_but_what_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(Path(lserve_ext.__file__).parents[1])}
    with subprocess.Popen(command, cwd=tmp_path.parent, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.lserve"]
    with DiskTier(tmp_path, 1 << 20, RECORD, keep=True) as tier:
        for i in range(5):
            into = bytearray(RECORD)
            tier.wait([tier.get(b"%d" % i, memoryview(into))])
            assert into == bytes(RECORD)
