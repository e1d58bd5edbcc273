"""Which heads of a model may stream (DuoAttention's question): measured without training, or by gates that are
trained."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
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
_BY_CHANGE = "||full - streaming|| / ||full|| where hidden pass keys are recited"
_BY_GATES = "gates trained where hidden pass keys are recited"
Samples = Iterable[tuple[Tensor, Tensor]]
"""Token ids [1, T], and which of them predict one of a key, bool [T]."""


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
    steps: int = 0,
) -> HeadPattern:
    """A pattern for a model: how much it needs of a head more than sink and local.

    A sample is a long text with pass keys in it that are recited at its end. Without training the score of a kv head is
    ||full - streaming|| / ||full|| of the outputs of its query heads where the keys are recited, averaged over samples.
    Hidden states stay exact, so one forward pass a sample measures every head. With `steps` it is a gate (`_trained`).

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        text: what pass keys are hidden in; by default the reference of the Python language.
        length: tokens of a sample; many more than sink and local.
        samples: forward passes, without training.
        sink_tokens, local_tokens: what a streaming head keeps.
        fraction: of streaming heads in the pattern; `HeadPattern.with_fraction` cuts the same scores elsewhere.
        seed: of keys and places.
        steps: of training, each on a sample of its own; 0: no training. A step takes time and memory as one of
            fine-tuning does, and attention twice; masks take length² bytes.
    """
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if length <= sink_tokens + local_tokens:
        raise ValueError(f"length: expected more than sink and local, {sink_tokens + local_tokens}, got {length}")
    sink, window = -(-sink_tokens // _PAGE), max(1, -(-local_tokens // _PAGE))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    recital = functools.partial(tasks.passkey_recital, tokenizer, length, _NAMES, text=text)
    if steps:
        scores = _trained(model, (recital(seed=seed + i) for i in range(steps)), steps, sink, window)
    else:
        scores = _measured(model, (recital(seed=seed + i) for i in range(samples)), samples, sink, window)
    if not scores:
        raise ValueError("model: expected full attention in some layer, got none")
    rows = tuple(tuple(round(x, 6) for x in scores[i].tolist()) if i in scores else () for i in range(layers))
    source = str(getattr(model.config, "_name_or_path", ""))
    metadata = {
        "model": Path(source).name if Path(source).exists() else source,
        "method": _BY_GATES if steps else _BY_CHANGE,
        "length": length,
        "steps" if steps else "samples": steps or samples,
        "sink_tokens": sink_tokens,
        "local_tokens": local_tokens,
        "seed": seed,
    }
    return HeadPattern(rows, fraction, metadata)


def _measured(model: Any, samples: Samples, count: int, sink: int, window: int) -> dict[int, Tensor]:
    """Of a layer, [kv heads] how much their outputs change when they stream."""
    errors: dict[int, Tensor] = {}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with tqdm(total=count * layers, unit=" layers") as bar:
        for ids, measured in samples:
            meter = _Meter(measured.to(model.device), sink, window, bar.update)
            with torch.inference_mode(), _attention(model, meter):
                model.base_model(ids.to(model.device), use_cache=False)
            for layer, error in meter.errors.items():
                errors[layer] = errors.get(layer, torch.zeros(())) + error / count
    return errors


def _trained(model: Any, samples: Samples, count: int, sink: int, window: int) -> dict[int, Tensor]:
    """Of a layer, [kv heads] gates, each the mean over all steps, so that those which end at 0 or at 1 have an order
    (DuoAttention, section 2.2: gate * full + (1 - gate) * streaming; the loss is the squared error of the last hidden
    states where keys are recited, summed over tokens and channels, and 0.05 of each gate; AdamW with rate 0.02, gates
    kept within 0 and 1).
    """
    attention = _Gated(sink, window)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    means: dict[int, Tensor] = {}
    optimizer: torch.optim.Optimizer | None = None
    try:
        for parameter in trains:
            parameter.requires_grad_(False)
        with _differentiable(), _attention(model, attention), tqdm(samples, total=count, unit=" steps") as bar:
            for step, (ids, measured) in enumerate(bar, 1):
                ids, rows = ids.to(model.device), measured.to(model.device).nonzero()[:, 0]
                attention.streams = False
                with torch.no_grad():
                    whole = model.base_model(ids, use_cache=False).last_hidden_state[0, rows].float()
                if optimizer is None:
                    if not attention.gates:
                        return {}
                    optimizer = torch.optim.AdamW(attention.gates.values(), lr=0.02, weight_decay=0.0)
                attention.streams = True
                hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, rows].float()
                error = (hidden - whole).square().sum()
                loss = error + 0.05 * torch.cat([*attention.gates.values()]).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
                optimizer.step()
                with torch.no_grad():
                    for layer, gate in attention.gates.items():
                        gate.clamp_(0, 1)
                        means[layer] = means.get(layer, torch.zeros(())) + gate.cpu() / count
                    bar.set_postfix_str(f"step {step}, error {float(error):.2e}, loss {float(loss):.3f}")
    finally:
        for parameter in trains:
            parameter.requires_grad_(True)
    return means


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


class _Gated:
    """An attention function whose heads stream as far as their gates are below 1."""

    def __init__(self, sink: int, window: int) -> None:
        self.gates: dict[int, Tensor] = {}
        """Of a layer, [kv heads], made at its first call."""
        self.streams = False
        """Whether gates are looked at."""
        self._sink, self._window, self._mask = sink, window, torch.empty(0, 0)

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
        if not isinstance(attention_mask, hf.AttentionMask) or not attention_mask.is_causal():
            raise ValueError(
                "steps: expected a model whose layers all have full attention, to train gates; got another"
            )
        if any(kwargs.get(name) is not None for name in hf.SINKS):
            raise ValueError("steps: expected a model without attention sinks, got one with them")
        layer: Any = module.layer_idx
        if layer not in self.gates:
            self.gates[layer] = torch.ones(key.shape[1], device=key.device, requires_grad=True)
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, query, key, value, scale=scaling, enable_gqa=True
        )
        out = attend(is_causal=True)  # [1, Hq, T, D]
        if self.streams:
            gate = self.gates[layer].repeat_interleave(query.shape[1] // key.shape[1])[:, None, None].to(out.dtype)
            out = gate * out + (1 - gate) * attend(attn_mask=self._streaming(query.shape[2], key.device))
        return out.transpose(1, 2), None

    def _streaming(self, tokens: int, device: torch.device) -> Tensor:
        """[T, T] what a streaming head attends."""
        if self._mask.shape[0] != tokens:
            at = torch.arange(tokens, device=device)
            page, query = at // _PAGE, at[:, None]
            self._mask = (at <= query) & ((page < self._sink) | (page > query // _PAGE - self._window))
        return self._mask


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
