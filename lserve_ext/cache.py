"""The paged KV of one attention layer: a pool of reference-counted blocks, tables, the residual buffer of the newest
tokens. It knows ops and policies, but no model: `hf` puts it under transformers.

A page is sealed once P further tokens follow it, and is never written again. So sequences share blocks (beams, forks),
and a crop within the residual buffer is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops, step
from .blocks import BlockTable, Memory, Pool
from .config import SparseConfig
from .files import Tensors
from .home import Recompute
from .ops import DENSE, LISTED, Mask, PagedKV
from .placement import TieredPool, make_pool
from .reserved import RESERVED, ReservedBatch, ReservedLayer
from .resident import Attention, Given, Resident
from .scorers import Selection
from .sequences import Sequences, Step, on_device


class State(NamedTuple):
    """All that a layer holds of a batch at one moment. A step makes another one and then takes it in one assignment, so
    an exception anywhere leaves the layer as it was.

    That is why a step writes only where this state does not look: newly allocated blocks, a buffer of its own
    (prefill), or the row of a token that has long been sealed (decode).
    """

    sequences: Sequences
    """The batch, one object for all layers of a model."""
    blocks: BlockTable
    block_table: Tensor
    """[B, H, M] of `blocks` on the device."""
    slot_table: Tensor
    """[B, H, M] the same tensor; or, where not all blocks lie on the device, slots where they may lie. Steps write it
    in place, which old states survive: a slot says what it holds."""
    residual_k: Tensor
    """[B, H, 2P, D], as in `PagedKV`."""
    residual_v: Tensor
    selection: Selection
    inputs: Tensor | None = None
    """[B, 2P, R] what the layer was given at the newest tokens, where that is kept; NaN where it is not known."""


class LayerCache:
    """What one attention layer keeps of a batch of sequences, and its attention over it.

    Args:
        config: what is attended and how it is stored.
        streaming_heads: which kv heads stream, [H].
        dense: heads that do not stream attend everything in decode too.
        like: [B, H, T, D] keys whose shape, dtype and device the layer takes.
        pool: of its blocks; by default one of its own.

    Each sequence has its own length. A cache belongs to one thread. After an exception, even a KeyboardInterrupt
    between two lines, it is as before the call or as after it.
    """

    def __init__(
        self,
        config: SparseConfig,
        streaming_heads: Sequence[bool],
        dense: bool,
        like: Tensor,
        pool: Pool | None = None,
    ) -> None:
        B, H, _, D = like.shape
        if len(streaming_heads) != H:
            raise ValueError(f"streaming_heads: expected {H} kv heads, got {len(streaming_heads)}")
        self.config, self.dtype, self.device = config, like.dtype, like.device
        self.heads, self.head_dim = H, D
        self._reserved: ReservedLayer | None = None
        self._following: LayerCache | None = None  # in reserved memory
        self._streaming = np.array(streaming_heads, bool)
        self._dense = dense
        self._scorer = None if dense or self._streaming.all() else config.make_scorer()
        listed = DENSE if self._scorer is None else LISTED
        with torch.inference_mode(False):
            decode = on_device(np.where(self._streaming, config.local_pages, listed), self.device)
            prefill = on_device(np.where(self._streaming, config.prefill_local_pages, DENSE), self.device)
            self._decode_mask = Mask(decode, sink=config.sink_pages, unit=config.page_size)
            self._prefill_mask = Mask(prefill, sink=config.prefill_sink_pages)
            self._pool = make_pool(config, like, self._reserved_blocks(B)) if pool is None else pool
            self._resident: Resident | None = None
            if isinstance(self._pool, TieredPool):
                packs = self._scorer is not None and config.packs and not self._streaming.any()
                self._resident = Resident(self._pool, packs, config.reuse_interval)
                self._pool.slots.check(self._reserved_slots(B) if config.max_tokens else 0, RESERVED)
                if pool is not None and not pool.allocator.capacity:  # at once, for all layers that will share it
                    pool.grow(self._pool.layers * self._reserved_blocks(B))
            blocks = self._pool.table(np.full((B, H, config.max_pages or 4), -1, np.int32))
            table = on_device(blocks.ids, self.device)
            k, v = (like.new_zeros(B, H, 2 * config.page_size, D) for _ in "kv")  # zeros: files hold all rows
            empty = Sequences.empty(config.pages, B)
            self._state = State(empty, blocks, table, self._slot_table(table), k, v, Selection())

    def _reserved_blocks(self, batch: int) -> int:
        """Blocks to allocate at once: all that dense heads will need; of streaming heads those of a prefill's window,
        and of the cycle that follows it."""
        if not self.config.max_pages:
            return 0
        pages, M, streaming = self.config.pages, self.config.max_pages, int(self._streaming.sum())
        cyclic = min(M, pages.sink + pages.longest_window + 1) + pages.decode_window
        return batch * (streaming * cyclic + (self.heads - streaming) * M)

    def _reserved_slots(self, batch: int) -> int:
        """Pages that a decode step in reserved memory may want."""
        config, M = self.config, self.config.max_pages or 0
        listed = M
        if self._scorer is not None and config.list_pages is not None and config.unit == "page":
            aged = -(-config.reuse_interval // config.page_size) + 1
            listed = min(M, config.sink_pages + config.list_pages + config.local_pages + aged)
        streams, streaming = min(M, config.sink_pages + config.local_pages + 1), int(self._streaming.sum())
        return batch * (streaming * streams + (self.heads - streaming) * listed)

    # ---- what it holds ----------------------------------------------------------------------------------------------
    @property
    def sequences(self) -> Sequences:
        """The batch as this layer holds it."""
        return self._state.sequences

    @property
    def lengths(self) -> list[int]:
        """Tokens held of each sequence, pad tokens not counted."""
        return [int(n) for n in self.sequences.lengths]

    @property
    def columns(self) -> int:
        """Columns of the padded batch that have been fed, less those that were cropped."""
        return self.sequences.columns

    @property
    def batch_size(self) -> int:
        return len(self.sequences)

    @property
    def kv(self) -> PagedKV:
        """The tensors that ops take, blocks where they have their home."""
        s = self._state
        sealed = s.sequences.facts(self.device).sealed
        return self._pool.kv(s.block_table, s.block_table, s.residual_k, s.residual_v, sealed)

    def memory(self) -> Memory:
        """Bytes of KV on the device. Blocks that forks share are counted in each of them."""
        size = self.residual_bytes
        return self._pool.tiers()["device"] + Memory(size, size, size)

    @property
    def residual_bytes(self) -> int:
        """Of the newest tokens."""
        return 2 * self._state.residual_k.nbytes

    @property
    def pool(self) -> Pool:
        """Of its blocks."""
        return self._pool

    def attended(self) -> tuple[int, int]:
        """Tokens that a decode step of this moment attends, and those of a dense one, over kv heads and sequences."""
        P, mask, batch = self.config.page_size, self._decode_mask, self.sequences
        lists, local_start = self._state.selection.lists, self._state.selection.local_start
        total = 0
        for b, n in enumerate(batch.lengths):
            for h, window in enumerate(mask.windows.tolist()):
                local, listed = max(0, (n - 1) // P - window + 1) * P, 0
                if window == LISTED:
                    local = 0
                    if lists is not None:  # else: as the next step will see it, before it selects
                        assert self._scorer is not None and local_start is not None
                        unit = self._scorer.unit_tokens
                        local, listed = int(local_start[b]) * unit, int((lists[b, h] >= 0).sum()) * unit
                local = min(local, batch.sealed[b] * P)
                total += min(mask.sink * P, local) + listed + n - local
        return int(total), int(batch.lengths.sum()) * self.heads

    def read_bytes(self) -> float:
        """Bytes of keys, values, scales and statistics that a decode step of this moment reads, on average over the
        steps that share a selection; of its lists nothing."""
        config, batch = self.config, self.sequences
        empty = self._pool.read(np.zeros(0, np.int32))
        sizes = {name: x.element_size() * x.shape[1:].numel() for name, x in empty.items()}
        grid = ("stats",) if config.kv_dtype == "int8" else ()  # of keys
        residual = int((batch.lengths - batch.sealed * config.page_size).sum()) * self.heads
        token = sum(sizes.get(name, 0) for name in ("k", "v", "scales", *grid)) / config.page_size
        fresh = 2 * self.head_dim * self.dtype.itemsize
        attention = (self.attended()[0] - residual) * token + residual * fresh
        if self.observes:  # keys once more
            attention *= 1.5
        if self._scorer is None or config.unit != "page":
            return attention
        listed = int((self._decode_mask.windows == LISTED).sum())
        scored = sizes["moments" if config.needs_moments else "stats"]
        return attention + int(batch.sealed.sum()) * listed * scored / config.reuse_interval

    # ---- attention --------------------------------------------------------------------------------------------------
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, new: Step | Sequence[int], scale: float, sinks: Tensor | None = None,
        given: tuple[Tensor, Recompute] | None = None,
    ) -> Tensor:  # fmt: skip
        """Appends the new tokens and attends: one token a sequence is decode, more is prefill.

        Args:
            q: [N, Hq, D] packed, after rotary embedding; in decode [B, Hq, D], for empty sequences too.
            k, v: [N, H, D].
            new: [B] tokens of each sequence; or the step that all layers of a model take together.
            scale: of q·k.
            sinks: [Hq] a logit that each head's softmax has in its denominator and nowhere else (GPT-OSS).
            given: with `SparseConfig.recompute`, the layer's inputs [N, R] at the new tokens, and what makes keys and
                values of such.

        Returns:
            Of q's shape; 0 where nothing is attended.
        """
        now = new if isinstance(new, Step) else Step(self.sequences, new)
        if now.before is not self._state.sequences:
            raise ValueError("new: expected a step that begins with this layer's sequences, got another one")
        if k.shape != (now.tokens, self.heads, self.head_dim):
            expected = [now.tokens, self.heads, self.head_dim]
            raise ValueError(f"k: expected {expected}, as the cache holds and new says, got {list(k.shape)}")
        with _below_autograd():
            return self._attend(q, k, v, now, scale, sinks, given)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, now: Step, scale: float, sinks: Tensor | None,
        given: tuple[Tensor, Recompute] | None,
    ) -> Tensor:  # fmt: skip
        s, pool, on = self._state, self._pool, now.on(self.device)
        pool.settle()
        blocks, table = self._tables(now)
        residual_k, residual_v = s.residual_k, s.residual_v
        slot_table = s.slot_table if table is s.block_table else self._slot_table(table, s.slot_table)
        attention: Attention = ops
        if self._resident is not None:
            attention, self._resident.slot_table = self._resident, slot_table
            self._resident.seals = bool((now.sealed[1] > now.sealed[0]).any())
            inputs = self._newest_inputs(given, now)
            self._resident.given = None if given is None or inputs is None else Given(given[0], inputs, given[1])
        else:
            inputs = None
        kv = pool.kv(table, table, residual_k, residual_v, on.sealed)
        if now.decode:
            mask = self._decode_mask
            out, selection = step.decode(
                q, k, v, kv, on, mask, self._scorer, s.selection, scale, sinks, attention
            )  # fmt: skip
        else:
            before = kv._replace(block_table=s.block_table, slot_table=s.block_table)
            if now.before.lengths.any():  # else the old state does not look at its buffer
                with torch.inference_mode(False):  # which later steps change in place
                    residual_k, residual_v = residual_k.clone(), residual_v.clone()
            after = kv._replace(residual_k=residual_k, residual_v=residual_v)
            mask = self._prefill_mask
            out, selection = step.prefill(
                q, k, v, before, after, now, mask, self._scorer, s.selection, scale, sinks, attention
            )  # fmt: skip
        self._state = State(now.after, blocks, table, slot_table, residual_k, residual_v, selection, inputs)
        return out

    def _newest_inputs(self, given: tuple[Tensor, Recompute] | None, now: Step) -> Tensor | None:
        """`State.inputs` that the step may write: a row of a token that is sealed in decode, else a copy."""
        inputs = self._state.inputs
        if not self.config.recompute or given is None:
            return None
        with torch.inference_mode(False):
            if inputs is None:
                return torch.full((self.batch_size, 2 * self.config.page_size, given[0].shape[1]), torch.nan,
                                  dtype=given[0].dtype, device=self.device)  # fmt: skip
            return inputs if now.decode else inputs.clone()

    # ---- reserved memory --------------------------------------------------------------------------------------------
    def enter_reserved(self, following: LayerCache | None = None) -> None:
        """From now on `decode_reserved` decodes, until `leave_reserved`; after it that of the layer that follows."""
        self._following = following
        s, residual = self._state, self._state.residual_k
        layer = self._reserved
        if layer is None or layer.batch_size != self.batch_size:
            assert self.config.max_pages is not None
            most = self._reserved_slots(self.batch_size)
            layer = ReservedLayer(self._pool, residual, self._streaming, self.config.max_pages, self._scorer, most)
        layer.load(s.blocks, s.sequences, s.residual_k, s.residual_v, s.selection)
        self._reserved = layer

    def decode_reserved(
        self, q: Tensor, k: Tensor, v: Tensor, batch: ReservedBatch, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """A decode step as `attend` takes it, q [B, Hq, D] and k, v [B, H, D], without the host."""
        layer, on = self._reserved, batch.on
        assert layer is not None and on is not None
        kv, before = layer.kv(on.sealed), layer.before(batch.age)
        with _below_autograd():
            out, selection = step.decode(
                q, k, v, kv, on, self._decode_mask, self._scorer, before, scale, sinks, layer.resident or ops
            )
            layer.keep(selection)
            following = self._following
            if following is not None and following._reserved is not None and not torch.compiler.is_compiling():
                following._reserved.bring_ahead(on, batch.age, following._decode_mask)
        return out

    def leave_reserved(self, sequences: Sequences, age: int) -> None:
        """Takes what has been decoded since."""
        layer = self._reserved
        assert layer is not None
        if layer.resident is not None:
            layer.resident.settle()
        if sequences is not self.sequences:
            blocks = layer.held(sequences)
            table = on_device(blocks.ids, self.device)
            selection = layer.chosen(age, self.config.reuse_interval)
            residual_k, residual_v = layer.residual_k.clone(), layer.residual_v.clone()
            slot_table = self._slot_table(table)
            self._state = State(sequences, blocks, table, slot_table, residual_k, residual_v, selection)

    def drop_reserved(self) -> None:
        """Gives back the blocks of pages to come."""
        if self._reserved is not None:
            self._reserved.blocks = None

    @property
    def observes(self) -> bool:
        """Whether its lists follow the attention mass of every step."""
        return self._scorer is not None and self._scorer.observes

    @property
    def age(self) -> int:
        """Steps that the lists of retrieval heads have served; 0: there are none."""
        return self._state.selection.age

    # ---- tables -----------------------------------------------------------------------------------------------------
    def _slot_table(self, table: Tensor, before: Tensor | None = None) -> Tensor:
        """Of a new block table: the same; or with slots, where its blocks may lie, as known before."""
        if not isinstance(self._pool, TieredPool):
            return table
        slots = torch.full_like(table, -1)
        if before is not None:
            known = before[..., : table.shape[2]]
            slots[..., : known.shape[2]] = known
        return slots

    def _tables(self, now: Step) -> tuple[BlockTable, Tensor]:
        """The tables after a step. At a page border they are made for all layers that take it, and copied at once."""
        s = self._state
        if not now.is_border and now.pages <= s.blocks.ids.shape[2]:
            return s.blocks, s.block_table
        if id(self) not in now.tables:
            layers = [layer for layer in now.layers if layer.device == self.device and id(layer) not in now.tables]
            layers = layers if self in layers else [self]
            with torch.inference_mode(False):  # pools may grow
                tables = [layer._grown(now) for layer in layers]
            flat = on_device(np.concatenate([table.ids.ravel() for table in tables]), self.device)
            parts = flat.split([table.ids.size for table in tables])
            for layer, table, part in zip(layers, tables, parts, strict=True):
                now.tables[id(layer)] = (table, part.view(table.ids.shape))
        blocks, table = now.tables[id(self)]
        return blocks, table

    def _grown(self, now: Step) -> BlockTable:
        """With a block for every page that the step seals, and none for those that streaming heads are past."""
        after, blocks, P = now.after, self._state.blocks, self.config.page_size
        held, most = blocks.ids.shape[2], self.config.max_pages
        if most is not None and now.pages > most:
            got = int(after.lengths.max())
            raise ValueError(f"max_tokens: expected at most {most * P} tokens a sequence, as are reserved, got {got}")
        full = int(after.lengths.max(initial=0)) == held * P and most is None  # grow now, at a border
        needed = max(now.pages, int(held * Pool.GROWTH)) if now.pages > held or full else held
        ids = np.pad(blocks.ids, ((0, 0), (0, 0), (0, needed - held)), constant_values=-1)
        page = np.arange(needed)
        kept = (page < after.pages.sink) | (page >= after.freed[:, None])  # [B, M]
        ids[(self._streaming[:, None] & ~kept[:, None]) & np.ones_like(ids, bool)] = -1
        first, last = now.sealed
        due = (page >= first[:, None]) & (page < last[:, None])
        return self._pool.table(ids, due[:, None] & (~self._streaming[:, None] | kept[:, None]))

    # ---- crop, batch operations, forks ------------------------------------------------------------------------------
    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Removes the newest `tokens` of every sequence.

        Exact within the residual buffer. Deeper, the page that is cut is dequantised into the buffer, and so quantised
        a second time later. Raises ValueError, and changes nothing, if streaming heads have freed what it needs.
        """
        s, P = self._state, self.config.page_size
        before, after = s.sequences, s.sequences.crop(tokens)
        self._check_crop(tokens, after.lengths)
        residual_k, residual_v, inputs = s.residual_k, s.residual_v, s.inputs
        cut = np.flatnonzero((after.sealed < before.sealed) & (after.lengths % P > 0))
        if len(cut):
            residual_k, residual_v = residual_k.clone(), residual_v.clone()
            inputs = None if inputs is None else inputs.clone()
        for b in cut:
            self._unseal(int(b), int(after.sealed[b]), residual_k, residual_v)
            if inputs is not None:
                inputs[b] = torch.nan
        blocks, table = s.blocks, s.block_table
        if (after.sealed < before.sealed).any():
            beyond = np.arange(blocks.ids.shape[2]) >= after.sealed[:, None]
            blocks = self._pool.table(np.where(beyond[:, None], -1, blocks.ids))
            table = on_device(blocks.ids, self.device)
        selection = s.selection.without_lists(after.facts(self.device).lengths)
        slot_table = self._slot_table(table, s.slot_table)
        self._state = State(after, blocks, table, slot_table, residual_k, residual_v, selection, inputs)

    def _check_crop(self, tokens: int, lengths: np.ndarray) -> None:
        s, P = self._state, self.config.page_size
        for b, length in enumerate(lengths if self._streaming.any() else ()):
            first = max(length // P - s.sequences.window + 1, s.sequences.pages.sink)
            last = min(-(-length // P), s.sequences.sealed[b])  # the page that is cut, too
            gone = (s.blocks.ids[b, self._streaming, first:last] < 0).any(0)
            if length < s.sequences.lengths[b] and gone.any():
                raise ValueError(
                    f"crop: expected no more than streaming heads still hold, got {tokens} tokens, which needs page "
                    f"{first + int(gone.argmax())} of sequence {b}"
                )

    def _unseal(self, b: int, page: int, residual_k: Tensor, residual_v: Tensor) -> None:
        """Copies a page from the pools into the residual buffer."""
        P, table = self.config.page_size, self._state.blocks.ids
        held = np.flatnonzero(table[b, :, page] >= 0)  # not those of streaming heads that are past
        pages = self._pool.read(table[b, held, page])
        k, v = pages["k"], pages["v"]
        if "scales" in pages:
            k, v = ops.dequantize_kv(k, v, pages.get("stats"), pages["scales"], self.dtype)
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
        blocks = self._pool.table(s.blocks.ids[index])
        table = on_device(blocks.ids, self.device)
        residual_k, residual_v, selection = s.residual_k[rows], s.residual_v[rows], s.selection.take_rows(rows)
        slot_table, sequences = self._slot_table(table, s.slot_table[rows]), s.sequences.take_rows(index)
        inputs = None if s.inputs is None else s.inputs[rows]
        self._state = State(sequences, blocks, table, slot_table, residual_k, residual_v, selection, inputs)

    def share(self, sequences: Sequences) -> None:
        """Takes the batch of another layer, which must say the same as its own: one object for all layers.

        Raises:
            ValueError: it says something else.
        """
        if not sequences.same_as(self.sequences):
            raise ValueError(
                f"sequences: expected {self.lengths} tokens as in the other layers, got {sequences.lengths}"
            )
        self._state = self._state._replace(sequences=sequences)

    def __copy__(self) -> LayerCache:
        """The same tokens and blocks, until one of the two goes on."""
        return self.as_it_was(self._state)

    @property
    def state_now(self) -> State:
        """What `as_it_was` takes. It costs nothing, and holds its blocks."""
        return self._state

    def as_it_was(self, state: State) -> LayerCache:
        """A copy in a state of before."""
        twin = object.__new__(LayerCache)
        twin.__dict__.update(self.__dict__, _state=state)
        return twin

    @torch.inference_mode(False)
    @torch.no_grad()
    def fork(self, config: SparseConfig | None = None) -> LayerCache:
        """A copy that shares the sealed blocks, maybe under another config that `SparseConfig.stores_as` this one."""
        twin, s = copy.copy(self), self._state
        if config is not None:
            twin.config, s = config, s._replace(selection=s.selection.without_lists())
            twin._scorer = None if self._scorer is None else config.make_scorer()
            if self._resident is not None:
                twin._resident = self._resident.with_reuse(config.reuse_interval)
        twin._reserved = None
        slots = self._slot_table(s.block_table, s.slot_table)
        twin._state = s._replace(
            residual_k=s.residual_k.clone(), residual_v=s.residual_v.clone(), slot_table=slots,
            inputs=None if s.inputs is None else s.inputs.clone(),
        )  # fmt: skip
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        """A copy with a pool of its own, which holds no blocks of forks."""
        s = self._state
        like = s.residual_k.new_empty(self.batch_size, self.heads, 0, self.head_dim)
        pool = copy.deepcopy(self._pool, memo) if isinstance(self._pool, TieredPool) else None
        twin = LayerCache(self.config, self._streaming.tolist(), self._dense, like, pool)
        twin.restore({name: tensor.clone() for name, tensor in self.state().items()}, s.sequences)
        return twin

    # ---- files ------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Everything but `sequences` that `restore` needs; only blocks in use, renumbered."""
        s, ids = self._state, self._state.blocks.ids
        used = np.unique(ids[ids >= 0])
        table = np.where(ids >= 0, np.searchsorted(used, ids), -1).astype(np.int32)
        state = {"table": torch.from_numpy(table), "selection.age": torch.tensor(s.selection.age)}
        state |= {f"pool.{name}": tensor for name, tensor in self._pool.read(used).items()}
        state |= {"residual_k": s.residual_k, "residual_v": s.residual_v}
        return state | {f"selection.{name}": x.contiguous() for name, x in s.selection.tensors().items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], sequences: Sequences) -> None:
        """The inverse of `state`, in a layer just made for it.

        Raises:
            ValueError: a tensor is missing or unknown, has another shape or dtype, or holds what no cache can.
        """
        self._check_file(Tensors(state), sequences)
        ids, pools = state["table"].numpy(), [name for name in state if name.startswith("pool.")]
        taken = self._pool.table(np.full(len(state["pool.k"]), -1), np.ones(len(state["pool.k"]), bool))
        self._pool.write(taken.ids, {name.removeprefix("pool."): state[name] for name in pools})
        blocks = self._pool.table(np.where(ids >= 0, taken.ids[ids], -1) if len(taken.ids) else ids)
        table = on_device(blocks.ids, self.device)
        fields = {name: state.get(f"selection.{name}") for name in ("lists", "local_start", "mass")}
        selection = Selection(
            age=int(state["selection.age"]),
            **{name: None if x is None else x.to(self.device) for name, x in fields.items()},
        )
        k, v = (state[name].to(self.device) for name in ("residual_k", "residual_v"))
        self._state = State(sequences, blocks, table, self._slot_table(table), k, v, selection)

    def _check_file(self, state: Tensors, sequences: Sequences) -> None:
        """Raises ValueError with the name of the tensor that does not fit."""
        B, H, P, D = self.batch_size, self.heads, self.config.page_size, self.head_dim
        pools = {f"pool.{name}": tensor for name, tensor in self._pool.read(np.zeros(0, np.int32)).items()}
        selection = {f"selection.{name}" for name in ("age", "lists", "local_start", "mass")}
        state.only({"table", "residual_k", "residual_v", *pools, *selection})
        count = state.take("pool.k", pools["pool.k"].dtype, None, P, D).shape[0]
        for name, pool in pools.items():
            x = state.take(name, pool.dtype, count, *pool.shape[1:])
            if name in ("pool.stats", "pool.moments", "pool.scales"):
                state.finite(name, x)
        for name in ("residual_k", "residual_v"):
            state.take(name, self.dtype, B, H, 2 * P, D)
        table = state.take("table", torch.int32, B, H, None).numpy()
        M, longest = table.shape[2], sequences.lengths.max(initial=0)
        state.expect("table", longest <= M * P, f"a page for each of {longest} tokens", M)
        state.within("table", table, -1, count - 1)
        page = np.arange(M)
        inside = (page < sequences.sealed[:, None])[:, None] & np.ones_like(table, bool)
        past = (page >= sequences.pages.sink) & (page < sequences.freed[:, None])
        state.expect("table", (table[~inside] < 0).all(), "-1 behind the sealed pages", "blocks")
        needed = inside & ~(self._streaming[:, None] & past[:, None])
        state.expect("table", (table[needed] >= 0).all(), "a block for every sealed page that is held", "-1")
        place = np.broadcast_to(np.arange(H)[:, None] * M + page, table.shape)[table >= 0]
        owners: dict[int, int] = {}
        for block, where in zip(table[table >= 0].tolist(), place.tolist(), strict=True):
            mine = owners.setdefault(block, where) == where
            state.expect("table", mine, "a block for one page and head", f"{block} twice")
        self._check_selection(state, sequences.lengths, M)

    def _check_selection(self, state: Tensors, lengths: np.ndarray, M: int) -> None:
        B, H, P = self.batch_size, self.heads, self.config.page_size
        state.within("selection.age", int(state.take("selection.age", torch.int64)), 0, self.config.reuse_interval)
        lists, start, mass = (f"selection.{name}" for name in ("lists", "local_start", "mass"))
        state.expect(lists, (lists in state) == (start in state), "lists and local_start, or neither", "one")
        state.expect(lists, lists not in state or self._scorer is not None, "none with this config", "lists")
        state.expect(mass, mass not in state or self.observes, "none with this config", "a tensor")
        if lists in state:
            assert self._scorer is not None
            units = M * P // self._scorer.unit_tokens
            chosen = state.take(lists, torch.int32, B, H, None).numpy()
            state.within(lists, chosen, -1, units - 1)
            rising = (chosen[..., 1:] > chosen[..., :-1]) | (chosen[..., 1:] < 0)
            state.expect(lists, rising.all(), "ascending lists, padded with -1", "others")
            first = state.take(start, torch.int32, B).numpy()
            state.within(start, first, 0, lengths)
            before = (chosen < first[:, None, None]) | (chosen < 0)
            state.expect(lists, before.all(), "entries before local_start", "later ones")
        if mass in state:
            x = state.take(mass, torch.float32, B, None, None)
            fits = x.shape[1] in (1, H) and x.shape[2] <= M * P
            state.expect(mass, fits, f"[{B}, 1 or {H}, <= {M * P}]", list(x.shape))
            state.finite(mass, x)


def _below_autograd() -> AbstractContextManager[Any]:
    """Autograd has nothing to do here, and its keys cost each op a detour through Python. In inference mode, and in a
    graph, there is none."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return nullcontext()
    below: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return below
