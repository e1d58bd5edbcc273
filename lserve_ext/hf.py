"""transformers: `attn_implementation="lserve"` and a `Cache` for it.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lserve")
    cache = SparseCache(model.config, SparseConfig.lserve(streaming="heads.json"))
    model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

The model calls `cache.update(k, v, layer)` and hands its result on to the attention function untouched. So `update`
returns a handle that holds k and v; the attention function, which also knows the padding, appends and attends. Pad
tokens never enter the cache: each sequence has its own length.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import heads, ops
from .cache import LayerCache, Memory
from .config import SparseConfig
from .files import write_beside as _write_beside
from .heads import HeadPattern

NAME = "lserve"
_WHO = f"attn_implementation={NAME!r}"

# Keywords that change what is attended. Others that reach an attention function do not.
_UNSUPPORTED = ("softcap", "head_mask", "position_bias", "indices")
SINKS = ("s_aux", "sinks")  # a learned logit a head in the denominator of the softmax (GPT-OSS)


class Handle:
    """Stands where a tensor would, between two functions of ours: whoever else touches it gets a clear error."""

    def _refuse(self, touch: str) -> NoReturn:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        touched = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Handle))  # in a list, of torch.cat
        touched._refuse(getattr(func, "__name__", str(func)))


def _refused(name: str) -> Any:
    return lambda self, *_: self._refuse(name)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "and", "rand", "or", "ror",
              "invert", "neg", "lt", "le", "gt", "ge", "eq", "ne", "bool", "len", "iter", "getitem",
              "setitem"):  # fmt: skip
    setattr(Handle, f"__{_name}__", _refused(f"__{_name}__"))
Handle.__hash__ = object.__hash__  # type: ignore[method-assign]  # which __eq__ has taken away


class PendingKV(Handle):
    """New keys and values on their way from `SparseCache.update` to the attention function, in the key's place."""

    def __init__(self, layer: SparseLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.used = False

    def _refuse(self, touch: str) -> NoReturn:
        if getattr(self.layer.model_config, "_attn_implementation", None) == NAME:
            latent = " (multi-head latent attention, whose cache holds compressed keys)"
            raise RuntimeError(
                f"{_WHO} with a SparseCache: {type(self.layer.model_config).__name__}'s attention changes keys between "
                f"cache and attention ({touch}), which is not supported"
                f"{latent if getattr(self.layer.model_config, 'kv_lora_rank', None) else ''}"
            )
        raise RuntimeError(
            "SparseCache needs attn_implementation='lserve': load the model with it, or call "
            "model.set_attn_implementation('lserve') before the forward pass"
        )

    def use(self, value: Tensor) -> None:
        """Raises if attention has used this update before, or if the values are others than those of the update."""
        if self.used:
            raise RuntimeError(
                f"{_WHO}: expected one call of attention for each update of the SparseCache, got a second one in layer "
                f"{self.layer.index}: models that attend twice or share keys between layers are not supported"
            )
        same = (value.data_ptr(), value.shape, value.stride()) == (self.v.data_ptr(), self.v.shape, self.v.stride())
        if value is not self.v and not (same and value.dtype == self.v.dtype):
            raise RuntimeError(
                f"{_WHO}: expected the values that layer {self.layer.index} gave to SparseCache.update, got others: "
                "models that change values between cache and attention are not supported"
            )
        self.used = True


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
            f"{_WHO} is not supported by the model of {config}: it uses the attention mask itself ({touch}), so it "
            "does not call the attention function, or changes what it attends"
        )

    def to(self, *args: Any, **kwargs: Any) -> AttentionMask:
        """Itself: models that are spread over devices move what they hand from layer to layer."""
        return self

    def starts(self) -> np.ndarray | None:
        """[B] columns of padding on the left, on the host; None: there is none.

        Raises:
            ValueError: the mask is not causal, or there is padding elsewhere.
        """
        if self.why_not is not None:
            raise ValueError(self.why_not)
        if self._starts is None:
            self._starts = (_padding(**self._arguments),)
        return self._starts[0]

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


class SparseLayer(CacheLayerMixin):
    """One layer of a `SparseCache`: makes its `LayerCache` when it sees the first keys.

    Heads whose channels are no multiple of 16, or whose keys and values differ in them, are padded with zeros.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, config: SparseConfig, model_config: PretrainedConfig, pattern: Sequence[bool] | bool, index: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config, self.model_config, self.pattern, self.index = config, model_config, pattern, index
        self.kv: LayerCache | None = None

    def _no_tensor(self) -> NoReturn:
        raise RuntimeError(
            f"SparseCache: the model of {type(self.model_config).__name__} reads the keys of layer {self.index} from "
            "the cache itself, as cross attention does, which is not supported"
        )

    # transformers' constructor sets both to None.
    keys = property(lambda self: self._no_tensor(), lambda self, value: None)
    values = property(lambda self: self._no_tensor(), lambda self, value: None)

    @property
    def seen(self) -> int:
        """Columns of the padded batch, which is what transformers counts."""
        return 0 if self.kv is None else self.kv.columns

    def __copy__(self) -> SparseLayer:
        """The same tokens, until one of the two goes on: states of a `LayerCache` are never changed."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(vars(self), kv=copy.copy(self.kv))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLayer:
        """Its own tensors, but the same configs."""
        twin = type(self).__new__(type(self))
        shared = {"config", "model_config", "pattern"}
        fields = {name: x if name in shared else copy.deepcopy(x, memo) for name, x in vars(self).items()}
        twin.__dict__.update(fields)
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        D = -(-max(key_states.shape[-1], value_states.shape[-1]) // 16) * 16
        if D > ops.MAX_HEAD_DIM:
            raise ValueError(
                f"{_WHO}: expected heads of at most {ops.MAX_HEAD_DIM} channels, got {D} in layer {self.index}"
            )
        self.kv = self.make(_widen(key_states[:, :, :0], D))

    @property
    def is_initialized(self) -> bool:
        return self.kv is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        pass  # transformers' constructor sets it

    def make(self, like: Tensor) -> LayerCache:
        """An empty cache for keys of that shape, dtype and device."""
        dense = self.index < self.config.dense_layers
        streaming = [False] * like.shape[1] if dense else _local_heads(self.pattern, like.shape[1])
        return LayerCache(self.config, streaming, dense, like)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        key_states = key_states.to(value_states.dtype)  # under autocast rotary embedding leaves float32
        if self.kv is None:
            self.lazy_initialization(key_states, value_states)
        return PendingKV(self, key_states, value_states), value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, starts: np.ndarray | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """Appends k and v [B, H, T, D] and attends with q [B, Hq, T, D]: [B, T, Hq, D]."""
        assert self.kv is not None
        T = k.shape[2]
        padding = np.zeros(k.shape[0], np.int64) if starts is None else starts
        same_batch = len(padding) == self.kv.batch_size  # else the cache says so
        if same_batch and self.kv.lengths != np.maximum(self.seen - padding, 0).tolist():
            raise ValueError(
                f"attention_mask: expected the padding of earlier calls, after which the sequences hold "
                f"{self.kv.lengths} of {self.seen} tokens, got {padding.tolist()} tokens of padding"
            )
        D, new_padding = self.kv.head_dim, np.clip(padding - self.seen, 0, T).tolist()
        out = self.kv.attend(_widen(q, D), _widen(k, D), _widen(v, D), new_padding, scale, sinks)
        return out[..., : v.shape[-1]]

    def restored(
        self, state: dict[str, Tensor], kv_heads: int, head_dim: int | None, device: torch.device | str
    ) -> LayerCache:
        """A cache from what `LayerCache.state` gave, for that many heads (or a tensor parallel part of them)."""
        raw, P = state.get("raw_k"), self.config.page_size
        if raw is None or raw.dim() != 4 or not raw.is_floating_point():
            raise ValueError(f"{self.index}.raw_k: expected [B, {kv_heads}, {2 * P}, D] of the model's dtype, got "
                             f"{'none' if raw is None else f'{list(raw.shape)} of {raw.dtype}'}")  # fmt: skip
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        heads_fit = raw.shape[1] == kv_heads or (parallel and raw.shape[1] > 0 and kv_heads % raw.shape[1] == 0)
        D = None if head_dim is None else -(-head_dim // 16) * 16
        if not heads_fit or raw.shape[2] != 2 * P or D not in (None, raw.shape[3]):
            raise ValueError(
                f"{self.index}.raw_k: expected [B, {kv_heads}, {2 * P}, {'D' if D is None else D}] for this model, got "
                f"{list(raw.shape)}"
            )
        kv = self.make(raw[:, :, :0].to(device))
        try:
            kv.restore(state)
        except ValueError as error:
            raise ValueError(f"{self.index}.{error}") from None
        return kv

    @property
    def batch_size(self) -> int:
        return -1 if self.kv is None else self.kv.batch_size

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.kv = None

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.kv is not None:
            self.kv.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kv is not None:
            self.kv.take_rows(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        if self.kv is not None:  # whatever indexes a tensor: a mask, a slice, negative numbers
            index = indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()
            self.reorder_cache(torch.arange(self.kv.batch_size)[index])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self.reorder_cache(torch.arange(self.kv.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        raise RuntimeError("SparseCache does not take part in transformers' offloading")

    prefetch = offload


class SparseHybridLayer(SparseLayer, LinearAttentionLayer):
    """A layer with full attention, which is ours, beside the states of a linear one, which are transformers'."""

    is_compileable = False
    is_croppable = LinearAttentionLayer.is_croppable

    def __init__(self, *args: Any, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states)
        SparseLayer.__init__(self, *args)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        own = SparseLayer if args else LinearAttentionLayer  # transformers gives keys by position, states by name
        own.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        SparseLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SparseLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        SparseLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` under the name that a model's `forward` and `generate` want: "cache" from transformers 5.24 on, before
    that (and in models from elsewhere) "past_key_values"."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


def _widen(x: Tensor, D: int) -> Tensor:
    """x with D channels, zeros behind its own."""
    return x if x.shape[-1] == D else torch.nn.functional.pad(x, (0, D - x.shape[-1]))


def _their_layers(config: PretrainedConfig) -> list[Any]:
    """The layers that transformers' own cache has for a model: by `layer_types`, or by windows in the config."""
    name = type(config).__name__
    try:
        count, _ = config.num_hidden_layers, config.num_attention_heads
        layers = DynamicCache(config=config).layers
    except Exception as error:  # whatever a config without attention, or of an old kind, runs into
        raise ValueError(f"SparseCache: expected the config of a model with attention, got {name}: {error}") from None
    return layers or [DynamicLayer() for _ in range(count)]


def _is_ours(layer: Any, index: int, config: PretrainedConfig) -> bool:
    """Full attention whose keys no other layer uses. A window that no position reaches does not count."""
    modes = getattr(config, "kv_sharing_modes", None) or []
    if "reuse" in modes and modes[index] is not None:
        return False
    positions = getattr(config, "max_position_embeddings", None)
    if type(layer) is DynamicSlidingWindowLayer and positions is not None:
        return bool(layer.sliding_window >= positions)
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


class SparseCache(Cache):
    """The KV cache of a transformers model: paged, sparse, optionally INT8.

    Layers with full attention are ours. Sliding-window, chunked, linear, convolution and state-space layers of a hybrid
    model keep transformers' own cache layers, and are attended by transformers.

    Args:
        config: the model's config; its layers and their kinds are read, and its kv heads, to check head patterns.
        sparse: what is attended and how it is stored; by default dense, in the model's dtype.

    Raises:
        ValueError: the pattern of streaming heads does not fit the model, there is none to cut a fraction from, or the
            model has no layer with full attention.
    """

    def __init__(self, config: PretrainedConfig, sparse: SparseConfig | None = None) -> None:
        self.sparse = sparse if sparse is not None else SparseConfig.dense()
        if isinstance(self.sparse.streaming, (str, os.PathLike)):  # a cache is whole without the file
            self.sparse = self.sparse.replace(streaming=HeadPattern.load(self.sparse.streaming))
        self._config = config.get_text_config(decoder=True)
        self._forward: _Forward | None = None
        self._used: set[int] | None = None  # layers that a whole forward has touched
        self._dead: str | None = None
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[Any]:
        text, layers = self._config, _their_layers(self._config)
        ours = [i for i, layer in enumerate(layers) if _is_ours(layer, i, text)]
        if not ours:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            window = getattr(text, "sliding_window", None)
            hint = "" if window is None else (
                f". For contexts up to its window of {window} tokens, set config.sliding_window = None before the "
                "model is loaded, and config.layer_types to 'full_attention' where there are any"
            )  # fmt: skip
            raise ValueError(
                f"SparseCache: expected a model with full attention in some layer, got {type(text).__name__}, whose "
                f"layers are {kinds}{hint}"
            )
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        patterns = heads.resolve(self.sparse.streaming, len(layers), kv_heads, ours)
        for i in ours:
            arguments = (self.sparse, text, patterns[i], i)
            if isinstance(layers[i], LinearAttentionLayer):
                layers[i] = SparseHybridLayer(*arguments, number_of_states=layers[i].number_of_states)
            else:
                layers[i] = SparseLayer(*arguments)
        return layers

    @property
    def ours(self) -> list[SparseLayer]:
        """The layers with full attention."""
        return [layer for layer in self.layers if isinstance(layer, SparseLayer)]

    # ---- one forward after the other --------------------------------------------------------------------------------
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._touch(layer_idx, "kv")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self._touch(layer_idx, f"conv{state_idx}")
        state: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self._touch(layer_idx, f"recurrent{state_idx}")
        state: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        return state

    def _touch(self, index: int, kind: str) -> None:
        """Notes that a forward has come to a layer, and begins a new one where layers begin anew."""
        forward = self._forward
        if forward is None or index < max(forward.touched, default=0) or kind in forward.touched.get(index, ()):
            self._settle()
            forward = self._forward = _Forward([_copied(layer) for layer in self.layers])
        layer = self.layers[index]
        if isinstance(layer, SparseLayer) and layer.seen != forward.columns:
            raise RuntimeError(
                f"SparseCache: expected {forward.columns} columns in layer {index}, as in the other layers, got "
                f"{layer.seen}: an earlier forward has left this layer out"
            )
        forward.touched.setdefault(index, set()).add(kind)

    def _settle(self) -> None:
        """Ends the last forward: an interrupted one is taken back, in all layers at once.

        Raises:
            RuntimeError: it cannot be taken back, because it has overwritten the state of a linear layer.
        """
        if self._dead is not None:
            raise RuntimeError(self._dead)
        forward = self._forward
        if forward is None:
            return
        if not self._is_whole(forward):
            if self._used is None and forward.touched:
                warnings.warn(
                    f"SparseCache: the first forward ended at layer {max(forward.touched)} of {len(self.layers)}, so "
                    "it is taken as interrupted and begins anew. If the model has no more layers than that, say so in "
                    "its config.num_hidden_layers",
                    stacklevel=4,
                )
            for index in forward.touched:
                states = getattr(forward.before[index], "has_previous_state", {})
                if any(states.values()):
                    self._dead = (
                        "SparseCache: the last forward was interrupted, and the linear layer "
                        f"{index} cannot be taken back: call reset() and prefill again"
                    )
                    raise RuntimeError(self._dead)
            self.layers = forward.before
        elif forward.touched:
            self._used = set(forward.touched)
        self._forward = None

    def _is_whole(self, forward: _Forward) -> bool:
        """Whether a forward has come to its end."""
        if not forward.touched:
            return True
        last = max(forward.touched)
        end = max(self._used) if self._used else max(i for i, x in enumerate(self.layers) if not _is_dummy(x))
        kinds = [kinds for i, kinds in forward.touched.items() if type(self.layers[i]) is type(self.layers[last])]
        attended = all(layer.seen > forward.columns for layer in self.ours if layer.index in forward.touched)
        return last >= end and attended and forward.touched[last] >= set().union(*kinds)

    def _on_all(self, action: Callable[[Any], object]) -> None:
        """Does something to every layer, or, if it fails in one, to none."""
        self._settle()
        layers = [_copied(layer) for layer in self.layers]
        for layer in layers:
            action(layer)
        self.layers = layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that the layers hold, or one layer but the first: 0 if no forward has come to it. During a forward,
        and after an interrupted one: those from before it."""
        forward = self._forward
        layers = self.layers if forward is None or self._is_whole(forward) else forward.before
        layer = layers[layer_idx]
        if layer_idx and isinstance(layer, SparseLayer):
            return layer.seen
        return max(layer.seen for layer in layers if isinstance(layer, SparseLayer))

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that a layer will have, and the column of the first of them."""
        layer = self.layers[layer_idx]
        if isinstance(layer, SparseLayer) or not isinstance(layer, CacheLayerMixin):
            return self.get_seq_length() + query_length, 0
        if self._forward is not None and not self._is_whole(self._forward):
            layer = self._forward.before[layer_idx]
        sizes: tuple[int, int] = layer.get_mask_sizes(query_length)
        return sizes

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first forward."""
        return max((layer.batch_size for layer in self.ours), default=-1)

    # ---- all layers at once -----------------------------------------------------------------------------------------
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` columns from every sequence, or raises and changes nothing."""
        self._on_all(lambda layer: layer.crop(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps these sequences, in this order."""
        self._on_all(lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the sequences that `indices` picks from a tensor's first dimension."""
        self._on_all(lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self._on_all(lambda layer: layer.batch_repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """transformers' own layers keep what a crop may ask for."""
        self._on_all(lambda layer: getattr(layer, "activate_past_recording", lambda: None)())

    def reset(self) -> None:
        """As new."""
        self.layers = self._new_layers()
        self._forward, self._dead = None, None

    def memory(self) -> dict[str, Memory]:
        """Bytes of KV a tier: used, reserved, peak. Layers of transformers' own count with what they hold now."""
        self._settle()  # what the last forward could have been taken back to is no longer held
        total = sum((layer.kv.memory() for layer in self.ours if layer.kv is not None), Memory())
        size = sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer).values())
        total += Memory(size, size, size)
        return {"device": total}

    def attended(self) -> tuple[int, int]:
        """Tokens that a decode step attends and those that a dense one would, over the layers with full attention, kv
        heads and sequences."""
        counts = [layer.kv.attended() for layer in self.ours if layer.kv is not None]
        return sum(some for some, _ in counts), sum(all_ for _, all_ in counts)

    def fork(self) -> SparseCache:
        """A second cache that goes on from here; sealed blocks are shared until either drops them."""
        self._settle()
        twin = copy.copy(self)
        shared = {id(layer.kv): layer.kv.fork() for layer in self.ours if layer.kv is not None}
        twin.layers = copy.deepcopy(self.layers, dict(shared))  # which takes these for copies made already
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseCache:
        """A copy that shares nothing."""
        self._settle()
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers, memo)
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as safetensors.

        Raises:
            ValueError: a layer of transformers' own holds something: only layers with full attention can be saved.
        """
        from safetensors.torch import save_file

        self._settle()
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if _tensors(layer):
                raise ValueError(
                    f"SparseCache.save: expected layers with full attention only, got {type(layer).__name__} in layer "
                    f"{i}, whose states are transformers' own"
                )
            if isinstance(layer, SparseLayer) and layer.kv is not None:
                tensors |= {f"{i}.{name}": tensor.cpu().contiguous() for name, tensor in layer.kv.state().items()}
        head = {"format": _FORMAT, "sparse": self.sparse.to_dict(), "layers": len(self.layers)}
        _write_beside(path, lambda beside: save_file(tensors, beside, {"lserve_ext": json.dumps(head)}))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: PretrainedConfig, device: torch.device | str = "cpu"
    ) -> SparseCache:
        """Reads what `save` wrote, for the same model, onto one device.

        Raises:
            ValueError: the file is damaged, of another format or of another model; the text names file and tensor.
        """
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if "lserve_ext" not in metadata:
                    raise ValueError("expected a file of SparseCache.save, got another one")
                head = json.loads(metadata["lserve_ext"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            return cls._from_file(head, tensors, config, device)
        except (ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(f"SparseCache.load: {name}: {error}") from None

    @classmethod
    def _from_file(
        cls, head: Any, tensors: dict[str, Tensor], config: PretrainedConfig, device: torch.device | str
    ) -> SparseCache:
        if not isinstance(head, dict) or head.get("format") != _FORMAT:
            got = head.get("format") if isinstance(head, dict) else type(head).__name__
            raise ValueError(f"format: expected {_FORMAT}, got {got!r}: written by another version of lserve_ext")
        cache = cls(config, SparseConfig.from_dict(head.get("sparse")))  # type: ignore[arg-type]  # checked there
        if len(cache.layers) != head.get("layers"):
            raise ValueError(f"layers: expected the {len(cache.layers)} of the model, got {head.get('layers')!r}")
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            if not (number.isdecimal() and len(number) < 6 and name):
                raise ValueError(f"{key}: expected a layer and a name, got another tensor")
            states.setdefault(int(number), {})[name] = tensor
        ours = [layer.index for layer in cache.ours]
        if states and sorted(states) != ours:
            raise ValueError(f"expected tensors of the layers {ours}, got {sorted(states)}")
        text = config.get_text_config(decoder=True)
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        for layer in cache.ours if states else ():
            layer.kv = layer.restored(states[layer.index], kv_heads, _head_dim(text), device)
        fed = {layer.index: layer.seen for layer in cache.ours}
        batches = {layer.index: layer.batch_size for layer in cache.ours}
        for what, values in (("columns", fed), ("batch size", batches)):
            if len(set(values.values())) > 1:
                raise ValueError(f"{what}: expected the same in all layers, got {values}")
        if states:
            cache._used = set(states)
        return cache


_FORMAT = 2  # of files


def _head_dim(config: PretrainedConfig) -> int | None:
    """Channels that a model's config gives its keys, if it gives all layers the same."""
    if any(hasattr(config, name) for name in ("qk_nope_head_dim", "global_head_dim")):
        return None
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


@dataclasses.dataclass
class _Forward:
    """A forward on its way through the layers."""

    before: list[Any]
    """The layers as they were."""
    touched: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    """Layers that it has come to, and which of their states it has asked for."""

    def __post_init__(self) -> None:
        self.columns = max(layer.seen for layer in self.before if isinstance(layer, SparseLayer))


def _copied(layer: Any) -> Any:
    """A copy that stays as it is while the layer goes on. Only linear layers change their tensors in place."""
    twin = copy.copy(layer)
    vars(twin).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    return twin


def _is_dummy(layer: Any) -> bool:
    """A layer that never holds anything, as one that reads another layer's keys."""
    return type(layer).__name__ == "DummyLayer"


def _tensors(layer: Any) -> dict[str, Tensor]:
    """What a layer of transformers' own holds."""
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        states = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}{i}": x for i, x in states if isinstance(x, Tensor) and x.numel() and x.dim() > 1}
    return found


def _local_heads(pattern: Sequence[bool] | bool, local: int) -> Sequence[bool]:
    """This rank's part of a layer's pattern. Head counts are read off the tensors: under tensor parallelism they are
    local, while the model's config still holds the global ones."""
    if isinstance(pattern, bool):
        return [pattern] * local
    if local == len(pattern):
        return pattern
    world = len(pattern) // local
    if len(pattern) % local or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(f"streaming: expected {len(pattern)} kv heads or an equal share of them per rank, got {local}")
    rank = torch.distributed.get_rank() % world
    return pattern[rank * local : (rank + 1) * local]


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
        raise ValueError(f"{_WHO} does not support dropout: expected 0, got {dropout}")
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError(f"{_WHO} has no gradient: call the model under torch.no_grad()")
    causal = getattr(module, "is_causal", True) is not False and kwargs.get("is_causal") is not False
    extra = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    sinks = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), None)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    starts: np.ndarray | None = None
    if isinstance(key, PendingKV):
        if extra:
            raise ValueError(f"{_WHO} does not support {extra[0]}: expected None, got {kwargs[extra[0]]!r:.60}")
        if not causal:
            raise ValueError(f"{_WHO} is causal, and this attention is not")
        if isinstance(attention_mask, AttentionMask):
            starts = attention_mask.starts()
        elif attention_mask is not None:
            raise ValueError(f"{_WHO}: expected a 2D attention_mask, got one that a model made 4D or was given so")
        window = kwargs.get("sliding_window")
        if window is not None and key.layer.seen + query.shape[2] > window:
            raise ValueError(f"{_WHO} does not support sliding_window: {_NO_WINDOW.format(window)}")
        key.use(value)
        return key.layer.attend(query.to(value.dtype), key.k, key.v, starts, scale, sinks), None
    if isinstance(attention_mask, AttentionMask):
        causal = causal and attention_mask.is_causal()
        starts = attention_mask.starts() if causal else None
    else:
        causal = causal and attention_mask is None
    channels = {query.shape[-1], key.shape[-1], value.shape[-1]}
    if causal and not extra and sinks is None and query.shape[2] <= key.shape[2] and max(channels) <= ops.MAX_HEAD_DIM:
        D = -(-max(channels) // 16) * 16
        q, k, v = (_widen(x.to(value.dtype), D) for x in (query, key, value))
        return _dense(q, k, v, starts, scale)[..., : value.shape[-1]], None
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

    (q_new, cu_q), (k_new, cu_k), (v_new, _) = pack(q, q_rows), pack(k, starts), pack(v, starts)
    windows = torch.full((k.shape[1],), ops.DENSE, dtype=torch.int32, device=q.device)
    packed, _ = ops.prefill(q_new, k_new, v_new, cu_q, cu_k, windows, scale=scale)
    out = q.new_zeros(B, T, Hq, D)
    for b, first in enumerate(q_rows):
        out[b, first:] = packed[int(cu_q[b]) : int(cu_q[b + 1])]
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
            raise ValueError(f"{_WHO}: expected an eager attention in {type(module).__module__}, got none")
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
) -> AttentionMask:
    """transformers' mask function, once a forward and kind of layer. Nothing is refused before attention asks."""
    arguments = {
        **kwargs,
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask,
    }  # fmt: skip
    why_not = None
    if int(q_offset) + q_length != kv_length + kv_offset:
        why_not = (
            f"{_WHO}: expected a cache that holds {int(q_offset)} tokens and no more, got {kv_length} keys for "
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
        why_not = f"{_WHO} is causal, with padding on the left, got a mask with {' and '.join(named)}{hint}"
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
        raise ValueError(f"{_WHO} supports padding on the left only, got a mask with padding elsewhere")
    return np.asarray((~padding).sum(1), np.int64)


def register() -> None:
    """Makes `attn_implementation="lserve"` known. Importing `lserve_ext` does it when transformers is imported."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def _refuse_models_without_interface() -> None:
    """Models that never call an attention function say so when "lserve" is asked of them. transformers itself accepts
    any registered name, and then ignores it (BLOOM) or fails with a KeyError (Falcon)."""
    check = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(check)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == NAME and not (self.is_backend_compatible() or self._can_set_attn_implementation()):
            raise ValueError(
                f"{_WHO} is not supported by {type(self).__name__}: this model has its own attention and does not call "
                'a registered one. If it is part of a larger model, pass attn_implementation={"text_config": "lserve"}'
            )
        return check(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]


register()
_refuse_models_without_interface()

__all__ = [
    "AttentionMask",
    "HeadPattern",
    "PendingKV",
    "SparseCache",
    "SparseLayer",
    "attention",
    "cache_argument",
    "mask",
    "register",
]
