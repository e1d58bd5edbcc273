"""The layers of a `SparseCache`, and what `update` returns in the key's place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from .. import heads, ops
from ..cache import LayerCache
from ..config import SparseConfig
from ..home import Recompute
from ..placement import SharedPool
from ..reserved import ReservedBatch
from ..sequences import Sequences, Step
from .handle import NAME, WHO, Handle


class Padding(Protocol):
    """What a forward knows of the padding of its batch."""

    def starts(self) -> np.ndarray | None:
        """[B] columns of padding on the left, on the host; None: there is none."""

    def misfit(self, batch: Sequences) -> Tensor | None:
        """A bool on the mask's device: whether the padding of a decode step is another than that of earlier calls;
        None: it costs nothing to look."""


class OnItsWay(Protocol):
    """A forward, as a layer sees it."""

    def step(self, kv: LayerCache, k: Tensor, mask: Padding | None) -> Step:
        """What all layers do to the batch with new keys [B, H, T, D]."""

    def leave(self, index: int) -> None:
        """A layer has attended."""


class GivenRows(NamedTuple):
    """What an attention module was given in a forward."""

    rows: Tensor
    """[B, T, R]: hidden states, and cosines and sines of rotary embedding where it has got them."""
    recompute: Recompute


class PendingKV(Handle):
    """New keys and values on their way from `SparseCache.update` to the attention function, in the key's place."""

    def __init__(self, layer: SparseLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.forward: OnItsWay | None = None  # which a `SparseCache` sets
        self.batch: ReservedBatch | None = None  # likewise, in reserved memory
        self.given: GivenRows | None = None  # likewise, with `SparseConfig.recompute`
        self.is_last = False
        self.used = False

    def _refuse(self, touch: str) -> NoReturn:
        if getattr(self.layer.model_config, "_attn_implementation", None) == NAME:
            latent = " (multi-head latent attention, whose cache holds compressed keys)"
            raise RuntimeError(
                f"{WHO} with a SparseCache: {type(self.layer.model_config).__name__}'s attention changes keys between "
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
                f"{WHO}: expected one call of attention for each update of the SparseCache, got a second one in layer "
                f"{self.layer.index}: models that attend twice or share keys between layers are not supported"
            )
        if value is not self.v and not _is_view(value, self.v):
            raise RuntimeError(
                f"{WHO}: expected the values that layer {self.layer.index} gave to SparseCache.update, got others: "
                "models that change values between cache and attention are not supported"
            )
        self.used = True


def _is_view(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same memory in the same way."""
    same = (x.data_ptr(), x.shape, x.stride(), x.dtype)
    return same == (y.data_ptr(), y.shape, y.stride(), y.dtype)


class SparseLayer(CacheLayerMixin):
    """One layer of a `SparseCache`: makes its `LayerCache` when it sees the first keys.

    Heads whose channels are no multiple of 16, or whose keys and values differ in them, are padded with zeros.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        config: SparseConfig,
        model_config: PretrainedConfig,
        pattern: Sequence[bool] | bool,
        index: int,
        shared_pool: SharedPool | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config, self.model_config, self.pattern, self.index = config, model_config, pattern, index
        self.shared_pool = shared_pool  # None: each layer has its own
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
        return self.with_kv(copy.copy(self.kv))

    def with_kv(self, kv: LayerCache | None) -> SparseLayer:
        """A copy that holds something else."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(vars(self), kv=kv)
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
                f"{WHO}: expected heads of at most {ops.MAX_HEAD_DIM} channels, got {D} in layer {self.index}"
            )
        self.kv = self.make(widen(key_states[:, :, :0], D))

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
        pool = None if self.shared_pool is None else self.shared_pool.pool(like)
        return LayerCache(self.config, streaming, dense, like, pool)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if key_states.dtype != value_states.dtype:  # under autocast rotary embedding leaves float32
            key_states = key_states.to(value_states.dtype)
        if self.kv is None:
            self.lazy_initialization(key_states, value_states)
        return PendingKV(self, key_states, value_states), value_states

    def attend(self, q: Tensor, new: PendingKV, mask: Padding | None, scale: float, sinks: Tensor | None) -> Tensor:
        """Appends what an update brought, [B, H, T, D] with padding on the left, and attends with q [B, Hq, T, D].

        Returns:
            [B, T, Hq, D]; 0 for pad tokens.
        """
        kv, forward, (B, _, T, _) = self.kv, new.forward, new.k.shape
        assert kv is not None and forward is not None
        now = forward.step(kv, new.k, mask)
        q, k, v = (widen(x, kv.head_dim) for x in (q, new.k, new.v))
        given = new.given
        if now.decode:
            k, v, inputs = k[:, :, 0], v[:, :, 0], None if given is None else given.rows[:, 0]
            if now.is_padded:  # a left-padded chunk of one token: those sequences are still empty
                rows = torch.from_numpy(now.new > 0).to(k.device)
                k, v, inputs = k[rows], v[rows], None if inputs is None else inputs[rows]
            source = None if given is None or inputs is None else (inputs, given.recompute)
            out = kv.attend(q[:, :, 0], k, v, now, scale, sinks, source)[:, None]
        elif now.is_padded:
            pads = torch.from_numpy(T - now.new).to(k.device)
            columns = torch.arange(T, device=k.device) >= pads[:, None]
            q, k, v = (x.transpose(1, 2)[columns] for x in (q, k, v))
            source = None if given is None else (given.rows[columns], given.recompute)
            packed = kv.attend(q, k, v, now, scale, sinks, source)
            out = packed.new_zeros(B, T, *packed.shape[1:]).index_put_((columns,), packed)
        else:
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
            source = None if given is None else (given.rows.flatten(0, 1), given.recompute)
            packed = kv.attend(q, k, v, now, scale, sinks, source)
            out = packed.unflatten(0, (B, T))
        forward.leave(self.index)
        return narrow(out, new.v.shape[3])

    def attend_reserved(
        self, q: Tensor, new: PendingKV, batch: ReservedBatch, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """The same for one token a sequence, in reserved memory."""
        kv = self.kv
        assert kv is not None
        q, k, v = (widen(x, kv.head_dim)[:, :, 0] for x in (q, new.k, new.v))
        return narrow(kv.decode_reserved(q, k, v, batch, scale, sinks)[:, None], new.v.shape[3])

    def restored(
        self,
        state: dict[str, Tensor],
        sequences: Sequences,
        kv_heads: int,
        head_dim: int | None,
        device: torch.device | str,
    ) -> LayerCache:
        """A cache from what `LayerCache.state` gave, for that many heads (or a tensor parallel part of them)."""
        residual, P = state.get("residual_k"), self.config.page_size
        name = f"{self.index}.residual_k"
        if residual is None or residual.dim() != 4 or not residual.is_floating_point():
            got = "none" if residual is None else f"{list(residual.shape)} of {residual.dtype}"
            raise ValueError(f"{name}: expected [B, {kv_heads}, {2 * P}, D] of the model's dtype, got {got}")
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        held = residual.shape[1]
        heads_fit = held == kv_heads or (parallel and held > 0 and kv_heads % held == 0)
        D = None if head_dim is None else -(-head_dim // 16) * 16
        if not heads_fit or residual.shape[2] != 2 * P or D not in (None, residual.shape[3]):
            wanted = f"[B, {kv_heads}, {2 * P}, {'D' if D is None else D}]"
            raise ValueError(f"{name}: expected {wanted} for this model, got {list(residual.shape)}")
        kv = self.make(residual[:, :, :0].to(device))
        try:
            kv.restore(state, sequences)
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
        return self.config.max_tokens or -1

    get_max_cache_shape = get_max_length

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


def widen(x: Tensor, D: int) -> Tensor:
    """x with D channels, zeros behind its own."""
    return x if x.shape[-1] == D else torch.nn.functional.pad(x, (0, D - x.shape[-1]))


def narrow(x: Tensor, D: int) -> Tensor:
    """The first D channels of x."""
    return x if x.shape[-1] == D else x[..., :D]


def _local_heads(pattern: Sequence[bool] | bool, local: int) -> Sequence[bool]:
    """This rank's part of a layer's pattern. Head counts are read off the tensors: under tensor parallelism they are
    local, while the model's config still holds the global ones."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not parallel and not isinstance(pattern, bool) and local != len(pattern):
        raise ValueError(f"streaming_heads: expected {len(pattern)} kv heads, got {local}")
    return heads.of_rank(pattern, local, torch.distributed.get_rank() if parallel else 0)
