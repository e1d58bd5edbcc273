"""How vLLM's scheduler counts, keeps, shares and frees the blocks of heads."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingHeadSpec(SlidingWindowSpec):
    """A head that keeps sink and local pages; `sliding_window` are the tokens of the latter."""

    sink_pages: int

    @property
    def local_pages(self) -> int:
        """The query's own page included."""
        return int(self.sliding_window) // int(self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most that a request holds at a time."""
        tokens = min(int(self.sliding_window) + max_in_flight_tokens, max_model_len)
        return -(-tokens // int(self.block_size)) + 1 + self.sink_pages

    def is_uniform_with_collection(self, kv_cache_specs: Any) -> bool:
        """Whether these layers hold the same pages."""
        return all(spec == self for spec in kv_cache_specs.values())


class StreamingHeadManager(SlidingWindowManager):
    """Frees what lies between sink and window."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """None from the beginning on, where the sink is."""
        return 0

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Frees the pages that the next token, and those after it, do not attend."""
        spec = self.kv_cache_spec
        first = processed_computed_tokens // self.block_size - spec.local_pages + 1
        self._remove_blocks_in_range(request_id, spec.sink_pages, first)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The longest prefix of which the sink and the window before its end are cached."""
        size, sink = kv_cache_spec.block_size, kv_cache_spec.sink_pages
        if drop_eagle_block or alignment_tokens % size:
            return tuple([] for _ in kv_cache_group_ids), 0
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        most, step = max_length // size, alignment_tokens // size
        cached = [block_pool.get_cached_block(hashes[i], kv_cache_group_ids) for i in range(most)]
        held_before = 0  # how many before this one lie there without a gap
        runs = [0]
        for blocks in cached:
            held_before = held_before + 1 if blocks else 0
            runs.append(held_before)
        for end in range(most // step * step, 0, -step):
            first = max(0, end - kv_cache_spec.local_pages + 1)
            if runs[end] >= end - first and runs[min(sink, end)] == min(sink, end):
                kept = [blocks if i < sink or i >= first else None for i, blocks in enumerate(cached[:end])]
                groups = range(len(kv_cache_group_ids))
                return tuple(
                    [blocks[g] if blocks else block_pool.null_block for blocks in kept] for g in groups
                ), end * size
        return tuple([] for _ in kv_cache_group_ids), 0

    @classmethod
    def reachable_block_mask(cls, *args: Any, **kwargs: Any) -> list[bool] | None:
        """Every block may be part of a hit."""
        return None


def register() -> None:
    """Makes the specs known to vLLM's scheduler."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(StreamingHeadSpec, StreamingHeadManager, uniform_type_base_spec=StreamingHeadSpec)


def head_spec(page: Any, sink_pages: int | None = None, local_pages: int | None = None) -> Any:
    """Of one kv head, a page of it being one state of vLLM's.

    Args:
        page: a `pages.Page`.
        sink_pages, local_pages: of streaming heads; None: the head keeps everything.
    """
    fields = {
        "block_size": page.size,
        "num_kv_heads": 1,
        "head_size": page.dim,
        "dtype": page.dtype,
        "state_content_bytes": page.bytes,
        "tokens_per_state": page.size,
        "dcp_sharded": False,
    }
    if sink_pages is None or local_pages is None:
        return FullAttentionSpec(**fields)
    return StreamingHeadSpec(**fields, sliding_window=local_pages * page.size, sink_pages=sink_pages)
