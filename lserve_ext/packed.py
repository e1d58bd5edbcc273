"""A decode step whose listed tokens lie side by side. A few tokens of nearly every page are attended: it is cheaper to
copy these rows to the device than the pages that they lie in (ALISA, section 4.2, "gather")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import Mask, PagedKV


class Packed(NamedTuple):
    """The step, and where its rows come from. Tokens keep their order, and those of the residual buffer their rows, so
    results are the same to the bit; but positions are others.

    A sequence is: the pages of packed tokens, as many as the longest list needs; up to two pages of nothing; and its
    local pages, moved by a multiple of 2P tokens.
    """

    mask: Mask
    kv: PagedKV
    seq_lens: Tensor
    page: Tensor
    """[B, H, K] int64 true page of each listed token; 0 where there is none."""
    offset: Tensor
    """[B, H, K] int32 its row there; -1: none."""
    dst: Tensor
    """[B, H, K] int32 rows of slots that they are to be copied to, slot * P + offset."""
    position: Tensor
    """[B, H, tokens] int64 true position of each token here that is attended; any of 0 to M * P for the others."""

    def unpacked(self, mass: Tensor, tokens: int) -> Tensor:
        """Attention mass [B, H, ...] at true positions [B, H, tokens]."""
        B, H, _ = mass.shape
        return mass.new_zeros(B, H, tokens + 1).scatter_add_(2, self.position, mass)[..., :tokens].contiguous()


def pages_of(mask: Mask, page_size: int) -> int:
    """Pages a head that packed tokens take."""
    assert mask.lists is not None
    return -(-mask.lists.shape[2] // page_size)


def pack(mask: Mask, kv: PagedKV, seq_lens: Tensor, first_slot: int, reuse_interval: int) -> Packed:
    """Lays out a step.

    Args:
        mask: all heads are `ops.LISTED`, on tokens, without a sink. As many tokens are local as a list may have, or as
            are not sealed, and those of the steps since it was made.
        kv: where local pages lie. Keys are on no grid of statistics, so these are left out.
        seq_lens: [B] int32.
        first_slot: of those for packed tokens, B * H * `pages_of`.
        reuse_interval: steps that a list serves.
    """
    lists, start = mask.lists, mask.local_start
    assert lists is not None and start is not None
    (B, H, K), P, M, device = lists.shape, kv.k_pool.shape[1], kv.block_table.shape[2], lists.device
    packed, local = pages_of(mask, P), -(-(max(K, 2 * P) + reuse_interval) // P) + 3
    there = lists >= 0
    offset = torch.where(there, lists % P, -1)
    page = (lists.clamp(min=0) // P).long()
    slots = torch.arange(first_slot, first_slot + B * H * packed, dtype=torch.int32, device=device).view(B, H, packed)
    token = torch.arange(K, dtype=torch.int32, device=device)

    back = ((start - packed * P) // (2 * P) * 2)[:, None]  # pages that a sequence moves
    behind = torch.arange(packed, packed + local, device=device) + back  # true pages, [B, local]
    index = behind.clamp(0, M - 1)[:, None].expand(B, H, local)
    tables = (torch.cat([head, table.gather(2, index)], 2)
              for head, table in ((slots, kv.block_table), (slots, kv.slot_table)))  # fmt: skip
    moved = back * P
    after = torch.arange(packed * P, (packed + local) * P, device=device) + moved
    after = after.clamp(0, M * P)[:, None].expand(B, H, local * P)
    before = torch.where(there, lists, M * P)
    if packed * P > K:
        before = torch.nn.functional.pad(before, (0, packed * P - K), value=M * P)
    block_table, slot_table = tables
    back, moved = back[:, 0], moved[:, 0]
    new_mask = mask._replace(lists=torch.where(there, token, -1), local_start=start - moved)
    new_kv = kv._replace(stats=None, block_table=block_table, slot_table=slot_table, sealed=kv.sealed - back)
    position = torch.cat([before, after], 2)
    return Packed(new_mask, new_kv, seq_lens - moved, page, offset, slots[..., :1] * P + token, position)
