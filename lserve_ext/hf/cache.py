"""A `Cache` of transformers whose layers with full attention are a `LayerCache` each."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from .. import heads
from ..blocks import Memory
from ..cache import LayerCache
from ..config import SparseConfig
from ..files import write_beside
from ..heads import HeadPattern
from ..placement import SharedPool, TieredPool, Traffic
from ..reserved import ReservedBatch
from ..sequences import Sequences, Step
from .layers import GivenRows, Padding, PendingKV, SparseHybridLayer, SparseLayer
from .recompute import KeptInputs


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
        model_config: the model's config; its layers and their kinds are read, and its kv heads, to check head patterns.
        config: what is attended and how it is stored; by default dense, in the model's dtype.
        model: with `config.recompute`, the model whose attention modules are watched for their inputs, until this cache
            and its copies are gone.

    Raises:
        ValueError: the pattern of streaming heads does not fit the model, there is none to cut a fraction from, or the
            model has no layer with full attention.
    """

    def __init__(
        self, model_config: PretrainedConfig, config: SparseConfig | None = None, model: torch.nn.Module | None = None
    ) -> None:
        self.config = _whole(config) if config is not None else SparseConfig.dense()
        self.model_config = model_config.get_text_config(decoder=True)
        self._forward: Forward | None = None
        self._spare: ReservedBatch | None = None  # whose tensors the next one takes
        self._batch: ReservedBatch | None = None  # while the cache decodes in reserved memory
        self._misfit: Tensor | None = None  # on a GPU: whether a mask since the last border was another than expected
        self._columns: int | None = None  # of the layers, once counted
        self._used: set[int] | None = None  # layers that a whole forward has touched
        self._dead: str | None = None
        super().__init__(layers=self._new_layers())
        self._given: dict[int, GivenRows] = {}  # by layer, of the forward that is under way
        if self.config.recompute != (model is not None):
            expected = "a model, whose inputs to keep" if self.config.recompute else "None without config.recompute"
            raise ValueError(f"model: expected {expected}, got {type(model).__name__}")
        if model is not None:
            self._check_recompute()
            ours = [layer.index for layer in self.ours]
            self._kept = KeptInputs(model, ours, SparseCache, lambda cache, i, given: cache._take(i, given))

    def _take(self, index: int, given: GivenRows) -> None:
        if self.config.recompute:
            self._given[index] = given

    def _check_recompute(self) -> None:
        """Raises ValueError where a layer's input is no smaller than what is made of it, so that nothing is won."""
        text = self.model_config
        kv_heads, D = getattr(text, "num_key_value_heads", None) or text.num_attention_heads, _head_dim(text) or 0
        scales = 8 if self.config.needs_stats else 16
        of_head = 2 * D + scales if self.config.kv_dtype == "int8" else 4 * D
        inputs, held = text.hidden_size * 2, kv_heads * of_head
        if held and inputs >= held:
            raise ValueError(
                f"recompute: expected layers whose input is smaller than their KV, got {inputs:,} bytes a token (at 16 "
                f"bits) against {held:,}: recomputing never pays, see `lserve plan`"
            )

    def _new_layers(self) -> list[Any]:
        text, layers = self.model_config, _their_layers(self.model_config)
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
        patterns = heads.resolve(self.config.streaming_heads, len(layers), kv_heads, ours)
        shared_pool = None if self.config.device_bytes is None else SharedPool(self.config, len(ours))
        for i in ours:
            arguments = (self.config, text, patterns[i], i, shared_pool)
            if isinstance(layers[i], LinearAttentionLayer):
                layers[i] = SparseHybridLayer(*arguments, number_of_states=layers[i].number_of_states)
            else:
                layers[i] = SparseLayer(*arguments)
        self._reserves = self.config.max_tokens is not None and all(type(layer) is SparseLayer for layer in layers)
        for layer in layers if self._reserves else ():
            layer.is_compileable = True
        return layers

    @property
    def ours(self) -> list[SparseLayer]:
        """The layers with full attention."""
        return [layer for layer in self.layers if isinstance(layer, SparseLayer)]

    # ---- one forward after the other --------------------------------------------------------------------------------
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self._batch is not None and key_states.shape[2] == 1:
            return self._update_reserved(self._batch, key_states, value_states, layer_idx)
        self._touch(layer_idx, "kv")
        layer = self.layers[layer_idx]
        if not isinstance(layer, SparseLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        handle, values = layer.update(key_states, value_states)
        handle.forward, handle.given = self._forward, self._given.pop(layer_idx, None)
        return handle, values

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
        if forward is None or index < forward.last or kind in forward.touched.get(index, ()):
            self._settle()
            forward = self._forward = Forward(self)
        layer = self.layers[index]
        if isinstance(layer, SparseLayer) and layer.seen != forward.columns:
            raise RuntimeError(
                f"SparseCache: expected {forward.columns} columns in layer {index}, as in the other layers, got "
                f"{layer.seen}: an earlier forward has left this layer out"
            )
        forward.last = index
        forward.touched.setdefault(index, set()).add(kind)

    # ---- reserved memory --------------------------------------------------------------------------------------------
    def _update_reserved(self, batch: ReservedBatch, k: Tensor, v: Tensor, index: int) -> tuple[Any, Any]:
        """`update` of a decode step: what `torch.compile` follows, so no Python changes but the batch's."""
        layer: Any = self.layers[index]
        if index == self._first:
            self._check_whole(batch)
            batch.begin()
        handle = PendingKV(layer, k.to(v.dtype), v)
        handle.batch = batch
        handle.is_last = index == self._last
        return handle, v

    def _check_whole(self, batch: ReservedBatch) -> None:
        """Raises RuntimeError if an interrupted step has left what cannot be taken back."""
        if batch.on is not None and self._observes:
            self._batch, self._dead = (
                None,
                (
                    "SparseCache: the last step was interrupted, and the attention mass of the first layers cannot be "
                    "taken back: call reset() and prefill again"
                ),
            )
            raise RuntimeError(self._dead)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _enter_reserved(self) -> None:
        """From now on decode steps need no host: called whenever the cache comes to rest."""
        held = [layer.kv for layer in self.ours if layer.kv is not None]
        if not self._reserves or self._dead is not None or not held or self._used is None:
            return
        sequences = held[0].sequences
        if len({kv.device for kv in held}) > 1 or not len(sequences) or not sequences.lengths.all():
            return  # spread over devices; or a sequence that is still empty, which padding might yet follow
        batch, device = self._spare, held[0].device
        if batch is None or len(batch.lengths) != len(sequences) or batch.lengths.device != device:
            tokens = (self.config.max_pages or 0) * self.config.page_size
            batch = ReservedBatch(sequences, device, tokens, self.config.reuse_interval)
        for kv, following in zip(held, [*held[1:], None], strict=True):
            kv.enter_reserved(following)
        batch.load(sequences, max(kv.age for kv in held))
        self._first, self._last = min(self._used), max(self._used)
        self._observes = any(kv.observes for kv in held)
        self._batch = batch

    @torch.inference_mode(False)
    @torch.no_grad()
    def _leave_reserved(self) -> None:
        """Reads what has been decoded from the device."""
        batch = self._batch
        if batch is None:
            return
        self._check_whole(batch)
        layers = [_copied(layer) for layer in self.layers]
        held = [layer.kv for layer in layers if layer.kv is not None]
        try:
            sequences = batch.read(held[0].sequences)
        except ValueError as error:
            self._dead = f"SparseCache: {error}: call reset() and prefill again"
            self._batch = None
            raise
        for kv in held:
            kv.leave_reserved(sequences, batch.age)
        self._columns = None
        self.layers = layers
        self._batch, self._spare = None, batch
        for kv in held:
            kv.drop_reserved()

    # ---- the end of a forward ---------------------------------------------------------------------------------------
    def _settle(self) -> None:
        """Ends the last forward: an interrupted one is taken back, in all layers at once.

        Raises:
            RuntimeError: it cannot be taken back, because it has overwritten the state of a linear layer.
        """
        self._leave_reserved()
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
                states = getattr(forward.before(index), "has_previous_state", {})
                if any(states.values()):
                    self._dead = (
                        "SparseCache: the last forward was interrupted, and the linear layer "
                        f"{index} cannot be taken back: call reset() and prefill again"
                    )
                    raise RuntimeError(self._dead)
            self.layers = [forward.before(index) for index in range(len(self.layers))]
            self._columns = forward.columns
        elif forward.touched:
            self._used = set(forward.touched)
            self._columns = forward.columns_after
        self._forward = None

    def _note(self, misfit: Tensor) -> None:
        self._misfit = misfit if self._misfit is None else self._misfit | misfit.to(self._misfit.device)

    def _check_masks(self) -> None:
        """Raises if a mask that was not read when it came was wrong."""
        misfit, self._misfit = self._misfit, None
        if misfit is not None and bool(misfit):
            raise ValueError(
                "attention_mask: expected the padding of earlier calls, on the left, got another one in a step since "
                "the last page border: its results are wrong"
            )

    def _is_whole(self, forward: Forward) -> bool:
        """Whether a forward has come to its end."""
        if forward.is_whole or not forward.touched:
            return True
        last = max(forward.touched)
        end = max(self._used) if self._used else max(i for i, x in enumerate(self.layers) if not _is_dummy(x))
        kinds = [kinds for i, kinds in forward.touched.items() if type(self.layers[i]) is type(self.layers[last])]
        attended = all(layer.seen > forward.columns for layer in self.ours if layer.index in forward.touched)
        forward.is_whole = last >= end and attended and forward.touched[last] >= set().union(*kinds)
        return forward.is_whole

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Between two forwards, on the host; afterwards a reserved cache goes on on the device."""
        self._settle()
        try:
            yield
        finally:
            self._enter_reserved()

    def _on_all(self, action: Callable[[Any], object]) -> None:
        """Does something to every layer, or, if it fails in one, to none."""
        with self._at_rest():
            layers = [_copied(layer) for layer in self.layers]
            for layer in layers:
                action(layer)
            self._columns = None
            self.layers = layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that the layers hold, or one layer but the first: 0 if no forward has come to it. During a forward,
        and after an interrupted one: those from before it. In reserved memory a tensor on the device, as of
        transformers' `StaticCache`."""
        if self._batch is not None:
            return self._batch.columns  # type: ignore[return-value]
        forward = self._forward
        whole = forward is None or self._is_whole(forward)
        if layer_idx:
            layer = self.layers[layer_idx] if forward is None or whole else forward.before(layer_idx)
            if isinstance(layer, SparseLayer):
                return layer.seen
        if forward is not None:
            return forward.columns_after if whole else forward.columns
        if self._columns is None:
            self._columns = max(layer.seen for layer in self.ours)
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that a layer will have, and the column of the first of them. (0, 0): none that a mask is wanted for."""
        if self._batch is not None and query_length == 1:
            return 0, 0
        layer = self.layers[layer_idx]
        if isinstance(layer, SparseLayer) or not isinstance(layer, CacheLayerMixin):
            return self.get_seq_length() + query_length, 0
        if self._forward is not None and not self._is_whole(self._forward):
            layer = self._forward.before(layer_idx)
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
        self._columns = None
        self.layers = self._new_layers()
        self._forward, self._dead, self._misfit, self._batch = None, None, None, None

    def memory(self) -> dict[str, Memory]:
        """Bytes of KV a tier: used, reserved, peak. Layers of transformers' own count with what they hold now."""
        with self._at_rest():  # what the last forward could have been taken back to is no longer held
            held = [layer.kv for layer in self.ours if layer.kv is not None]
            size = sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer).values())
            size += sum(kv.residual_bytes for kv in held)
            tiers = {"device": Memory(size, size, size)}
            for pool in {id(kv.pool): kv.pool for kv in held}.values():  # which layers may share
                for tier, memory in pool.tiers().items():
                    tiers[tier] = tiers.get(tier, Memory()) + memory
            return tiers

    def _tiered_pools(self) -> list[TieredPool]:
        pools = {id(layer.kv.pool): layer.kv.pool for layer in self.ours if layer.kv is not None}
        return [pool for pool in pools.values() if isinstance(pool, TieredPool)]

    def traffic(self) -> Traffic:
        """Pages that were moved between tiers, forks included; all 0 where there is a device only."""
        with self._at_rest():
            counts = [pool.traffic() for pool in self._tiered_pools()]
            return Traffic(*(sum(some) for some in zip(*counts, strict=True)))

    @property
    def phase(self) -> int:
        """1: all pages fit on the device; 2: they fit in host memory; 3: they fit in neither (ALISA, Algorithm 2)."""
        with self._at_rest():  # blocks of pages to come are not held
            return max((pool.phase for pool in self._tiered_pools()), default=1)

    def attended(self) -> tuple[int, int]:
        """Tokens that a decode step attends and those that a dense one would, over the layers with full attention, kv
        heads and sequences."""
        with self._at_rest():
            counts = [layer.kv.attended() for layer in self.ours if layer.kv is not None]
            return sum(some for some, _ in counts), sum(all_ for _, all_ in counts)

    def read_bytes(self) -> float:
        """Bytes of keys, values, scales and statistics that a decode step of this moment reads."""
        with self._at_rest():
            return sum(layer.kv.read_bytes() for layer in self.ours if layer.kv is not None)

    def fork(self, config: SparseConfig | None = None) -> SparseCache:
        """A second cache that goes on from here; sealed blocks are shared until either drops them.

        Args:
            config: of the second one; it may have another budget_tokens, kv_sparsity and reuse_interval.

        Raises:
            ValueError: it differs in more, so that pages would be stored otherwise.
        """
        config = None if config is None else _whole(config)
        if config is not None and not self.config.stores_as(config):
            raise ValueError("config: expected the cache's own but for budget and reuse_interval, got another")
        with self._at_rest():
            shared = {id(layer.kv): layer.kv.fork(config) for layer in self.ours if layer.kv is not None}
            layers = copy.deepcopy(self.layers, dict(shared))  # which takes these for copies it made
            return self._with_layers(layers, config)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseCache:
        """A copy that shares nothing."""
        with self._at_rest():
            return self._with_layers(copy.deepcopy(self.layers, memo))

    def _with_layers(self, layers: list[Any], config: SparseConfig | None = None) -> SparseCache:
        """A second cache, of these layers."""
        twin = copy.copy(self)
        twin.layers, twin._spare, twin._given = layers, None, {}
        if config is not None:
            twin.config = config
            for layer in twin.ours:
                layer.config = config
        twin._enter_reserved()
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as safetensors.

        Raises:
            ValueError: a layer of transformers' own holds something: only layers with full attention can be saved.
        """
        from safetensors.torch import save_file

        head = {"format": _FORMAT, "config": self.config.to_dict(), "layers": len(self.layers)}
        with self._at_rest():
            tensors = self._tensors()
        write_beside(path, lambda beside: save_file(tensors, beside, {"lserve_ext": json.dumps(head)}))

    def _tensors(self) -> dict[str, Tensor]:
        """Of a file."""
        tensors: dict[str, Tensor] = {}
        first = self.ours[0].kv
        if first is not None:
            tensors = {f"sequences.{name}": x for name, x in first.sequences.state().items()}
        for i, layer in enumerate(self.layers):
            if _tensors(layer):
                raise ValueError(
                    f"SparseCache.save: expected layers with full attention only, got {type(layer).__name__} in layer "
                    f"{i}, whose states are transformers' own"
                )
            if isinstance(layer, SparseLayer) and layer.kv is not None:
                tensors |= {f"{i}.{name}": tensor.cpu().contiguous() for name, tensor in layer.kv.state().items()}
        return tensors

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model_config: PretrainedConfig, device: torch.device | str = "cpu"
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
            return cls._from_file(head, tensors, model_config, device)
        except (ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(f"SparseCache.load: {name}: {error}") from None

    @classmethod
    def _from_file(
        cls, head: Any, tensors: dict[str, Tensor], model_config: PretrainedConfig, device: torch.device | str
    ) -> SparseCache:
        if not isinstance(head, dict) or head.get("format") != _FORMAT:
            got = head.get("format") if isinstance(head, dict) else type(head).__name__
            raise ValueError(f"format: expected {_FORMAT}, got {got!r}: written by another version of lserve_ext")
        config = SparseConfig.from_dict(head.get("config"))  # type: ignore[arg-type]  # checked there
        cache = cls(model_config, config.replace(recompute=False))
        if len(cache.layers) != head.get("layers"):
            raise ValueError(f"layers: expected the {len(cache.layers)} of the model, got {head.get('layers')!r}")
        states: dict[int, dict[str, Tensor]] = {}
        batch: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part == "sequences":
                batch[name] = tensor
            elif part.isdecimal() and len(part) < 6 and name:
                states.setdefault(int(part), {})[name] = tensor
            else:
                raise ValueError(f"{key}: expected a layer and a name, got another tensor")
        ours = [layer.index for layer in cache.ours]
        if not tensors:
            return cache
        if sorted(states) != ours:
            raise ValueError(f"expected tensors of the layers {ours}, got {sorted(states)}")
        try:
            sequences = Sequences.restore(batch, cache.config.pages)
        except ValueError as error:
            raise ValueError(f"sequences.{error}") from None
        text = model_config.get_text_config(decoder=True)
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        for layer in cache.ours:
            layer.kv = layer.restored(states[layer.index], sequences, kv_heads, _head_dim(text), device)
        cache._used, cache._columns = set(states), None
        cache._enter_reserved()
        return cache


_FORMAT = 3  # of files


def _whole(config: SparseConfig) -> SparseConfig:
    """With the pattern that it names: a cache is whole without the file."""
    if isinstance(config.streaming_heads, (str, os.PathLike)):
        return config.replace(streaming_heads=HeadPattern.load(config.streaming_heads))
    return config


def _head_dim(config: PretrainedConfig) -> int | None:
    """Channels that a model's config gives its keys, if it gives all layers the same."""
    if any(hasattr(config, name) for name in ("qk_nope_head_dim", "global_head_dim")):
        return None
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


class Forward:
    """A forward on its way through the layers of a cache."""

    def __init__(self, cache: SparseCache) -> None:
        self.touched: dict[int, set[str]] = {}
        """Layers that it has come to, and which of their states it has asked for."""
        self.last = 0
        """The layer that it has come to."""
        self.columns = cache.get_seq_length()
        self.is_whole = False
        """Whether it is known to have come to its end."""
        self._cache = cache
        self._step: Step | None = None
        self._layers = [layer if type(layer) is SparseLayer else _copied(layer) for layer in cache.layers]
        self._states = [x.kv.state_now if type(x) is SparseLayer and x.kv is not None else None for x in self._layers]

    def before(self, index: int) -> Any:
        """A layer as it was."""
        layer, state = self._layers[index], self._states[index]
        if type(layer) is not SparseLayer:
            return layer
        return layer.with_kv(None if state is None or layer.kv is None else layer.kv.as_it_was(state))

    @property
    def columns_after(self) -> int:
        """Columns of the padded batch once it has come to its end."""
        return self.columns if self._step is None else self._step.after.columns

    def step(self, kv: LayerCache, k: Tensor, mask: Padding | None) -> Step:
        """What all layers do to the batch with new keys [B, H, T, D]; the first one that attends begins it.

        Raises:
            ValueError: the keys are of another batch, the padding is another than before, or layers bring different
                numbers of tokens.
        """
        B, H, columns, D = k.shape
        first = self._step is None or len(self._step.new) != B or kv.heads != H
        if first and (kv.batch_size, kv.heads) != (B, H):
            held = f"[{kv.batch_size}, {kv.heads}, T, {D}]"
            raise ValueError(f"k: expected {held}, as the cache holds, got {list(k.shape)}")
        if self._step is None:
            batch = kv.sequences
            new = columns - np.clip(self._starts(batch, columns, mask) - batch.columns, 0, columns)
            layers = [layer.kv for layer in self._cache.ours if layer.kv is not None]
            self._step = Step(batch, new, columns, columns == 1, layers)
            if self._step.is_border or not self._step.decode:
                self._cache._check_masks()
        if columns != self._step.columns:
            raise ValueError(f"k: expected {self._step.columns} tokens as in the other layers, got {columns}")
        if kv.sequences is not self._step.before:
            kv.share(self._step.before)
        return self._step

    def leave(self, index: int) -> None:
        """A layer of ours has attended. After the last one a reserved cache goes on on the device."""
        cache = self._cache
        end = max(cache._used) if cache._used else len(cache.layers) - 1
        if cache._reserves and cache._forward is self and index == end and cache._is_whole(self):
            cache._used, cache._columns, cache._forward = set(self.touched), self.columns_after, None
            cache._enter_reserved()

    def _starts(self, batch: Sequences, columns: int, mask: Padding | None) -> np.ndarray:
        """[B] columns of padding."""
        padding = np.zeros(len(batch), np.int64)
        if mask is not None:
            known = batch.columns - batch.lengths
            misfit = mask.misfit(batch) if columns == 1 and batch.columns else None
            if misfit is not None:  # reading it now would wait for the GPU
                self._cache._note(misfit)
                return known
            starts = mask.starts()
            padding = padding if starts is None else starts
        if padding.shape != batch.lengths.shape or (batch.lengths != np.maximum(batch.columns - padding, 0)).any():
            raise ValueError(
                f"attention_mask: expected the padding of earlier calls, after which the sequences hold "
                f"{batch.lengths.tolist()} of {batch.columns} tokens, got {padding.tolist()} tokens of padding"
            )
        return padding


def _copied(layer: Any) -> Any:
    """A copy that stays as it is while the layer goes on. Only linear layers change their tensors in place."""
    twin = copy.copy(layer)
    if type(layer) is SparseLayer:
        return twin
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
