"""Where pages have their home if host memory is limited: frames there, and records in a tier below it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .blocks import Memory
from .tiers import DiskTier, FsspecTier, Pending, Tier, TierFullError

CHUNK = 256  # pages that are read, or written, at a time: so many are in memory twice


class Home:
    """Pages of blocks, by block: in a frame of host memory, in a record of the tier below, or in both. A page is
    written once and never changed, so a frame whose page has a record is given up by forgetting it.

    Records are written in the background, oldest pages first: as many as leave half of the frames without one.

    Args:
        like: tensors [0, ...] of a page; frames are as these.
        size: the most bytes that frames take.
        tier: makes the tier below for records of so many bytes; None: there is none.
        is_used: of blocks [N], [N] bool: whether anybody has them still.

    Raises:
        ValueError: there is no room for a single page.

    After an exception every page is what it was, wherever it lies: a frame names its block last of all.
    """

    def __init__(
        self,
        like: Mapping[str, Tensor],
        size: int,
        tier: Callable[[int], Tier] | None,
        is_used: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self._page_bytes = {name: x.element_size() * x.shape[1:].numel() for name, x in like.items()}
        self.page_bytes = sum(self._page_bytes.values())
        count = size // self.page_bytes
        if count < 1:
            raise ValueError(f"host_bytes: expected at least the {self.page_bytes:,} bytes of one page, got {size:,}")
        self.tensors = {name: x.new_empty((count, *x.shape[1:])) for name, x in like.items()}
        self.tier = None if tier is None else tier(self.page_bytes)
        self._is_used = is_used
        self._blocks = np.full(count, -1)  # in each frame; -1: none
        self._last_use = np.zeros(count, np.int64)
        self._clock = itertools.count(1)
        self._frames = np.zeros(0, np.int64)  # of each block, if that frame names it
        self._records = np.zeros(0, np.int64)  # of each block, a number; -1: none
        self._is_written = np.zeros(0, bool)  # whether that record is whole
        self._serial = itertools.count()
        self._writing: dict[int, Pending] = {}  # by block
        self._peak = 0
        self.loaded = 0
        """Pages that were read from the tier below."""
        self.written = 0
        """Pages that were written there."""

    def __len__(self) -> int:
        """Frames."""
        return len(self._blocks)

    def tiers(self) -> dict[str, Memory]:
        """Bytes of frames and of records."""
        size = len(self) * self.page_bytes
        found = {"host": Memory(int((self._blocks >= 0).sum()) * self.page_bytes, size, self._peak * self.page_bytes)}
        if self.tier is not None:
            found["disk"] = Memory(self.tier.used, self.tier.used, self.tier.peak)
        return found

    # ---- pages ------------------------------------------------------------------------------------------------------
    def write(self, blocks: np.ndarray, pages: Mapping[str, Tensor]) -> None:
        """Takes pages [N, ...] of these blocks [N], which held nothing since `forget`.

        Raises:
            ValueError: without a tier below, there are not enough frames.
            TierFullError, TierTimeoutError, OSError: of the tier below.
        """
        self._reach(blocks)
        for part in _chunks(len(blocks), min(CHUNK, len(self))):
            frames = self._room(len(blocks[part]), must=True)
            self._keep(blocks[part], frames, {name: x[part] for name, x in pages.items()})
        if self.tier is not None:
            dirty = self._dirty()
            self._write_down(dirty[: max(0, len(dirty) - len(self) // 2)])

    def read(self, blocks: np.ndarray) -> dict[str, Tensor]:
        """Pages [N, ...] of these blocks [N]; those from below take frames that can be given up at once.

        Raises:
            BadRecordError, TierTimeoutError, OSError: of the tier below.
        """
        pages = {name: x.new_empty((len(blocks), *x.shape[1:])) for name, x in self.tensors.items()}
        for part in _chunks(len(blocks), CHUNK):
            wanted = blocks[part]
            frames = self._frame(wanted)
            row = {block: i for i, block in enumerate(dict.fromkeys(wanted[frames < 0].tolist()))}
            missing, rows = (
                np.array([*row], np.int64),
                np.array([row[b] for b in wanted[frames < 0].tolist()], np.int64),
            )
            there, gone = (part.start + np.flatnonzero(x) for x in (frames >= 0, frames < 0))
            self._last_use[frames[frames >= 0]] = next(self._clock)
            loaded = self._load(missing) if len(missing) else {}
            for name, tensor in self.tensors.items():
                pages[name][_index(there)] = tensor[_index(frames[frames >= 0])]
                if loaded:
                    pages[name][_index(gone)] = loaded[name][_index(rows)]
            if loaded:
                room = self._room(len(missing), must=False)
                self._keep(missing[: len(room)], room, {name: x[: len(room)] for name, x in loaded.items()})
        return pages

    def copy(self, src: Tensor, into: Mapping[str, Tensor], dst: Tensor) -> None:
        """`ops.gather_pages` from here: pages of blocks src [N] to rows dst [N]; -1: none."""
        wanted = src >= 0
        blocks, rows = src[wanted].numpy(), dst[wanted].long()
        for part in _chunks(len(blocks), CHUNK):
            for name, x in self.read(blocks[part]).items():
                into[name][rows[part]] = x

    def forget(self, blocks: np.ndarray) -> None:
        """These blocks [N] will hold something else."""
        self._reach(blocks)
        frames = self._frame(blocks)
        self._blocks[frames[frames >= 0]] = -1
        for block in blocks[self._records[blocks] >= 0].tolist():
            assert self.tier is not None
            self.tier.delete(self._key(block))
            self._writing.pop(block, None)
        self._is_written[blocks] = False
        self._records[blocks] = -1

    # ---- frames -----------------------------------------------------------------------------------------------------
    def _frame(self, blocks: np.ndarray) -> np.ndarray:
        """[N] where they lie; -1: in no frame."""
        frames = self._frames[blocks]
        return np.asarray(np.where(self._blocks[frames] == blocks, frames, -1))

    def _keep(self, blocks: np.ndarray, frames: np.ndarray, pages: Mapping[str, Tensor]) -> None:
        """Fills empty frames."""
        for name, tensor in self.tensors.items():
            tensor[_index(frames)] = pages[name]
        self._frames[blocks] = frames
        self._last_use[frames] = next(self._clock)
        self._blocks[frames] = blocks
        self._peak = max(self._peak, int((self._blocks >= 0).sum()))

    def _room(self, count: int, must: bool) -> np.ndarray:
        """Empty frames: so many, or, unless they `must` be, as many as can be had without waiting."""
        empty = np.flatnonzero(self._blocks < 0)
        if len(empty) < count:
            self._drop_unused()
            empty = np.flatnonzero(self._blocks < 0)
        if len(empty) < count:
            self._settle()
            if must and self._clean(count - len(empty)) < count - len(empty):
                self._write_down(self._dirty())
                self._finish()
            self._give_up(count - len(empty))
            empty = np.flatnonzero(self._blocks < 0)
        return empty[:count]

    def _drop_unused(self) -> None:
        """Forgets blocks that nobody has any more."""
        known = self._records >= 0
        known[self._blocks[self._blocks >= 0]] = True
        blocks = np.flatnonzero(known)
        unused = blocks[~self._is_used(blocks)]
        if len(unused):
            self.forget(unused)

    def _clean(self, most: int) -> int:
        return min(most, int(self._is_written[self._blocks[self._blocks >= 0]].sum()))

    def _give_up(self, count: int) -> None:
        """Empties frames whose pages have records, those used longest ago first."""
        frames = np.flatnonzero(self._blocks >= 0)
        frames = frames[self._is_written[self._blocks[frames]]]
        self._blocks[frames[np.argsort(self._last_use[frames], kind="stable")[:count]]] = -1

    def _dirty(self) -> np.ndarray:
        """Blocks without a record, those used longest ago first."""
        frames = np.flatnonzero(self._blocks >= 0)
        frames = frames[~self._is_written[self._blocks[frames]]]
        blocks = self._blocks[frames[np.argsort(self._last_use[frames], kind="stable")]]
        return np.asarray(blocks[[int(block) not in self._writing for block in blocks]])

    def _reach(self, blocks: np.ndarray) -> None:
        """Grows what is kept by block."""
        more = int(blocks.max(initial=-1)) + 1 - len(self._frames)
        if more > 0:
            more = max(more, len(self._frames))
            self._is_written = np.concatenate([self._is_written[: len(self._frames)], np.zeros(more, bool)])
            self._records = np.concatenate([self._records[: len(self._frames)], np.full(more, -1)])
            self._frames = np.concatenate([self._frames, np.zeros(more, np.int64)])

    # ---- records ----------------------------------------------------------------------------------------------------
    def _key(self, block: int) -> bytes:
        return f"page {self._records[block]}".encode()

    def _write_down(self, blocks: np.ndarray) -> None:
        """Begins to write the pages of these blocks, which lie in frames, to the tier below."""
        if self.tier is None:
            held, have = (n * self.page_bytes for n in (len(self) + 1, len(self)))
            raise ValueError(f"host_bytes: expected at least {held:,}, or disk_dir beside it, got {have:,}")
        for part in _chunks(len(blocks), CHUNK):
            if len(self._writing) >= CHUNK:
                self._finish()
            frames = _index(self._frame(blocks[part]))
            rows = [x[frames].reshape(len(frames), -1).view(torch.uint8) for x in self.tensors.values()]
            for block, row in zip(blocks[part].tolist(), torch.cat(rows, 1).numpy(), strict=True):
                self._put(block, memoryview(row))

    def _put(self, block: int, record: memoryview) -> None:
        assert self.tier is not None
        if self._records[block] >= 0:  # an interrupt has come before its end was noted
            self.tier.delete(self._key(block))
        self._records[block] = next(self._serial)
        try:
            self._writing[block] = self.tier.put(self._key(block), record)
        except TierFullError:
            self._drop_unused()
            self._writing[block] = self.tier.put(self._key(block), record)
        self.written += 1

    def _settle(self) -> None:
        """Notes which records have been written.

        Raises:
            OSError, TierFullError: one has not; its page is where it was.
        """
        if self.tier is None:
            return
        done = {block: pending for block, pending in self._writing.items() if pending.future.done()}
        for block, pending in done.items():
            self._is_written[block] = pending.future.exception() is None
            self._writing.pop(block, None)
        self.tier.wait(done.values())

    def _finish(self) -> None:
        """Waits for all that is being written."""
        assert self.tier is not None
        try:
            self.tier.wait(self._writing.values())
        finally:
            self._settle()

    def _load(self, blocks: np.ndarray) -> dict[str, Tensor]:
        """Pages [N, ...] from the tier below."""
        assert self.tier is not None
        raw = torch.empty(len(blocks), self.page_bytes, dtype=torch.uint8)
        rows = zip(blocks.tolist(), raw.numpy(), strict=True)
        self.tier.wait(self.tier.get_many([(self._key(block), memoryview(row)) for block, row in rows]))
        self.loaded += len(blocks)
        parts = zip(raw.split(list(self._page_bytes.values()), 1), self.tensors.items(), strict=True)
        return {name: x.contiguous().view(like.dtype).view(-1, *like.shape[1:]) for x, (name, like) in parts}


def open_tier(where: str | os.PathLike[str], limit: int | None, record_bytes: int) -> Tier:
    """The tier in a folder, or at a URL that fsspec knows; without a limit, what the place itself takes."""
    limit = 2**62 if limit is None else limit
    if "://" not in os.fspath(where):
        return DiskTier(Path(where), limit, record_bytes)
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(
            f"disk_dir: expected a folder, or fsspec installed (pip install 'lserve_ext[fsspec]'), got {where!r}"
        ) from None
    fs, folder = url_to_fs(os.fspath(where))
    return FsspecTier(fs, f"{folder.rstrip('/')}/{os.urandom(8).hex()}", limit, record_bytes)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int64))
