"""Lists of tokens, copied side by side: attention over them is that over the pages that they come from, to the bit."""

from __future__ import annotations

import pytest
import torch
from _cases import SHAPES, Shape, awkward_lengths, build, ints, same_bits
from test_cache import CONFIGS, D, G, H, P, attend, feed, tokens
from test_placement import make, slot_bytes

from lserve_ext import LayerCache, ops
from lserve_ext.ops import Mask
from lserve_ext.packed import pack, pages_of
from lserve_ext.placement import Traffic, gather_rows


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.45], ids=str)
@pytest.mark.parametrize("stale", [0, 3])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.kv_dtype != "int8" or not s.stats_group], ids=str)
def test_pack(shape: Shape, stale: int, ratio: float, device: str) -> None:
    """A ragged batch whose lists are as many steps old."""
    page_size = shape.page_size
    lengths = [*awkward_lengths(page_size), 30 * page_size + 3, 9 * page_size + page_size // 2]
    case = build(shape, lengths, heads=2, device=device)
    lists, start = case.token_lists(ratio=ratio, max_picks=int(ratio * 34 * page_size))
    mask = Mask(case.windows(0, 0), lists, (start - stale).clamp(min=0), unit=1)
    lists[lists >= (mask.local_start[:, None, None] if mask.local_start is not None else 0)] = -1
    q = case.queries()
    want = ops.decode(q, mask, case.kv, case.lengths)

    slots, room = len(case.kv.k_pool), 2 * len(lengths) * pages_of(mask, page_size)
    pools = [x if x is None else torch.cat([x, torch.full_like(x[:1], 7).expand(room, *x.shape[1:])])
             for x in (case.kv.k_pool, case.kv.v_pool, case.kv.scales)]  # fmt: skip
    kv = case.kv._replace(k_pool=pools[0], v_pool=pools[1], scales=pools[2])
    packed = pack(mask, kv, case.lengths, slots, stale + 1)
    assert packed.kv.block_table.shape[2] <= pages_of(mask, page_size) + 6 + lists.shape[2] // page_size
    src = case.kv.slot_table.gather(2, packed.page) * page_size + packed.offset
    src = torch.where(packed.offset < 0, -1, src)
    tensors = {name: x for name, x in zip(("k", "v", "scales"), pools, strict=True) if x is not None}
    gather_rows(tensors, src.view(-1), tensors, packed.dst.view(-1))
    for x in tensors.values():
        assert same_bits(x[:slots], x[:slots].clone())
    got = ops.decode(q, packed.mask, packed.kv, packed.seq_lens)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    lse = want[1][:, None].contiguous()
    mass = ops.attention_mass(q[:, None], lse, mask, case.kv, case.lengths)
    found = ops.attention_mass(q[:, None], lse, packed.mask, packed.kv, packed.seq_lens)
    assert same_bits(packed.unpacked(found, mass.shape[2]), mass)


@pytest.mark.parametrize("reuse", [2, 4])
@pytest.mark.parametrize("name", ["alisa", "h2o"])
def test_lists_of_tokens_that_are_reused(name: str, reuse: int) -> None:
    """A layer alone, whose packed tokens would still lie where they lay in the last step."""
    config, like, qkv = CONFIGS[name].replace(reuse_interval=reuse), torch.empty(1, H, 1, D), tokens(420)
    limited = config.replace(device_bytes=H * 30 * slot_bytes(name))
    caches = [LayerCache(some, [False] * H, False, like) for some in (config, limited)]
    assert torch.equal(*(feed(cache, qkv, [200, *range(201, 421)]) for cache in caches))
    assert caches[1].pool.traffic().rows > 0


@pytest.mark.parametrize("frames", [None, 6])
@pytest.mark.parametrize("name", ["alisa", "h2o"])
def test_tokens_are_fetched_without_their_pages(name: str, frames: int | None) -> None:
    """Once not all pages fit; the few that are local stay."""
    batch, pages = 2, 400 // P
    caches = [make(name, batch, None), make(name, batch, 2 * H * pages // 2, frames, "memory://packed")]
    qkv = tokens(420, batch)
    both = [feed(cache, tuple(x[:, :, :380] for x in qkv), [380]) for cache in caches]  # type: ignore[arg-type]
    assert torch.equal(*both)
    before, names = caches[1].pool.traffic(), 0  # of tokens in lists
    for i in range(380, 420):
        both = [attend(cache, *(x[:, :, i : i + 1] for x in qkv)) for cache in caches]
        assert torch.equal(*both)
        lists = caches[1]._state.selection.lists
        assert lists is not None
        names += int((lists >= 0).sum())
    moved: Traffic = caches[1].pool.traffic() - before
    listed, local = CONFIGS[name].budget.picks or round(0.1 * 420), pages // 3
    assert 0 < moved.rows < names <= 40 * batch * H * listed  # some of their pages still lie in slots
    assert moved.fetched < 3 * batch * H * local
    assert caches[1].pool.phase > 1


def test_a_head_fits_by_its_tokens() -> None:
    """Where there is no room for the pages that they lie in; the error says what is needed."""
    config = CONFIGS["alisa"]
    qkv, like = tokens(400), torch.empty(1, H, 1, D)
    least = -(-round(0.1 * 400) // P) + -(-round(0.1 * 400) // P) + 2
    whole = LayerCache(config, [False] * H, False, like)
    want = feed(whole, qkv, [*range(1, 401)])
    tight = LayerCache(config.replace(device_bytes=2 * least * slot_bytes("alisa")), [False] * H, False, like)
    assert torch.equal(feed(tight, qkv, [*range(1, 401)]), want) and tight.pool.traffic().rows > 0
    small = LayerCache(config.replace(device_bytes=3 * slot_bytes("alisa")), [False] * H, False, like)
    with pytest.raises(
        ValueError, match=r"^device_bytes: expected at least .* for the 4 pages that a head attends, got"
    ):
        feed(small, qkv, [*range(1, 401)])


@pytest.mark.gpu
def test_nothing_to_pack(device: str) -> None:
    mask = Mask(ints([0], device), torch.zeros(0, 1, 5, dtype=torch.int32, device=device), ints([], device), unit=1)
    kv = build(SHAPES[0], [40], heads=1, device=device).kv
    none = kv._replace(block_table=kv.block_table[:0], slot_table=kv.slot_table[:0], sealed=kv.sealed[:0])
    packed = pack(mask, none, ints([], device), 0, 1)
    assert packed.offset.shape == packed.page.shape == packed.dst.shape == (0, 1, 5) and G >= 1
