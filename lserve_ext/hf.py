"""transformers: `attn_implementation="lserve"` and a `Cache` for it.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lserve")
    cache = SparseCache(model.config, SparseConfig.lserve(streaming="heads.json"))
    model.generate(**inputs, past_key_values=cache)

The model calls `cache.update(k, v, layer)` and hands its result on to the attention function untouched. So `update`
returns a handle that holds k and v; the attention function, which also knows the padding, appends and attends. Pad
tokens never enter the cache: each sequence has its own length.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from . import heads, ops
from .cache import LayerCache, Memory
from .config import SparseConfig
from .heads import HeadPattern

NAME = "lserve"
_WHO = f"attn_implementation={NAME!r}"

# Keywords that change what is attended; the others that reach an attention function do not.
_UNSUPPORTED = ("softcap", "sliding_window", "s_aux", "sinks", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k")


class PendingKV:
    """New keys and values on their way from `SparseCache.update` to the attention function.

    It stands where a key tensor would; any other attention implementation that touches it gets a clear error.
    """

    def __init__(self, layer: SparseLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v

    @staticmethod
    def _refuse() -> NoReturn:
        raise RuntimeError(
            "SparseCache needs attn_implementation='lserve': load the model with it, or call "
            "model.set_attn_implementation('lserve') before the forward pass"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, index: Any) -> Any:
        self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls._refuse()


class SparseLayer(CacheLayerMixin):
    """One layer of a `SparseCache`: makes its `LayerCache` when it sees the first keys."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: SparseConfig, pattern: Sequence[bool], index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config, self.pattern, self.index = config, pattern, index
        self.seen = 0  # columns of the padded batch, which is what transformers counts
        self.kv: LayerCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.make(key_states)

    def make(self, like: Tensor) -> LayerCache:
        """The layer's cache, empty, for keys of that shape, dtype and device."""
        dense = self.index < self.config.dense_layers
        streaming = [False] * like.shape[1] if dense else _local_heads(self.pattern, like.shape[1])
        self.kv = LayerCache(self.config, streaming, dense, like)
        self.is_initialized = True
        return self.kv

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        key_states = key_states.to(value_states.dtype)  # under autocast rotary embedding leaves float32
        if self.kv is None:
            self.lazy_initialization(key_states, value_states)
        return PendingKV(self, key_states, value_states), value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor | None, scale: float) -> Tensor:
        assert self.kv is not None
        T = k.shape[2]
        starts = np.zeros(k.shape[0], np.int64) if kv_start is None else kv_start.cpu().numpy().astype(np.int64)
        if kv_start is not None and self.kv.lengths != np.maximum(self.seen - starts, 0).tolist():
            raise ValueError(
                f"attention_mask: expected the padding of earlier calls, after which the sequences hold "
                f"{self.kv.lengths} of {self.seen} tokens, got {starts.tolist()} tokens of padding"
            )
        out = self.kv.attend(q, k, v, np.clip(starts - self.seen, 0, T).tolist(), scale)
        self.seen += T
        return out

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
        self.kv, self.seen, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.kv is not None:
            self.kv.crop(-tokens_to_remove)
            self.seen = max(0, self.seen + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kv is not None:
            self.kv.take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kv is not None:  # whatever indexes a tensor: a mask, negative numbers
            self.reorder_cache(torch.arange(self.kv.batch_size)[torch.as_tensor(indices).cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self.reorder_cache(torch.arange(self.kv.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        raise RuntimeError("SparseCache does not take part in transformers' offloading")

    prefetch = offload


class SparseCache(Cache):
    """The KV cache of a transformers model: paged, sparse, optionally INT8.

    Args:
        config: the model's config; only its numbers of layers and of kv heads are read, to check head patterns.
        sparse: what is attended and how it is stored; by default dense, in the model's dtype.

    Raises:
        ValueError: the pattern of streaming heads does not fit the model, or there is none to cut a fraction from.
    """

    layers: list[SparseLayer]  # type: ignore[assignment]  # transformers' list is of any layers

    def __init__(self, config: PretrainedConfig, sparse: SparseConfig | None = None) -> None:
        sparse = sparse if sparse is not None else SparseConfig.dense()
        text = config.get_text_config(decoder=True)
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        patterns = heads.resolve(sparse.streaming, text.num_hidden_layers, kv_heads)
        super().__init__(layers=[SparseLayer(sparse, pattern, i) for i, pattern in enumerate(patterns)])
        self.sparse = sparse

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == 0:
            self._recover()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that every layer holds: after an interrupted forward, those from before it."""
        return min(layer.seen for layer in self.layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def _recover(self) -> None:
        """After an exception in the middle of a forward: back to the last length that all layers reached."""
        length = self.get_seq_length()
        if length == 0:  # nothing to keep, not even the batch size
            self.reset()  # type: ignore[no-untyped-call]
        for layer in self.layers:
            if layer.seen > length and layer.kv is not None:
                layer.kv.check_crop(layer.seen - length)
        for layer in self.layers:
            layer.crop(length - layer.seen)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` columns from every sequence, or raises and changes nothing."""
        for layer in self.layers:
            if layer.kv is not None and tokens_to_remove < 0:
                layer.kv.check_crop(-int(tokens_to_remove))
        super().crop(tokens_to_remove)

    def memory(self) -> dict[str, Memory]:
        """Bytes of KV a tier: used, reserved, peak."""
        return {"device": sum((layer.kv.memory() for layer in self.layers if layer.kv is not None), Memory())}

    def attended(self) -> tuple[int, int]:
        """Tokens that a decode step attends and those that a dense one would, over layers, kv heads and sequences."""
        counts = [layer.kv.attended() for layer in self.layers if layer.kv is not None]
        return sum(some for some, _ in counts), sum(all_ for _, all_ in counts)

    def fork(self) -> SparseCache:
        """A second cache that goes on from here; sealed blocks are shared until either drops them."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        for layer in twin.layers:
            layer.kv = layer.kv.fork() if layer.kv is not None else None
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as safetensors."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if layer.kv is not None:
                tensors |= {f"{i}.{name}": tensor.cpu().contiguous() for name, tensor in layer.kv.state().items()}
        head = {
            "sparse": self.sparse.to_dict(),
            "seen": [layer.seen for layer in self.layers],
            "pattern": [[bool(streams) for streams in layer.pattern] for layer in self.layers],
        }
        save_file(tensors, path, {"lserve_ext": json.dumps(head)})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: PretrainedConfig, device: torch.device | str = "cpu"
    ) -> SparseCache:
        """Reads what `save` wrote, for the same model, onto one device."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "lserve_ext" not in metadata:
                raise ValueError(f"SparseCache.load: expected a file of SparseCache.save, got {os.fspath(path)!r}")
            head = json.loads(metadata["lserve_ext"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        cache = cls(config, SparseConfig.from_dict(head["sparse"]))
        if len(cache.layers) != len(head["seen"]):
            raise ValueError(f"SparseCache.load: expected {len(cache.layers)} layers, got {len(head['seen'])}")
        for i, layer in enumerate(cache.layers):
            state = {name.removeprefix(f"{i}."): tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")}
            layer.pattern, layer.seen = head["pattern"][i], head["seen"][i]
            if state:
                raw = state["raw_k"].to(device)
                layer.make(raw).restore(state)
        return cache


def _local_heads(pattern: Sequence[bool], local: int) -> Sequence[bool]:
    """This rank's part of a layer's pattern. Head counts are read off the tensors: under tensor parallelism they are
    local, while the model's config still holds the global ones."""
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
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        query: [B, Hq, T, D].
        key: what `SparseCache.update` returned, or [B, H, S, D] without such a cache: then dense and causal.
        value: [B, H, S, D].
        attention_mask: [B] int32 first column of every sequence, from `mask`; or None.

    Returns:
        [B, T, Hq, D], and no attention weights.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{_WHO} does not support {name}: expected None, got {kwargs[name]!r:.60}")
    if dropout:
        raise ValueError(f"{_WHO} does not support dropout: expected 0, got {dropout}")
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise ValueError(f"{_WHO} is causal, and this attention is not")
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError(f"{_WHO} has no gradient: call the model under torch.no_grad()")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if attention_mask is not None and attention_mask.dim() != 1:
        raise ValueError(f"{_WHO}: expected a 2D attention_mask, got one that a model made 4D or was given so")
    query = query.to(value.dtype)
    if isinstance(key, PendingKV):
        return key.layer.attend(query, key.k, key.v, attention_mask, scale), None
    return _dense(query, key.to(value.dtype), value, attention_mask, scale), None


def _dense(q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor | None, scale: float) -> Tensor:
    """Causal attention over plain tensors, queries aligned with the last keys."""
    B, Hq, T, D = q.shape
    S = k.shape[2]
    starts = [0] * B if kv_start is None else [min(int(s), S) for s in kv_start.tolist()]
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


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function, once a forward: the 2D padding mask becomes [B] first columns, on the host.

    Raises:
        ValueError: padding on the right or in the middle, or keys beyond the queries (a static cache).
    """
    if int(q_offset) + q_length != kv_length + kv_offset:
        raise ValueError(
            f"{_WHO}: expected a cache that holds {int(q_offset)} tokens and no more, got {kv_length} keys for "
            f"{q_length} queries. Static caches are not supported: use SparseCache or DynamicCache"
        )
    if mask_function is not None and mask_function is not causal_mask_function:
        raise ValueError(
            f"{_WHO} is causal, with padding on the left: no sliding_window, packed sequences or bidirectional "
            f"prefixes, got the mask {getattr(mask_function, '__qualname__', mask_function)}"
        )
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < kv_length:
        raise ValueError(
            f"attention_mask: expected [{batch_size}, {kv_length}], a column for every token in the cache and every "
            f"new one, got {list(attention_mask.shape)}"
        )
    padding = attention_mask[:, :kv_length].bool().cpu()
    if not bool((padding[:, :-1] <= padding[:, 1:]).all()):
        raise ValueError(f"{_WHO} supports padding on the left only, got a mask with padding elsewhere")
    return (~padding).sum(1, dtype=torch.int32)


def register() -> None:
    """Makes `attn_implementation="lserve"` known. Importing `lserve_ext` does it when transformers is imported."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


register()

__all__ = ["HeadPattern", "PendingKV", "SparseCache", "SparseLayer", "attention", "mask", "register"]
