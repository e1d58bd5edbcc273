"""Tiers below the device: records of bytes on a disk, or on any file system that fsspec knows.

A record is written once and never changed. Calls return at once; what they return is waited for with `Tier.wait`. Each
record carries its key and a checksum: what comes back is what was put there, or an error says which record is not.
"""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import mmap
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HEADER = struct.Struct("<8sIIQ16s")  # magic, version, checksum, bytes, digest of the key
MAGIC, VERSION = b"lservekv", 1
SUFFIX = ".lserve"
NEIGHBOURS = 16  # records that are read at once, if they stand side by side
ALIGNMENT = 4096  # of records in a file and of buffers, which O_DIRECT asks for


def stride(record_bytes: int) -> int:
    """Bytes that a record of so many takes."""
    return -(-(HEADER.size + record_bytes) // ALIGNMENT) * ALIGNMENT


class TierFullError(RuntimeError):
    """A tier's limit, or the disk itself, does not take another record."""


class BadRecordError(RuntimeError):
    """A record is gone, or is not what was put there."""


class TierTimeoutError(RuntimeError):
    """A record has not come by its deadline."""


@dataclasses.dataclass(eq=False)
class Pending:
    """A put, or some gets, on their way. After `abandon` nothing is written any more to where gets were to go.

    Args:
        key: of the first record.
        size: bytes of all records.
    """

    key: bytes
    size: int
    future: concurrent.futures.Future[None] = dataclasses.field(default_factory=concurrent.futures.Future)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _is_abandoned: bool = False

    def abandon(self) -> None:
        with self._lock:
            self._is_abandoned = True

    def deliver(self, record: memoryview, into: memoryview) -> None:
        with self._lock:
            if not self._is_abandoned:
                into[:] = record


@dataclasses.dataclass(eq=False)
class _Entry:
    """A record that a tier holds or is about to hold."""

    place: Any
    size: int
    written: Pending | None  # None: it was there when the tier was opened
    users: int = 0  # operations on their way
    is_deleted: bool = False


class _Get(NamedTuple):
    key: bytes
    entry: _Entry
    into: memoryview


class Tier(abc.ABC):
    """Records of up to `record_bytes` under opaque keys.

    Args:
        limit: the most bytes that all records may take, their headers and gaps included.
        record_bytes: of the largest record.
        deadline: (seconds, seconds a KiB) until which a get must have come.
        threads: operations at a time.
    """

    def __init__(
        self, limit: int, record_bytes: int, deadline: tuple[float, float] = (5.0, 1e-3), threads: int = 4
    ) -> None:
        if record_bytes < 1:
            raise ValueError(f"record_bytes: expected at least 1, got {record_bytes}")
        self.limit, self.record_bytes, self.deadline = limit, record_bytes, deadline
        self.stride = stride(record_bytes)
        """Bytes that a record takes."""
        if limit < self.stride:
            raise ValueError(f"limit: expected at least the {self.stride:,} bytes of one record, got {limit:,}")
        self._threads = threads
        self._entries: dict[bytes, _Entry] = {}  # by the digests of keys
        self._lock = threading.RLock()
        self._failed: dict[Pending, BaseException] = {}
        self._under_way = 0
        self._used = 0
        self.peak = 0
        """The most bytes that the records ever took."""
        self._is_closed = False
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="lserve-tier")

    # ---- what a kind of tier does
    @abc.abstractmethod
    def _allocate(self, digest: bytes) -> Any:
        """Where a new record goes. Raises TierFullError."""

    @abc.abstractmethod
    def _write(self, place: Any, header: bytes, record: memoryview) -> None: ...

    @abc.abstractmethod
    def _read(self, places: Sequence[Any], sizes: Sequence[int]) -> Iterator[memoryview]:
        """Headers and records, one after the other. Each may be overwritten when the next one is asked for."""

    @abc.abstractmethod
    def _release(self, place: Any) -> None:
        """The record is not wanted any more."""

    # ---- what all do
    @property
    def used(self) -> int:
        """Bytes that the records take."""
        return self._used

    def put(self, key: bytes, record: memoryview) -> Pending:
        """Writes a record, which must not change until that is done. A key that is there already is left as it is.

        Raises:
            TierFullError: at once, and nothing is written.
        """
        size = record.nbytes
        if not 0 < size <= self.record_bytes:
            raise ValueError(f"record: expected 1..{self.record_bytes} bytes, got {size}")
        with self._lock:
            self._check_open()
            digest = _digest(key)
            entry = self._entries.get(digest)
            if entry is not None:
                return entry.written or _arrived(key, entry.size)
            if self._used + self.stride > self.limit:
                want = f"expected at most {self.limit:,} bytes, which is its limit"
                raise TierFullError(f"{self}: {want}, got a record of {self.stride:,} on top of {self._used:,}")
            pending = Pending(key, size)
            entry = self._entries[digest] = _Entry(self._allocate(digest), size, pending, users=1)
            self._used += self.stride
            self.peak = max(self.peak, self._used)
            self._start(pending, self._put, digest, entry, record.cast("B"))
        return pending

    def get(self, key: bytes, into: memoryview) -> Pending:
        """Reads a record. One that is still being written is waited for.

        Raises:
            BadRecordError: at once if there is none; from `wait` if it is not what was put there.
        """
        return self.get_many([(key, into)])[0]

    def get_many(self, wanted: Sequence[tuple[bytes, memoryview]], threads: int | None = None) -> list[Pending]:
        """The same of many records: each thread reads some of them, neighbours on the disk at once.

        Args:
            threads: how many share the records; None: all.

        Raises:
            BadRecordError: at once, and nothing is read, if one is not there.
        """
        with self._lock:
            self._check_open()
            gets = [_Get(key, self._found(key, into), into.cast("B")) for key, into in wanted]
            gets.sort(key=lambda get: get.entry.place)
            share = max(1, -(-len(gets) // (threads or self._threads)))
            started = []
            for part in (gets[i : i + share] for i in range(0, len(gets), share)):
                for get in part:
                    get.entry.users += 1
                pending = Pending(part[0].key, sum(get.entry.size for get in part))
                self._start(pending, self._get, part, pending)
                started.append(pending)
        return started

    def _found(self, key: bytes, into: memoryview) -> _Entry:
        entry = self._entries.get(_digest(key))
        if entry is None:
            raise BadRecordError(f"{self}: expected record {_text(key)}, which is not there")
        if entry.size != into.nbytes:
            raise ValueError(f"into: expected the {entry.size} bytes of record {_text(key)}, got {into.nbytes}")
        return entry

    def exists(self, key: bytes) -> bool:
        """Whether a record is there, or is being written."""
        with self._lock:
            return _digest(key) in self._entries

    def delete(self, key: bytes) -> None:
        """Forgets a record. Gets that are on their way still come."""
        with self._lock:
            entry = self._entries.pop(_digest(key), None)
            if entry is not None:
                entry.is_deleted = True
                self._free(entry)

    def wait(self, pending: Iterable[Pending]) -> None:
        """Until all have come.

        Raises:
            TierTimeoutError: one has not come by the deadline of all their bytes; all are abandoned.
            BadRecordError, TierFullError, OSError: what befell the first one that failed.
        """
        found = list(pending)
        size = sum(p.size for p in found)
        seconds = self.deadline[0] + self.deadline[1] * size / 1024
        _, late = concurrent.futures.wait([p.future for p in found], timeout=seconds)
        if late:
            for p in found:
                p.abandon()
            first = next(p for p in found if p.future in late)
            raise TierTimeoutError(
                f"{self}: expected {size:,} bytes within {seconds:.1f} s, got no record {_text(first.key)} by then"
            )
        with self._lock:
            for p in found:
                self._failed.pop(p, None)
        for p in found:
            p.future.result()

    def poll(self) -> int:
        """Operations under way.

        Raises:
            Exception: what befell a put that nobody waited for; its record is not there.
        """
        with self._lock:
            if self._failed:
                raise self._failed.pop(next(iter(self._failed)))
            return self._under_way

    def close(self) -> None:
        """Ends what is under way. Gets and puts raise from now on."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Tier:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # ---- in threads
    def _start(self, pending: Pending, work: Callable[..., None], *args: Any) -> None:
        self._under_way += 1
        self._pool.submit(self._run, pending, work, *args)

    def _run(self, pending: Pending, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            with self._lock:
                self._under_way -= 1
            pending.future.set_exception(error)
        else:
            with self._lock:
                self._under_way -= 1
            pending.future.set_result(None)

    def _put(self, digest: bytes, entry: _Entry, record: memoryview) -> None:
        try:
            self._write(entry.place, _header(digest, record), record)
        except BaseException as error:
            with self._lock:
                assert entry.written is not None
                self._failed[entry.written] = error
                if self._entries.get(digest) is entry:
                    del self._entries[digest]
                    entry.is_deleted = True
            raise
        finally:
            self._done_with(entry)

    def _get(self, gets: Sequence[_Get], pending: Pending) -> None:
        try:
            for get in gets:
                if get.entry.written is not None:
                    get.entry.written.future.result()
            records = self._read([get.entry.place for get in gets], [HEADER.size + get.entry.size for get in gets])
            for get in gets:
                try:
                    found = next(records)
                except FileNotFoundError as error:
                    raise BadRecordError(
                        f"{self}: expected record {_text(get.key)}, which is not there any more"
                    ) from error
                self._check(get.key, get.entry, found)
                pending.deliver(found[HEADER.size :], get.into)
        finally:
            for get in gets:
                self._done_with(get.entry)

    def _check(self, key: bytes, entry: _Entry, found: memoryview) -> None:
        where = f"{self}: record {_text(key)} at {entry.place}"
        if found.nbytes < HEADER.size + entry.size:
            raise BadRecordError(f"{where}: expected {HEADER.size + entry.size} bytes, got {found.nbytes}")
        record = found[HEADER.size :]
        if bytes(found[: HEADER.size]) != _header(_digest(key), record):
            raise BadRecordError(f"{where}: expected what was put there, got other bytes")

    def _done_with(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            self._free(entry)

    def _free(self, entry: _Entry) -> None:
        if entry.is_deleted and entry.users == 0:
            self._release(entry.place)
            self._used -= self.stride

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"{self} is closed")


def _arrived(key: bytes, size: int) -> Pending:
    pending = Pending(key, size)
    pending.future.set_result(None)
    return pending


def _header(digest: bytes, record: memoryview) -> bytes:
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(record), record.nbytes, digest)


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()


def _text(key: bytes) -> str:
    return repr(key[:48])[1:]


class DiskTier(Tier):
    """Records in one file of a folder, past the page cache where the file system takes that (O_DIRECT).

    The file has no name, so that nothing is left of it however the process ends, unless it is kept.

    Args:
        folder: made if it is not there.
        keep: name the file, leave it, and find there what the last tier with `keep` has left, as far as the limit goes.
        options: of `Tier`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], limit: int, record_bytes: int, *, keep: bool = False, **options: Any
    ) -> None:
        super().__init__(limit, record_bytes, **options)
        self.folder, self.keep = Path(folder), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ("kept.lserve" if keep else f"{os.getpid()}-{id(self):x}.lserve")
        self._file, self.is_direct = _open(path)
        self._close_file = weakref.finalize(self, os.close, self._file)
        if keep:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.close()
                raise RuntimeError(f"{path}: expected no other tier that is open there, got one") from None
        else:
            path.unlink()
        self._buffers = threading.local()
        self._places = 0  # of records in the file
        self._vacant: list[int] = []
        if keep:
            self._find()

    def __str__(self) -> str:
        return f"disk tier {self.folder}"

    def close(self) -> None:
        super().close()
        self._close_file()

    def _find(self) -> None:
        """The records of the file."""
        self._places = min(os.fstat(self._file).st_size, self.limit) // self.stride
        os.ftruncate(self._file, self._places * self.stride)
        for place in range(self._places):
            magic, version, _, size, digest = HEADER.unpack(next(self._read([place], [HEADER.size])))
            if (magic, version) == (MAGIC, VERSION) and 0 < size <= self.record_bytes and digest not in self._entries:
                self._entries[digest] = _Entry(place, size, None)
                self._used += self.stride
            else:
                self._vacant.append(place)

    def _allocate(self, digest: bytes) -> int:
        if not self._vacant:
            more = max(1, min(self._places // 4, self.limit // self.stride - self._places))
            try:
                os.posix_fallocate(self._file, self._places * self.stride, more * self.stride)
            except OSError as error:
                wanted = f"{more * self.stride:,} bytes more"
                raise TierFullError(f"{self}: expected room for {wanted}, got: {error.strerror}") from error
            self._vacant.extend(reversed(range(self._places, self._places + more)))
            self._places += more
        return self._vacant.pop()

    def _write(self, place: int, header: bytes, record: memoryview) -> None:
        buffer, size = self._buffer(), len(header) + record.nbytes
        buffer[: len(header)] = header
        buffer[len(header) : size] = record
        aligned = buffer[: _aligned(size)]
        if os.pwrite(self._file, aligned, place * self.stride) != len(aligned):
            raise TierFullError(f"{self}: expected room for {len(aligned):,} bytes, got less")

    def _read(self, places: Sequence[int], sizes: Sequence[int]) -> Iterator[memoryview]:
        buffer, stride, first = self._buffer(), self.stride, 0
        while first < len(places):
            end = first + 1  # of a run of neighbours
            while end < len(places) and end - first < NEIGHBOURS and places[end] == places[end - 1] + 1:
                end += 1
            size = (end - 1 - first) * stride + _aligned(sizes[end - 1])
            got = os.preadv(self._file, [buffer[:size]], places[first] * stride)
            for i in range(end - first):
                start = i * stride
                yield buffer[min(got, start) : min(got, start + sizes[first + i])]
            first = end

    def _release(self, place: int) -> None:
        if self.keep:  # not to be found again
            nothing = self._buffer()[:ALIGNMENT]
            nothing[:] = bytes(ALIGNMENT)
            os.pwrite(self._file, nothing, place * self.stride)
        self._vacant.append(place)

    def _buffer(self) -> memoryview:
        """Memory of this thread for some records, aligned as O_DIRECT asks."""
        if not hasattr(self._buffers, "memory"):
            self._buffers.memory = memoryview(mmap.mmap(-1, NEIGHBOURS * self.stride))
        memory: memoryview = self._buffers.memory
        return memory


class FsspecTier(Tier):
    """Records as files of a folder of any file system that fsspec knows. The folder must be this tier's alone.

    Args:
        fs: an `fsspec.AbstractFileSystem`.
        folder: emptied first; and when the tier is closed or nobody has it any more, unless kept.
        keep: leave the files, and find there what the last tier has left, as far as the limit goes.
        options: of `Tier`.
    """

    def __init__(
        self, fs: Any, folder: str, limit: int, record_bytes: int, *, keep: bool = False, **options: Any
    ) -> None:
        super().__init__(limit, record_bytes, **options)
        self.fs, self.folder, self.keep = fs, folder.rstrip("/"), keep
        fs.makedirs(self.folder, exist_ok=True)
        self._clean = weakref.finalize(self, lambda: None) if keep else weakref.finalize(self, _remove, fs, self.folder)
        for file in sorted(_listed(fs, self.folder), key=lambda file: str(file["name"])):
            path, size = str(file["name"]), int(file["size"]) - HEADER.size
            if not path.endswith(SUFFIX):
                continue
            if keep and 0 < size <= self.record_bytes and self._used + self.stride <= limit:
                self._entries[bytes.fromhex(Path(path).stem)] = _Entry(path, size, None)
                self._used += self.stride
            else:
                fs.rm_file(path)

    def __str__(self) -> str:
        return f"{type(self.fs).__name__} tier {self.folder}"

    def close(self) -> None:
        super().close()
        self._clean()

    def _allocate(self, digest: bytes) -> str:
        return f"{self.folder}/{digest.hex()}{SUFFIX}"

    def _write(self, place: str, header: bytes, record: memoryview) -> None:
        self.fs.pipe_file(place, header + record)

    def _read(self, places: Sequence[str], sizes: Sequence[int]) -> Iterator[memoryview]:
        return (memoryview(self.fs.cat_file(place)) for place in places)

    def _release(self, place: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(place)


def _listed(fs: Any, folder: str) -> list[dict[str, Any]]:
    """What lies in a folder, with names and sizes."""
    while True:
        with contextlib.suppress(RuntimeError):  # fsspec's file system in memory, while other threads write to it
            return list(fs.ls(folder, detail=True))


def _remove(fs: Any, folder: str) -> None:
    """Removes the records of a folder, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):  # it is not there any more, or holds something else
        for file in _listed(fs, folder):
            if str(file["name"]).endswith(SUFFIX):
                fs.rm_file(file["name"])
        fs.rmdir(folder)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _open(path: Path) -> tuple[int, bool]:
    """A file to read and write, and whether that goes past the page cache, which not every file system can."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        file = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(path, flags, 0o600), False
    try:
        os.preadv(file, [memoryview(mmap.mmap(-1, ALIGNMENT))], 0)
    except OSError:
        os.close(file)
        return os.open(path, flags, 0o600), False
    return file, True
