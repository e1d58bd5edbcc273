"""One prefill and one decode step of an attention layer, as functions without storage."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .ops import Mask, PagedKV
from .resident import Attention, StepAttention
from .scorers import PREFILL_QUERIES, Scorer, Selection
from .sequences import OnDevice, Step


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: PagedKV,
    after: PagedKV,
    step: Step,
    mask: Mask,
    scorer: Scorer | None,
    selection: Selection,
    scale: float,
    sinks: Tensor | None = None,
    attention: Attention = ops,
) -> tuple[Tensor, Selection]:
    """Attends what the layer held and the new tokens, then appends these.

    Args:
        q: [N, Hq, D] packed; k, v: [N, H, D].
        before: the layer as it lies.
        after: the same with blocks for the pages that the append seals; may share tensors with `before`, but for the
            residual buffer if `before` is to stay as it is.
        step: the batch.
        mask: windows and sink of prefill.
        scorer, selection: what the layer knows for decode; its lists are dropped.
        scale: of q·k.
        sinks: see `with_sinks`.
        attention: who appends and attends pages.

    Returns:
        [N, Hq, D], and the new selection.
    """
    on = step.on(q.device)
    cu_seqlens = on.cu_seqlens
    out, lse = attention.prefill(q, k, v, cu_seqlens, cu_seqlens, mask, before, on.context_lens, scale=scale)
    out, lse = with_sinks(out, lse, sinks)
    attention.append_kv(k, v, cu_seqlens, on.context_lens, after)
    selection = selection.without_lists()
    if scorer is not None and scorer.observes:
        tail, tail_lse = _last_queries(q, lse, step)
        held = after._replace(sealed=on.sealed_after)
        mass = attention.attention_mass(tail, tail_lse, mask, held, on.seq_lens, scale=scale)
        selection = scorer.observe(selection, mass, on, step.columns)
    return out, selection


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: PagedKV,
    step: OnDevice,
    mask: Mask,
    scorer: Scorer | None,
    selection: Selection,
    scale: float,
    sinks: Tensor | None = None,
    attention: StepAttention = ops,
) -> tuple[Tensor, Selection]:
    """Appends one token a sequence and attends with it. Nothing here needs the host.

    Args:
        q: [B, Hq, D].
        k, v: [N, H, D]; N = B, or fewer if a sequence is still empty.
        kv: the layer with blocks for the pages that the append seals, but `sealed` from before it: a step reads the
            pages as they lay when it began.
        step: the batch on q's device.
        mask: windows and sink of decode; the scorer adds the lists.
        scorer, selection: which lists; None: no head follows one.
        scale: of q·k.
        sinks: see `with_sinks`.
        attention: who appends and attends pages.

    Returns:
        [B, Hq, D], and the new selection.
    """
    attention.append_kv(k, v, step.cu_seqlens, step.context_lens, kv)
    if scorer is not None:
        selection = scorer.next(selection, q, kv, step, mask.windows)
        mask = mask._replace(lists=selection.lists, local_start=selection.local_start, unit=scorer.unit_tokens)
    out, lse = with_sinks(*attention.decode(q, mask, kv, step.seq_lens, scale=scale), sinks)
    if scorer is not None and scorer.observes:
        mass = attention.attention_mass(q[:, None], lse[:, None], mask, kv, step.seq_lens, scale=scale)
        selection = scorer.observe(selection, mass, step, 1)
    return out, selection


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention whose softmax has one more term in its denominator: a logit a query head (GPT-OSS).

    Args:
        out: [..., Hq, D]; lse: [..., Hq].
        sinks: [Hq]; None: no such term.
    """
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.float())
    return (out * (lse - total).exp()[..., None]).to(out.dtype), total


def _last_queries(q: Tensor, lse: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D] and lse [N, Hq] as [B, T, ...], T <= PREFILL_QUERIES; lse is -inf where a sequence has fewer."""
    new, B = step.new, len(step.new)
    T = int(min(PREFILL_QUERIES, new.max(initial=0)))
    if (new == new.max(initial=0)).all():
        tail = lse.reshape(B, -1, *lse.shape[1:])[:, -T:] if T else lse.reshape(B, 0, *lse.shape[1:])
        return q.reshape(B, -1, *q.shape[1:])[:, -T:] if T else q.reshape(B, 0, *q.shape[1:]), tail.contiguous()
    ends = torch.from_numpy(new.cumsum()).to(q.device)[:, None]
    back = torch.arange(T, 0, -1, device=q.device)  # how far from the end
    rows = (ends - back).clamp(min=0)
    missing = back > torch.from_numpy(new).to(q.device)[:, None]
    return q[rows], lse[rows].masked_fill(missing[..., None], float("-inf"))
