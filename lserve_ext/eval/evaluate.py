"""Several configs of a cache on the same prompts: what each costs in accuracy beside the first one, and what it reads.

A prompt is read once for all configs that store it alike (`SparseConfig.stores_as`); each goes on in a fork. Every
result is written at once, so that a run which was cut short goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from .. import __version__, files
from ..config import SparseConfig
from ..hf import SparseCache
from . import GENERATION, TEXT, generate, metrics, ruler, tasks
from .recall import Recall

TASKS = (TEXT, GENERATION, *ruler.TASKS)
QUARTERS = 4
SAMPLED = 17
"""Every so many steps the recall is measured: no multiple of a reuse interval, so that lists of all ages have their
turn."""
_DEFAULT_TEXT = "the reference of the Python language"
_FORMAT = 1  # of files
_FIXED = ("samples", "texts", "positions", "new_tokens", "chunk", "seed")
"""Settings that results of one file share; lengths and tasks may be added."""

Choice = Callable[[int, Tensor], "int | None"]
"""Of the number of a step and the logits before it, the token that is read; None: no more."""
Result = dict[str, Any]
"""Fields `config`, `task`, `length`, `sample`; of tasks with answers `depth`, `output`, `score`; of text and generation
the figures of `metrics.compare`, `divergence` (tokens until the best one is another), `kl_quarters`,
`tokens_per_second`, and of text also `perplexity` (a quarter of the positions each), `recall` and `oracle` (a layer
each; None: no lists), `calls` (of ops, a step), `read_bytes` (of KV and statistics, a step), `kv_bytes` (held)."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of every config.

    Args:
        tasks: of `TASKS`.
        lengths: tokens of a prompt.
        samples: prompts of each task and length; needles stand from the beginning to the end of them.
        texts: the same for text and generation: parts of the text, one behind the other.
        positions: tokens of a text that are followed after the prompt.
        new_tokens: of generation.
        chunk: tokens of a prompt that are read at a time.
        seed: of prompts.

    Raises:
        ValueError: a task that there is not.
    """

    tasks: Sequence[str] = (TEXT, "passkey")
    lengths: Sequence[int] = (2048, 4096)
    samples: int = 5
    texts: int = 1
    positions: int = 256
    new_tokens: int = 512
    chunk: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {task!r}")

    @property
    def tokens(self) -> int:
        """The most that a cache will hold."""
        more = {TEXT: self.positions, GENERATION: self.new_tokens}
        return max(self.lengths) + max(more.get(task, ruler.MOST_NEW_TOKENS) for task in self.tasks)

    def cells(self) -> list[tuple[str, int, int]]:
        """Task, length and sample of every prompt, short ones first."""
        return [
            (task, length, sample)
            for length in self.lengths
            for task in self.tasks
            for sample in range(self.texts if task in (TEXT, GENERATION) else self.samples)
        ]


class Evaluation:
    """Configs by name, of which the first is what others are compared with.

    Args:
        model, tokenizer: a transformers model with attn_implementation="lserve".
        configs: by name.
        settings: what is asked.
        out: a file of results, which is gone on with if it is there; None: none is written.
        text: what is followed, and what needles lie in; by default `tasks.long_text`.

    Raises:
        ValueError: a file of other settings; a text that is too short.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        configs: Mapping[str, SparseConfig],
        settings: Settings,
        out: Path | None = None,
        text: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.configs, self.settings = model, tokenizer, dict(configs), settings
        self.results: list[Result] = []
        self._out, self._text = out, tasks.long_text() if text is None else text
        self._ids = tasks.encode(tokenizer, self._text)
        needed = settings.texts * (max(settings.lengths, default=0) + settings.positions)
        if {TEXT, GENERATION} & {*settings.tasks} and len(self._ids) < needed:
            raise ValueError(f"text: expected at least {needed} tokens, got {len(self._ids)}")
        self._head = {
            "format": _FORMAT,
            "lserve_ext": __version__,
            "model": Path(str(getattr(model.config, "_name_or_path", ""))).name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "text": _DEFAULT_TEXT if text is None else hashlib.sha256(text.encode()).hexdigest()[:16],
            **{name: value for name, value in dataclasses.asdict(settings).items() if name in _FIXED},
        }
        if out is not None and out.exists():
            self._resume(out)

    def _resume(self, out: Path) -> None:
        found = files.read_json(files.read_text(out, "--out"), "--out", out)
        for name, value in self._head.items():
            if found.get(name) != value:
                raise ValueError(f"{out}: expected results with {name} {value!r}, got {found.get(name)!r}")
        self.results = found["results"]
        for result in self.results:
            name = result["config"]
            if name in self.configs and found["configs"][name] != self.configs[name].to_dict():
                raise ValueError(f"{out}: expected results of {name!r} as it is now, got another config of that name")

    @torch.inference_mode()
    def run(self) -> list[Result]:
        """All results, those of before included."""
        done = {_key(result) for result in self.results}
        cells = self.settings.cells()
        with tqdm(total=len(cells) * len(self.configs), unit=" runs") as bar:
            for cell in cells:
                missing = [name for name in self.configs if (name, *cell) not in done]
                bar.update(len(self.configs) - len(missing))
                for result in self._results(cell, missing):
                    bar.set_postfix_str(f"{result['task']}, {result['length']}, {result['config']}")
                    bar.update()
                    self.results.append(result)
                    self._write()
        return self.results

    def _results(self, cell: tuple[str, int, int], names: list[str]) -> Iterator[Result]:
        """Of one prompt under these configs."""
        if not names:
            return
        find = self._followed if cell[0] in (TEXT, GENERATION) else self._answered
        for name, figures in find(*cell, names):
            yield {"config": name, "task": cell[0], "length": cell[1], "sample": cell[2]} | figures

    def _answered(self, task: str, length: int, sample: int, names: list[str]) -> Iterator[tuple[str, Result]]:
        """What each makes of a prompt that has an answer."""
        depth, seed = self._depth(sample), self.settings.seed + sample
        prompt = ruler.prompt(task, self.tokenizer, length, depth=depth, seed=seed, text=self._text)
        for name, cache, last in self._caches(prompt.ids, names):
            logits, _ = self._decode(cache, last, self._greedy(prompt.new_tokens))
            output = self.tokenizer.decode(logits.argmax(-1), skip_special_tokens=True)
            yield name, {"depth": depth, "output": output, "score": prompt.score(output)}

    def _followed(self, task: str, length: int, sample: int, names: list[str]) -> Iterator[tuple[str, Result]]:
        """How far each is from the first config on the tokens of a text, or on those that the first one generates."""
        first, positions = next(iter(self.configs)), self.settings.positions
        end = sample * (length + positions) + length
        tokens: list[int] | None = self._ids[end : end + positions] if task == TEXT else None
        reference: Tensor | None = None
        for name, cache, last in self._caches(torch.tensor([self._ids[end - length : end]]), [first, *names]):
            recall = Recall() if task == TEXT else None
            choose = self._greedy(self.settings.new_tokens, ends=()) if tokens is None else _listed(tokens)
            logits, rate = self._decode(cache, last, choose, recall)
            if reference is None:
                reference, tokens = logits, logits.argmax(-1).tolist()[:-1] if tokens is None else tokens
            found = _compared(reference, logits) | {"tokens_per_second": rate}
            if recall is not None:
                found |= _measured(cache, logits, tokens or [], recall)
            if name in names:  # else its result is there already
                yield name, found

    def _caches(self, ids: Tensor, names: Iterable[str]) -> Iterator[tuple[str, SparseCache, Tensor]]:
        """A cache of each config that holds the prompt [1, tokens], and the logits of its last token."""
        for group in _alike({name: self.configs[name] for name in names}):
            cache = SparseCache(self.model.config, self.configs[group[0]])
            last = generate.prefill(self.model, ids.to(self.model.device), cache, self.settings.chunk)
            for name in group:
                yield name, cache.fork(self.configs[name]), last

    def _depth(self, sample: int) -> float:
        return sample / (self.settings.samples - 1) if self.settings.samples > 1 else 0.5

    def _greedy(self, new_tokens: int, ends: Collection[int] | None = None) -> Choice:
        """The best token each time, so many or until the sequence ends (by default where the model says so)."""
        if ends is None:
            stop = self.model.generation_config.eos_token_id
            ends = [] if stop is None else [stop] if isinstance(stop, int) else stop

        def choose(i: int, logits: Tensor) -> int | None:
            best = int(logits.argmax())
            return None if i + 1 >= new_tokens or best in ends else best

        return choose

    def _decode(
        self, cache: SparseCache, last: Tensor, choose: Choice, recall: Recall | None = None
    ) -> tuple[Tensor, float]:
        """Logits [1 + steps, vocabulary] from the prompt's last one on, and steps a second."""
        rows, seconds = [last], []
        while (token := choose(len(rows) - 1, rows[-1])) is not None:
            x, start = torch.tensor([[token]], device=last.device), time.perf_counter()
            if recall is not None and len(rows) % SAMPLED == 0:
                with recall:
                    rows.append(generate.forward(self.model, x, cache))
                continue
            rows.append(generate.forward(self.model, x, cache))
            seconds.append(time.perf_counter() - start)
        return torch.stack(rows), len(seconds) / sum(seconds) if seconds else 0.0

    def _write(self) -> None:
        if self._out is None:
            return
        used = {result["config"] for result in self.results}
        configs = {name: config.to_dict() for name, config in self.configs.items() if name in used}
        if self._out.exists():
            configs = files.read_json(files.read_text(self._out, "--out"), "--out", self._out)["configs"] | configs
        content = self._head | {"configs": configs, "results": self.results}
        files.write_text(self._out, json.dumps(content, indent=1) + "\n")


def _listed(tokens: Sequence[int]) -> Choice:
    return lambda i, _: tokens[i] if i < len(tokens) else None


def _compared(reference: Tensor, logits: Tensor) -> Result:
    """Figures of logits [positions, vocabulary] beside those of the first config."""
    kl, flips = metrics.kl_divergence(reference, logits), reference.argmax(-1) != logits.argmax(-1)
    found: Result = metrics.compare(reference, logits)
    found["divergence"] = int(flips.nonzero()[0]) if flips.any() else None
    return found | {"kl_quarters": [float(part.mean()) for part in kl.tensor_split(QUARTERS)]}


def _measured(cache: SparseCache, logits: Tensor, followed: Sequence[int], recall: Recall) -> Result:
    """Figures of a config on a text that it has followed."""
    losses = torch.nn.functional.cross_entropy(logits[:-1].cpu(), torch.tensor(followed), reduction="none")
    found = _layers(recall, len(cache.layers))
    found["perplexity"] = [math.exp(float(part.mean())) for part in losses.tensor_split(QUARTERS)]
    found["kv_bytes"] = sum(memory.used for memory in cache.memory().values())
    return found | {"read_bytes": cache.read_bytes()}


def summary(results: Iterable[Result], length: int) -> list[list[str]]:
    """A table of what was found at one length: a row a config, a column a figure."""
    by_config: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        if result["length"] == length:
            by_config.setdefault(result["config"], {}).setdefault(result["task"], []).append(result)
    present = [task for task in TASKS if any(task in of for of in by_config.values())]
    head = ["config"]
    if TEXT in present:
        head += ["read a step", "KL", "top-1", "perplexity", "recall", "oracle"]
    if GENERATION in present:
        head += ["first divergence", "KL, first and last quarter"]
    scored = [task for task in present if task in ruler.TASKS]
    rows = [head + scored]
    texts = next((of[TEXT] for of in by_config.values() if TEXT in of), [])
    most = _mean([result["read_bytes"] for result in texts]) if texts else 1.0
    for name, of in by_config.items():
        row = [name]
        if TEXT in present:
            row += _text_cells(of[TEXT], most) if TEXT in of else [""] * 6
        if GENERATION in present:
            row += _generation_cells(of[GENERATION]) if GENERATION in of else [""] * 2
        for task in scored:
            scores = [result["score"] for result in of.get(task, [])]
            row.append(f"{sum(scores) / len(scores):.0%}" if scores else "")
        rows.append(row)
    return rows


def _text_cells(of: Sequence[Result], most: float) -> list[str]:
    read, kl, top1 = (_mean([result[name] for result in of]) for name in ("read_bytes", "kl", "top1"))
    perplexity = math.exp(_mean([math.log(x) for result in of for x in result["perplexity"]]))
    cells = [f"{read / 1e6:.1f} MB, {read / most:.0%}", f"{kl:.1e}", f"{top1:.1%}", f"{perplexity:.2f}"]
    shares = ([x for result in of for x in result[name] or ()] for name in ("recall", "oracle"))
    return [*cells, *(f"{_mean(values):.3f}" if values else "" for values in shares)]


def _generation_cells(of: Sequence[Result]) -> list[str]:
    """Of several texts the middle one, when ordered by where they diverge."""
    places = sorted((result["divergence"] for result in of), key=lambda x: math.inf if x is None else x)
    first, last = (_mean([result["kl_quarters"][i] for result in of]) for i in (0, -1))
    middle = places[len(places) // 2]
    return ["none" if middle is None else f"after {middle}", f"{first:.1e}, {last:.1e}"]


def _layers(recall: Recall, layers: int) -> Result:
    """Means over the sampled steps, a layer each."""
    steps = [recall.layers[i : i + layers] for i in range(0, len(recall.layers), layers)]
    shares = [[share for share in of_layer if share is not None] for of_layer in zip(*steps, strict=True)]
    found: Result = {
        "recall": [_mean([share.attended for share in of]) for of in shares if of] or None,
        "oracle": [_mean([share.oracle for share in of]) for of in shares if of] or None,
    }
    found["calls"] = {name: count / max(1, len(steps)) for name, count in sorted(recall.calls.items())}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _key(result: Result) -> tuple[str, str, int, int]:
    return result["config"], result["task"], result["length"], result["sample"]


def _alike(configs: Mapping[str, SparseConfig]) -> list[list[str]]:
    """Names of configs that one reading of a prompt serves, in their order."""
    groups: list[list[str]] = []
    for name, config in configs.items():
        for group in groups:
            if configs[group[0]].stores_as(config):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups
