"""A plugin for vLLM: this project's attention, and KV blocks of single heads, under vLLM's scheduler and server.

vLLM loads it in each of its processes (entry point `vllm.general_plugins`). It does nothing unless vLLM's own
configuration asks for it, see `settings`. Nothing else in the package imports vLLM.
"""

from __future__ import annotations


def register() -> None:
    """What vLLM calls. It may do so more than once."""
    from . import plugin

    plugin.install()
