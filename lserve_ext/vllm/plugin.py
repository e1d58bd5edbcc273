"""Where vLLM is changed: its configuration is checked, and an attention layer is given this project's backend."""

from __future__ import annotations

import functools
from typing import Any

import vllm
from vllm.config import VllmConfig

from . import settings


def install() -> None:
    """Changes vLLM's classes, once in a process. What was not asked for is left as it is."""
    if hasattr(VllmConfig, "_lserve"):
        return
    VllmConfig._lserve = True
    _after(VllmConfig, "__post_init__", _check)
    if settings.is_tested(vllm.__version__):
        from vllm.model_executor.layers.attention import Attention

        from . import blocks

        blocks.register()
        _replace_attention(Attention)


def _check(vllm_config: Any) -> None:
    """Of every configuration that is made."""
    config = settings.sparse_config(vllm_config)
    if config is None:
        return
    settings.check_version(vllm.__version__)
    settings.check_engine(vllm_config, config)
    vllm_config.cache_config.block_size = config.page_size
    if isinstance(vllm_config.additional_config, dict):  # where other processes find it, and caches of compiled code
        vllm_config.additional_config = {**vllm_config.additional_config, settings.KEY: config.to_dict()}


def _after(owner: type, name: str, then: Any) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def both(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self)

    setattr(owner, name, both)


def _replace_attention(attention: Any) -> None:
    original = attention.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, prefix: str = "", attn_backend: Any = None, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        from .backend import SparseBackend, split

        vllm_config = get_current_vllm_config()
        config = settings.sparse_config(vllm_config)
        if config is None:
            original(self, *args, prefix=prefix, attn_backend=attn_backend, **kwargs)
            return
        if attn_backend is not None:
            raise ValueError(
                f"lserve: expected layers of plain causal attention, got {type(self).__name__} {prefix!r}, which has a "
                f"backend of its own, {attn_backend.get_name()}"
            )
        original(self, *args, prefix=prefix, attn_backend=SparseBackend, **kwargs)
        split(self, vllm_config, config)

    attention.__init__ = init
