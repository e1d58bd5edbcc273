"""What a decode step costs on a machine, from a model's config alone: bytes of each tier, seconds of each part, and
whether it pays to recompute what could be fetched. (ALISA, section 5, with the machine's own figures, GQA counted.)"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np
import torch

from .blocks import Pool
from .config import SparseConfig
from .heads import HeadPattern
from .home import CHUNK
from .machine import Profile
from .placement import share, slot_bytes
from .tiers import stride


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of a model.

    Args:
        hidden: width of a layer's input.
        input_width: of what is kept for recomputation: the same, and cosines and sines of rotary embedding, if any.
        matrices: (rows, columns, how many) of the weights that each token is multiplied with.
        parameters: elements of all weights.
        dtype: of weights, activations and unquantised KV.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    input_width: int
    matrices: tuple[tuple[int, int, int], ...]
    parameters: int
    dtype: torch.dtype

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype = torch.bfloat16, name: str = "") -> Model:
        """Of a config of transformers. No weights are made.

        Raises:
            ValueError: it is no config of a language model with attention.
        """
        from transformers import AutoModelForCausalLM

        text = config.get_text_config(decoder=True)
        try:
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(text)
            heads = int(text.num_attention_heads)
            kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
            head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        except (ValueError, AttributeError, KeyError) as error:
            got = name or type(config).__name__
            raise ValueError(f"model: expected a language model with attention, got {got}: {error}") from None
        embedding, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
        weights = [p for p in made.parameters() if p.dim() > 1 and (p is not embedding or p is head)]
        tables = {id(m.weight) for m in made.modules() if isinstance(m, torch.nn.Embedding)} - {id(head)}
        sizes = Counter((p[..., 0].numel(), p.shape[-1]) for p in weights if id(p) not in tables)
        rotates = any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta"))
        matrices = tuple((*shape, count) for shape, count in sorted(sizes.items()))
        parameters = sum(p.numel() for p in made.parameters())
        return cls(
            name or str(getattr(config, "model_type", "")), int(text.num_hidden_layers), heads, kv_heads, head_dim,
            int(text.hidden_size), int(text.hidden_size) + 2 * head_dim * rotates, matrices, parameters, dtype,
        )  # fmt: skip

    @classmethod
    def load(cls, source: str, dtype: torch.dtype | None = None) -> Model:
        """Of a folder or hub name, or of a config that comes with the package; in its own dtype if none is given.

        Raises:
            ValueError: there is none.
        """
        from transformers import AutoConfig

        if source in known_models():
            fields = json.loads((_DATA / "models" / f"{source}.json").read_text("utf-8"))
            config = AutoConfig.for_model(**fields)
        else:
            try:
                config = AutoConfig.from_pretrained(source)
            except (OSError, ValueError) as error:
                expected = f"a folder, a hub name or one of {', '.join(known_models())}"
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"model: expected {expected}, got {source!r}: {reason}") from None
        own = getattr(config, "dtype", None)
        return cls.from_config(config, dtype or (own if isinstance(own, torch.dtype) else torch.bfloat16), source)

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    def kv_bytes(self, tokens: int) -> int:
        """Of all layers, unquantised."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize * tokens

    def step_seconds(self, profile: Profile, tokens: int) -> float:
        """To multiply so many tokens with all weights: their bytes or the operations, whichever take longer."""
        kind = "float32" if self.dtype == torch.float32 else "bfloat16"
        total = 0.0
        for rows, columns, count in self.matrices:
            row, products = columns * self.dtype.itemsize, 2 * rows * columns * tokens
            read = profile.seconds(f"linear.{kind}", rows * row, row)
            total += count * max(read, profile.seconds(f"matmul.{kind}", products))
        return total


_DATA = resources.files(__package__) / "data"


def known_models() -> list[str]:
    """Configs that come with the package."""
    return sorted(x.name.removesuffix(".json") for x in (_DATA / "models").iterdir() if x.name.endswith(".json"))


@dataclasses.dataclass(frozen=True)
class Choice:
    """Keep, fetch or recompute: seconds until the device has a page, for all heads that want it at once."""

    fetch: float
    """From host memory."""
    recompute: float
    """From the layer's input in host memory."""
    load: float | None
    """From the disk; None: there is none."""
    reload: float | None
    """From the layer's input on the disk."""
    input_bytes: int
    """Of a layer's input, a token."""
    kv_bytes: int
    """Of a layer's KV, a token."""
    heads: int
    """That want a page at once."""

    @property
    def pays(self) -> bool:
        """Whether it pays to keep layers' inputs on the disk in place of KV (`SparseConfig.recompute`), or, on a
        machine without one, in host memory: they are smaller, and KV is there sooner."""
        if self.load is None or self.reload is None:
            return self.input_bytes < self.kv_bytes and self.recompute < self.fetch
        return self.input_bytes < self.kv_bytes and self.reload < self.load

    @property
    def why(self) -> str:
        """In words."""
        if self.input_bytes >= self.kv_bytes:
            sizes = f"a layer's input takes {self.input_bytes:,} bytes a token, its KV {self.kv_bytes:,}"
            return f"recomputing never pays: {sizes}, so KV fits wherever the input would"
        times = f"in host memory {self.recompute * 1e6:,.1f} us a page against {self.fetch * 1e6:,.1f}"
        if self.load is not None and self.reload is not None:
            times += f", on the disk {self.reload * 1e6:,.1f} against {self.load * 1e6:,.1f}"
        verdict = "recomputing pays" if self.pays else "recomputing never pays"
        alone = (
            "" if self.pays or self.heads > 1 else "; each head wants pages of its own, and the input is that of all"
        )
        return f"{verdict}: {times}{alone}"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A decode step at one context."""

    context: int
    batch: int
    phase: int
    """1: all pages lie on the device; 2: some in host memory only; 3: some not even there. 0: they do not fit."""
    bytes: dict[str, int]
    """Of KV, a tier."""
    alpha: float
    """The share of KV that is not on the device."""
    beta: float
    """The share that is recomputed."""
    moved: dict[str, float]
    """Bytes a step: "fetch" and "load"."""
    seconds: dict[str, float]
    """Of a step, by what they are spent on."""
    missing: str = ""
    """What is too small, if it does not fit."""

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """Tokens a second of all sequences; 0 if they do not fit."""
        return self.batch / self.step if self.phase else 0.0

    @property
    def binds(self) -> str:
        """What takes the largest part of a step."""
        return max(self.seconds, key=lambda name: self.seconds[name]) if self.phase else self.missing


class Plan:
    """A model under a config on a machine.

    Args:
        config: its limits in bytes are those of the tiers; a limit that it does not give is the machine's.
        tiers: whether what does not fit on the device lies elsewhere; False: it does not fit then.
    """

    def __init__(self, model: Model, config: SparseConfig, profile: Profile, *, tiers: bool = True) -> None:
        self.model, self.config, self.profile, self.tiers = model, config, profile, tiers
        like = torch.empty(1, 1, 0, model.head_dim, dtype=model.dtype)
        pool = Pool(
            config.replace(device_bytes=None, host_bytes=None, disk_dir=None, disk_bytes=None, recompute=False), like, 0
        )
        self.page_bytes = slot_bytes(pool)
        """Of a page of a kv head, as it is moved."""
        self.stats_bytes = pool.block_bytes - self.page_bytes
        """What stays of it on the device."""
        scored = pool.tensors.get("moments" if config.needs_moments else "stats")
        self.scored_bytes = 0 if scored is None else scored.element_size() * scored.shape[1:].numel()
        """What a selection reads of it."""

    # ---- what is held and attended ----------------------------------------------------------------------------------
    @cached_property
    def streaming(self) -> int:
        """Kv heads that stream, of all layers."""
        heads, config = self.model.kv_heads, self.config.streaming_heads
        total = (self.model.layers - min(self.config.dense_layers, self.model.layers)) * heads
        if config is None or isinstance(config, (int, float)):
            return round(total * (config or 0))
        pattern = config if isinstance(config, HeadPattern) else HeadPattern.load(config)
        rows = [sum(pattern.streaming(layer)) for layer in range(self.config.dense_layers, pattern.num_layers)]
        return sum(rows)

    @property
    def observes(self) -> bool:
        """Whether each step takes the attention mass, for which keys are read once more."""
        scorer = self.config.make_scorer()
        return scorer is not None and scorer.observes

    @property
    def others(self) -> int:
        """Kv heads that hold everything, of all layers."""
        return self.model.layers * self.model.kv_heads - self.streaming

    def pages(self, context: int) -> tuple[int, int]:
        """Sealed pages that a head holds which does not stream, and one that does."""
        sealed = max(0, context // self.config.page_size - 1)
        kept = self.config.pages.sink + self.config.pages.decode_window - 1
        return sealed, min(sealed, kept)

    def held(self, context: int) -> int:
        """Sealed pages of a sequence, over layers and heads."""
        sealed, kept = self.pages(context)
        return self.others * sealed + self.streaming * kept

    def attended(self, context: int) -> tuple[float, float]:
        """Tokens that a step reads of a head which does not stream (over the dense layers too, on average), and of one
        that does."""
        config, P = self.config, self.config.page_size
        streams = min(context, (config.sink_pages + config.local_pages) * P)
        if not config.selects:
            return context, streams
        picked = min(context, self._budget(context))
        dense = min(config.dense_layers, self.model.layers) * self.model.kv_heads / max(1, self.others)
        return dense * context + (1 - dense) * picked, streams

    def _budget(self, context: int) -> float:
        config = self.config
        if config.kv_sparsity is not None:
            return (1 - config.kv_sparsity) * context
        return float(config.budget_tokens or context)

    def wanted(self, context: int) -> float:
        """Pages that a step wants on the device, of a sequence."""
        sealed, kept = self.pages(context)
        attended, _ = self.attended(context)
        if not self.config.selects:
            pages: float = sealed
        elif self.config.unit == "token":  # of a page with any token that is picked
            local = min(context, self._budget(context) / 2)
            share = min(1.0, self._budget(context) / 2 / max(1.0, context - local))
            far = sealed * (1 - local / context)
            pages = (sealed - far) + far * (1 - (1 - share) ** self.config.page_size)
        else:
            pages = min(sealed, attended / self.config.page_size)
        return self.others * pages + self.streaming * kept

    # ---- what one page costs ----------------------------------------------------------------------------------------
    @property
    def _remake(self) -> float:
        """Seconds in which an attention module makes a page of all its kv heads again."""
        m, figures = self.model, self.profile.figures
        kind = "float32" if m.dtype == torch.float32 else "bfloat16"
        columns = (m.heads + 2 * m.kv_heads) * m.head_dim  # queries too
        rate = f"recompute.{kind}" if f"recompute.{kind}" in figures else f"matmul.{kind}"
        return self.profile.seconds(rate, 2 * self.config.page_size * m.hidden * columns)

    @cached_property
    def choice(self) -> Choice:
        """Keep, fetch or recompute."""
        m, P, profile = self.model, self.config.page_size, self.profile
        shared = self.config.selects and self.config.scorer == "decayed_mass"  # one list for all heads of a layer
        heads = m.kv_heads if shared or not self.config.selects else 1
        moved, row = heads * self.page_bytes, P * m.input_width * m.dtype.itemsize
        products = self._remake
        fetch, load, reload = profile.seconds("fetch", moved, self.page_bytes), None, None
        if "load" in profile.figures:
            load = profile.seconds("load", moved, self.page_bytes) + fetch
            reload = profile.seconds("load", row, row) + products + fetch
        recompute = profile.seconds("fetch", row, row) + products
        return Choice(fetch, recompute, load, reload, row // P, m.kv_heads * self.page_bytes // P, heads)

    def prefix(self, tokens: int) -> dict[str, float]:
        """Seconds until the KV of a prompt of so many tokens, which lies nowhere on the device any more, is there
        again: fetched from host memory, loaded from the disk (as KV, or as layers' inputs), or made of its token ids by
        another prefill, which is exact where that was dense."""
        m, P, profile = self.model, self.config.page_size, self.profile
        pages, kind = self.held(tokens), "float32" if m.dtype == torch.float32 else "bfloat16"
        rate = profile.figure(f"matmul.{kind}")
        found = {"fetch": profile.seconds("fetch", pages * self.page_bytes, self.page_bytes)}
        if "load" in profile.figures:
            row, groups = P * m.input_width * m.dtype.itemsize, m.layers * (tokens // P)
            projections = tokens // P * m.layers * self._remake
            found["load"] = found["fetch"] + profile.seconds("load", pages * self.page_bytes, self.page_bytes)
            found["inputs"] = profile.seconds("load", groups * row, row) + projections
        attention = 2 * m.layers * m.heads * m.head_dim * tokens * tokens / rate  # 4 a key, of which half are earlier
        return found | {"ids": m.step_seconds(profile, tokens) + attention}

    # ---- a step -----------------------------------------------------------------------------------------------------
    def resident(self, context: int, batch: int) -> int:
        """Bytes of KV that always lie on the device: statistics, and the newest tokens."""
        m, rows = self.model, 2 * self.config.page_size
        newest = 2 * m.layers * m.kv_heads * rows * m.head_dim * m.dtype.itemsize
        return batch * (newest + self.held(context) * self.stats_bytes)

    def limits(self, context: int, batch: int) -> dict[str, int]:
        """Bytes that pages may take on each tier, statistics and the newest tokens and weights apart."""
        config, profile, m = self.config, self.profile, self.model
        fixed = m.weight_bytes + self.resident(context, batch)
        free = max(0, int(profile.figure("device_bytes")) - fixed)
        device = free if config.device_bytes is None else min(free, config.device_bytes)
        if not self.tiers:
            return {"device": device, "host": 0, "disk": 0}
        host = int(profile.figure("host_bytes")) - (fixed + device if profile.device == "cpu" else 0)
        host = max(0, host if config.host_bytes is None else min(host, config.host_bytes))
        disk = int(profile.figure("disk_bytes")) if "disk_bytes" in profile.figures else 0
        return {"device": device, "host": host, "disk": disk if config.disk_bytes is None else config.disk_bytes}

    def predict(self, context: int, batch: int = 1) -> Prediction:
        """A decode step of so many sequences of that length."""
        m, profile, config = self.model, self.profile, self.config
        limits, page = self.limits(context, batch), self.page_bytes
        held = batch * self.held(context)
        slots, frames = limits["device"] // page, limits["host"] // page
        phase = self.phase(context, batch)
        found = {"device": self.resident(context, batch) + page * min(held, slots)}
        alpha, beta = max(0.0, 1 - slots / held) if held else 0.0, 0.0
        if phase > 1:
            found["host"] = page * min(held, frames)
        if phase == 3:
            records = self._records(held)
            if records > limits["disk"] or "load" not in profile.figures:
                what = "disk" if limits["disk"] else "host memory" if frames else "device memory"
                return Prediction(context, batch, 0, found, alpha, 0, {}, {}, f"{what} too small")
            found["disk"] = records
            beta = 1 - frames / held if config.recompute else 0.0
        misses, tokens = self._fetched(context, batch, slots) if phase > 1 else (0.0, 0.0)
        below = self._misses(context, batch, frames) if phase == 3 else 0.0
        if not tokens:
            below = min(below, misses)
        loads, recomputed = (0.0, below) if config.recompute else (below, 0.0)
        rounds = math.ceil(batch * self.wanted(context) / m.layers / max(1, slots))  # of heads
        if batch * self.pages(context)[0] <= CHUNK:
            rounds = 1  # which share what was recomputed last
        calls = profile.figure("layer.mass" if self.observes else "layer")
        if phase > 1 or config.device_bytes is not None:
            calls += profile.figure("layer.slots")
        if phase > 1 and self.packs:
            calls += profile.figure("layer.packed")
        if phase == 3 or config.host_bytes is not None:
            calls += profile.figure("layer.frames")
        attended, streams = self.attended(context)
        token_bytes = self.page_bytes / config.page_size
        keys_again = 1.5 if self.observes else 1.0
        read = batch * token_bytes * (self.others * attended * keys_again + self.streaming * streams)
        scores = batch * self.others * self.pages(context)[0] * self.scored_bytes / config.reuse_interval
        seconds = {
            "weights": m.step_seconds(profile, batch),
            "attention": profile.seconds(f"attend.{config.kv_dtype}", read),
            "selection": profile.seconds("attend.auto", scores) if config.selects else 0.0,
            "calls": m.layers * calls,
            "fetch": profile.seconds("fetch", misses * page, page)
            + profile.seconds("fetch", tokens * token_bytes, int(token_bytes / 2)),
            "load": profile.seconds("load", loads * page, page) if loads else 0.0,
            "recompute": rounds * recomputed / self.choice.heads * ((self.choice.reload or 0.0) - self.choice.fetch),
        }
        moved = {"fetch": misses * page + tokens * token_bytes, "load": loads * page}
        return Prediction(context, batch, phase, found, alpha, beta, moved, seconds)

    def _records(self, held: int) -> int:
        """Bytes of the disk: of so many pages, or of the inputs that they come from."""
        if not self.config.recompute:
            return held * stride(self.page_bytes)
        m = self.model
        return held // m.kv_heads * stride(self.config.page_size * m.input_width * m.dtype.itemsize)

    @property
    def packs(self) -> bool:
        """Whether listed tokens are fetched without their pages, where not all of these fit on the device."""
        return self.config.selects and self.config.packs and not self.streaming

    def _fetched(self, context: int, batch: int, slots: int) -> tuple[float, float]:
        """Pages, and tokens by themselves, that a step brings to the device where not all pages fit there."""
        if not self.packs:
            return self._misses(context, batch, slots), 0.0
        P, layers, listed = self.config.page_size, self.model.layers, self._budget(context) / 2
        heads = batch * self.others
        slots -= min(slots // 2, math.ceil(listed / P) * heads // layers)  # those for packed tokens
        local = heads * max(0.0, listed / P - 1)  # the newest pages are not sealed
        kept = min(local / layers, share(slots, local / layers, layers))
        missed = max(heads / P, local - layers * kept)
        held = batch * self.held(context)
        near = max(0.0, slots - local) / max(1.0, held - local) if held < 4 * slots else 0.0
        return missed, heads * listed * (1 - near)

    def _misses(self, context: int, batch: int, slots: int) -> float:
        """Pages that a step wants and that do not lie in so many slots, or frames."""
        held, wanted = batch * self.held(context), batch * self.wanted(context)
        if not self.config.selects:  # all of them in turn: each layer keeps a share
            layers, of_layer = self.model.layers, wanted / self.model.layers
            kept = share(slots, of_layer, layers)
            left = max(0.0, slots - of_layer) - (layers - 1) * kept
            return 0.0 if kept >= of_layer else wanted - layers * kept - left
        if self.config.unit == "token":
            return wanted * max(0.0, 1 - slots / held)
        kept = batch * self.streaming * self.pages(context)[1]
        factor = max(0.0, slots - kept) / max(1.0, wanted - kept)
        listed = batch * self.others * (self.config.budget.picks or 0)
        missed = locality(self.config.reuse_interval).at(factor)
        if factor < 1:  # what does not fit is missed in every step
            return (wanted - kept) * (1 - factor) + factor * listed * missed / self.config.reuse_interval
        return min(wanted, listed * missed / self.config.reuse_interval)

    def switches(self, batch: int = 1, most: int = 1 << 24) -> tuple[int | None, int | None]:
        """Tokens of context at which phases II and III begin; None: never, or not before so many."""
        found: list[int | None] = []
        for phase in (2, 3):
            low, high = 1, most
            if self.phase(most, batch) < phase:
                found.append(None)
                continue
            while low < high:
                middle = (low + high) // 2
                if self.phase(middle, batch) >= phase:
                    high = middle
                else:
                    low = middle + 1
            found.append(low)
        return found[0], found[1]

    def phase(self, context: int, batch: int = 1) -> int:
        """1: all pages fit on the device; 2: they fit in host memory; 3: they fit in neither."""
        limits, held = self.limits(context, batch), batch * self.held(context) * self.page_bytes
        return 1 if held <= limits["device"] else 2 if held <= limits["host"] else 3


@dataclasses.dataclass(frozen=True)
class Locality:
    """Which share of newly selected pages is missed, by slots for each page of a list."""

    points: Sequence[tuple[float, float]]

    def at(self, factor: float) -> float:
        """Between points on a line, both of them as logarithms; beyond the last one as between the last two."""
        x, y = (np.log([p[i] for p in self.points]) for i in (0, 1))
        at = math.log(max(factor, self.points[0][0]))
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
        return float(np.exp(np.interp(at, x, y) + min(0.0, slope) * max(0.0, at - x[-1])))


def locality(reuse_interval: int) -> Locality:
    """As measured on real text by `bench/placement.py`, for the nearest reuse interval that it has measured."""
    curves: dict[str, Any] = json.loads((_DATA / "locality" / "smollm2-135m-instruct.json").read_text("utf-8"))[
        "missed_of_listed"
    ]
    nearest = min(curves, key=lambda known: abs(math.log(int(known) / reuse_interval)))
    return Locality([(slots, share) for slots, share in curves[nearest]])
