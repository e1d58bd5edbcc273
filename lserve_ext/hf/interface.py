"""What transformers calls: the attention function, the mask function, and the name that selects both."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..sequences import Sequences
from .handle import NAME, WHO, Handle
from .layers import PendingKV, narrow, widen

# Keywords that change what is attended. Others that reach an attention function do not.
_UNSUPPORTED = ("softcap", "head_mask", "position_bias", "indices")
SINKS = ("s_aux", "sinks")  # a learned logit a head in the denominator of the softmax (GPT-OSS)


class AttentionMask(Handle):
    """What `mask` returns, once a forward. Our attention reads `starts`; layers that are not ours get `dense`."""

    def __init__(self, why_not: str | None, arguments: dict[str, Any]) -> None:
        self.why_not = why_not  # our attention cannot be asked for this mask
        self._arguments = arguments
        self._starts: tuple[np.ndarray | None] | None = None
        self._dense: dict[str, Tensor | None] = {}

    def _refuse(self, touch: str) -> NoReturn:
        config = type(self._arguments.get("config")).__name__
        raise RuntimeError(
            f"{WHO} is not supported by the model of {config}: it uses the attention mask itself ({touch}), so it "
            "does not call the attention function, or changes what it attends"
        )

    ndim = 2  # as of the mask of padding that it stands for

    def to(self, *args: Any, **kwargs: Any) -> AttentionMask:
        """Itself: models that are spread over devices move what they hand from layer to layer."""
        return self

    def starts(self) -> np.ndarray | None:
        """[B] columns of padding on the left, on the host; None: there is none.

        Raises:
            ValueError: the mask is not causal, or there is padding elsewhere.
        """
        self.check()
        if self._starts is None:
            self._starts = (_padding(**self._arguments),)
        return self._starts[0]

    def check(self) -> None:
        """Raises ValueError if the mask is not causal."""
        if self.why_not is not None:
            raise ValueError(self.why_not)

    def misfit(self, batch: Sequences) -> Tensor | None:
        """Whether a decode step's padding is another than that of earlier calls, as a bool on the GPU; None: it is on
        the CPU, or of a wrong shape, so that one can look."""
        padding: Tensor | None = self._arguments["attention_mask"]
        if padding is None or not _is_slow_to_read(padding) or padding.shape != (len(batch), batch.columns + 1):
            return None
        starts = batch.columns - batch.facts(padding.device).lengths
        expected = torch.arange(batch.columns + 1, device=padding.device) >= starts[:, None]
        return (padding.bool() != expected).any()

    def is_causal(self) -> bool:
        """Whether our attention serves it."""
        try:
            self.starts()
        except ValueError:
            return False
        return True

    def dense(self, kind: str) -> Tensor | None:
        """The same as a tensor, as transformers' "sdpa" or "eager" attention takes it."""
        if kind not in self._dense:
            self._dense[kind] = ALL_MASK_ATTENTION_FUNCTIONS[kind](**self._arguments)
        return self._dense[kind]


def _is_slow_to_read(tensor: Tensor) -> bool:
    """Whether reading it waits for a GPU."""
    return tensor.device.type != "cpu"


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` under the name that a model's `forward` and `generate` want: "cache" from transformers 5.24 on, before
    that (and in models from elsewhere) "past_key_values"."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | PendingKV,
    value: Tensor,
    attention_mask: Tensor | AttentionMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    With a `SparseCache`, layers with full attention are attended as its config says. Without one, causal attention is
    ours, dense; and everything else (windows, prefixes, encoders, soft caps) is left to transformers' own functions.

    Args:
        query: [B, Hq, T, D].
        key: what `SparseCache.update` returned, or [B, H, S, D].
        value: [B, H, S, D].
        attention_mask: from `mask`; or a tensor, or None, where a model makes its own.

    Returns:
        [B, T, Hq, D], and no attention weights.

    Raises:
        ValueError: the model asks a layer of the cache for what it does not support, which the text names.
        RuntimeError: gradients are wanted, or attention is called in another way than once an update.
    """
    if dropout:
        raise ValueError(f"{WHO} does not support dropout: expected 0, got {dropout}")
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError(f"{WHO} has no gradient: call the model under torch.no_grad()")
    causal = getattr(module, "is_causal", True) is not False and kwargs.get("is_causal") is not False
    extra = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    sinks = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), None)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(key, PendingKV):
        if extra:
            raise ValueError(f"{WHO} does not support {extra[0]}: expected None, got {kwargs[extra[0]]!r:.60}")
        if not causal:
            raise ValueError(f"{WHO} is causal, and this attention is not")
        if isinstance(attention_mask, AttentionMask):
            attention_mask.check()
        elif attention_mask is not None:
            raise ValueError(f"{WHO}: expected a 2D attention_mask, got one that a model made 4D or was given so")
        window = kwargs.get("sliding_window")
        if window is not None and key.layer.seen + query.shape[2] > window:
            raise ValueError(f"{WHO} does not support sliding_window: {_NO_WINDOW.format(window)}")
        if key.batch is not None:
            if not torch.compiler.is_compiling():
                key.use(value)
            out = key.layer.attend_reserved(query.to(value.dtype), key, key.batch, scale, sinks)
            if key.is_last:
                key.batch.commit()
            return out, None
        key.use(value)
        if query.dtype != value.dtype:
            query = query.to(value.dtype)
        return key.layer.attend(query, key, attention_mask, scale, sinks), None
    starts: np.ndarray | None = None
    if isinstance(attention_mask, AttentionMask):
        causal = causal and attention_mask.is_causal()
        starts = attention_mask.starts() if causal else None
    else:
        causal = causal and attention_mask is None
    channels = {query.shape[-1], key.shape[-1], value.shape[-1]}
    if causal and not extra and sinks is None and query.shape[2] <= key.shape[2] and max(channels) <= ops.MAX_HEAD_DIM:
        D = -(-max(channels) // 16) * 16
        q, k, v = (widen(x.to(value.dtype), D) for x in (query, key, value))
        return narrow(_dense(q, k, v, starts, scale), value.shape[-1]), None
    return _theirs(module, query, key, value, attention_mask, scaling, kwargs, eager=bool(extra) or sinks is not None)


def _dense(q: Tensor, k: Tensor, v: Tensor, kv_start: np.ndarray | None, scale: float) -> Tensor:
    """Causal attention over plain tensors, queries aligned with the last keys."""
    B, Hq, T, D = q.shape
    S = k.shape[2]
    starts = [0] * B if kv_start is None else [min(int(s), S) for s in kv_start]
    q_rows = [T - min(T, S - start) for start in starts]

    def pack(x: Tensor, firsts: list[int]) -> tuple[Tensor, Tensor]:
        rows = [x[b, :, first:].transpose(0, 1) for b, first in enumerate(firsts)]
        bounds = np.cumsum([0, *map(len, rows)])
        return torch.cat(rows), torch.from_numpy(bounds.astype(np.int32)).to(x.device)

    (q_new, cu_seqlens_q), (k_new, cu_seqlens_k), (v_new, _) = pack(q, q_rows), pack(k, starts), pack(v, starts)
    windows = torch.full((k.shape[1],), ops.DENSE, dtype=torch.int32, device=q.device)
    packed, _ = ops.prefill(q_new, k_new, v_new, cu_seqlens_q, cu_seqlens_k, ops.Mask(windows), scale=scale)
    out = q.new_zeros(B, T, Hq, D)
    for b, first in enumerate(q_rows):
        out[b, first:] = packed[int(cu_seqlens_q[b]) : int(cu_seqlens_q[b + 1])]
    return out


def _theirs(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | AttentionMask | None,
    scaling: float | None,
    kwargs: dict[str, Any],
    *,
    eager: bool,
) -> tuple[Tensor, None]:
    """transformers' own attention over plain tensors: SDPA, or what the model's file calls eager where SDPA cannot."""
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if eager:
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is None:
            raise ValueError(f"{WHO}: expected an eager attention in {type(module).__module__}, got none")
    if isinstance(attention_mask, AttentionMask):
        attention_mask = attention_mask.dense("eager" if eager else "sdpa")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out, _ = function(module, query, key, value, attention_mask, scaling=scale, dropout=0.0, **kwargs)
    return out, None


_NO_WINDOW = (
    "a layer with a window of {} tokens has got more than these. Where that window does not matter, set "
    "config.sliding_window = None before the model is loaded"
)
# What a mask of transformers is made of, by the function that made each part.
_PARTS = {
    "sliding_window_overlay": "a sliding window",
    "chunked_overlay": "attention in chunks",
    "packed_sequence_mask_function": "packed sequences",
    "remap_positions_for_packed_sequence": "packed sequences",
    "blockwise_overlay": "blocks that are bidirectional, as a prefix or an image",
    "bidirectional_mask_function": "bidirectional attention",
}
_CAUSAL = {"causal_mask_function", "and_masks"}


def _parts(mask_function: Any) -> set[str]:
    """Names of the functions that a mask function of transformers is composed of."""
    names = {str(getattr(mask_function, "__qualname__", mask_function)).partition(".")[0]}
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    for inner in (x for cell in cells for x in (cell if isinstance(cell, (tuple, list)) else [cell])):
        if callable(inner):
            names |= _parts(inner)
    return names


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> AttentionMask | None:
    """transformers' mask function, once a forward and kind of layer. Nothing is refused before attention asks.

    Returns:
        None for a decode step in reserved memory, which knows the padding from the prefill.
    """
    if kv_length == 0:
        return None
    if isinstance(attention_mask, AttentionMask):  # made before the forward, as `generate` does it
        return attention_mask
    arguments = {
        **kwargs,
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask,
    }  # fmt: skip
    why_not = None
    if int(q_offset) + q_length != kv_length + kv_offset:
        why_not = (
            f"{WHO}: expected a cache that holds {int(q_offset)} tokens and no more, got {kv_length} keys for "
            f"{q_length} queries. Static caches are not supported: use SparseCache"
        )
    parts = _parts(mask_function) - _CAUSAL
    window = kwargs.get("local_size")
    if (
        parts <= {"sliding_window_overlay", "chunked_overlay"}
        and window is not None
        and kv_offset + kv_length <= window
    ):
        parts = set()  # it does not matter yet
    if parts:
        named = sorted({_PARTS.get(part, part) for part in parts})
        hint = "" if window is None else "; " + _NO_WINDOW.format(window)
        why_not = f"{WHO} is causal, with padding on the left, got a mask with {' and '.join(named)}{hint}"
    return AttentionMask(why_not, arguments)


def _padding(
    batch_size: int, kv_length: int, kv_offset: int, attention_mask: Tensor | None, **_: Any
) -> np.ndarray | None:
    """The 2D padding mask as [B] first columns.

    Raises:
        ValueError: padding on the right or in the middle, or another number of columns than there are tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != kv_offset + kv_length:
        raise ValueError(
            f"attention_mask: expected [{batch_size}, {kv_offset + kv_length}], a column for every token in the cache "
            f"and every new one, got {list(attention_mask.shape)}"
        )
    padding: np.ndarray = attention_mask.bool().cpu().numpy()
    if not (padding[:, :-1] <= padding[:, 1:]).all():
        raise ValueError(f"{WHO} supports padding on the left only, got a mask with padding elsewhere")
    return np.asarray((~padding).sum(1), np.int64)


def register() -> None:
    """Makes `attn_implementation="lserve"` known. Importing `lserve_ext` does it when transformers is imported."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def refuse_models_without_interface() -> None:
    """Models that never call an attention function say so when "lserve" is asked of them. transformers itself accepts
    any registered name, and then ignores it (BLOOM) or fails with a KeyError (Falcon)."""
    check = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(check)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == NAME and not (self.is_backend_compatible() or self._can_set_attn_implementation()):
            raise ValueError(
                f"{WHO} is not supported by {type(self).__name__}: this model has its own attention and does not call "
                'a registered one. If it is part of a larger model, pass attn_implementation={"text_config": "lserve"}'
            )
        return check(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]
