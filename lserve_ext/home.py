"""Where pages have their home if host memory is limited: frames there, and records in a tier below it, of the pages or
of what they are recomputed from."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .blocks import Memory, empty_blocks
from .tiers import BadRecordError, DiskTier, FsspecTier, Pending, Tier, TierFullError, TierTimeoutError

CHUNK = 256  # pages that are read, or written, at a time: so many are in memory twice


Recompute = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of a layer: inputs [N, P, R] of pages to keys and values [N, H, P, D], as attention would have got them."""


class Inputs(NamedTuple):
    """What pages of a layer can be recomputed from.

    Args:
        rows: [G, P, R] the layer's inputs at the tokens of G pages, those of all heads.
        page: [N] which of them each block is a page of.
        head: [N] of each block.
        recompute: the layer's.
    """

    rows: Tensor
    page: np.ndarray
    head: np.ndarray
    recompute: Recompute


@dataclasses.dataclass(eq=False)
class _Record:
    """In the tier: a page of a block, or the inputs that the pages of some blocks are recomputed from."""

    blocks: set[int]
    """That need it still."""
    recompute: Recompute | None = None
    like: Tensor | None = None
    """[0, P, R] of the inputs' dtype."""


@dataclasses.dataclass(eq=False)
class _Ahead:
    """Records that are being read before anybody wants them."""

    rows: dict[int, memoryview]
    """By the numbers of the records; those that have been taken are not there any more."""
    pending: list[Pending]

    @property
    def is_done(self) -> bool:
        return all(p.future.done() for p in self.pending)


class Home:
    """Pages of blocks, by block: in a frame of host memory, in a record of the tier below, or in both. A page is
    written once and never changed, so a frame whose page has a record is given up by forgetting it.

    Records are written in the background, oldest pages first: as many as leave half of the frames without one. Where a
    page comes with the layer's inputs, the record holds these, for all heads at once, and is written with the page.

    Args:
        like: tensors [0, ...] of a page; frames are as these, pinned if these lie on a GPU.
        size: the most bytes that frames take.
        tier: makes the tier below for records of so many bytes; None: there is none.
        is_used: of blocks [N], [N] bool: whether anybody has them still.
        encode: keys and values [N, P, D] of these blocks [N] as pages, on the grids that they were first stored on.
        recompute: make the tier when the first inputs come, for records that hold them.

    Raises:
        ValueError: there is no room for a single page.

    Beside the frames lie pages on their way, up to `CHUNK` that are wanted and as many that are read ahead, and with
    `recompute` keys and values of the records that were recomputed last.

    After an exception every page is what it was, wherever it lies: a frame names its block last of all.
    """

    def __init__(
        self,
        like: Mapping[str, Tensor],
        size: int,
        tier: Callable[[int], Tier] | None,
        is_used: Callable[[np.ndarray], np.ndarray],
        encode: Callable[[np.ndarray, Tensor, Tensor], dict[str, Tensor]] | None = None,
        recompute: bool = False,
    ) -> None:
        self._page_bytes = {name: x.element_size() * x.shape[1:].numel() for name, x in like.items()}
        self.page_bytes = sum(self._page_bytes.values())
        count = size // self.page_bytes
        if count < 1:
            raise ValueError(f"host_bytes: expected at least the {self.page_bytes:,} bytes of one page, got {size:,}")
        self._pins = any(x.is_cuda for x in like.values())
        self.tensors = {name: self._empty(x, count) for name, x in like.items()}
        self._make_tier = tier
        self.tier = None if tier is None or recompute else tier(self.page_bytes)
        self._is_used, self._encode = is_used, encode
        self._blocks = np.full(count, -1)  # in each frame; -1: none
        self._last_use = np.zeros(count, np.int64)
        self._clock = itertools.count(1)
        self._frames = np.zeros(0, np.int64)  # of each block, if that frame names it
        self._serials = np.zeros(0, np.int64)  # of each block, the number of its record; -1: none
        self._is_written = np.zeros(0, bool)  # whether that record is whole
        self._heads = np.zeros(0, np.int64)  # of each block whose record holds inputs
        self._serial = itertools.count()
        self._records: dict[int, _Record] = {}
        self._writing: dict[int, Pending] = {}  # records
        # Records that nobody needs any more, and that take room until they are written.
        self._leaving: list[Pending] = []
        self._ahead: list[_Ahead] = []
        # Keys and values of the records that were recomputed last, of all heads, since these may come in turn.
        self._remade: tuple[dict[int, int], Tensor, Tensor] = ({}, torch.empty(0), torch.empty(0))
        self._peak = 0
        self.loaded = 0
        """Pages that were read from the tier below, wanted or ahead."""
        self.ahead = 0
        """Records that had come, or were on their way, when they were wanted."""
        self.written = 0
        """Records that were written there."""
        self.recomputed = 0
        """Pages that were recomputed from inputs in the tier below."""

    def __len__(self) -> int:
        """Frames."""
        return len(self._blocks)

    def _empty(self, like: Tensor, count: int) -> Tensor:
        """Pages in host memory."""
        if not self._pins:
            return empty_blocks(like, count)
        return torch.empty((count, *like.shape[1:]), dtype=like.dtype, pin_memory=True)

    def tiers(self) -> dict[str, Memory]:
        """Bytes of frames and of records."""
        used = int(self._is_used(self._blocks[self._blocks >= 0]).sum())
        found = {"host": Memory(*(frames * self.page_bytes for frames in (used, len(self), self._peak)))}
        if self.tier is not None:
            found["disk"] = Memory(self.tier.used, self.tier.used, self.tier.peak)
        return found

    # ---- pages ------------------------------------------------------------------------------------------------------
    def write(self, blocks: np.ndarray, pages: Mapping[str, Tensor], inputs: Inputs | None = None) -> None:
        """Takes pages [N, ...] of these blocks [N], which held nothing since `forget`, and maybe what they come from.

        Raises:
            ValueError: without a tier below, there are not enough frames.
            TierFullError, TierTimeoutError, OSError: of the tier below.
        """
        self._reach(blocks)
        if inputs is not None:
            self._write_inputs(blocks, inputs)
        for part in _chunks(len(blocks), min(CHUNK, len(self))):
            frames = self._room(len(blocks[part]), must=True)
            self._keep(blocks[part], frames, {name: x[part] for name, x in pages.items()})
        if self._make_tier is not None:
            dirty = self._dirty()
            self._write_down(dirty[: max(0, len(dirty) - len(self) // 2)])

    def read(self, blocks: np.ndarray) -> dict[str, Tensor]:
        """Pages [N, ...] of these blocks [N], in host memory; those from below take frames that can be given up at
        once.

        Raises:
            BadRecordError, TierTimeoutError, OSError: of the tier below.
        """
        pages = {name: self._empty(x, len(blocks)) for name, x in self.tensors.items()}
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

    def read_ahead(self, blocks: np.ndarray) -> None:
        """Begins to read pages of these blocks [N] that lie in no frame, unless too many are on their way. `read` takes
        them when they are wanted; if they are not before the next call, they take frames that can be given up."""
        assert self.tier is not None
        self._take_ahead()
        blocks = self.below(blocks)
        under_way = {serial for ahead in self._ahead for serial in ahead.rows}
        serials = [s for s in dict.fromkeys(self._serials[blocks].tolist()) if s >= 0 and s not in under_way]
        serials = serials[: CHUNK - len(under_way)]
        if not serials:
            return
        sizes = [self._record_bytes(self._records[serial]) for serial in serials]
        raw = memoryview(np.empty(sum(sizes), np.uint8))  # type: ignore[arg-type]
        ends = itertools.accumulate(sizes)
        rows = {serial: raw[end - size : end] for serial, size, end in zip(serials, sizes, ends, strict=True)}
        wanted = [(_key(serial), row) for serial, row in rows.items()]
        self._ahead = [*self._ahead, _Ahead(rows, self.tier.get_many(wanted, threads=1))]
        self.loaded += sum(self._records[serial].recompute is None for serial in serials)

    def below(self, blocks: np.ndarray) -> np.ndarray:
        """Those of blocks [N] that have a record and lie in no frame."""
        blocks = blocks[blocks < len(self._frames)]
        return np.asarray(blocks[(self._frame(blocks) < 0) & self._is_written[blocks]])

    def _take_ahead(self) -> None:
        """Pages that were read and not wanted yet take frames that can be given up."""
        for ahead in [ahead for ahead in self._ahead if ahead.is_done]:
            room = self._room(len(ahead.rows), must=False)  # which may forget blocks, and with them records
            rows = {}
            for serial, row in ahead.rows.items():
                record = self._records.get(serial)
                if record is not None and record.recompute is None:
                    rows.update(dict.fromkeys(record.blocks, row))
            blocks = np.array([*rows], np.int64)
            blocks = blocks[self._frame(blocks) < 0][: len(room)]
            if len(blocks) and all(p.future.exception() is None for p in ahead.pending):
                raw = np.stack([np.frombuffer(rows[block], np.uint8) for block in blocks.tolist()])
                self._keep(blocks, room[: len(blocks)], self._pages(torch.from_numpy(raw)))
            self._ahead = [other for other in self._ahead if other is not ahead]

    def copy(self, src: Tensor, into: Mapping[str, Tensor], dst: Tensor) -> None:
        """`ops.gather_pages` from here: pages of blocks src [N] to rows dst [N]; -1: none."""
        src, dst, device = src.cpu(), dst.cpu(), dst.device
        wanted = src >= 0
        blocks, rows = src[wanted].numpy(), dst[wanted]
        if device.type == "cpu":  # on a GPU kernels might still read a frame when it is given to another page
            frames = self._frame(blocks)
            there, gone = np.flatnonzero(frames >= 0), np.flatnonzero(frames < 0)
            self._last_use[frames[there]] = next(self._clock)
            ids = torch.from_numpy(frames[there].astype(np.int32))
            for name, x in self.tensors.items():
                ops.gather_pages(x, ids, into[name], rows[_index(there)])
            blocks, rows = blocks[gone], rows[_index(gone)]
        for part in _chunks(len(blocks), CHUNK):
            for name, x in self.read(blocks[part]).items():
                into[name][rows[part].long().to(device)] = x.to(device, non_blocking=True)

    def copy_rows(self, src: Tensor, into: Mapping[str, Tensor], dst: Tensor) -> None:
        """Tokens src [N] of blocks to tokens dst [N], block * P + offset; -1: none."""
        src, dst, device = src.cpu(), dst.cpu(), dst.device
        P = self.tensors["k"].shape[1]
        wanted = src >= 0
        rows, places = src[wanted].numpy(), dst[wanted].long()
        of_block = np.argsort(rows, kind="stable")
        rows, places = rows[of_block], places[_index(of_block)]
        blocks, starts = np.unique(rows // P, return_index=True)
        ends = np.append(starts[1:], len(rows))
        for part in _chunks(len(blocks), CHUNK):
            span = slice(int(starts[part.start]), int(ends[part.stop - 1]))
            page = _index(np.searchsorted(blocks[part], rows[span] // P))
            offset, place, at = _index(rows[span] % P), (places[span] // P).to(device), (places[span] % P).to(device)
            for name, x in self.read(blocks[part]).items():
                if name == "scales":
                    into[name][place, :, at] = x[page, :, offset].to(device, non_blocking=True)
                else:
                    into[name][place, at] = x[page, offset].to(device, non_blocking=True)

    def forget(self, blocks: np.ndarray) -> None:
        """These blocks [N] will hold something else."""
        self._reach(blocks)
        frames = self._frame(blocks)
        self._blocks[frames[frames >= 0]] = -1
        for block in blocks[self._serials[blocks] >= 0].tolist():
            self._drop(block)
        self._is_written[blocks] = False
        self._serials[blocks] = -1

    # ---- frames -----------------------------------------------------------------------------------------------------
    def _frame(self, blocks: np.ndarray) -> np.ndarray:
        """[N] where they lie; -1: in no frame."""
        frames = self._frames[blocks]
        return np.asarray(np.where(self._blocks[frames] == blocks, frames, -1))

    def _keep(self, blocks: np.ndarray, frames: np.ndarray, pages: Mapping[str, Tensor]) -> None:
        """Fills empty frames."""
        for name, tensor in self.tensors.items():
            tensor[_index(frames)] = pages[name].cpu()
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
            if must and self.tier is not None and self._clean(count - len(empty)) < count - len(empty):
                self._finish()
            if must and self._clean(count - len(empty)) < count - len(empty):
                self._write_down(self._dirty())
                self._finish()
            self._give_up(count - len(empty))
            empty = np.flatnonzero(self._blocks < 0)
        return empty[:count]

    def _drop_unused(self) -> None:
        """Forgets blocks that nobody has any more."""
        known = self._serials >= 0
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
        return np.asarray(blocks[[int(serial) not in self._writing for serial in self._serials[blocks]]])

    def _reach(self, blocks: np.ndarray) -> None:
        """Grows what is kept by block."""
        more = int(blocks.max(initial=-1)) + 1 - len(self._frames)
        if more > 0:
            more = max(more, len(self._frames))
            self._is_written = np.concatenate([self._is_written[: len(self._frames)], np.zeros(more, bool)])
            self._serials = np.concatenate([self._serials[: len(self._frames)], np.full(more, -1)])
            self._heads = np.concatenate([self._heads[: len(self._frames)], np.zeros(more, np.int64)])
            self._frames = np.concatenate([self._frames, np.zeros(more, np.int64)])

    # ---- records ----------------------------------------------------------------------------------------------------
    def _tier(self, record_bytes: int) -> Tier:
        """The tier below, made now if it is not there yet.

        Raises:
            ValueError: there is none.
        """
        if self._make_tier is None:
            held, have = (n * self.page_bytes for n in (len(self) + 1, len(self)))
            raise ValueError(f"host_bytes: expected at least {held:,}, or disk_dir beside it, got {have:,}")
        if self.tier is None:
            self.tier = self._make_tier(max(self.page_bytes, record_bytes))
        return self.tier

    def _write_down(self, blocks: np.ndarray) -> None:
        """Begins to write the pages of these blocks, which lie in frames, to the tier below."""
        self._tier(self.page_bytes)
        for part in _chunks(len(blocks), CHUNK):
            if len(self._writing) >= CHUNK:
                self._finish()
            frames = _index(self._frame(blocks[part]))
            rows = [x[frames].reshape(len(frames), -1).view(torch.uint8) for x in self.tensors.values()]
            for block, row in zip(blocks[part].tolist(), torch.cat(rows, 1).numpy(), strict=True):
                self._put(_Record({block}), memoryview(row))

    def _write_inputs(self, blocks: np.ndarray, inputs: Inputs) -> None:
        """Begins to write inputs to the tier below, in place of the pages that come from them."""
        rows = inputs.rows.contiguous().cpu()
        raw = rows.view(len(rows), -1).view(torch.uint8)
        if raw.shape[1] > self._tier(raw.shape[1]).record_bytes:
            return  # the tier was made for pages alone
        self._heads[blocks] = inputs.head
        order = np.argsort(inputs.page, kind="stable")
        members = np.split(blocks[order], np.flatnonzero(np.diff(inputs.page[order])) + 1)
        for page, of_page in zip(np.unique(inputs.page).tolist(), members, strict=True):
            if len(self._writing) >= CHUNK:
                self._finish()
            record = _Record(set(of_page.tolist()), inputs.recompute, rows[:0])
            content: Any = raw[page].numpy()
            self._put(record, memoryview(content))

    def _put(self, record: _Record, content: memoryview) -> None:
        assert self.tier is not None
        serial = next(self._serial)
        for block in record.blocks:
            if self._serials[block] >= 0:  # an interrupt has come before its end was noted
                self._drop(block)
        self._records[serial] = record
        self._serials[list(record.blocks)] = serial
        try:
            self._writing[serial] = self.tier.put(_key(serial), content)
        except TierFullError:
            self._drop_unused()
            with contextlib.suppress(OSError, TierFullError):  # of what nobody needs
                self.tier.wait(self._leaving)
            self._writing[serial] = self.tier.put(_key(serial), content)
        self.written += 1

    def _drop(self, block: int) -> None:
        """A block needs its record no more."""
        serial = int(self._serials[block])
        record = self._records.get(serial)
        if record is not None:
            record.blocks.discard(block)
        if record is None or not record.blocks:
            assert self.tier is not None
            self.tier.delete(_key(serial))
            pending = self._writing.pop(serial, None)
            if pending is not None:
                self._leaving = [*(p for p in self._leaving if not p.future.done()), pending]
            self._records.pop(serial, None)

    def _settle(self) -> None:
        """Notes which records have been written.

        Raises:
            OSError, TierFullError: one has not; its page is where it was.
        """
        if self.tier is None:
            return
        done = {serial: pending for serial, pending in self._writing.items() if pending.future.done()}
        for serial, pending in done.items():
            record = self._records.get(serial)
            if record is not None:
                self._is_written[list(record.blocks)] = pending.future.exception() is None
            self._writing.pop(serial, None)
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
        pages = {name: x.new_empty((len(blocks), *x.shape[1:])) for name, x in self.tensors.items()}
        recomputes: dict[Recompute, list[int]] = {}
        plain = []
        for i, serial in enumerate(self._serials[blocks].tolist()):
            record = self._records.get(serial)
            if record is None or record.recompute is None:
                plain.append(i)
            else:
                recomputes.setdefault(record.recompute, []).append(i)
        if plain:
            raw, ahead = self._read(self._serials[blocks[plain]].tolist(), self.page_bytes)
            self.loaded += len(plain) - ahead
            for name, x in self._pages(raw).items():
                pages[name][plain] = x
        for recompute, places in recomputes.items():
            for name, x in self._recomputed(recompute, blocks[places]).items():
                pages[name][places] = x.cpu()
        return pages

    def _pages(self, raw: Tensor) -> dict[str, Tensor]:
        """Pages of records [N, page_bytes]."""
        parts = zip(raw.split(list(self._page_bytes.values()), 1), self.tensors.items(), strict=True)
        return {name: x.contiguous().view(like.dtype).view(-1, *like.shape[1:]) for x, (name, like) in parts}

    def _record_bytes(self, record: _Record) -> int:
        like = record.like
        return self.page_bytes if like is None else like.element_size() * like.shape[1:].numel()

    def _recomputed(self, recompute: Recompute, blocks: np.ndarray) -> dict[str, Tensor]:
        """Pages [N, ...] of blocks of one layer from its inputs."""
        serials = dict.fromkeys(self._serials[blocks].tolist())
        record = self._records[next(iter(serials))]
        like = record.like
        assert like is not None and self._encode is not None
        place, k, v = self._remade
        if not serials.keys() <= place.keys():
            raw, _ = self._read(list(serials), self._record_bytes(record))
            k, v = recompute(raw.view(like.dtype).view(-1, *like.shape[1:]))
            place = {serial: i for i, serial in enumerate(serials)}
            self._remade = place, k, v
        which = _index(np.array([place[serial] for serial in self._serials[blocks].tolist()])).to(k.device)
        heads = _index(self._heads[blocks]).to(k.device)
        self.recomputed += len(blocks)
        return self._encode(blocks, k[which, heads], v[which, heads])

    def _read(self, serials: Sequence[int], size: int) -> tuple[Tensor, int]:
        """[N, size] bytes of records, and how many of them had been read ahead. If that has failed, they are read
        again, which says why."""
        assert self.tier is not None
        raw = torch.empty(len(serials), size, dtype=torch.uint8)
        rows: dict[int, memoryview] = dict(zip(serials, (memoryview(row) for row in raw.numpy()), strict=True))
        for ahead in [ahead for ahead in self._ahead if rows.keys() & ahead.rows.keys()]:
            try:
                self.tier.wait(ahead.pending)
            except (BadRecordError, TierTimeoutError, TierFullError, OSError):
                self._ahead = [other for other in self._ahead if other is not ahead]
                continue
            for serial in rows.keys() & ahead.rows.keys():
                rows[serial][:] = ahead.rows[serial]
                del rows[serial], ahead.rows[serial]
                self.ahead += 1
        if rows:
            self.tier.wait(self.tier.get_many([(_key(serial), row) for serial, row in rows.items()]))
        return raw, len(serials) - len(rows)


def _key(serial: int) -> bytes:
    return b"page %d" % serial


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
