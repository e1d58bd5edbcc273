"""A decode step of a model needs no host: what it copies to the device and reads back, counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _tiny import cached
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lserve_ext
from lserve_ext import HeadPattern, SparseCache, SparseConfig
from lserve_ext.hf import interface

PACKAGE = str(Path(lserve_ext.__file__).parent)
P, LAYERS = 8, 4
SMALL: dict[str, Any] = {"page_size": P, "stats_group": 4, "sink_tokens": P, "local_tokens": 2 * P}
PRESETS = {
    "dense": SparseConfig.dense(page_size=P, stats_group=4),
    "int8": SparseConfig.dense(page_size=P, kv_dtype="int8", stats_group=4),
    "streaming": SparseConfig.streaming(**SMALL),
    "lserve": SparseConfig.lserve(budget_tokens=6 * P, streaming_heads=HeadPattern([[0.0, 1.0]] * LAYERS), **SMALL),
    "quest": SparseConfig.quest(budget_tokens=6 * 16),
    "h2o": SparseConfig.h2o(page_size=P, stats_group=4, budget_tokens=2 * P),
    "alisa": SparseConfig.alisa(page_size=P, stats_group=4, kv_sparsity=0.5),
}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train(False)
    model.set_attn_implementation("lserve")
    return model


class Traffic(TorchDispatchMode):
    """Counts what the package moves between host and device, as it would be if the tensors lay on a GPU: tensors made
    of host values, and values of tensors that Python sees."""

    TO_DEVICE = ("from_numpy", "tensor", "as_tensor")
    TO_HOST = ("numpy", "cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__len__")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for name in self.TO_DEVICE:
            patch.setattr(torch, name, self._counted(name, getattr(torch, name)))
        for name in self.TO_HOST:
            if name != "__len__":  # a shape, which the host knows
                patch.setattr(Tensor, name, self._counted(name, getattr(Tensor, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
                self.counts[name] += 1
            return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero"):
            frame = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back  # type: ignore[assignment]
            if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PRESETS)
def test_between_page_borders_nothing_moves(name: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of a padded batch, whose borders lie apart."""
    monkeypatch.setattr(interface, "_is_slow_to_read", lambda _: True)
    cache, prompt = SparseCache(llama.config, PRESETS[name]), torch.randint(3, 96, (2, 6 * P + 4))
    mask = torch.ones_like(prompt)
    mask[1, : P + 3] = 0
    borders, moved = [], []
    with torch.no_grad():
        x = llama(prompt, attention_mask=mask, **cached(cache)).logits[:, -1:].argmax(-1)
        for _ in range(3 * P):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            before = cache.ours[0].kv.lengths
            with monkeypatch.context() as patch, Traffic(patch) as traffic:
                x = llama(x, attention_mask=mask, **cached(cache)).logits[:, -1:].argmax(-1)
            after = cache.ours[0].kv.lengths
            size = PRESETS[name].page_size
            borders.append(any(a // size > b // size for a, b in zip(after, before, strict=True)))
            moved.append(traffic.counts)
    first = moved.pop(0)  # a step after a prefill may leave more pages than one behind
    borders.pop(0)
    assert sum(first.values()) < 8, first
    for border, counts in zip(borders, moved, strict=True):
        assert sum(counts.values()) <= 2 * border, counts  # one table for all layers, and the check of the masks
    assert any(borders) and not all(borders)


def test_a_wrong_mask_on_a_gpu_is_noticed_at_the_next_border(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_is_slow_to_read", lambda _: True)
    cache, prompt = SparseCache(llama.config, PRESETS["lserve"]), torch.randint(3, 96, (1, 3 * P + 1))
    with torch.no_grad():
        llama(prompt, **cached(cache))
        for n in range(3 * P + 2, 4 * P):
            mask = torch.ones(1, n, dtype=torch.int64)
            mask[0, 0] = n % 4 != 0  # now and then the first token is a pad token
            llama(prompt[:, :1], attention_mask=mask, **cached(cache))
        with pytest.raises(ValueError, match="attention_mask: expected the padding of earlier calls"):
            llama(prompt[:, :1], attention_mask=torch.ones(1, 4 * P), **cached(cache))
        cache.crop(-1)
        for n in range(4 * P - 1, 5 * P):
            llama(prompt[:, :1], attention_mask=torch.ones(1, n), **cached(cache))
        with pytest.raises(ValueError, match="a column for every token"):
            llama(prompt[:, :1], attention_mask=torch.ones(1, 9), **cached(cache))
