"""Which heads of a model may stream, measured without training (after DuoAttention's question)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AttentionInterface, AttentionMaskInterface

from . import hf, ops
from .eval import tasks
from .heads import HeadPattern
from .step import with_sinks

_NAMES = ("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry")
_PAGE = 64


def calibrate(
    model: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    length: int = 4096,
    samples: int = 4,
    sink_tokens: int = 128,
    local_tokens: int = 256,
    fraction: float = 0.5,
    seed: int = 0,
) -> HeadPattern:
    """A pattern for a model without training: how much a head's output changes when it keeps sink and local only.

    A sample is a long text with pass keys in it that are recited at its end. The score of a kv head is
    ||full - streaming|| / ||full|| of the outputs of its query heads where the keys are recited, averaged over samples.
    Hidden states stay exact, so one forward pass a sample measures every head.

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        text: what pass keys are hidden in; by default the reference of the Python language.
        length: tokens of a sample; many more than sink and local.
        samples: forward passes.
        sink_tokens, local_tokens: what a streaming head keeps.
        fraction: of streaming heads in the pattern; `HeadPattern.with_fraction` cuts the same scores elsewhere.
        seed: of keys and places.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if length <= sink_tokens + local_tokens:
        raise ValueError(f"length: expected more than sink and local, {sink_tokens + local_tokens}, got {length}")
    sink, window = -(-sink_tokens // _PAGE), max(1, -(-local_tokens // _PAGE))
    errors: dict[int, Tensor] = {}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with tqdm(total=samples * layers, unit=" layers") as bar:
        for i in range(samples):
            ids, measured = tasks.passkey_recital(tokenizer, length, _NAMES, seed=seed + i, text=text)
            meter = _Meter(measured.to(model.device), sink, window, bar.update)
            with torch.inference_mode(), _attention(model, meter):
                model.base_model(ids.to(model.device), use_cache=False)
            for layer, error in meter.errors.items():
                errors[layer] = errors.get(layer, torch.zeros(())) + error / samples
    if not errors:
        raise ValueError("model: expected full attention in some layer, got none")
    scores = tuple(tuple(round(x, 6) for x in errors[i].tolist()) if i in errors else () for i in range(layers))
    source = str(getattr(model.config, "_name_or_path", ""))
    metadata = {
        "model": Path(source).name if Path(source).exists() else source,
        "method": "||full - streaming|| / ||full|| where hidden pass keys are recited",
        "length": length,
        "samples": samples,
        "sink_tokens": sink_tokens,
        "local_tokens": local_tokens,
        "seed": seed,
    }
    return HeadPattern(scores, fraction, metadata)


class _Meter:
    """An attention function that attends everything, and measures what streaming heads would have changed."""

    def __init__(self, measured: Tensor, sink: int, window: int, progress: Callable[[], object]) -> None:
        self.errors: dict[int, Tensor] = {}  # of a layer: [kv heads]
        self._measured, self._sink, self._window, self._progress = measured, sink, window, progress

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        full, _ = hf.attention(module, query, key, value, attention_mask, scaling, **kwargs)  # [1, T, Hq, D]
        self._progress()
        if not isinstance(attention_mask, hf.AttentionMask) or not attention_mask.is_causal():
            return full, None  # a window: transformers' own
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        H, T = k.shape[1], k.shape[0]
        rows = self._measured.nonzero()[:, 0]
        first = int(rows[0])
        cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (T - first, T))
        windows = torch.full((H,), self._window, dtype=torch.int32, device=q.device)
        mask = ops.Mask(windows, sink=self._sink)
        sinks = next((kwargs[name] for name in hf.SINKS if kwargs.get(name) is not None), None)
        streaming, _ = with_sinks(
            *ops.prefill(q[first:], k, v, cu_seqlens_q, cu_seqlens_k, mask, page_size=_PAGE, scale=scaling),
            sinks,
        )
        exact = full[0, rows].reshape(len(rows), H, -1).double()
        change = streaming[rows - first].reshape(len(rows), H, -1).double() - exact
        norms = [x.square().sum((0, 2)).sqrt() for x in (change, exact)]
        layer: Any = module.layer_idx
        self.errors[layer] = (norms[0] / norms[1].clamp_min(1e-30)).cpu()
        return full, None


@contextlib.contextmanager
def _attention(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """The model with another attention function, which nobody else sees, and which is gone afterwards."""
    before, name = model.config._attn_implementation, f"lserve_calibrate_{id(function)}"
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, hf.mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]
