"""Keys and values from what attention modules are given, which is kept.

A module is called with rows that were kept, and a cache that takes the keys and values and ends the call. So bias,
norms and rotary embedding are the module's own, at the positions of then.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .handle import WHO
from .layers import GivenRows, widen


class _Done(Exception):  # noqa: N818 (nothing is wrong)
    """Ends a call of a module."""


class _Taker:
    """Stands for a cache: takes keys and values, and ends the call."""

    def __init__(self) -> None:
        self.k = self.v = torch.empty(0)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.k, self.v = k.to(v.dtype), v
        raise _Done


class ModuleInputs:
    """An attention module and how it is called; makes keys and values of rows.

    Args:
        module: of one layer.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self._signature = inspect.signature(module.forward)
        self._others: dict[str, Any] = {}
        self._cache = ""
        self._widths: list[int] = []

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any) -> GivenRows:
        """The rows of a call."""
        named = dict(self._signature.bind(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        x = named.pop("hidden_states", None)
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(f"{WHO}: expected hidden_states [B, T, R] in {type(self.module).__name__}, to keep them")
        parts = [x]
        embeddings = named.pop("position_embeddings", None)
        if embeddings is not None:
            parts += [part.expand(*x.shape[:2], -1).to(x.dtype) for part in embeddings]
        self._cache = next(name for name, value in named.items() if value is cache)
        self._others = {n: value for n, value in named.items() if not isinstance(value, Tensor) and value is not cache}
        self._others.pop("attention_mask", None)
        self._widths = [part.shape[-1] for part in parts]
        return GivenRows(torch.cat(parts, -1), self)

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `home.Recompute`."""
        pages, P, _ = rows.shape
        rows = rows.to(next(self.module.parameters()).device)
        x, *embeddings = rows.reshape(1, pages * P, -1).split(self._widths, -1)
        taker = _Taker()
        arguments = self._others | {self._cache: taker, "hidden_states": x.contiguous(), "attention_mask": None}
        if embeddings:
            arguments["position_embeddings"] = tuple(embeddings)
        with contextlib.suppress(_Done):
            self.module.forward(**arguments)
        D = -(-max(taker.k.shape[-1], taker.v.shape[-1]) // 16) * 16
        k, v = (widen(y, D)[0].unflatten(1, (pages, P)).transpose(0, 1) for y in (taker.k, taker.v))
        return k, v


class KeptInputs:
    """Watches the attention modules of a model for as long as this object lives.

    Args:
        model: whose modules are watched.
        layers: indices of the layers that are ours.
        take: what to do with what a module of a layer was given: cache, layer, rows.
        kind: of the caches for which that is done.
    """

    def __init__(
        self, model: torch.nn.Module, layers: Collection[int], kind: type, take: Callable[[Any, int, GivenRows], None]
    ) -> None:
        modules: list[Any] = [m for m in model.modules() if "Attention" in type(m).__name__]
        found = {m.layer_idx: m for m in modules if hasattr(m, "layer_idx")}
        missing = sorted(set(layers) - set(found))
        if missing:
            raise ValueError(
                f"recompute: expected an attention module with layer_idx {missing[0]} in the model, got none"
            )
        handles = [_watch(found[layer], layer, kind, take) for layer in layers]
        self._end = weakref.finalize(self, lambda: [handle.remove() for handle in handles])


def _watch(module: Any, layer: int, kind: type, take: Callable[[Any, int, GivenRows], None]) -> Any:
    inputs = ModuleInputs(module)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, kind)), None)
        if cache is not None:
            take(cache, layer, inputs.given(args, kwargs, cache))

    return module.register_forward_pre_hook(before, with_kwargs=True)
