"""How far the logits of one run are from those of another."""

from __future__ import annotations

from torch import Tensor

CLEAR = 0.1
"""A flip counts as clear where the two best logits of the reference are further apart than this."""


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats, at every position.

    Args:
        reference, other: [positions, vocabulary] logits.

    Returns:
        [positions] float64, not below 0.
    """
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).double().clamp_min(0)


def compare(reference: Tensor, other: Tensor) -> dict[str, float]:
    """Figures over all positions of logits [positions, vocabulary].

    kl, kl_median   nats; of kl_divergence
    kl_first_half   mean over the first half of the positions
    top1            share of positions with the same best token
    clear_flips     positions with another best token where the reference was sure (`CLEAR`)
    """
    best = reference.topk(2, -1).values
    flipped = reference.argmax(-1) != other.argmax(-1)
    kl = kl_divergence(reference, other)
    return {
        "kl": float(kl.mean()),
        "kl_median": float(kl.median()),
        "kl_first_half": float(kl[: max(1, len(kl) // 2)].mean()),
        "top1": float((~flipped).double().mean()),
        "clear_flips": int((flipped & (best[:, 0] - best[:, 1] > CLEAR)).sum()),
    }
