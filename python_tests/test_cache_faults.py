"""What a cache is after anything went wrong: as before, as after, or dead; and random programs against simpler ones."""

from __future__ import annotations

import copy
import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from _tiny import cached, llama
from test_cache import CONFIGS, SMALL, audit
from torch import Tensor

import lserve_ext
from lserve_ext import HeadPattern, LayerCache, SparseCache, SparseConfig, hf, ops

pytest.importorskip("transformers")

PACKAGE = Path(lserve_ext.__file__).parent
FILES = {
    str(PACKAGE / f"{name}.py")
    for name in (
        "blocks",
        "cache",
        "scorers",
        "sequences",
        "step",
        "placement",
        "resident",
        "home",
        "hf/cache",
        "hf/interface",
        "hf/layers",
    )
}
LAYERS, KV_HEADS, VOCABULARY = 3, 2, 258
PRESETS = {
    **{name: config for name, config in CONFIGS.items() if name not in ("half", "pages")},
    "pages": CONFIGS["pages"].replace(reuse_interval=3),
    "half": CONFIGS["half"].replace(streaming_heads=HeadPattern([[0.0, 1.0], [1.0, 0.0], [0.2, 0.8]])),
    "duo": SparseConfig.duo(streaming_heads=HeadPattern([[0.0, 1.0], [1.0, 0.0], [0.2, 0.8]]), **SMALL),
    "quest": SparseConfig.quest(budget_tokens=48, dense_layers=1),
}
# The device holds little more than one head of one sequence.
PRESETS |= {
    f"{name}, slots": PRESETS[name].replace(device_bytes=64 << 10) for name in ("dense", "pages", "half", "h2o")
}
PRESETS |= {
    name.replace("slots", "disk"): config.replace(host_bytes=16 << 10, disk_dir="memory://faults")
    for name, config in PRESETS.items()
    if name.endswith(", slots")
}


@pytest.fixture(scope="module")
def model() -> Any:
    made = llama(layers=LAYERS)
    made.set_attn_implementation("lserve")
    return made


def forward(model: Any, cache: SparseCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=mask, **cached(cache), logits_to_keep=1).logits[:, -1]
    return logits


def contents(cache: SparseCache) -> list[Any]:
    """Everything that later steps depend on; not where blocks lie."""
    found: list[Any] = [cache.get_seq_length()]
    for layer in cache.ours:
        if layer.kv is None:
            continue
        kv, s = layer.kv, layer.kv._state
        P, ids = kv.config.page_size, torch.from_numpy(s.blocks.ids)
        found += [
            kv.lengths,
            kv.columns,
            kv.sequences.window,
            s.selection.age,
            torch.from_numpy(kv.sequences.sealed),
            torch.from_numpy(kv.sequences.freed),
        ]
        found += [x for _, x in sorted(s.selection.tensors().items())]
        found += [ids >= 0, *(x for _, x in sorted(kv._pool.read(s.blocks.ids[s.blocks.ids >= 0]).items()))]
        for b, n in enumerate(kv.lengths):
            rows = torch.arange(int(kv.sequences.sealed[b]) * P, n) % (2 * P)
            found += [s.residual_k[b, :, rows], s.residual_v[b, :, rows]]
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def audit_all(*caches: SparseCache) -> None:
    for cache in caches:
        cache._settle()
    pools: dict[int, list[LayerCache]] = {}
    for layer in (layer.kv for cache in caches for layer in cache.ours):
        if layer is not None:
            pools.setdefault(id(layer.pool), []).append(layer)
    for group in pools.values():
        audit(*group)


# ---- an interrupt at every line


class Interrupt(KeyboardInterrupt):
    pass


@contextmanager
def interrupted_at(count: int) -> Iterator[Callable[[], int]]:
    """Raises at the count-th line of our files that is reached; how many were reached."""
    reached = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal reached
        if frame.f_code.co_filename not in FILES or frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            reached += 1
            if reached == count:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: reached
    finally:
        sys.settrace(before)


IDS = torch.randint(3, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(5))
ACTIONS: dict[str, Callable[[Any, SparseCache], object]] = {
    "step": lambda model, cache: forward(model, cache, IDS[:, 60:61]),
    "chunk": lambda model, cache: forward(model, cache, IDS[:, 60:77]),
    "crop": lambda model, cache: cache.crop(-9),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda model, cache: cache.batch_repeat_interleave(2),
    "fork": lambda model, cache: cache.fork(),
    "reset": lambda model, cache: cache.reset(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dense-int8", "half", "pages", "h2o", "half, slots", "h2o, slots", "half, disk", "h2o, disk"]
)
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interrupt_at_any_line_leaves_the_cache_as_before_or_as_after(
    model: Any, name: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page border is next: the step seals. What follows must be bitwise what follows one of the two."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps what an interrupted __del__ held
    start = SparseCache(model.config, PRESETS[name])
    forward(model, start, IDS[:, :58])
    for t in (58, 59, 60, 61, 62):
        forward(model, start, IDS[:, t : t + 1])
    act = ACTIONS[action]
    after_cache = copy.deepcopy(start)
    act(model, after_cache)
    before, after = contents(copy.deepcopy(start)), contents(after_cache)
    step, bad, count, done = IDS[:, 80:81], [], 0, False

    def follow(cache: SparseCache) -> list[Any]:
        batch = max(cache.batch_size, 1) if cache.get_seq_length() else 2
        forward(model, cache, step[:1].expand(batch, 1))
        return contents(cache)

    next_before, next_after = follow(copy.deepcopy(start)), follow(copy.deepcopy(after_cache))
    while not done:
        count += 1 if not name.endswith("disk") else 7  # which takes its time
        cache = copy.deepcopy(start)
        try:
            with warnings.catch_warnings(), interrupted_at(count) as reached:
                warnings.simplefilter("ignore")
                act(model, cache)
                done = reached() < count  # else it came where a __del__ was called, which nothing gets out of
        except Interrupt:
            pass
        if count % 2:  # at once, without a copy, which would settle what is pending
            following = follow(cache)
            settled = same(following, next_before) or same(following, next_after)
        else:
            now = contents(copy.deepcopy(cache))
            settled = (same(now, before) and same(follow(cache), next_before)) or (
                same(now, after) and same(follow(cache), next_after)
            )
        if not settled:
            bad.append(count)
        try:
            audit_all(cache)
        except AssertionError:
            gc.collect()  # the traceback held what the interrupted lines held
            audit_all(cache)
    assert count > 20 and not bad, f"{len(bad)} of {count} lines: {bad[:20]}"


# ---- random programs


class Exact:
    """A model whose layers look up q, k and v by token and add the last layer's output to q: without matrix products, a
    row's bits depend on nothing else in the batch. It drives cache, mask and attention as transformers does."""

    def __init__(self, config: Any) -> None:
        self.config, rng = config, torch.Generator().manual_seed(3)
        self.q = torch.randn(LAYERS, VOCABULARY, 4, 16, generator=rng)
        self.k, self.v = torch.randn(2, LAYERS, VOCABULARY, KV_HEADS, 16, generator=rng)

    def __call__(self, cache: SparseCache, ids: Tensor) -> Tensor:
        seen, (B, T) = cache.get_seq_length(), ids.shape
        mask, module = hf.mask(B, T, seen + T, q_offset=seen), torch.nn.Module()
        out = torch.zeros(B, T, 4, 16)
        for layer in range(LAYERS):
            q, k, v = (
                (x[layer][ids] + bias).transpose(1, 2) for x, bias in ((self.q, out), (self.k, 0.0), (self.v, 0.0))
            )
            with torch.no_grad():
                out, _ = hf.attention(module, q, *cache.update(k, v, layer), mask)
        return out[:, -1]


class Program:
    """A cache under random calls, beside one cache a sequence that sees only its own."""

    def __init__(self, model: Exact, name: str, seed: int) -> None:
        self.model, self.rng = model, random.Random(seed)
        self.config = PRESETS[name]
        self.cache = SparseCache(model.config, self.config)
        self.rows: list[SparseCache] = []
        self.forks: list[SparseCache] = []
        self.log: list[str] = []

    def fresh(self, batch: int) -> None:
        self.rows = [SparseCache(self.model.config, self.config) for _ in range(batch)]
        self.feed(self.rng.randint(2, 40))

    def feed(self, count: int, fault: str | None = None) -> None:
        ids = torch.tensor([[self.rng.randrange(3, VOCABULARY) for _ in range(count)] for _ in self.rows])
        if fault is not None:
            self.fail(fault, ids)
        self.model(self.cache, ids)
        for row, alone in enumerate(self.rows):
            self.model(alone, ids[row : row + 1])

    def fail(self, op: str, ids: Tensor) -> None:
        """The same forward, first with an op that fails before or after it has run."""
        real, calls, when = getattr(ops, op), 0, self.rng.choice(["before", "after"])
        at = self.rng.randrange(LAYERS)

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1 and when == "before":
                raise Interrupt
            result = real(*args, **kwargs)
            if calls == at + 1:
                raise Interrupt
            return result

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(ops, op, failing)
            try:
                self.model(self.cache, ids)
            except Interrupt:
                return
        # The op was not called so often: the forward went through, and so must the other caches'.
        for row, alone in enumerate(self.rows):
            self.model(alone, ids[row : row + 1])

    def act(self) -> None:
        batch, length = len(self.rows), self.cache.get_seq_length()
        kind = self.rng.choice(["step"] * 4 + ["chunk", "fault", "fault", "crop", "reorder", "select", "repeat", "fork",
                                "deepcopy", "file"])  # fmt: skip
        self.log.append(kind)
        if kind == "step":
            self.feed(1)
        elif kind == "chunk":
            self.feed(self.rng.randint(2, 21))
        elif kind == "fault":
            self.feed(self.rng.choice([1, 1, 6, 19]),
                      self.rng.choice(["append_kv", "decode", "prefill", "page_scores", "select_pages", "select_tokens",
                                       "attention_mass"]))  # fmt: skip
        elif kind == "crop":
            count = self.rng.randint(0, min(9, length - 1))
            before = contents(self.cache)
            try:
                self.cache.crop(-count)
            except ValueError:  # streaming heads have freed what it needs
                assert self.config.streaming_heads is not None and same(before, contents(self.cache))
                return
            for alone in self.rows:
                alone.crop(-count)
        elif kind in ("reorder", "select", "repeat"):
            picks = [self.rng.randrange(batch) for _ in range(batch)]
            if kind == "reorder":
                self.cache.reorder_cache(torch.tensor(picks))
            elif kind == "select":
                picks = sorted(set(picks))
                self.cache.batch_select_indices(torch.tensor(picks))
            else:
                picks = [row for row in range(batch) for _ in "ab"][: 2 * batch]
                self.cache.batch_repeat_interleave(2)
            self.rows = [copy.deepcopy(self.rows[row]) for row in picks]
            if len(self.rows) > 3:
                self.cache.batch_select_indices(slice(0, 3))
                self.rows = self.rows[:3]
        elif kind == "fork":
            self.forks = [*self.forks[-1:], self.cache]
            self.cache = self.cache.fork()
        elif kind == "deepcopy":
            self.cache, self.forks = copy.deepcopy(self.cache), []

    def check(self) -> None:
        audit_all(self.cache, *self.forks)
        for index, layer in enumerate(self.cache.ours):
            assert layer.kv is not None
            assert layer.kv.lengths == [alone.ours[index].kv.lengths[0] for alone in self.rows]  # type: ignore[union-attr]


def run_program(model: Any, name: str, seed: int, tmp_path: Path) -> None:
    program = Program(Exact(model.config), name, seed)
    program.fresh(program.rng.choice([1, 2, 3]))
    for _ in range(9):
        program.act()
        if program.log[-1] == "file":
            program.cache.save(tmp_path / "program.safetensors")
            program.cache = SparseCache.load(tmp_path / "program.safetensors", model.config)
            program.forks = []
        program.check()
    ids = torch.tensor([[7]] * len(program.rows))
    together = program.model(program.cache, ids)
    alone = torch.cat([program.model(row, ids[:1]) for row in program.rows])
    assert torch.equal(together, alone), program.log


@pytest.mark.parametrize("seed", range(23))
@pytest.mark.parametrize("name", PRESETS)
def test_random_programs(model: Any, name: str, seed: int, tmp_path: Path) -> None:
    run_program(model, name, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_more_random_programs(model: Any, name: str, tmp_path: Path) -> None:
    for seed in range(1000, 1223):
        run_program(model, name, seed, tmp_path)


def test_dense_programs_against_the_whole_text(model: Any) -> None:
    """An oracle that has no cache: what remains of the text, read at once."""
    rng = random.Random(1)
    cache, text = SparseCache(model.config, SparseConfig.dense(**SMALL)), IDS[:1, :20].tolist()[0]
    forward(model, cache, torch.tensor([text]))
    for _ in range(40):
        if rng.random() < 0.4 and len(text) > 12:
            count = rng.randint(1, 10)
            cache.crop(-count)
            text = text[:-count]
        new = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice([1, 1, 3, 17]))]
        text += new
        got = forward(model, cache, torch.tensor([new]))
        with torch.no_grad():
            want = model(torch.tensor([text]), use_cache=False, logits_to_keep=1).logits[:, -1]
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


# ---- files that somebody has changed


def tamper(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    changed = change(tensors[name].clone())
    rest = {key: value for key, value in tensors.items() if key != name}
    return rest if changed is None else rest | {name: changed.contiguous()}


def put(value: float, *index: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[index if index else ...] = value
        return x

    return change


TAMPERED: list[tuple[str, Callable[[Tensor], Tensor | None]]] = [
    ("1.pool.v", lambda _: None),
    ("1.pool.scales", lambda _: None),
    ("1.pool.k", lambda x: x[:1]),
    ("1.pool.k", lambda x: x.float()),
    ("1.pool.stats", put(float("nan"), 0, 0, 0, 0)),
    ("1.pool.scales", put(float("inf"), 0, 0, 0, 0)),
    ("1.residual_k", lambda x: x[:, :1]),
    ("1.residual_v", lambda x: x.half()),
    ("1.table", put(10**6, 0, 0, 0)),
    ("1.table", put(-2, 0, 0, 0)),
    ("1.table", lambda x: x[..., :1]),
    ("1.table", lambda x: x[:, :, [1, 1, *range(2, x.shape[2])]]),
    ("sequences.lengths", put(10**9, 0)),
    ("sequences.lengths", put(-1, 0)),
    ("sequences.lengths", lambda x: x + 8),
    ("sequences.lengths", lambda x: x.int()),
    ("sequences.sealed", lambda x: x + 1),
    ("sequences.sealed", lambda x: x - 1),
    ("sequences.freed", put(10**6, 0)),
    ("sequences.window", put(10**6)),
    ("sequences.columns", put(0)),
    ("sequences.columns", lambda x: x[None]),
    ("1.selection.age", put(99)),
    ("1.selection.lists", put(10**6, 0, 0, 0)),
    ("1.selection.lists", lambda _: None),
    ("1.selection.local_start", put(10**6, 0)),
]


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = SparseCache(model.config, PRESETS["half"])
    forward(model, cache, IDS[:, :75])
    forward(model, cache, IDS[:, 75:76])
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    cache.save(path)
    return path


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, to, metadata)
    return to


@pytest.mark.parametrize("index", range(len(TAMPERED)), ids=lambda i: f"{TAMPERED[i][0]}-{i}")
def test_a_changed_file_is_refused_by_name(model: Any, saved: Path, index: int, tmp_path: Path) -> None:
    name, change = TAMPERED[index]

    def edit(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        new = tamper(tensors, name, change)
        tensors.clear()
        tensors.update(new)

    path = rewritten(saved, tmp_path / "bad.safetensors", edit)
    with pytest.raises(ValueError, match=r"SparseCache\.load: .*bad\.safetensors: ") as caught:
        SparseCache.load(path, model.config)
    text = str(caught.value)
    part = name.split(".")[0]  # or what contradicts it
    assert f"{part}." in text or (part == "sequences" and "0.table" in text), text


def test_other_changes_of_a_file(model: Any, saved: Path, tmp_path: Path) -> None:
    def check(change: Callable[[dict[str, Tensor], dict[str, str]], None], message: str) -> None:
        path = rewritten(saved, tmp_path / "bad.safetensors", change)
        with pytest.raises(ValueError, match=message):
            SparseCache.load(path, model.config)

    check(lambda t, _: t.update(extra=torch.zeros(1)), "extra: expected a layer and a name")
    check(lambda t, _: t.update({"1.extra": torch.zeros(1)}), r"1\.extra: expected no such tensor")
    check(lambda t, _: [t.pop(key) for key in list(t) if key.startswith("2.")] and None, r"the layers \[0, 1, 2\]")
    check(lambda _, m: m.update(lserve_ext="{"), "Expecting property name")
    check(lambda _, m: m.update(lserve_ext="[" * 100_000), "recursion")
    check(lambda _, m: m.update(lserve_ext='{"format": 1}'), "format: expected 3, got 1")
    check(lambda _, m: m.update(lserve_ext='{"format": 3, "layers": 3}'), "expected a mapping")
    check(lambda _, m: m.update(lserve_ext=m["lserve_ext"].replace('"layers": 3', '"layers": 4')), "layers: expected")
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        SparseCache.load(tmp_path / "cut.safetensors", model.config)
    with pytest.raises(ValueError, match=r"expected a pattern of 3 layers x 1 kv heads"):
        SparseCache.load(saved, llama(layers=LAYERS, kv_heads=1).config)
    with pytest.raises(ValueError, match=r"0\.residual_k: expected \[B, 2, 16, 32\] for this model"):
        SparseCache.load(saved, llama(layers=LAYERS, head_dim=32).config)


def test_equal_caches_give_equal_files(model: Any, tmp_path: Path) -> None:
    """No old memory in them."""
    for name in ("a", "b"):
        torch.full((1 << 20,), float(ord(name)))  # what an allocation may find
        cache = SparseCache(model.config, PRESETS["dense"])
        forward(model, cache, IDS[:, :5])
        cache.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_save_costs_nothing(model: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    cache, path = SparseCache.load(saved, model.config), tmp_path / "kept.safetensors"
    cache.save(path)
    kept = path.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]
