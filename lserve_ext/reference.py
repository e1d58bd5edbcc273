"""Every op in a few lines of plain PyTorch: what the kernels must compute, written to be read.

Same names and arguments as `lserve_ext.ops`, any device, float64 inside, and no attention to speed. The one
function to understand is `attended`: the positions that a query attends. The rest follows from it.

Words: a sequence b, a kv head h, a position t, a page p of P tokens, a block (a page's row in the pools).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lserve_ext.ops import DENSE, LISTED, Mask, PagedKV

# ---------------------------------------------------------------------------------------------- masks


def attended(
    t: int,
    window: int,
    page_size: int,
    sealed: int,
    *,
    sink: int = 0,
    picks: Sequence[int] = (),
    start: int = 0,
    unit: int | None = None,
    blocks: Sequence[int] = (),
) -> list[int]:
    """The positions that the query at position t attends, ascending: sink, list, local.

    window: DENSE, a number of local pages (a streaming head), or LISTED: the head follows its list.
    sealed: pages in the pools; every page after them is attended.
    picks, start: list and first local unit of `unit` tokens each, for a head that follows its list.
    blocks: block of every sealed page; a streaming head passes over those that it has freed (-1).
    """
    unit = unit or page_size
    if window == DENSE:
        local = 0
    elif window > 0:
        local = max(0, t // page_size - window + 1) * page_size
    else:
        local = start * unit
    local = min(local, sealed * page_size)

    positions = list(range(min(sink * page_size, local)))
    if window == LISTED:
        positions += [pick * unit + i for pick in picks if pick >= 0 for i in range(unit)]
    positions += range(local, t + 1)

    if 0 < window < DENSE:
        freed = {page for page, block in enumerate(blocks) if block < 0}
        positions = [i for i in positions if i // page_size not in freed]
    return [i for i in positions if i <= t]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries [G, D] over the keys and values [n, D] that they attend: out [G, D] and lse [G], float64."""
    logits = scale * q.double() @ k.double().T
    lse = logits.logsumexp(-1)
    if k.shape[0] == 0:
        return torch.zeros_like(q, dtype=torch.float64), lse  # the sum of nothing: lse is -inf
    return logits.softmax(-1) @ v.double(), lse


# ---------------------------------------------------------------------------------------------- the grid


def grid_step(low: Tensor, high: Tensor) -> Tensor:
    whole = high.new_tensor(255)  # by a number, torch multiplies with its rounded reciprocal on a GPU
    return high / whole - low / whole  # two quotients, because high - low may overflow


def grid_codes(x: Tensor, low: Tensor, step: Tensor) -> Tensor:
    half = (x.double() * 0.5 - (low * 0.5).double()).float() / step  # x - low may overflow; one rounding, as fused
    codes = (half + half).round().nan_to_num(nan=0.0).clamp(0, 255)  # half to even
    return torch.where(step > 0, codes, 0).to(torch.uint8)


def grid_values(codes: Tensor, low: Tensor, step: Tensor, high: Tensor | None = None) -> Tensor:
    x = (step.double() * codes + low.double()).float()  # one rounding, as a fused multiply-add
    return x if high is None else torch.where(x > high, high, x)


def _boxes(stats: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Statistics [pages, P/L, 2, D] as the minimum and maximum [pages, P, D] of every token's group, float32."""
    low, high = stats.float().repeat_interleave(page_size // stats.shape[1], dim=1).unbind(2)
    return low, high


def _token_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x [pages, P, D] on a grid of every token's own, and its step and minimum [pages, P, 2]."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True) + 0.0, x.amax(-1, keepdim=True) + 0.0  # no zero has a sign
    step = grid_step(low, high)
    return grid_codes(x, low, step), torch.cat([step, low], -1)


# ---------------------------------------------------------------------------------------------- pages


def page_stats(k: Tensor, group: int) -> Tensor:
    """k [pages, P, D] -> minimum and maximum of every group and channel, [pages, P/group, 2, D]."""
    groups = k.reshape(k.shape[0], k.shape[1] // group, group, k.shape[2])
    return torch.stack([groups.amin(2), groups.amax(2)], dim=2)


def page_moments(k: Tensor, group: int) -> Tensor:
    """k [pages, P, D] -> mean minus and plus a deviation of every group and channel, [pages, P/group, 2, D]."""
    groups = k.reshape(k.shape[0], k.shape[1] // group, group, k.shape[2]).double()
    mean, deviation = groups.mean(2), groups.std(2, correction=0)
    return torch.stack([mean - deviation, mean + deviation], dim=2).to(k.dtype)


def quantize_kv(k: Tensor, v: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [pages, P, D] -> codes of both, and scales [pages, C, P, 2]: V's (step, min), and K's without stats."""
    v_codes, v_scales = _token_grid(v)
    if stats is None:
        k_codes, k_scales = _token_grid(k)
        return k_codes, v_codes, torch.stack([v_scales, k_scales], dim=1)
    low, high = _boxes(stats, k.shape[1])
    return grid_codes(k.float(), low, grid_step(low, high)), v_codes, v_scales.unsqueeze(1)


def dequantize_kv(
    k_codes: Tensor, v_codes: Tensor, stats: Tensor | None, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The inverse of `quantize_kv`. A key of a grid from statistics stays in its box."""
    v_step, v_low = scales[:, 0, :, None].unbind(-1)
    v = grid_values(v_codes, v_low, v_step)
    if stats is None:
        k_step, k_low = scales[:, 1, :, None].unbind(-1)
        k = grid_values(k_codes, k_low, k_step)
    else:
        low, high = _boxes(stats, k_codes.shape[1])
        k = grid_values(k_codes, low, grid_step(low, high), high)
    return k.to(dtype), v.to(dtype)


def append_kv(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, context_lens: Tensor, kv: PagedKV) -> None:
    """Appends k, v [N, H, D] token by token: to the residual buffer, and a page with P tokens after it is sealed."""
    page_size, starts = kv.k_pool.shape[1], cu_seqlens_k.tolist()
    if kv.residual_k is None or kv.residual_v is None:
        for b, held in enumerate(context_lens.tolist()):
            for t, i in enumerate(range(starts[b], starts[b + 1]), start=held):
                _write_row(kv, b, t, k[i], v[i])
        return
    for b, (held, sealed) in enumerate(zip(context_lens.tolist(), kv.sealed.tolist(), strict=True)):
        for t, i in enumerate(range(starts[b], starts[b + 1]), start=held):
            kv.residual_k[b, :, t % (2 * page_size)] = k[i]
            kv.residual_v[b, :, t % (2 * page_size)] = v[i]
            if (t + 1) // page_size - 1 > sealed:
                for h in range(k.shape[1]):
                    _seal(kv, b, h, sealed)
                sealed += 1


def _write_row(kv: PagedKV, b: int, t: int, k: Tensor, v: Tensor) -> None:
    """Puts k, v [H, D] of token t into its page."""
    page, row = divmod(t, kv.k_pool.shape[1])
    for h, slot in enumerate(kv.slot_table[b, :, page].tolist()):
        if slot < 0:
            continue
        new_k, new_v = k[h], v[h]
        if kv.scales is not None:
            k_codes, v_codes, scales = quantize_kv(k[h, None, None], v[h, None, None])
            new_k, new_v, kv.scales[slot, :, row] = k_codes[0, 0], v_codes[0, 0], scales[0, :, 0]
        kv.k_pool[slot, row], kv.v_pool[slot, row] = new_k, new_v


def _seal(kv: PagedKV, b: int, h: int, page: int) -> None:
    """Copies a page from the residual buffer into its block. A page without a slot is past already: nothing to keep."""
    assert kv.residual_k is not None and kv.residual_v is not None
    page_size = kv.k_pool.shape[1]
    block, slot = int(kv.block_table[b, h, page]), int(kv.slot_table[b, h, page])
    if slot < 0:
        return
    half = slice(page % 2 * page_size, (page % 2 + 1) * page_size)
    k, v = kv.residual_k[b, h, None, half], kv.residual_v[b, h, None, half]
    stats = None
    if kv.stats is not None:
        stats = page_stats(k, page_size // kv.stats.shape[1])
        kv.stats[block] = stats[0]
    if kv.moments is not None:
        kv.moments[block] = page_moments(k, page_size // kv.moments.shape[1])[0]
    if kv.scales is not None:
        k, v, scales = quantize_kv(k, v, stats)
        kv.scales[slot] = scales[0]
    kv.k_pool[slot], kv.v_pool[slot] = k[0], v[0]


def wanted_pages(
    mask: Mask, block_table: Tensor, sealed: Tensor, first: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """`ops.wanted_pages`: what the first query attends, and all that comes after it."""
    B, H, _ = block_table.shape
    pages, counts = torch.full_like(block_table, -1), torch.zeros_like(block_table[..., 0])
    unit = mask.unit or page_size
    for b, h in itertools.product(range(B), range(H)):
        t, held, window = max(0, int(first[b])), int(sealed[b]), int(mask.windows[h])
        picks = [] if mask.lists is None else mask.lists[b, h].tolist()
        start = 0 if mask.local_start is None else int(mask.local_start[b])
        rule: dict[str, Any] = {"sink": mask.sink, "picks": picks, "start": start, "unit": unit}
        now = {i // page_size for i in attended(t, window, page_size, held, **rule)}
        wanted = now | set(range(t // page_size + 1, held))
        found = [page for page in sorted(wanted) if page < held and block_table[b, h, page] >= 0]
        pages[b, h, : len(found)] = torch.tensor(found, dtype=torch.int32)
        counts[b, h] = len(found)
    return pages, counts


def resolve_pages(
    lists: Tensor,
    block_table: Tensor,
    slot_table: Tensor,
    slot_blocks: Tensor,
    last_use: Tensor,
    clock: Tensor,
    keep: int = DENSE,
) -> tuple[Tensor, Tensor]:
    """`ops.resolve_pages`."""
    src_ids, dst_ids = torch.full_like(lists, -1), torch.full_like(lists, -1)
    clock += 1
    misses = []
    for b, h, i in itertools.product(*map(range, lists.shape)):
        page = int(lists[b, h, i])
        if page < 0:
            continue
        block, slot = int(block_table[b, h, page]), int(slot_table[b, h, page])
        if slot >= 0 and slot_blocks[slot] == block:
            last_use[slot] = clock
        else:
            misses.append((b, h, i, page, block))
    victims = sorted(range(len(last_use)), key=lambda slot: int(last_use[slot]))[: len(misses)]
    for (b, h, i, page, block), slot in zip(misses, sorted(victims), strict=True):
        src_ids[b, h, i], dst_ids[b, h, i] = block, slot
        slot_table[b, h, page], slot_blocks[slot], last_use[slot] = slot, block, clock
    wanted = (at for at in itertools.product(*map(range, lists.shape)) if lists[at] >= 0)
    for b, h, i in itertools.islice(wanted, keep, None):
        last_use[slot_table[b, h, lists[b, h, i]]] = 0
    return src_ids, dst_ids


def gather_pages(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor) -> None:
    """dst[dst_ids[i]] = src[src_ids[i]]; a pair with a -1 is passed over."""
    for i, j in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
        if i >= 0 and j >= 0:
            dst[j] = src[i]


def history(kv: PagedKV, b: int, h: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [length, D] that attention reads, float32. A page that is not held is NaN: a wrong read shows."""
    page_size, head_dim = kv.k_pool.shape[1:]
    pages = []
    for p in range(math.ceil(length / page_size)):
        block, slot = int(kv.block_table[b, h, p]), int(kv.slot_table[b, h, p])
        if p >= int(kv.sealed[b]):
            assert kv.residual_k is not None and kv.residual_v is not None
            half = slice(p % 2 * page_size, (p % 2 + 1) * page_size)
            k, v = kv.residual_k[b, h, half], kv.residual_v[b, h, half]
        elif slot < 0:
            k = v = torch.full((page_size, head_dim), math.nan, device=kv.k_pool.device)
        else:
            k, v = kv.k_pool[slot], kv.v_pool[slot]
            if kv.scales is not None:
                stats = None if kv.stats is None else kv.stats[block, None]
                k, v = (x[0] for x in dequantize_kv(k[None], v[None], stats, kv.scales[slot, None], torch.float32))
        pages.append((k.float(), v.float()))
    nothing = torch.zeros(0, head_dim, device=kv.k_pool.device)
    keys, values = (torch.cat([nothing, *(page[i] for page in pages)])[:length] for i in (0, 1))
    return keys, values


# ---------------------------------------------------------------------------------------------- selection


def page_scores(q: Tensor, stats: Tensor, block_table: Tensor, sealed: Tensor, windows: Tensor | None = None) -> Tensor:
    """q [B, Hq, D] -> [B, H, M]: no key of the page has a larger q·k with any query head of the group."""
    heads, group = block_table.shape[1], q.shape[1] // block_table.shape[1]
    scores = torch.full(block_table.shape, -math.inf, device=q.device)
    for b, pages in enumerate(sealed.tolist()):
        for h in range(heads):
            if windows is not None and int(windows[h]) != 0:
                continue
            for p, block in enumerate(block_table[b, h, :pages].tolist()):
                if block >= 0:
                    queries = q[b, h * group : (h + 1) * group].double()  # [G, D]
                    low, high = stats[block].double().unbind(1)  # [groups, D]
                    bounds = torch.maximum(queries[:, None] * low, queries[:, None] * high).sum(-1)
                    scores[b, h, p] = bounds.amax()
    return scores


def _heaviest(weights: Sequence[float], first: int, count: int, width: int) -> list[int]:
    """Ascending indices of the `count` largest weights, ties to the lower, from `first` on; -1 up to the width."""
    finite = [-math.inf if math.isnan(w) else w for w in weights]
    ranked = sorted(range(first, len(finite)), key=lambda i: (-finite[i], i))
    best = sorted(ranked[:count])
    return best + [-1] * (width - len(best))


def select_pages(
    scores: Tensor, seq_lens: Tensor, sealed: Tensor, page_size: int, sink: int, local: int, count: int
) -> tuple[Tensor, Tensor]:
    """scores [B, H, M] -> the `count` best sealed pages between sink and local [B, H, count], local_start [B]."""
    starts = [
        max(0, min((n - 1) // page_size - local + 1, pages)) if n else 0
        for n, pages in zip(seq_lens.tolist(), sealed.tolist(), strict=True)
    ]
    pages = [
        [_heaviest(row[:start], sink, count, count) for row in heads.tolist()]
        for heads, start in zip(scores, starts, strict=True)
    ]
    table = torch.tensor(pages, dtype=torch.int32, device=scores.device)
    return table.reshape(*scores.shape[:2], count), torch.tensor(starts, dtype=torch.int32, device=scores.device)


def select_tokens(
    mass: Tensor, seq_lens: Tensor, sealed: Tensor, counts: Tensor, page_size: int, max_picks: int
) -> tuple[Tensor, Tensor]:
    """mass [B, H, width] -> the counts[b] heaviest tokens before the local ones [B, H, max_picks], local_start [B].

    Local are as many of the newest tokens, or all that are not sealed if they are more.
    """
    starts, tokens = [], []
    numbers = zip(mass, seq_lens.tolist(), sealed.tolist(), counts.tolist(), strict=True)
    for heads, n, pages, count in numbers:
        k = min(max_picks, count)
        start = max(0, n - max(k, n - pages * page_size))
        starts.append(start)
        tokens.append([_heaviest(row[:start], 0, k, max_picks) for row in heads.tolist()])
    table = torch.tensor(tokens, dtype=torch.int32, device=mass.device)
    return table.reshape(*mass.shape[:2], max_picks), torch.tensor(starts, dtype=torch.int32, device=mass.device)


# ---------------------------------------------------------------------------------------------- attention


def _decode_positions(t: int, b: int, h: int, mask: Mask, kv: PagedKV) -> list[int]:
    sealed = int(kv.sealed[b])
    return attended(
        t,
        int(mask.windows[h]),
        kv.k_pool.shape[1],
        sealed,
        sink=mask.sink,
        picks=() if mask.lists is None else mask.lists[b, h].tolist(),
        start=0 if mask.local_start is None else int(mask.local_start[b]),
        unit=mask.unit,
        blocks=kv.block_table[b, h, :sealed].tolist(),
    )


def decode(
    q: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, D], the newest token of every sequence -> out [B, Hq, D], lse [B, Hq]."""
    group = q.shape[1] // mask.windows.shape[0]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, device=q.device)
    for b, n in enumerate(seq_lens.tolist()):
        for h in range(mask.windows.shape[0]):
            k, v = history(kv, b, h, n)
            positions = _decode_positions(n - 1, b, h, mask, kv)
            heads = slice(h * group, (h + 1) * group)
            out[b, heads], lse[b, heads] = attend(q[b, heads], k[positions], v[positions], _scale(q, scale))
    return out, lse


def attention_mass(
    q: Tensor, lse: Tensor, mask: Mask, kv: PagedKV, seq_lens: Tensor, *, scale: float | None = None
) -> Tensor:
    """q [B, T, Hq, D], the last T tokens -> the softmax mass [B, H, M * P] that they put on every token."""
    rows, heads, group = q.shape[1], mask.windows.shape[0], q.shape[2] // mask.windows.shape[0]
    mass = torch.zeros(q.shape[0], heads, kv.block_table.shape[2] * kv.k_pool.shape[1], device=q.device).double()
    for b, n in enumerate(seq_lens.tolist()):
        for h in range(heads):
            k, _ = history(kv, b, h, n)
            for i in range(max(0, rows - n), rows):
                positions = _decode_positions(n - rows + i, b, h, mask, kv)
                for g in range(h * group, (h + 1) * group):
                    if lse[b, i, g] > -math.inf:
                        logits = _scale(q, scale) * k[positions].double() @ q[b, i, g].double()
                        mass[b, h, positions] += (logits - lse[b, i, g]).exp()
    return mass.float()


def prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, mask: Mask, kv: PagedKV | None = None,
    context_lens: Tensor | None = None, *, page_size: int | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [Nq, Hq, D], the last of the new tokens k, v [Nk, H, D] -> out [Nq, Hq, D], lse [Nq, Hq].

    What a query attends depends on its position alone, so that chunks of a prompt give what the prompt gives. A
    streaming head attends its own page and the one before at least; a head with lists its sink, list and own page.
    """
    page_size = page_size or (64 if kv is None else kv.k_pool.shape[1])
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    q_starts, k_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, device=q.device)
    for b in range(len(q_starts) - 1):
        held = 0 if context_lens is None else int(context_lens[b])
        new = slice(k_starts[b], k_starts[b + 1])
        first = held + k_starts[b + 1] - k_starts[b] - (q_starts[b + 1] - q_starts[b])  # position of the first query
        for h in range(heads):
            keys, values, blocks = k[new, h], v[new, h], []
            if kv is not None:
                old_keys, old_values = history(kv, b, h, held)
                keys, values = torch.cat([old_keys, keys.float()]), torch.cat([old_values, values.float()])
                blocks = kv.block_table[b, h, : int(kv.sealed[b])].tolist()
            for t, i in enumerate(range(q_starts[b], q_starts[b + 1]), start=first):
                page, window = t // page_size, int(mask.windows[h])
                picks = [] if mask.lists is None else mask.lists[b, h, page - first // page_size].tolist()
                sealed = page if window == LISTED else max(0, page - 1)  # when this token is decoded
                positions = attended(
                    t, window, page_size, sealed, sink=mask.sink, picks=picks, start=page, blocks=blocks
                )
                g = slice(h * group, (h + 1) * group)
                out[i, g], lse[i, g] = attend(q[i, g], keys[positions], values[positions], _scale(q, scale))
    return out, lse


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint sets of keys: out [..., D], lse [...]. Two empty sets join to an empty one."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    share_a, share_b = ((x.double() - lse).exp().where(lse > -math.inf, 0.0).unsqueeze(-1) for x in (lse_a, lse_b))
    return (share_a * out_a.double() + share_b * out_b.double()).to(out_a.dtype), lse.float()


# ---------------------------------------------------------------------------------------------- ALISA


def sparse_window_attention(q: Tensor, k: Tensor, v: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """ALISA's Algorithm 1, literally: one layer over q [n, Hq, D], k and v [n, H, D], generated token by token.

    A step attends the newest `half` tokens and the `half` older ones that weigh most in the last `half` steps, with
    half = round(n * ratio / 2), but 1 at least: a token attends itself. KV sparsity is 1 - ratio.
    Returns out [n, Hq, D] and the history of the weights, summed over heads: [step, token].
    """
    steps, group = q.shape[0], q.shape[1] // k.shape[1]
    out, weights = torch.zeros_like(q), torch.zeros(steps, steps, dtype=torch.float64, device=q.device)
    for t in range(steps):
        n = t + 1
        half = max(1, round(n * ratio / 2))
        sums = weights[max(0, t - half) : t].sum(0)  # S: of the last rows that there are
        local = list(range(max(0, n - half), n))
        heavy = [i for i in _heaviest(sums[: local[0]].tolist(), 0, half, half) if i >= 0]
        tokens = heavy + local
        for head in range(q.shape[1]):
            keys, values = k[tokens, head // group], v[tokens, head // group]
            row, _ = attend(q[t, head, None], keys, values, _scale(q, None))
            out[t, head] = row[0]
            weights[t, tokens] += (_scale(q, None) * keys.double() @ q[t, head].double()).softmax(-1)
    return out, weights
