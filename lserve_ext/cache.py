"""The paged KV of one attention layer: a pool of reference-counted blocks, tables, the residual buffer of the newest
tokens. It knows ops and policies, but no model: `hf` puts it under transformers.

A page is sealed once P further tokens follow it, and is never written again. So sequences share blocks (beams, forks),
and a crop within the residual buffer is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .blocks import BlockTable, Memory, Pool
from .config import SparseConfig
from .ops import DENSE, LISTED, Mask, PagedKV
from .select import PREFILL_QUERIES, Selection, make_selector


class State(NamedTuple):
    """All that a layer holds of a batch at one moment. A step makes another one and then takes it in one assignment, so
    an exception anywhere leaves the layer as it was.

    That is why a step writes only where this state does not look: newly allocated blocks, a buffer of its own
    (prefill), or the row of a token that has long been sealed (decode).
    """

    blocks: BlockTable
    block_table: Tensor
    """[B, H, M] the same on the device."""
    lengths: np.ndarray
    """[B] tokens held, without padding."""
    sealed: np.ndarray
    """[B] pages in the pools."""
    freed: np.ndarray
    """[B] streaming heads hold no page from the sink up to here."""
    window: int
    """Pages that streaming heads keep: until the first decode step those of the longer window."""
    columns: int
    """Columns of the padded batch that have been fed."""
    residual_k: Tensor
    """[B, H, 2P, D], as in `PagedKV`."""
    residual_v: Tensor
    device_lengths: Tensor
    device_sealed: Tensor
    selection: Selection


class LayerCache:
    """What one attention layer keeps of a batch of sequences, and its attention over it.

    Args:
        config: what is attended and how it is stored.
        streaming_heads: which kv heads stream, [H].
        dense: heads that do not stream attend everything in decode too.
        like: [B, H, T, D] keys whose shape, dtype and device the layer takes.

    Each sequence has its own length; lengths live on the host. A cache belongs to one thread. After an exception, even
    a KeyboardInterrupt between two lines, it is as before the call or as after it.
    """

    def __init__(self, config: SparseConfig, streaming_heads: Sequence[bool], dense: bool, like: Tensor) -> None:
        B, H, _, D = like.shape
        if len(streaming_heads) != H:
            raise ValueError(f"streaming_heads: expected {H} kv heads, got {len(streaming_heads)}")
        self.config, self.dtype, self.device = config, like.dtype, like.device
        self.heads, self.head_dim = H, D
        P = config.page_size
        self._streaming = np.array(streaming_heads, bool)
        self._sink = max(config.sink_pages, config.prefill_sink_pages)
        self._dense = dense
        self._selector = None if dense or self._streaming.all() else make_selector(config)
        with torch.inference_mode(False):
            listed = DENSE if self._selector is None else LISTED
            self._decode_windows = self._ints(np.where(self._streaming, config.local_pages, listed))
            self._prefill_windows = self._ints(np.where(self._streaming, config.prefill_local_pages, DENSE))
            pages = -(-config.max_tokens // P) if config.max_tokens else 4
            self._pool = Pool(config, like, B * H * pages if config.max_tokens else 0)
            raw = [like.new_zeros(B, H, 2 * P, D) for _ in "kv"]  # files hold rows that no token has filled
            self._state = self._make_state(
                blocks=self._pool.table(np.full((B, H, pages), -1, np.int32)),
                lengths=np.zeros(B, np.int64),
                sealed=np.zeros(B, np.int64),
                freed=np.full(B, self._sink, np.int64),
                window=self._longest_window,
                columns=0,
                residual_k=raw[0],
                residual_v=raw[1],
                selection=Selection(),
            )

    # ---- what it holds ----------------------------------------------------------------------------------------------
    @property
    def lengths(self) -> list[int]:
        """Tokens held of each sequence, pad tokens not counted."""
        return [int(n) for n in self._state.lengths]

    @property
    def columns(self) -> int:
        """Columns of the padded batch that have been fed, less those that were cropped."""
        return self._state.columns

    @property
    def batch_size(self) -> int:
        return len(self._state.lengths)

    @property
    def kv(self) -> PagedKV:
        """The tensors that ops take."""
        return self._paged(self._state)

    def _paged(self, s: State) -> PagedKV:
        tensors = self._pool.tensors
        return PagedKV(tensors["k"], tensors["v"], tensors.get("stats"), tensors.get("scales"), s.block_table,
                       s.block_table, s.residual_k, s.residual_v, s.device_sealed)  # fmt: skip

    @property
    def _longest_window(self) -> int:
        return max(self.config.local_pages, self.config.prefill_local_pages)

    def _ints(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.device)

    def _make_state(self, lengths: np.ndarray, sealed: np.ndarray, blocks: BlockTable, **fields: Any) -> State:
        """A state whose tensors on the device follow from its arrays."""
        return State(lengths=lengths, sealed=sealed, device_lengths=self._ints(lengths), blocks=blocks,
                     device_sealed=self._ints(sealed), block_table=self._ints(blocks.ids), **fields)  # fmt: skip

    def memory(self) -> Memory:
        """Bytes of KV on the device. Blocks that forks share are counted in each of them."""
        raw = 2 * self._state.residual_k.nbytes
        return self._pool.memory + Memory(raw, raw, raw)

    def attended(self) -> tuple[int, int]:
        """Tokens that a decode step of this moment attends, and those of a dense one, over kv heads and sequences."""
        P, sink = self.config.page_size, self.config.sink_pages * self.config.page_size
        s, lists, local_start = self._state, self._state.selection.lists, self._state.selection.local_start
        total = 0
        for b, n in enumerate(s.lengths):
            for h, window in enumerate(self._decode_windows.tolist()):
                local, listed = max(0, (n - 1) // P - window + 1) * P, 0
                if window == LISTED:
                    local = 0
                    if lists is not None:  # else: as the next step will see it, before it selects
                        assert self._selector is not None and local_start is not None
                        unit = self._selector.unit
                        local, listed = int(local_start[b]) * unit, int((lists[b, h] >= 0).sum()) * unit
                local = min(local, s.sealed[b] * P)
                total += min(sink, local) + listed + n - local
        return int(total), int(s.lengths.sum()) * self.heads

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
        self._pool.settle()
        step = self._decode if k.shape[2] == 1 else self._prefill
        out, self._state = step(q, k, v, np.asarray(pads, np.int64), scale, sinks)
        return out

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, pads: np.ndarray, scale: float, sinks: Tensor | None
    ) -> tuple[Tensor, State]:
        B, Hq, T, D = q.shape
        s, new = self._state, T - pads
        if pads.any():
            columns = torch.arange(T, device=self.device) >= torch.from_numpy(pads).to(self.device)[:, None]
            q_new, k_new, v_new = (x.transpose(1, 2)[columns] for x in (q, k, v))
        else:
            columns = None
            q_new, k_new, v_new = (x.transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (q, k, v))
        bounds = self._ints(np.concatenate([[0], np.cumsum(new)]))
        mask = Mask(self._prefill_windows, sink=self.config.prefill_sink_pages)
        out, lse = ops.prefill(q_new, k_new, v_new, bounds, bounds, mask, self._paged(s), s.device_lengths, scale=scale)
        out, lse = with_sinks(out, lse, sinks)
        own_buffer = s._replace(residual_k=s.residual_k.clone(), residual_v=s.residual_v.clone())
        s = self._appended(own_buffer, k_new, v_new, bounds, new, T)
        if columns is not None:
            out = out.new_zeros(B, T, Hq, D).index_put_((columns,), out)
            lse = lse.new_full((B, T, Hq), float("-inf")).index_put_((columns,), lse)
        selection = s.selection.without_lists()
        if self._selector is not None and self._selector.observes:
            tail = q.transpose(1, 2)[:, -PREFILL_QUERIES:]
            lse_tail = lse.reshape(B, T, Hq)[:, -PREFILL_QUERIES:].contiguous()
            mass = ops.attention_mass(tail, lse_tail, mask, self._paged(s), s.device_lengths, scale=scale)
            selection = self._selector.observe(selection, mass, s.device_lengths, T)
        return out.reshape(B, T, Hq, D), s._replace(selection=selection)

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, pads: np.ndarray, scale: float, sinks: Tensor | None
    ) -> tuple[Tensor, State]:
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        if pads.any():  # a left-padded chunk of one token: those sequences are still empty
            rows = torch.from_numpy(pads == 0).to(self.device)
            k, v = k[rows], v[rows]
        s = self._state._replace(window=self.config.local_pages)
        sealed = s.device_sealed  # a step reads the pages as they lay when it began
        bounds = self._ints(np.concatenate([[0], np.cumsum(1 - pads)]))
        s = self._appended(s, k, v, bounds, 1 - pads, 1)
        kv, selection, unit = self._paged(s)._replace(sealed=sealed), s.selection, None
        if self._selector is not None:
            selection = self._selector.select(selection, q, kv, s.device_lengths, self._decode_windows)
            unit = self._selector.unit
        mask = Mask(self._decode_windows, selection.lists, selection.local_start, self.config.sink_pages, unit)
        out, lse = with_sinks(*ops.decode(q, mask, kv, s.device_lengths, scale=scale), sinks)
        if self._selector is not None and self._selector.observes:
            mass = ops.attention_mass(q[:, None], lse[:, None], mask, kv, s.device_lengths, scale=scale)
            selection = self._selector.observe(selection, mass, s.device_lengths, 1)
        return out[:, None], s._replace(selection=selection)

    def _appended(self, s: State, k: Tensor, v: Tensor, bounds: Tensor, new: np.ndarray, columns: int) -> State:
        """s with these tokens."""
        P = self.config.page_size
        lengths = s.lengths + new
        sealed = np.maximum(s.sealed, lengths // P - 1)
        # Streaming heads keep one page more than their window, for exact crops.
        freed = np.maximum(s.freed, lengths // P - s.window) if self._streaming.any() else s.freed
        blocks, table, held = s.blocks, s.block_table, s.blocks.ids.shape[2]
        needed = -(-int(lengths.max(initial=0)) // P)
        if needed > held or (sealed > s.sealed).any() or (freed > s.freed).any():
            needed = max(needed, int(held * Pool.GROWTH)) if needed > held else held
            ids = np.pad(s.blocks.ids, ((0, 0), (0, 0), (0, needed - held)), constant_values=-1)
            page = np.arange(needed)
            kept = (page < self._sink) | (page >= freed[:, None])  # [B, M]
            ids[(self._streaming[:, None] & ~kept[:, None]) & np.ones_like(ids, bool)] = -1
            due = (page >= s.sealed[:, None]) & (page < sealed[:, None])
            blocks = self._pool.table(ids, due[:, None] & (~self._streaming[:, None] | kept[:, None]))
            table = self._ints(blocks.ids)
        # The pages that are due are sealed by this call: it finds them below `after // P - 1`.
        ops.append_kv(k, v, bounds, s.device_lengths, self._paged(s._replace(block_table=table)))
        return s._replace(lengths=lengths, sealed=sealed, blocks=blocks, block_table=table, freed=freed,
                          device_lengths=self._ints(lengths), device_sealed=self._ints(sealed),
                          columns=s.columns + columns)  # fmt: skip

    # ---- crop, batch operations, forks ------------------------------------------------------------------------------
    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Removes the newest `tokens` of every sequence.

        Exact within the residual buffer. Deeper, the page that is cut is dequantised into the buffer, and so quantised
        a second time later. Raises ValueError, and changes nothing, if streaming heads have freed what it needs.
        """
        s, P = self._state, self.config.page_size
        lengths = np.maximum(s.lengths - tokens, 0)
        self._check_crop(tokens, lengths)
        residual_k, residual_v = s.residual_k, s.residual_v
        page = np.where(lengths < s.sealed * P, lengths // P, s.sealed)
        cut = np.flatnonzero((page < s.sealed) & (lengths % P > 0))
        if len(cut):
            residual_k, residual_v = residual_k.clone(), residual_v.clone()
        for b in cut:
            self._unseal(int(b), int(page[b]), residual_k, residual_v)
        blocks = s.blocks
        if (page < s.sealed).any():
            beyond = np.arange(blocks.ids.shape[2]) >= page[:, None]
            blocks = self._pool.table(np.where(beyond[:, None], -1, blocks.ids))
        state = self._make_state(
            lengths=lengths,
            sealed=page,
            blocks=blocks,
            freed=np.maximum(np.minimum(s.freed, lengths // P), self._sink),
            window=s.window if lengths.any() else self._longest_window,  # without tokens: as new
            columns=max(0, s.columns - tokens),
            residual_k=residual_k,
            residual_v=residual_v,
            selection=s.selection,
        )
        self._state = state._replace(selection=s.selection.without_lists(state.device_lengths))

    def _check_crop(self, tokens: int, lengths: np.ndarray) -> None:
        s, P = self._state, self.config.page_size
        for b, length in enumerate(lengths if self._streaming.any() else ()):
            first = max(length // P - s.window + 1, self._sink)
            last = min(-(-length // P), s.sealed[b])  # the page that is cut, too
            gone = (s.blocks.ids[b, self._streaming, first:last] < 0).any(0)
            if length < s.lengths[b] and gone.any():
                raise ValueError(
                    f"crop: expected no more than streaming heads still hold, got {tokens} tokens, which needs page "
                    f"{first + int(gone.argmax())} of sequence {b}"
                )

    def _unseal(self, b: int, page: int, residual_k: Tensor, residual_v: Tensor) -> None:
        """Copies a page from the pools into the residual buffer."""
        P, tensors, table = self.config.page_size, self._pool.tensors, self._state.blocks.ids
        held = np.flatnonzero(table[b, :, page] >= 0)  # not those of streaming heads that are past
        ids = self._ints(table[b, held, page]).long()
        k, v = tensors["k"][ids], tensors["v"][ids]
        if "scales" in tensors:
            stats = tensors["stats"][ids] if "stats" in tensors else None
            k, v = ops.dequantize_kv(k, v, stats, tensors["scales"][ids], self.dtype)
        rows = slice(page % 2 * P, page % 2 * P + P)
        heads = torch.from_numpy(held).to(self.device)
        residual_k[b, heads, rows], residual_v[b, heads, rows] = k, v

    @torch.inference_mode(False)
    @torch.no_grad()
    def take_rows(self, rows: Tensor) -> None:
        """Keeps these sequences of the batch, in this order; they may repeat. Blocks are shared, the rest is copied."""
        s, rows = self._state, rows.to(self.device)
        index = rows.cpu().numpy()
        if len(index) and (index.min() < 0 or index.max() >= self.batch_size):
            raise ValueError(f"rows: expected sequences 0..{self.batch_size - 1}, got {index.tolist()}")
        self._state = self._make_state(
            lengths=s.lengths[index],
            sealed=s.sealed[index],
            blocks=self._pool.table(s.blocks.ids[index]),
            freed=s.freed[index],
            window=s.window,
            columns=s.columns,
            residual_k=s.residual_k[rows],
            residual_v=s.residual_v[rows],
            selection=s.selection.take_rows(rows),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def fork(self) -> LayerCache:
        """A copy that shares the sealed blocks."""
        twin = copy.copy(self)
        twin._state = self._state._replace(
            residual_k=self._state.residual_k.clone(), residual_v=self._state.residual_v.clone()
        )
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        """A copy with a pool of its own, which holds no blocks of forks."""
        s = self._state
        like = s.residual_k.new_empty(self.batch_size, self.heads, 0, self.head_dim)
        twin = LayerCache(self.config, self._streaming.tolist(), self._dense, like)
        twin.restore({name: tensor.clone() for name, tensor in self.state().items()})
        return twin

    # ---- files ------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs; only blocks in use, renumbered."""
        s, table = self._state, self._state.blocks.ids
        used = np.unique(table[table >= 0])
        ids = torch.from_numpy(used).to(self.device).long()
        table = np.where(table >= 0, np.searchsorted(used, table), -1).astype(np.int32)
        hosts = {"table": table, "lengths": s.lengths, "sealed": s.sealed, "freed": s.freed}
        state = {name: torch.from_numpy(array) for name, array in hosts.items()}
        state |= {f"pool.{name}": tensor[ids] for name, tensor in self._pool.tensors.items()}
        state |= {"residual_k": s.residual_k, "residual_v": s.residual_v}
        numbers = {"window": s.window, "columns": s.columns, "selection.age": s.selection.age}
        state |= {name: torch.tensor(value) for name, value in numbers.items()}
        return state | {f"selection.{name}": x.contiguous() for name, x in s.selection.tensors().items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, in a layer just made for it.

        Raises:
            ValueError: a tensor is missing or unknown, has another shape or dtype, or holds what no cache can.
        """
        self._check_file(state)
        table, pools = state["table"].numpy(), [name for name in state if name.startswith("pool.")]
        blocks = self._pool.table(np.full(len(state["pool.k"]), -1), np.ones(len(state["pool.k"]), bool))
        ids = torch.from_numpy(blocks.ids).to(self.device).long()
        for name in pools:
            self._pool.tensors[name.removeprefix("pool.")][ids] = state[name].to(self.device)
        named = np.where(table >= 0, blocks.ids[table], -1) if len(blocks.ids) else table
        selection = {name: state.get(f"selection.{name}") for name in ("lists", "local_start", "mass")}
        self._state = self._make_state(
            lengths=state["lengths"].numpy().copy(),
            sealed=state["sealed"].numpy().copy(),
            blocks=self._pool.table(named),
            freed=state["freed"].numpy().copy(),
            window=int(state["window"]),
            columns=int(state["columns"]),
            residual_k=state["residual_k"].to(self.device),
            residual_v=state["residual_v"].to(self.device),
            selection=Selection(
                age=int(state["selection.age"]),
                **{name: None if x is None else x.to(self.device) for name, x in selection.items()},
            ),
        )

    def _check_file(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError with the name of the tensor that does not fit."""
        B, H, P, D = self.batch_size, self.heads, self.config.page_size, self.head_dim

        def expect(name: str, condition: Any, expected: str, got: object) -> None:
            if not bool(condition):
                raise ValueError(f"{name}: expected {expected}, got {got}")

        def tensor(name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
            expect(name, name in state, "a tensor", "none")
            x = state[name]
            fits = len(shape) == x.dim() and all(a in (None, b) for a, b in zip(shape, x.shape, strict=True))
            wanted = f"{list(shape)} of {dtype}".replace("None", "*")
            expect(name, fits and x.dtype == dtype, wanted, f"{list(x.shape)} of {x.dtype}")
            return x

        def within(name: str, x: np.ndarray | Tensor, low: Any, high: Any) -> None:
            inside = (np.asarray(x) >= low) & (np.asarray(x) <= high)
            expect(name, inside.all(), f"{np.min(low)}..{np.max(high)}", np.asarray(x)[~inside][:4].tolist())

        def finite(name: str, x: Tensor) -> None:
            expect(name, torch.isfinite(x).all(), "finite numbers", "NaN or infinity")

        optional = {"selection.lists", "selection.local_start", "selection.mass"}
        known = {
            "table",
            "lengths",
            "sealed",
            "freed",
            "window",
            "columns",
            "residual_k",
            "residual_v",
            "selection.age",
        }
        known |= {f"pool.{name}" for name in self._pool.tensors}
        for name in sorted(set(state) - known - optional):
            expect(name, False, "no such tensor", list(state[name].shape))
        count = tensor("pool.k", self._pool.tensors["k"].dtype, None, P, D).shape[0]
        for name, pool in self._pool.tensors.items():
            x = tensor(f"pool.{name}", pool.dtype, count, *pool.shape[1:])
            if name in ("stats", "scales"):
                finite(f"pool.{name}", x)
        for name in ("residual_k", "residual_v"):
            tensor(name, self.dtype, B, H, 2 * P, D)
        table = tensor("table", torch.int32, B, H, None).numpy()
        M = table.shape[2]
        lengths, sealed, freed = (tensor(name, torch.int64, B).numpy() for name in ("lengths", "sealed", "freed"))
        within("lengths", lengths, 0, M * P)
        within("sealed", sealed, np.maximum(lengths // P - 1, 0), lengths // P)
        within("freed", freed, self._sink, np.maximum(lengths // P, self._sink))
        within("window", tensor("window", torch.int64), min(self.config.local_pages, self._longest_window),
               self._longest_window)  # fmt: skip
        within("columns", tensor("columns", torch.int64), lengths.max(initial=0), np.iinfo(np.int32).max)
        within("table", table, -1, count - 1)
        page = np.arange(M)
        inside = (page < sealed[:, None])[:, None] & np.ones_like(table, bool)
        past = (page >= self._sink) & (page < freed[:, None])
        expect("table", (table[~inside] < 0).all(), "-1 behind the sealed pages", "blocks")
        needed = inside & ~(self._streaming[:, None] & past[:, None])
        expect("table", (table[needed] >= 0).all(), "a block for every sealed page that is held", "-1")
        place = np.broadcast_to(np.arange(H)[:, None] * M + page, table.shape)[table >= 0]
        owners: dict[int, int] = {}
        for block, where in zip(table[table >= 0].tolist(), place.tolist(), strict=True):
            expect("table", owners.setdefault(block, where) == where, "a block for one page and head", f"{block} twice")
        self._check_selection(state, tensor, within, expect, finite, lengths, M)

    def _check_selection(self, state: dict[str, Tensor], tensor: Any, within: Any, expect: Any, finite: Any,
                         lengths: np.ndarray, M: int) -> None:  # fmt: skip
        B, H, P = self.batch_size, self.heads, self.config.page_size
        age = int(tensor("selection.age", torch.int64))
        within("selection.age", np.array(age), 0, self.config.reuse_interval)
        both = ("selection.lists" in state, "selection.local_start" in state)
        expect("selection.lists", both[0] == both[1], "lists and local_start, or neither", "one")
        observes = self._selector is not None and self._selector.observes
        expect("selection.lists", not both[0] or self._selector is not None, "none with this config", "lists")
        expect("selection.mass", observes or "selection.mass" not in state, "none with this config", "a tensor")
        if both[0]:
            assert self._selector is not None
            units = M * P // self._selector.unit
            lists = tensor("selection.lists", torch.int32, B, H, None).numpy()
            within("selection.lists", lists, -1, units - 1)
            rising = (lists[..., 1:] > lists[..., :-1]) | (lists[..., 1:] < 0)
            expect("selection.lists", rising.all(), "ascending lists, padded with -1", "others")
            start = tensor("selection.local_start", torch.int32, B).numpy()
            within("selection.local_start", start, 0, lengths)
            listed = (lists < start[:, None, None]) | (lists < 0)
            expect("selection.lists", listed.all(), "entries before local_start", "later ones")
        if "selection.mass" in state:
            mass = tensor("selection.mass", torch.float32, B, None, None)
            expect("selection.mass", mass.shape[1] in (1, H) and mass.shape[2] <= M * P, f"[{B}, 1 or {H}, <= {M * P}]",
                   list(mass.shape))  # fmt: skip
            finite("selection.mass", mass)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention whose softmax has one more term in its denominator: out [..., Hq, D], lse [..., Hq], sinks [Hq]."""
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.float())
    return (out * (lse - total).exp()[..., None]).to(out.dtype), total
