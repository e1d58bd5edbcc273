"""What vLLM was asked for, as a `SparseConfig`, and whether model and engine can do it: errors come at the start."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..config import SparseConfig

TESTED = ((0, 32), (0, 33))
"""Versions of vLLM that this was tested with: from the first up to before the second."""
KEY = "lserve"
"""Of vLLM's `additional_config`: what `SparseConfig.from_dict` takes, or a file of it."""
VARIABLE = "LSERVE_VLLM_CONFIG"
"""The environment variable that names a file of `SparseConfig.save`, where `additional_config` has no such key."""


def sparse_config(vllm_config: Any) -> SparseConfig | None:
    """What is asked for; None: nothing.

    Raises:
        ValueError, TypeError: fields that there are not, or values that they cannot have.
    """
    additional = vllm_config.additional_config
    given = additional.get(KEY) if isinstance(additional, Mapping) else None
    if given is None:
        given = os.environ.get(VARIABLE)
    if given is None:
        return None
    if isinstance(given, str):
        return SparseConfig.load(given)
    if not isinstance(given, Mapping):
        raise TypeError(f"additional_config[{KEY!r}]: expected fields of a SparseConfig or its file, got {given!r:.80}")
    return SparseConfig.from_dict(given)


def tested() -> str:
    """The range in words."""
    first, end = (".".join(map(str, parts)) for parts in TESTED)
    return f"{first} or newer, before {end}"


def is_tested(version: str) -> bool:
    """Whether this was tested with that version of vLLM."""
    first, end = TESTED
    return first <= tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < end


def check_version(version: str) -> None:
    """Raises RuntimeError if vLLM is another one than those that this was tested with."""
    if not is_tested(version):
        raise RuntimeError(f"lserve_ext: expected vLLM {tested()}, got {version}")


def check_engine(vllm_config: Any, config: SparseConfig) -> None:
    """Raises ValueError if the engine's settings contradict the config, or ask for what is not supported."""
    if config.unit == "token":
        raise ValueError("lserve: unit: expected 'page' under vLLM, got 'token'")
    for name in ("max_tokens", "device_bytes", "host_bytes", "disk_dir"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"lserve: {name}: expected None under vLLM, which places KV itself, got {getattr(config, name)!r}"
            )
    if config.page_size % config.reuse_interval:
        raise ValueError(
            f"lserve: reuse_interval: expected a divisor of page_size {config.page_size} under vLLM, "
            f"got {config.reuse_interval}"
        )
    cache, model, parallel = vllm_config.cache_config, vllm_config.model_config, vllm_config.parallel_config
    if cache.user_specified_block_size and cache.block_size != config.page_size:
        raise ValueError(
            f"--block-size: expected lserve's page_size {config.page_size}, or none, got {cache.block_size}"
        )
    if cache.cache_dtype != "auto":
        raise ValueError(
            f"--kv-cache-dtype: expected 'auto' beside lserve's kv_dtype {config.kv_dtype!r}, got {cache.cache_dtype!r}"
        )
    if parallel.decode_context_parallel_size > 1:
        raise ValueError("--decode-context-parallel-size: expected 1 beside lserve")
    if vllm_config.speculative_config is not None:  # drafts that are rejected would be in statistics of full pages
        raise ValueError("--speculative-config: expected none beside lserve")
    if vllm_config.kv_transfer_config is not None:
        raise ValueError("--kv-transfer-config: expected none beside lserve")
    if model is not None and model.use_mla:
        raise ValueError("lserve: expected a model without multi-head latent attention")
    if model is not None and (model.is_encoder_decoder or model.is_attention_free or model.is_hybrid):
        raise ValueError("lserve: expected a decoder whose layers all have attention")
