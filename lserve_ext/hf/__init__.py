"""transformers: `attn_implementation="lserve"` and a `Cache` for it.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lserve")
    cache = SparseCache(model.config, SparseConfig.lserve(streaming_heads="heads.json"))
    model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

The model calls `cache.update(k, v, layer)` and hands its result on to the attention function untouched. So `update`
returns a handle that holds k and v; the attention function, which also knows the padding, appends and attends. Pad
tokens never enter the cache: each sequence has its own length.
"""

from ..heads import HeadPattern
from .cache import SparseCache
from .interface import (
    SINKS,
    AttentionMask,
    attention,
    cache_argument,
    mask,
    refuse_models_without_interface,
    register,
)
from .layers import PendingKV, SparseLayer
from .speculate import speculate

register()
refuse_models_without_interface()

__all__ = [
    "SINKS",
    "AttentionMask",
    "HeadPattern",
    "PendingKV",
    "SparseCache",
    "SparseLayer",
    "attention",
    "cache_argument",
    "mask",
    "register",
    "speculate",
]
