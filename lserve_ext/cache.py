"""The paged KV of one attention layer: a pool of reference-counted blocks, tables, the raw buffer of the newest
tokens. It knows ops and policies, but no model: `hf` puts it under transformers.

A page is sealed once P further tokens follow it, and is never written again. So sequences share blocks by reference
count (beams, forks), and a crop within the raw buffer is exact.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .config import SparseConfig
from .ops import DENSE, PagedKV
from .select import PREFILL_QUERIES, make_selector


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a tier: in use now, reserved from the allocator, and the most that ever were in use."""

    used: int = 0
    reserved: int = 0
    peak: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.used + other.used, self.reserved + other.reserved, self.peak + other.peak)


class BlockPool:
    """Blocks of one layer on one device: the pools of `PagedKV`, grown on demand, and a reference count a block."""

    GROWTH = 1.5

    def __init__(self, config: SparseConfig, like: Tensor, capacity: int) -> None:
        P, D, dtype = config.page_size, like.shape[-1], like.dtype
        int8 = config.kv_dtype == "int8"
        rows: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "k": ((P, D), torch.uint8 if int8 else dtype),
            "v": ((P, D), torch.uint8 if int8 else dtype),
        }
        if config.needs_stats:
            rows["stats"] = ((P // config.stats_group, 2, D), dtype)
        if int8:
            rows["scales"] = ((1 if config.needs_stats else 2, P, 2), torch.float32)
        self.tensors = {name: like.new_empty((0, *shape), dtype=kind) for name, (shape, kind) in rows.items()}
        self.block_bytes = sum(t.element_size() * t.shape[1:].numel() for t in self.tensors.values())
        self._references = np.zeros(0, np.int64)
        self._free: list[int] = []
        self.peak = 0
        self._grow(capacity)

    @property
    def capacity(self) -> int:
        return len(self._references)

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return self.capacity - len(self._free)

    def take(self, count: int) -> np.ndarray:
        """`count` free blocks with one reference each."""
        if count > len(self._free):
            self._grow(max(self.used + count, int(self.capacity * self.GROWTH)))
        ids = np.array([self._free.pop() for _ in range(count)], np.int32)
        self._references[ids] = 1
        self.peak = max(self.peak, self.used)
        return ids

    def share(self, ids: np.ndarray) -> None:
        """One more reference for every entry of ids, which may repeat; -1 is nobody."""
        np.add.at(self._references, ids[ids >= 0], 1)

    def drop(self, ids: np.ndarray) -> None:
        """One reference less for every entry of ids; blocks without any are free again."""
        ids = ids[ids >= 0]
        np.subtract.at(self._references, ids, 1)
        free = np.unique(ids[self._references[ids] == 0])
        self._free.extend(free[::-1].tolist())

    def _grow(self, capacity: int) -> None:
        old = self.capacity
        try:
            for name, tensor in self.tensors.items():  # one at a time: the peak is one copy, not all
                grown = tensor.new_empty((capacity, *tensor.shape[1:]))
                grown[:old] = tensor
                self.tensors[name] = grown
        except BaseException:
            self.tensors = {name: tensor[:old] for name, tensor in self.tensors.items()}
            raise
        self._references = np.concatenate([self._references, np.zeros(capacity - old, np.int64)])
        self._free[:0] = range(capacity - 1, old - 1, -1)


class LayerCache:
    """What one attention layer keeps of a batch of sequences, and its attention over it.

    Args:
        config: what is attended and how it is stored.
        streaming: which kv heads stream, [H].
        dense: heads that do not stream attend everything in decode too.
        like: [B, H, T, D] keys whose shape, dtype and device the layer takes.

    Each sequence has its own length; lengths live on the host. A cache belongs to one thread.
    """

    def __init__(self, config: SparseConfig, streaming: Sequence[bool], dense: bool, like: Tensor) -> None:
        B, H, _, D = like.shape
        if len(streaming) != H:
            raise ValueError(f"streaming: expected {H} kv heads, got {len(streaming)}")
        self.config, self.dtype, self.device = config, like.dtype, like.device
        self.heads, self.head_dim = H, D
        P = config.page_size
        self._streaming = np.array(streaming, bool)
        self._sink = max(config.sink_pages, config.prefill_sink_pages)
        self._window = max(config.local_pages, config.prefill_local_pages)  # of streaming heads, until the first decode
        self._dense = dense
        self._selector = None if dense or self._streaming.all() else make_selector(config)
        with torch.inference_mode(False):
            listed = DENSE if self._selector is None else 0
            self._decode_windows = self._ints(np.where(self._streaming, config.local_pages, listed))
            self._prefill_windows = self._ints(np.where(self._streaming, config.prefill_local_pages, DENSE))
            pages = -(-config.max_tokens // P) if config.max_tokens else 4
            self._pool = BlockPool(config, like, B * H * pages if config.max_tokens else 0)
            self._raw_k = like.new_zeros(B, H, 2 * P, D)  # zeros, because files hold rows that no token has filled
            self._raw_v = like.new_zeros(B, H, 2 * P, D)
        self._table = np.full((B, H, pages), -1, np.int32)
        self._lengths = np.zeros(B, np.int64)
        self._sealed = np.zeros(B, np.int64)
        self._freed = np.full(B, self._sink, np.int64)  # streaming heads hold no page from the sink up to here
        self._last: tuple[Tensor, Tensor, int] | None = None  # lists, local_start and unit of the last decode step
        self._upload()

    # ---- what it holds ----------------------------------------------------------------------------------------------
    @property
    def lengths(self) -> list[int]:
        """Tokens held of each sequence, pad tokens not counted."""
        return [int(n) for n in self._lengths]

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def kv(self) -> PagedKV:
        """The tensors that ops take."""
        tensors = self._pool.tensors
        return PagedKV(tensors["k"], tensors["v"], tensors.get("stats"), tensors.get("scales"), self._device_table,
                       self._device_table, self._raw_k, self._raw_v, self._device_sealed)  # fmt: skip

    def memory(self) -> Memory:
        """Bytes of KV on the device. Blocks that forks share are counted in each of them."""
        raw = 2 * self._raw_k.nbytes
        pool = self._pool
        return Memory(*(blocks * pool.block_bytes + raw for blocks in (pool.used, pool.capacity, pool.peak)))

    def attended(self) -> tuple[int, int]:
        """Tokens that a decode step of this moment attends, and those of a dense one, over kv heads and sequences."""
        P, sink = self.config.page_size, self.config.sink_pages * self.config.page_size
        total = 0
        for b, n in enumerate(self._lengths):
            for h, window in enumerate(self._decode_windows.tolist()):
                local, listed = max(0, (n - 1) // P - window + 1) * P, 0
                if window == 0:
                    local = 0
                    if self._last is not None:  # else: as the next step will see it, before it selects
                        lists, local_start, unit = self._last
                        local, listed = int(local_start[b]) * unit, int((lists[b, h] >= 0).sum()) * unit
                local = min(local, self._sealed[b] * P)
                total += min(sink, local) + listed + n - local
        return int(total), int(self._lengths.sum()) * self.heads

    # ---- attention --------------------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    @torch.no_grad()
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pads: Sequence[int], scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """Appends the new tokens and attends: T = 1 is decode, more is prefill.

        Args:
            q: [B, Hq, T, D]; k, v: [B, H, T, D], after rotary embedding.
            pads: [B], how many of the T tokens are padding, on the left.
            scale: of q·k.
            sinks: [Hq] a logit that each head's softmax has in its denominator and nowhere else (GPT-OSS).

        Returns:
            [B, T, Hq, D]; 0 for pad tokens.
        """
        if k.shape[:2] != (self.batch_size, self.heads) or k.shape[3] != self.head_dim:
            held = f"[{self.batch_size}, {self.heads}, T, {self.head_dim}]"
            raise ValueError(f"k: expected {held}, as the cache holds, got {list(k.shape)}")
        before = self._lengths
        try:
            step = self._decode if k.shape[2] == 1 else self._prefill
            return step(q, k, v, np.asarray(pads, np.int64), scale, sinks)
        except BaseException:
            if self._lengths is not before:  # already appended: take it back
                self._truncate(before)
            raise

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, pads: np.ndarray, scale: float, sinks: Tensor | None) -> Tensor:
        B, Hq, T, D = q.shape
        new = T - pads
        if pads.any():
            columns = torch.arange(T, device=self.device) >= torch.from_numpy(pads).to(self.device)[:, None]
            q_new, k_new, v_new = (x.transpose(1, 2)[columns] for x in (q, k, v))
        else:
            columns = None
            q_new, k_new, v_new = (x.transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (q, k, v))
        bounds = self._ints(np.concatenate([[0], np.cumsum(new)]))
        out, lse = ops.prefill(
            q_new,
            k_new,
            v_new,
            bounds,
            bounds,
            self._prefill_windows,
            self.kv,
            self._device_lengths,
            sink=self.config.prefill_sink_pages,
            scale=scale,
        )
        out, lse = _with_sinks(out, lse, sinks)
        self._append(k_new, v_new, bounds, new)
        if columns is not None:
            out = out.new_zeros(B, T, Hq, D).index_put_((columns,), out)
            lse = lse.new_full((B, T, Hq), float("-inf")).index_put_((columns,), lse)
        self._last = None
        if self._selector is not None:
            self._selector.drop()
            if self._selector.observes:
                tail = q.transpose(1, 2)[:, -PREFILL_QUERIES:]
                lse_tail = lse.reshape(B, T, Hq)[:, -PREFILL_QUERIES:].contiguous()
                mass = ops.attention_mass(tail, lse_tail, self.kv, self._device_lengths, self._prefill_windows,
                                          sink=self.config.prefill_sink_pages, scale=scale)  # fmt: skip
                self._selector.observe(mass, self._device_lengths, T)
        return out.reshape(B, T, Hq, D)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, pads: np.ndarray, scale: float, sinks: Tensor | None) -> Tensor:
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        if pads.any():  # a left-padded chunk of one token: those sequences are still empty
            rows = torch.from_numpy(pads == 0).to(self.device)
            k, v = k[rows], v[rows]
        self._window = self.config.local_pages
        sealed = self._device_sealed  # a step reads the pages as they lay when it began
        self._append(k, v, self._ints(np.concatenate([[0], np.cumsum(1 - pads)])), 1 - pads)
        kv = self.kv._replace(sealed=sealed)
        lists = local_start = unit = None
        if self._selector is not None:
            lists, local_start = self._selector.select(q, kv, self._device_lengths, self._decode_windows)
            unit = self._selector.unit
            self._last = lists, local_start, unit
        rule = (self._device_lengths, self._decode_windows, lists, local_start)
        sink = self.config.sink_pages
        out, lse = _with_sinks(*ops.decode(q, kv, *rule, sink=sink, unit=unit, scale=scale), sinks)
        if self._selector is not None and self._selector.observes:
            mass = ops.attention_mass(q[:, None], lse[:, None], kv, *rule, sink=sink, unit=unit, scale=scale)
            self._selector.observe(mass, self._device_lengths, 1)
        return out[:, None]

    def _append(self, k: Tensor, v: Tensor, bounds: Tensor, new: np.ndarray) -> None:
        P = self.config.page_size
        lengths = self._lengths + new
        sealed = np.maximum(self._sealed, lengths // P - 1)
        self._reserve(int(lengths.max(initial=0)))
        # Streaming heads keep one page more than their window, for exact crops. And what this append leaves behind is
        # freed by the next one, so that an interrupted forward can be taken back.
        self._free_past(self._lengths // P - self._window)
        keep_from = lengths // P - self._window
        taken = []
        try:
            for b in np.flatnonzero(sealed > self._sealed):
                pages = np.arange(self._sealed[b], sealed[b])
                was_raw = pages <= self._lengths[b] // P
                wanted = ~self._streaming[:, None] | (pages < self._sink) | (pages >= keep_from[b]) | was_raw
                ids = self._pool.take(int(wanted.sum()))
                taken.append(ids)
                self._table[b][:, pages[0] : pages[-1] + 1][wanted] = ids
            if taken:
                self._upload_table()
            ops.append_kv(k, v, bounds, self._device_lengths, self.kv)
        except BaseException:
            for ids in taken:
                self._table[np.isin(self._table, ids)] = -1
                self._pool.drop(ids)
            self._upload_table()
            raise
        self._lengths, self._sealed = lengths, sealed
        self._upload_lengths()

    def _free_past(self, keep_from: np.ndarray) -> None:
        """Drops the blocks of streaming heads that no query can reach any more."""
        if not self._streaming.any():
            return
        changed = False
        for b in np.flatnonzero(keep_from > self._freed):
            past = self._table[b, self._streaming, self._freed[b] : keep_from[b]]
            self._pool.drop(past)
            self._table[b, self._streaming, self._freed[b] : keep_from[b]] = -1
            self._freed[b] = keep_from[b]
            changed = True
        if changed:
            self._upload_table()

    def _reserve(self, tokens: int) -> None:
        """Makes the table wide enough."""
        pages, held = -(-tokens // self.config.page_size), self._table.shape[2]
        if pages > held:
            pages = max(pages, int(held * BlockPool.GROWTH))
            self._table = np.pad(self._table, ((0, 0), (0, 0), (0, pages - held)), constant_values=-1)
            self._upload_table()

    # ---- the host's state on the device -----------------------------------------------------------------------------
    def _ints(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.device)

    def _upload_table(self) -> None:
        self._device_table = self._ints(self._table)

    def _upload_lengths(self) -> None:
        self._device_lengths, self._device_sealed = self._ints(self._lengths), self._ints(self._sealed)

    def _upload(self) -> None:
        with torch.inference_mode(False):
            self._upload_table()
            self._upload_lengths()

    # ---- crop, batch operations, forks ------------------------------------------------------------------------------
    def check_crop(self, tokens: int) -> None:
        """Raises ValueError if a crop by `tokens` needs blocks that streaming heads have freed."""
        if not self._streaming.any():
            return
        P = self.config.page_size
        for b, length in enumerate(self._cropped(tokens)):
            first = max(length // P - self._window + 1, self._sink)
            last = min(-(-length // P), self._sealed[b])  # the page that is cut, too
            gone = (self._table[b, self._streaming, first:last] < 0).any(0)
            if length < self._lengths[b] and gone.any():
                raise ValueError(
                    f"crop: expected no more than streaming heads still hold, got {tokens} tokens, which needs page "
                    f"{first + int(gone.argmax())} of sequence {b}"
                )

    def _cropped(self, tokens: int) -> np.ndarray:
        return np.maximum(self._lengths - tokens, 0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Removes the newest `tokens` of every sequence.

        Exact within the raw buffer. Deeper, the page that is cut is dequantised into the buffer, and so quantised a
        second time later. Raises ValueError, and changes nothing, if streaming heads have freed what it needs.
        """
        self.check_crop(tokens)
        self._truncate(self._cropped(tokens))

    def _truncate(self, lengths: np.ndarray) -> None:
        P = self.config.page_size
        for b in np.flatnonzero(lengths < self._sealed * P):
            page = int(lengths[b] // P)
            if lengths[b] % P:
                self._unseal(int(b), page)
            self._pool.drop(self._table[b, :, page:])
            self._table[b, :, page:] = -1
            self._sealed[b] = page
        self._freed = np.maximum(np.minimum(self._freed, lengths // P), self._sink)
        self._lengths, self._last = lengths, None
        if not lengths.any():  # as new
            self._window = max(self.config.local_pages, self.config.prefill_local_pages)
        self._upload()
        if self._selector is not None:
            self._selector.drop(self._device_lengths)

    def _unseal(self, b: int, page: int) -> None:
        """Copies a page from the pools into the raw buffer."""
        P, tensors = self.config.page_size, self._pool.tensors
        held = np.flatnonzero(self._table[b, :, page] >= 0)  # not those of streaming heads that are past
        ids = self._ints(self._table[b, held, page]).long()
        k, v = tensors["k"][ids], tensors["v"][ids]
        if "scales" in tensors:
            stats = tensors["stats"][ids] if "stats" in tensors else None
            k, v = ops.dequantize_kv(k, v, stats, tensors["scales"][ids], self.dtype)
        rows = slice(page % 2 * P, page % 2 * P + P)
        heads = torch.from_numpy(held).to(self.device)
        self._raw_k[b, heads, rows], self._raw_v[b, heads, rows] = k, v

    @torch.inference_mode(False)
    @torch.no_grad()
    def take_rows(self, rows: Tensor) -> None:
        """Keeps these sequences of the batch, in this order; they may repeat. Blocks are shared, raw buffers copied."""
        rows = rows.to(self.device)
        index = rows.cpu().numpy()
        if len(index) and (index.min() < 0 or index.max() >= self.batch_size):
            raise ValueError(f"rows: expected sequences 0..{self.batch_size - 1}, got {index.tolist()}")
        raw_k, raw_v, table = self._raw_k[rows], self._raw_v[rows], self._table[index]
        if self._selector is not None:
            self._selector.take_rows(rows)
        self._pool.share(table)
        self._pool.drop(self._table)
        self._raw_k, self._raw_v, self._table = raw_k, raw_v, table
        self._lengths, self._sealed, self._freed = self._lengths[index], self._sealed[index], self._freed[index]
        if self._last is not None:
            lists, local_start, unit = self._last
            self._last = lists[rows], local_start[rows], unit
        self._upload()

    @torch.inference_mode(False)
    @torch.no_grad()
    def fork(self) -> LayerCache:
        """A copy that shares the sealed blocks."""
        twin = copy.copy(self)
        twin._table = np.full_like(self._table, -1)  # it names no block until it has a reference to it
        twin._raw_k, twin._raw_v = self._raw_k.clone(), self._raw_v.clone()
        twin._lengths, twin._sealed, twin._freed = self._lengths.copy(), self._sealed.copy(), self._freed.copy()
        twin._selector = copy.deepcopy(self._selector)
        self._pool.share(self._table)
        twin._table = self._table.copy()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        """A copy with a pool of its own, which holds no blocks of forks."""
        like = self._raw_k.new_empty(self.batch_size, self.heads, 0, self.head_dim)
        twin = LayerCache(self.config, self._streaming.tolist(), self._dense, like)
        twin.restore({name: tensor.clone() for name, tensor in self.state().items()})
        return twin

    # ---- files ------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs; only blocks in use, renumbered."""
        used = np.unique(self._table[self._table >= 0])
        ids = torch.from_numpy(used).to(self.device).long()
        table = np.where(self._table >= 0, np.searchsorted(used, self._table), -1).astype(np.int32)
        hosts = {"table": table, "lengths": self._lengths, "sealed": self._sealed, "freed": self._freed}
        state = {name: torch.from_numpy(array) for name, array in hosts.items()}
        state |= {f"pool.{name}": tensor[ids] for name, tensor in self._pool.tensors.items()}
        state |= {"raw_k": self._raw_k, "raw_v": self._raw_v, "window": torch.tensor(self._window)}
        if self._selector is not None:
            state |= {f"selector.{name}": tensor for name, tensor in self._selector.state().items()}
        return state

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, in a layer just made for it."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): t.to(self.device) for key, t in state.items() if key.startswith(prefix)}

        pools = part("pool.")
        blocks = self._pool.take(len(pools["k"]))
        for name, tensor in pools.items():
            self._pool.tensors[name][torch.from_numpy(blocks).to(self.device).long()] = tensor
        table = state["table"].numpy()
        self._table = np.where(table >= 0, blocks[table] if len(blocks) else table, -1).astype(np.int32)
        self._pool.share(self._table)
        self._pool.drop(blocks)  # what take gave; the table's own references stay
        hosts = (state[name].numpy().copy() for name in ("lengths", "sealed", "freed"))
        self._lengths, self._sealed, self._freed = hosts
        self._window = int(state["window"])
        self._raw_k, self._raw_v = state["raw_k"].to(self.device), state["raw_v"].to(self.device)
        if self._selector is not None:
            self._selector.restore(part("selector."))
        self._upload()

    def __del__(self) -> None:
        if hasattr(self, "_table") and not sys.is_finalizing():
            self._pool.drop(self._table)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention whose softmax has one more term in its denominator: out [..., Hq, D], lse [..., Hq], sinks [Hq]."""
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.float())
    return (out * (lse - total).exp()[..., None]).to(out.dtype), total
