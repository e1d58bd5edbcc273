"""Decode in reserved memory (`SparseConfig.max_tokens`): all that a step needs lies on the device, under addresses that
do not change, and is advanced there. So a step of a whole model is one graph, for `torch.compile` and CUDA graphs.

Blocks of all pages that will ever be are assigned beforehand. Streaming heads get a cycle of them: a page takes the
place of the one that has left the window.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import ops
from .blocks import BlockTable, Pool
from .ops import Mask, PagedKV
from .placement import TieredPool, over
from .scorers import Scorer, Selection
from .sequences import Facts, OnDevice, Sequences

RESERVED = "that a step may attend in reserved memory"


class ReservedBatch:
    """The batch while it decodes in reserved memory, the same for all layers.

    A step begins with the first layer and is committed by the last one, so an interrupted one has not happened. What a
    step reads of Python is `age` alone: `torch.compile` makes one graph for each of its values.
    """

    def __init__(self, sequences: Sequences, device: torch.device, tokens: int, reuse_interval: int) -> None:
        batch = len(sequences)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.sealed = torch.zeros(batch, dtype=torch.int32, device=device)
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        self.ones = sequences.facts(device).ones.clone()
        self.tokens, self.page_size, self.reuse_interval = tokens, sequences.pages.page_size, reuse_interval
        self.age = 0
        """Steps since the last selection; 0: the next step selects."""
        self.room = 0
        """Tokens that still fit, as far as the host has counted; what compiled steps took it does not know."""
        self.on: OnDevice | None = None
        """The step that is under way."""
        for tensor in (self.lengths, self.sealed, self.columns, self.ones):
            torch._dynamo.mark_static_address(tensor)

    def load(self, sequences: Sequences, age: int) -> None:
        """Takes the facts of a batch."""
        facts = sequences.facts(self.lengths.device)
        self.lengths.copy_(facts.lengths)
        self.sealed.copy_(facts.sealed)
        self.columns.fill_(sequences.columns)
        self.age, self.on = age % self.reuse_interval, None
        self.room = self.tokens - int(sequences.lengths.max(initial=0))

    def begin(self) -> None:
        """Before the first layer.

        Raises:
            ValueError: the memory is full.
        """
        if not torch.compiler.is_compiling() and self.room <= 0:
            raise ValueError(f"max_tokens: expected at most {self.tokens} tokens a sequence, got one more")
        # At the end of the memory lengths stay where they are, so that nothing is written behind it.
        seq_lens = torch.clamp(self.lengths + 1, max=self.tokens)
        sealed_after = torch.maximum(self.sealed, torch.div(seq_lens, self.page_size, rounding_mode="floor") - 1)
        self.on = OnDevice(self.lengths, self.sealed, self.ones, seq_lens, sealed_after)

    def commit(self) -> None:
        """After the last layer."""
        assert self.on is not None
        self.lengths.copy_(self.on.seq_lens)
        self.sealed.copy_(self.on.sealed_after)
        self.columns.add_(1)
        self.age = (self.age + 1) % self.reuse_interval
        self.on = None
        if not torch.compiler.is_compiling():
            self.room -= 1

    def read(self, before: Sequences) -> Sequences:
        """The batch as it is now, after `before`, read from the device; `before` itself if there was no step.

        Raises:
            ValueError: more tokens came than there is memory for.
        """
        columns = int(self.columns)
        steps = columns - before.columns
        if steps == 0:
            return before
        most = int(before.lengths.max()) + steps
        if most > self.tokens:
            raise ValueError(f"max_tokens: expected at most {self.tokens} tokens a sequence, got {most}")
        lengths, sealed = (x.cpu().numpy().astype(np.int64) for x in (self.lengths, self.sealed))
        window, P = before.pages.decode_window, before.pages.page_size
        after = Sequences(
            before.pages, lengths, sealed, np.maximum(before.freed, lengths // P - window), window, columns
        )
        after.has_made(self.lengths.device, Facts(self.lengths.clone(), self.sealed.clone(), self.ones))
        return after


class ReservedResident:
    """`resident.Resident` for decode steps that never ask the host: what a step wants fits in slots, all heads at once.

    Args:
        pool: by block.
        table: [B, H, M] its blocks.
        most: pages that a step may want.

    Raises:
        ValueError: there are fewer slots.
    """

    def __init__(self, pool: TieredPool, table: Tensor, most: int) -> None:
        (B, H, M), slots = table.shape, pool.slots
        slots.check(most, RESERVED)
        self._pool, self._slots, self._most = pool, slots, most
        self._keep = 0  # pages that a step keeps, beside those of other layers
        self._rows = torch.arange(B * H, dtype=torch.int32, device=table.device)
        self._slot_table = torch.full_like(table, -1)
        self._staging_table = self._rows.view(B, H, 1).repeat(1, 1, M)
        self._staging = {name: x.new_empty((B * H, *x.shape[1:])) for name, x in slots.tensors.items()}
        self._moved = torch.zeros(2, dtype=torch.int64, device=table.device)  # pages wanted, and fetched
        # The lengths that name a step whose pages are being brought, and the copies' ids, which must live until then.
        self._ahead: tuple[Tensor, Tensor, Tensor] | None = None
        kept = (self._rows, self._slot_table, self._staging_table, self._moved, *self._staging.values())
        for tensor in (*kept, *slots.state, *slots.tensors.values()):
            torch._dynamo.mark_static_address(tensor)

    def begin(self) -> None:
        """Decode is about to go on here; all slots are for pages."""
        self._slots.land()
        self._slots.reserve(0)
        self._keep = self._slots.share(self._most)

    def append_kv(self, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, context_lens: Tensor, kv: PagedKV) -> None:
        """`ops.append_kv`: a page that is sealed is made on the device, and then copied to its home.

        Blocks of streaming heads are written again and again. Slots of their old contents are not found: entries of the
        table are of pages, and that of a page which has just been sealed is empty.
        """
        B, H, M = kv.block_table.shape
        ops.append_kv(k, v, cu_seqlens_k, context_lens, over(kv, self._staging, self._staging_table))
        after = torch.div(context_lens + cu_seqlens_k.diff(), kv.k_pool.shape[1], rounding_mode="floor") - 1
        page = kv.sealed.clamp(max=M - 1).long()[:, None, None].expand(B, H, 1)
        blocks = torch.where((after > kv.sealed)[:, None, None], kv.block_table.gather(2, page), -1).view(-1)
        self._pool.put(self._staging, self._rows, blocks)

    def decode(
        self, q: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`ops.decode`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:  # a graph that is captured must not wait for a stream in which nothing has begun
            self._pool.stream.join()
        if ahead is None or ahead[0] is not seq_lens:
            self._bring(mask, kv, seq_lens, beside=False)
        return ops.decode(q, mask, over(kv, self._slots.tensors, self._slot_table), seq_lens, scale=scale)

    def bring_ahead(self, mask: Mask, kv: PagedKV, seq_lens: Tensor) -> None:
        """Begins to bring what `decode` is about to be asked for, while another layer computes."""
        self._ahead = (seq_lens, *self._bring(mask, kv, seq_lens, beside=True))

    def _bring(self, mask: Mask, kv: PagedKV, seq_lens: Tensor, beside: bool) -> tuple[Tensor, Tensor]:
        pages, counts = ops.wanted_pages(mask, kv.block_table, kv.sealed, seq_lens - 1, kv.k_pool.shape[1])
        src, dst = self._slots.bring(pages, kv.block_table, self._slot_table, self._keep, beside)
        self._moved += torch.stack([counts.sum(), (src >= 0).sum()])
        return src, dst

    def attention_mass(
        self, q: Tensor, lse: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """`ops.attention_mass` of the step that has just been decoded."""
        return ops.attention_mass(q, lse, mask, over(kv, self._slots.tensors, self._slot_table), seq_lens, scale=scale)

    def settle(self) -> None:
        """Counts what has been moved since the last call; others will not take slots for what they were."""
        self._pool.stream.join()
        self._ahead = None
        wanted, fetched = self._moved.tolist()
        self._slots.wanted += wanted
        self._slots.fetched += fetched
        self._slots.generation += 1
        self._moved.zero_()


class ReservedLayer:
    """One layer's tensors while it decodes in reserved memory."""

    def __init__(self, pool: Pool, residual: Tensor, streaming: np.ndarray, pages: int, scorer: Scorer | None,
                 most: int) -> None:  # fmt: skip
        B, H, rows, D = residual.shape
        device = residual.device
        self._pool, self._streaming, self._pages, self._scorer = pool, streaming, pages, scorer
        self.blocks: BlockTable | None = None
        self.table = torch.full((B, H, pages), -1, dtype=torch.int32, device=device)
        self.residual_k, self.residual_v = torch.empty(2, B, H, rows, D, dtype=residual.dtype, device=device).unbind()
        self.selection = Selection()
        if scorer is not None:
            lists, local_start, mass = scorer.buffers(B, H, pages, device)
            self.selection = Selection(lists, local_start, mass=mass)
        kept = (self.table, self.residual_k, self.residual_v, *self.selection.tensors().values())
        for tensor in kept:
            torch._dynamo.mark_static_address(tensor)
        self.resident = ReservedResident(pool, self.table, most) if isinstance(pool, TieredPool) else None
        """Where not all pages lie on the device."""

    @property
    def batch_size(self) -> int:
        return len(self.table)

    def load(self, blocks: BlockTable, sequences: Sequences, residual_k: Tensor, residual_v: Tensor,
             selection: Selection) -> None:  # fmt: skip
        """Takes what a layer holds, and assigns the blocks of all pages to come."""
        self.blocks = self._assigned(blocks.ids, sequences)
        if self.resident is not None:
            self.resident.begin()
        for tensor in self._pool.storage():  # which have grown, maybe
            torch._dynamo.mark_static_address(tensor)
        self.table.copy_(torch.from_numpy(self.blocks.ids))
        self.residual_k.copy_(residual_k)
        self.residual_v.copy_(residual_v)
        for name, buffer in self.selection.tensors().items():
            given = selection.tensors().get(name)
            if given is None:
                buffer.zero_()
            elif name == "mass":
                buffer.zero_()
                buffer[..., : given.shape[2]] = given
            else:
                buffer.copy_(given)

    def _assigned(self, ids: np.ndarray, sequences: Sequences) -> BlockTable:
        """[B, H, pages] blocks; those of a streaming head's pages behind the sink repeat."""
        window, sink, M = sequences.pages.decode_window, sequences.pages.sink, self._pages
        ids = np.pad(ids[..., :M], ((0, 0), (0, 0), (0, max(0, M - ids.shape[2]))), constant_values=-1)
        sealed = sequences.sealed[:, None]
        kept = np.maximum(sequences.freed, sequences.lengths // sequences.pages.page_size - window)[:, None]
        page = np.arange(M)
        to_come = np.broadcast_to((page >= sealed)[:, None], ids.shape)
        cyclic = np.broadcast_to((self._streaming[:, None] & (page >= sink)), ids.shape)
        cycle = np.full((*ids.shape[:2], window), -1, np.int32)  # blocks by page % window
        for p in range(max(sink, int(kept.min(initial=M))), int(sealed.max(initial=0))):
            holds = (p >= kept) & (p < sealed) & self._streaming  # [B, H]
            cycle[..., p % window] = np.where(holds, ids[..., p], cycle[..., p % window])
        missing = (cycle < 0) & self._streaming[:, None]
        wanted = np.concatenate([to_come & ~cyclic, missing], 2)
        with_cycle = self._pool.table(np.concatenate([ids, cycle], 2), wanted)
        new, cycle = with_cycle.ids[..., :M], with_cycle.ids[..., M:]
        return self._pool.table(np.where(cyclic & to_come, cycle[..., page % window], new))

    def held(self, sequences: Sequences) -> BlockTable:
        """The blocks of sealed pages alone."""
        assert self.blocks is not None
        page, ids = np.arange(self._pages), self.blocks.ids
        to_come = page >= sequences.sealed[:, None]
        past = (page >= sequences.pages.sink) & (page < sequences.freed[:, None])
        gone = to_come[:, None] | (past[:, None] & self._streaming[:, None])
        return self._pool.table(np.where(gone, -1, ids))

    def bring_ahead(self, on: OnDevice, age: int, mask: Mask) -> None:
        """Begins to bring the pages that the layer's step will want, unless it will select them first.

        Args:
            on, age: the step.
            mask: without lists.
        """
        if self.resident is None or (self._scorer is not None and age == 0):
            return
        if self._scorer is not None:
            lists, local_start = self.selection.lists, self.selection.local_start
            mask = mask._replace(lists=lists, local_start=local_start, unit=self._scorer.unit_tokens)
        self.resident.bring_ahead(mask, self.kv(on.sealed), on.seq_lens)

    def kv(self, sealed: Tensor) -> PagedKV:
        """The tensors that ops take."""
        return self._pool.kv(self.table, self.table, self.residual_k, self.residual_v, sealed)

    def before(self, age: int) -> Selection:
        """What a step knows; at age 0 nothing of lists, so that it selects."""
        if age == 0:
            return self.selection._replace(lists=None, local_start=None)
        return self.selection

    def keep(self, selection: Selection) -> None:
        """Writes what a step has chosen into the tensors that stay."""
        for name, buffer in self.selection.tensors().items():
            given = getattr(selection, name)
            if given is not None and given is not buffer:
                buffer.copy_(given)

    def chosen(self, age: int, reuse_interval: int) -> Selection:
        """The selection as a layer outside of reserved memory holds it, `age` steps after the last one."""
        if self._scorer is None:
            return Selection()
        tensors = {name: buffer.clone() for name, buffer in self.selection.tensors().items()}
        return Selection(age=age if age else reuse_interval, **tensors)
