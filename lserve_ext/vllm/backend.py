"""vLLM's attention backend: every kv head of a layer is a KV layer of its own in vLLM's books, so that streaming heads
give their blocks back and the others do not; a step of a layer attends with all of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.kv_cache_layout import KVCacheLayout

from .. import heads, ops
from ..config import SparseConfig
from ..ops import DENSE, LISTED, Mask, PagedKV
from ..scorers import Selection
from ..sequences import OnDevice
from .blocks import head_spec
from .pages import Page

T = TypeVar("T")


class SparseBackend(AttentionBackend):
    """What vLLM asks about."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """A name that vLLM knows."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SparseImpl]:
        return SparseImpl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and head_size <= ops.MAX_HEAD_DIM

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """All blocks of a head lie one behind the other."""
        return (KVCacheLayout.LBHNC,)


@dataclasses.dataclass
class Batch:
    """The requests of a step, decodes first; of one group of heads, which share their blocks' numbers."""

    order: Tensor | None
    """[N] where vLLM has each new token; None: in this order."""
    tokens: int
    """N, new ones."""
    decodes: int
    """The first so many requests have one new token, which they generated."""
    cu_seqlens: Tensor
    """[B + 1] int32 bounds of new tokens."""
    prefill_cu_seqlens: Tensor
    """[B - decodes + 1] int32, the same of the others alone."""
    context_lens: Tensor
    """[B] int32 tokens held before."""
    seq_lens: Tensor
    """[B] int32 tokens held after."""
    host_lens: Any
    """The same on the host, an array [B]."""
    blocks: Tensor
    """[B, M] int32 block of each page."""
    full: tuple[Tensor, Tensor]
    """Request and page, each [F], of the pages that are full after the step and were not before."""
    size: int
    """P."""
    _derived: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def once(self, name: Any, make: Callable[[], T]) -> T:
        """What all layers make of a step, made by the first that asks."""
        if name not in self._derived:
            self._derived[name] = make()
        found: T = self._derived[name]
        return found

    def pages(self, lengths: Tensor) -> Tensor:
        """[B] int32 pages, the last one maybe partly filled, of so many tokens."""
        return ((lengths + self.size - 1) // self.size).int()


class Builder(AttentionMetadataBuilder[Batch]):
    """Makes a `Batch` a step, for one group of heads."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.page_size = kv_cache_spec.block_size
        self._init_reorder_batch_threshold(1)  # requests of one new token come first

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Batch:
        """Of vLLM's metadata."""
        common, P = common_attn_metadata, self.page_size
        B, bounds = common.num_reqs, common.query_start_loc_cpu.numpy().astype(np.int64)
        device, on_host = common.seq_lens.device, common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens.cpu() if on_host is None else on_host)[:B].numpy().astype(np.int64)
        new = np.diff(bounds[: B + 1])
        tokens, M = int(bounds[B]), max(1, -(-int(lengths.max(initial=1)) // P))
        seq_lens, blocks = common.seq_lens[:B], common.block_table_tensor[:B, :M]
        order = None

        decode = new == 1
        if common.is_prefilling is not None:  # a prompt's last token may come alone, and yet is none that was generated
            decode &= ~common.is_prefilling[:B].cpu().numpy()
        decodes = int(decode.sum())
        if not decode[:decodes].all():
            rows = np.argsort(~decode, kind="stable")
            order = torch.from_numpy(np.concatenate([np.arange(bounds[b], bounds[b + 1]) for b in rows])).to(device)
            new, lengths, on = new[rows], lengths[rows], torch.from_numpy(rows).to(device)
            seq_lens, blocks = seq_lens[on], blocks[on]

        first, last = (lengths - new) // P, lengths // P
        counts = last - first
        request = np.repeat(np.arange(B), counts)
        page = np.arange(len(request)) - np.repeat(counts.cumsum() - counts, counts) + first[request]
        new_lens = torch.from_numpy(new.astype(np.int32)).to(device)
        cu_seqlens = torch.nn.functional.pad(new_lens.cumsum(0, dtype=torch.int32), (1, 0))
        return Batch(
            order=order,
            tokens=tokens,
            decodes=decodes,
            cu_seqlens=cu_seqlens,
            prefill_cu_seqlens=cu_seqlens[decodes:] - decodes,
            context_lens=seq_lens - new_lens,
            seq_lens=seq_lens,
            host_lens=lengths,
            blocks=blocks,
            full=(torch.from_numpy(request).to(device), torch.from_numpy(page).to(device)),
            size=P,
        )


class Head(AttentionLayerBase):
    """One kv head, a layer in vLLM's books."""

    kv_cache: Tensor

    def __init__(self, impl: SparseImpl, spec: Any) -> None:
        self.impl, self.spec, self.kv_cache = impl, spec, torch.tensor([])

    def get_attn_backend(self) -> type[SparseBackend]:
        return SparseBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self.spec


def split(attention: Any, vllm_config: Any, config: SparseConfig) -> None:
    """Has vLLM's books name the kv heads of an attention layer in its place.

    Raises:
        ValueError: the pattern of streaming heads is of another model.
    """
    model, layers = vllm_config.model_config, vllm_config.compilation_config.static_forward_context
    index, count = extract_layer_index(attention.layer_name), attention.num_kv_heads
    patterns = heads.resolve(
        config.streaming_heads, model.get_total_num_hidden_layers(), model.get_total_num_kv_heads()
    )
    rank = get_tensor_model_parallel_rank()
    streaming = list(heads.of_rank(patterns[index], count, rank))
    page = Page.of(config, attention.head_size, model.dtype)
    kept = head_spec(page)
    local = max(config.local_pages, config.prefill_local_pages)
    freed = head_spec(page, max(config.sink_pages, config.prefill_sink_pages), local)
    impl, first = attention.impl, rank * count % model.get_total_num_kv_heads()
    impl.take(config, page, streaming, index)
    name = attention.layer_name
    impl.heads = {f"{name}.head{first + h}": Head(impl, freed if streaming[h] else kept) for h in range(count)}
    del layers[name]
    layers.update(impl.heads)
    attention.layer_name = next(iter(impl.heads))


class SparseImpl(AttentionImpl):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "a soft cap of logits": bool(logits_soft_cap),
            "attention sinks": sinks is not None,
            "attention that is not causal": attn_type != AttentionType.DECODER,
            "KV shared between layers": kv_sharing_target_layer_name is not None,
            f"heads of {head_size} channels": not SparseBackend.supports_head_size(head_size),
        }
        for what, is_there in refused.items():
            if is_there:
                raise ValueError(f"lserve: expected a model without {what}")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.heads: dict[str, Head] = {}
        self.chief = 0  # the first head that follows a list, if one does: its books are asked
        self._pools: dict[str, Tensor] = {}

    def take(self, config: SparseConfig, page: Page, streaming: Any, index: int) -> None:
        """What the layer's heads attend."""
        self.config, self.page = config, page
        self.selects = config.selects and index >= config.dense_layers and not all(streaming)
        self.keeps_lists = self.selects and page.picks is not None
        self.scorer = config.make_scorer() if self.selects else None
        rest = LISTED if self.selects else DENSE

        def mask(local: int, others: int, sink: int) -> Mask:
            return Mask(torch.tensor([local if s else others for s in streaming], dtype=torch.int32), sink=sink)

        self.decode_mask = mask(config.local_pages, rest, config.sink_pages)
        self.whole_mask = mask(config.local_pages, DENSE, config.sink_pages)
        self.prefill_mask = mask(config.prefill_local_pages, DENSE, config.prefill_sink_pages)
        self.listed = torch.tensor([h for h, s in enumerate(streaming) if not s])
        self.chief = streaming.index(False) if not all(streaming) else 0

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes new keys and values, then attends.

        Args:
            query: [N, Hq, D]; key, value: [N, H, D].
            attn_metadata: None while vLLM measures memory.
            output: [N, Hq, D], written.
        """
        if attn_metadata is None:
            return output.zero_()
        if not self._pools:
            self._bind(query.device)
        metadata = get_forward_context().attn_metadata
        batches = [metadata[name] for name in self.heads]
        batch = batches[self.chief]
        new = slice(batch.tokens) if batch.order is None else batch.order
        q, k, v = query[new], key[new], value[new]
        out = output[new]
        table, rows = self._tables(batches)
        ops.append_kv(k, v, batch.cu_seqlens, batch.context_lens, self._kv(table, batch.seq_lens))
        n = batch.decodes
        if n:
            out[:n] = self._decode(q[:n], table[:n], rows[:n], batch)
        if n < len(batch.seq_lens):
            out[n:] = self._prefill(q[n:], k[n:], v[n:], table[n:], batch)
            if self.keeps_lists:  # what lies there is of the block's owner before
                self._pools["list"][rows[n:], -1] = -1
        if batch.order is not None:
            output[new] = out
        if self.selects and len(batch.full[0]):
            self._seal(table, batch.full)
        return output

    def _bind(self, device: torch.device) -> None:
        """Finds out where in vLLM's memory the heads' blocks lie."""
        caches, size = [head.kv_cache for head in self.heads.values()], self.page.bytes
        begin = [cache.storage_offset() * cache.element_size() for cache in caches]
        offset = int(begin[0]) % size
        self._pools = self.page.pools(caches[0].untyped_storage(), device, offset)
        stride = caches[0].stride(0) * caches[0].element_size() // size
        firsts = torch.tensor([(at - offset) // size for at in begin], device=device)
        self._first, self._stride = firsts.int(), stride
        for name in ("decode_mask", "whole_mask", "prefill_mask"):
            mask: Mask = getattr(self, name)
            setattr(self, name, mask._replace(windows=mask.windows.to(device)))
        self.listed = self.listed.to(device)

    def _tables(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """Rows of the pools that pages [B, H, M] lie in, and [B, H] that of the page with the newest token."""
        chief = batches[self.chief]

        def rows() -> tuple[Tensor, Tensor]:
            """But for where each head begins."""
            parts = batches[:1] if all(batch is batches[0] for batch in batches) else batches
            pages = torch.stack([part.blocks for part in parts], 1) * self._stride
            newest = ((chief.seq_lens - 1) // self.page.size).clamp(min=0).long()
            return pages, pages.gather(2, newest[:, None, None].expand(-1, len(parts), 1))[:, :, 0]

        pages, newest = chief.once(tuple(map(id, batches)), rows)
        return pages + self._first[:, None], newest + self._first if self.keeps_lists else newest

    def _kv(self, table: Tensor, pages: Tensor) -> PagedKV:
        """What lies in so many pages [B]."""
        pools = self._pools
        return PagedKV(pools["k"], pools["v"], None, pools.get("scales"), table, table, None, None, pages)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, batch: Batch) -> Tensor:
        cu_seqlens, context_lens = batch.prefill_cu_seqlens, batch.context_lens[batch.decodes :]
        kv = self._kv(table, batch.once("held before", lambda: batch.pages(context_lens)))
        out, _ = ops.prefill(q, k, v, cu_seqlens, cu_seqlens, self.prefill_mask, kv, context_lens, scale=self.scale)
        return out

    def _decode(self, q: Tensor, table: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        seq_lens = batch.seq_lens[: batch.decodes]
        if self.selects and batch.once("fits", lambda: self._fits(batch)):
            mask = self.whole_mask
        else:
            mask = self._listed_mask(q, table, rows, batch) if self.selects else self.decode_mask
        kv = self._kv(table, batch.once("held after", lambda: batch.pages(seq_lens)))
        out, _ = ops.decode(q, mask, kv, seq_lens, scale=self.scale)
        return out

    def _fits(self, batch: Batch) -> bool:
        """Whether the lists of all requests would name every page: then none is made."""
        config, at = self.config, batch.host_lens[: batch.decodes] - 1
        between = (at - at % config.reuse_interval) // self.page.size + 1 - config.local_pages - config.sink_pages
        return bool((between <= config.list_pages).all())

    def _seal(self, table: Tensor, full: tuple[Tensor, Tensor]) -> None:
        """Statistics or moments of pages that are full now, of heads that select."""
        request, page = full
        rows = table[request, :, page.long()][:, self.listed].flatten()
        k = self._pools["k"][rows]
        if self.page.is_int8:
            codes = k
            k, _ = ops.dequantize_kv(codes, codes, None, self._pools["scales"][rows], self.page.dtype)
        make = ops.page_moments if self.config.needs_moments else ops.page_stats
        self._pools["stats"][rows] = make(k, self.page.size // self.page.groups)

    def _listed_mask(self, q: Tensor, table: Tensor, rows: Tensor, batch: Batch) -> Mask:
        """With the lists of this step: a new one each `reuse_interval` tokens, else that of the page being written.

        Args:
            rows: [B, H] of the page being written.
        """
        seq_lens = batch.seq_lens[: batch.decodes]
        if not self.keeps_lists:
            lists, local_start = self._select(q, table, seq_lens)
            return self.decode_mask._replace(lists=lists, local_start=local_start)
        held, chief = self._pools["list"], rows[:, self.chief]

        def due() -> tuple[Tensor, Tensor]:
            at = seq_lens - 1
            since = at - at % self.config.reuse_interval
            return since, ((at == since) | (held[chief, -1] != since)).nonzero()[:, 0]

        since, which = batch.once("due", due)
        if len(which):
            every = len(which) == len(q)
            chosen = slice(None) if every else which
            lists, local_start = self._select(q[chosen], table[chosen], (since[chosen] + 1).int())
            known = torch.stack([local_start, since[chosen]], 1)[:, None].expand(-1, lists.shape[1], -1)
            held.index_copy_(0, rows[chosen].flatten().long(), torch.cat([lists, known], 2).flatten(0, 1))
        found = held.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        local_start = batch.once("local_start", lambda: found[:, self.chief, -2].contiguous())
        return self.decode_mask._replace(lists=found[..., :-2], local_start=local_start)

    def _select(self, q: Tensor, table: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        pools, sealed = self._pools, seq_lens // self.page.size
        kv = PagedKV(pools["k"], pools["v"], pools["stats"], None, table, table, None, None, sealed, pools["stats"])
        step = OnDevice(seq_lens - 1, sealed, seq_lens, seq_lens, sealed)
        assert self.scorer is not None
        return self.scorer.select(Selection(), q, kv, step, self.decode_mask.windows)
