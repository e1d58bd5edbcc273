"""Pages whose home is limited: frames in host memory and a tier below. What is written comes back, whatever fails."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _tiny
import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import CONFIGS, feed, tokens
from test_placement import make, slot_bytes

import lserve_ext
from lserve_ext import SparseConfig
from lserve_ext.hf import SparseCache
from lserve_ext.home import Home, Inputs, open_tier
from lserve_ext.resident import Resident
from lserve_ext.tiers import ALIGNMENT, BadRecordError, DiskTier, TierFullError, TierTimeoutError

LIKE = {"k": torch.empty(0, 4, 8), "v": torch.empty(0, 4, 8), "scales": torch.empty(0, 2, dtype=torch.float64)}
PAGE = 2 * 4 * 8 * 4 + 16


def pages(blocks: list[int], version: int = 0) -> dict[str, torch.Tensor]:
    """What such a page holds: its block and how often that was written."""
    values = torch.tensor(blocks, dtype=torch.float64) + version / 1000
    found = {}
    for i, (name, x) in enumerate(LIKE.items()):
        noise = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(i))
        found[name] = (values.view(-1, *[1] * noise.dim()) + noise).to(x.dtype)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def home(frames: int, where: Any = "memory://home", limit: int | None = None, used: set[int] | None = None) -> Home:
    def is_used(blocks: np.ndarray) -> np.ndarray:
        return np.array([used is None or int(block) in used for block in blocks], bool)

    return Home(LIKE, frames * PAGE, None if where is None else lambda size: open_tier(where, limit, size), is_used)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_written_comes_back(data: st.DataObject) -> None:
    """Random blocks are written, read in any order and number, given up and written anew."""
    used: set[int] = set()
    ours = home(data.draw(st.integers(1, 8)), used=used)
    versions: dict[int, int] = {}
    for turn in range(data.draw(st.integers(1, 15))):
        free = sorted(set(range(24)) - used)
        if free and data.draw(st.booleans()):
            new = data.draw(st.lists(st.sampled_from(free), min_size=1, unique=True))
            ours.forget(np.array(new))
            used |= set(new)
            ours.write(np.array(new), pages(new, turn))
            versions |= dict.fromkeys(new, turn)
        elif used and data.draw(st.booleans()):
            used -= set(data.draw(st.lists(st.sampled_from(sorted(used)), max_size=5)))
        elif used and data.draw(st.booleans()):
            some = np.array(data.draw(st.lists(st.sampled_from(range(30)), max_size=20)), np.int64)
            if ours.tier is not None:
                ours.read_ahead(some)
        elif used:
            wanted = data.draw(st.lists(st.sampled_from(sorted(used)), max_size=30))
            want = {name: torch.cat([pages([b], versions[b])[name] for b in wanted] or [x]) for name, x in LIKE.items()}
            assert same(ours.read(np.array(wanted, np.int64)), want)
        tiers = ours.tiers()
        assert tiers["host"].used <= tiers["host"].peak <= tiers["host"].reserved == len(ours) * PAGE
        assert tiers["host"].used // PAGE + tiers["disk"].used // ALIGNMENT >= len(used)


def test_nothing_is_written_before_half_of_the_frames_are_taken(tmp_path: Path) -> None:
    """Spill begins under pressure; then each page is written once, and giving it up costs nothing."""
    ours = home(10, tmp_path)
    for block in range(5):
        ours.write(np.array([block]), pages([block]))
    tier = ours.tier
    assert tier is not None and ours.written == 0 and tier.used == 0
    for block in range(5, 40):
        ours.write(np.array([block]), pages([block]))
    assert ours.written == 35 and ours.loaded == 0
    for _ in range(3):
        ours.read(np.arange(40))
    assert ours.written <= 40 and ours.loaded >= 30
    loaded = ours.loaded
    ours.read(np.array([39]))
    assert ours.loaded == loaded


def test_read_ahead(tmp_path: Path) -> None:
    """What has come takes no second read, wherever it is when it is wanted; what nobody wants takes frames."""
    ours = home(8, tmp_path)
    ours.write(np.arange(24), pages([*range(24)]))
    ours._finish()
    absent = [*ours.below(np.arange(24))]
    assert len(absent) >= 16 and not len(ours.below(np.array([100])))
    ours.read_ahead(np.array(absent[:3]))
    assert same(ours.read(np.array(absent[:2])), pages(absent[:2]))
    assert ours.loaded == 3 and ours.ahead == 2
    for _ in range(2):  # the second time, nothing is left to be read
        ours.read_ahead(np.array(absent[:4]))
    assert ours.loaded == 4
    assert ours.tier is not None
    ours.tier.wait(p for ahead in ours._ahead for p in ahead.pending)
    ours.read_ahead(np.array([], np.int64))
    assert not ours._ahead and len(ours.below(np.array(absent[:4]))) < 4
    assert same(ours.read(np.arange(24)), pages([*range(24)]))
    ours.read_ahead(ours.below(np.arange(24))[:2])
    ours.forget(np.arange(24))  # while they are read
    ours.write(np.arange(24), pages([*range(24)], 1))
    assert same(ours.read(np.arange(24)), pages([*range(24)], 1))


def test_reading_ahead_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read again; only what is wanted can fail."""
    ours = home(4, tmp_path)
    ours.write(np.arange(12), pages([*range(12)]))
    ours._finish()
    absent = ours.below(np.arange(12))
    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "_read", lambda *args: iter(()))
        for part in (absent[:2], absent[2:4]):
            ours.read_ahead(part)
        time.sleep(0.1)
        ours.read_ahead(absent[4:6])
    assert same(ours.read(absent), pages(absent.tolist())) and ours.ahead <= 2


@pytest.mark.parametrize("name", ["dense", "pages", "alisa"])
def test_layers_that_come_next_are_read_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a tier makes threads wait, they wait while layers compute."""
    model = _tiny.llama(layers=4, attn_implementation="lserve")
    size, frames = slot_bytes(name), 12 if name == "pages" else 24
    slots = 13 if name == "pages" else 32  # less than all layers want, though lists are reused
    limits = {"device_bytes": slots * size, "host_bytes": frames * size, "disk_dir": "memory://ahead"}
    ids = torch.randint(0, 258, (1, 164), generator=torch.Generator().manual_seed(0))
    found = []
    for ahead in (False, True):
        cache = SparseCache(model.config, CONFIGS[name].replace(streaming_heads=None, **limits))
        with monkeypatch.context() as patch, torch.no_grad():
            if not ahead:
                patch.setattr(Resident, "_look_ahead", lambda self: None)
            parts = [ids[:, :140], *ids[:, 140:].split(1, 1)]
            logits = [model(part, use_cache=True, **_tiny.cached(cache)).logits[:, -1] for part in parts]
        home = next(layer.kv.pool.home for layer in cache.ours if layer.kv is not None)
        found.append((torch.stack(logits), home.loaded, home.ahead))
    (plain, _, never), (same, loaded, before) = found
    assert torch.equal(plain, same) and never == 0
    assert before > (0.9 if name == "dense" else 0.3) * loaded


def test_heads_that_come_in_turn_share_what_is_recomputed(tmp_path: Path) -> None:
    calls = []

    def recompute(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(rows))
        heads = torch.stack([rows, rows + 100], 1)
        return heads, -heads

    def encode(blocks: np.ndarray, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"k": k, "v": v}

    like = {name: LIKE[name] for name in ("k", "v")}
    ours = Home(like, 2 * 2 * 4 * 8 * 4, lambda size: open_tier(tmp_path, None, size), lambda b: b >= 0, encode, True)
    rows = torch.arange(5.0)[:, None, None].repeat(1, 4, 8)
    page, head = np.repeat(np.arange(5), 2), np.tile([0, 1], 5)  # block 2 * page + head
    k, v = recompute(rows)
    contents = {"k": k.flatten(0, 1), "v": v.flatten(0, 1)}
    ours.write(np.arange(10), contents, Inputs(rows, page, head, recompute))
    ours._finish()
    calls.clear()
    for some in (np.arange(0, 8, 2), np.arange(1, 8, 2), np.array([3]), np.arange(10)):  # two heads, a page, all
        found = ours.read(some)
        assert all(torch.equal(found[name], contents[name][torch.from_numpy(some)]) for name in like)
    assert calls[0] == 4 and len(calls) <= 2  # at last perhaps a page that was not among them
    assert ours.recomputed > 10


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_blocks_that_nobody_has_make_room(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In frames, and in a tier that is full of them, even while they are still being written."""
    write = DiskTier._write

    def slow(self: DiskTier, *args: Any) -> None:
        time.sleep(seconds)
        write(self, *args)

    monkeypatch.setattr(DiskTier, "_write", slow)
    used: set[int] = set()
    ours = home(2, tmp_path, 5 * ALIGNMENT, used)
    for first in range(0, 60, 6):
        used |= set(range(first, first + 6))
        for block in range(first, first + 6):
            ours.write(np.array([block]), pages([block]))
        assert same(ours.read(np.arange(first, first + 6)), pages(list(range(first, first + 6))))
        used.clear()


def test_limits_that_are_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"host_bytes: expected at least the {PAGE} bytes of one page, got {PAGE - 1}"):
        Home(LIKE, PAGE - 1, None, lambda blocks: blocks >= 0)
    ours = home(3, None)
    ours.write(np.arange(3), pages([0, 1, 2]))
    want = f"host_bytes: expected at least {4 * PAGE:,}, or disk_dir beside it, got {3 * PAGE}"
    with pytest.raises(ValueError, match=want):
        ours.write(np.array([3]), pages([3]))
    assert same(ours.read(np.arange(3)), pages([0, 1, 2]))
    ours = home(2, tmp_path, 3 * ALIGNMENT)
    for block in range(4):
        ours.write(np.array([block]), pages([block]))
    with pytest.raises(TierFullError, match=f"disk tier {tmp_path}: expected at most {3 * ALIGNMENT:,} bytes"):
        ours.write(np.array([4]), pages([4]))
    assert same(ours.read(np.arange(4)), pages(list(range(4))))


@pytest.mark.parametrize("where", ["disk", "url"])
def test_a_write_that_fails(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told at the next write, and tried again: no page is lost."""
    ours = home(4, tmp_path if where == "disk" else f"file://{tmp_path}")
    ours.write(np.arange(2), pages([0, 1]))

    def broken(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(type(ours.tier), "_write", broken)
        with pytest.raises(OSError, match="no room"):
            ours.write(np.arange(2, 9), pages(list(range(2, 9))))
    held = [0, 1]
    assert sorted(ours._blocks.tolist()) == [-1, -1, *held] and same(ours.read(np.array(held)), pages(held))
    ours.write(np.arange(10, 20), pages(list(range(10, 20))))
    everything = [*held, *range(10, 20)]
    assert same(ours.read(np.array(everything)), pages(everything))


def record_places(ours: Home) -> dict[int, int]:
    """Where each block's record stands in the file of a disk tier."""
    assert isinstance(ours.tier, DiskTier)
    from lserve_ext.tiers import _digest

    written = np.flatnonzero(ours._is_written).tolist()
    return {block: ours.tier._entries[_digest(b"page %d" % ours._serials[block])].place for block in written}


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_a_bad_record(kind: str, tmp_path: Path) -> None:
    """Is named; the other pages come."""
    ours = home(2, tmp_path)
    ours.write(np.arange(6), pages(list(range(6))))
    ours._finish()
    (bad, place), tier = next(iter(sorted(record_places(ours).items()))), ours.tier
    assert isinstance(tier, DiskTier) and ours._frame(np.array([bad]))[0] < 0
    if kind == "flipped":
        file = os.open(f"/proc/self/fd/{tier._file}", os.O_RDWR)
        byte = os.pread(file, 1, place * tier.stride + 100)
        os.pwrite(file, bytes([byte[0] ^ 1]), place * tier.stride + 100)
        os.close(file)
    else:
        os.ftruncate(tier._file, place * tier.stride + 10)
    with pytest.raises(BadRecordError, match=f"disk tier {tmp_path}: record 'page {ours._serials[bad]}' at {place}"):
        ours.read(np.array([bad]))
    frames = ours._blocks[ours._blocks >= 0]
    assert same(ours.read(frames), pages(frames.tolist()))


def test_a_load_past_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = home(2, tmp_path)
    ours.write(np.arange(6), pages(list(range(6))))
    ours._finish()
    read, tier = DiskTier._read, ours.tier
    assert tier is not None
    tier.deadline = (0.05, 0.0)

    def slow(self: DiskTier, places: Any, sizes: Any) -> Iterator[memoryview]:
        time.sleep(0.3)
        return read(self, places, sizes)

    gone = np.array([block for block in range(6) if ours._frame(np.array([block]))[0] < 0])
    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "_read", slow)
        with pytest.raises(TierTimeoutError, match="got no record 'page "):
            ours.read(gone)
    tier.deadline = (5.0, 0.0)
    assert same(ours.read(gone), pages(gone.tolist()))


def cached_model(name: str, disk: Any, frames: int = 8) -> tuple[Any, SparseCache]:
    limits = {"device_bytes": 40 * slot_bytes(name), "host_bytes": frames * slot_bytes(name), "disk_dir": disk}
    model = _tiny.llama(attn_implementation="lserve")
    return model, SparseCache(model.config, CONFIGS[name].replace(streaming_heads=None, **limits))


@pytest.mark.parametrize("failure", ["read", "write", "flipped"])
@pytest.mark.parametrize("name", ["pages", "alisa"])
def test_a_model_goes_on_after_a_failure(
    name: str, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that fails has not happened: the same tokens come as if it had never been tried."""
    model, cache = cached_model(name, tmp_path)
    plain = SparseCache(model.config, CONFIGS[name].replace(streaming_heads=None))
    ids = torch.randint(0, 258, (1, 160), generator=torch.Generator().manual_seed(0))

    def forward(cache: SparseCache, from_: int, to: int) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids[:, from_:to], use_cache=True, **_tiny.cached(cache)).logits
        return logits

    read = DiskTier._read

    def broken(*args: Any) -> Any:
        raise OSError(errno.EIO, "broken")

    def flipped(self: DiskTier, places: Any, sizes: Any) -> Iterator[memoryview]:
        for found in read(self, places, sizes):
            found[-1] ^= 1
            yield found

    assert torch.equal(*(forward(c, 0, 120) for c in (plain, cache)))
    failures = 0
    for i in range(120, 160):
        found = None
        with monkeypatch.context() as patch:
            if failure == "flipped":
                patch.setattr(DiskTier, "_read", flipped)
            else:
                patch.setattr(DiskTier, f"_{failure}", broken)
            try:
                found = forward(cache, i, i + 1)  # nothing may be missing
            except (OSError, BadRecordError):
                failures += 1
        found = forward(cache, i, i + 1) if found is None else found
        assert torch.equal(forward(plain, i, i + 1), found)
    assert failures
    assert not list(tmp_path.iterdir())  # no name is left


def test_a_prefix_is_made_again_of_its_token_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a record is lost for good, `reset` and another prefill, exact where it is dense."""
    model, cache = cached_model("dense", tmp_path)
    plain = SparseCache(model.config, CONFIGS["dense"])
    ids = torch.randint(0, 258, (1, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = [model(part, use_cache=True, **_tiny.cached(plain)).logits[:, -1] for part in ids.split([150, 5, 5], 1)]
        model(ids[:, :150], use_cache=True, **_tiny.cached(cache))
        monkeypatch.setattr(DiskTier, "_read", lambda *args: iter([memoryview(b"lost")] * 100))
        for _ in range(2):
            with pytest.raises(BadRecordError, match="record"):
                model(ids[:, 150:155], use_cache=True, **_tiny.cached(cache))
        monkeypatch.undo()
        cache.reset()
        found = [model(part, use_cache=True, **_tiny.cached(cache)).logits[:, -1] for part in ids.split([155, 5], 1)]
    torch.testing.assert_close(torch.stack(found), torch.stack(want[1:]), atol=1e-4, rtol=1e-4)


def test_a_full_disk_ends_a_step_and_nothing_more(tmp_path: Path) -> None:
    """The step that finds no room has not happened; what a crop gives back is room again."""
    model, _ = cached_model("pages", tmp_path)
    config = CONFIGS["pages"].replace(streaming_heads=None)
    page = slot_bytes("pages")
    limits = {"device_bytes": 40 * page, "host_bytes": 8 * page, "disk_dir": tmp_path, "disk_bytes": 60 * ALIGNMENT}
    caches = SparseCache(model.config, config), SparseCache(model.config, config.replace(**limits))
    ids = torch.randint(0, 258, (1, 400), generator=torch.Generator().manual_seed(0))

    def forward(cache: SparseCache, i: int) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids[:, i : i + 1], use_cache=True, **_tiny.cached(cache)).logits
        return logits

    def until_full(i: int) -> None:
        while True:
            assert torch.equal(forward(caches[1], i), forward(caches[0], i))
            i += 1

    for _ in range(3):
        i = caches[0].get_seq_length()
        with pytest.raises(TierFullError, match=f"disk tier {tmp_path}: expected at most {60 * ALIGNMENT:,} bytes"):
            until_full(i)
        i = caches[0].get_seq_length()
        assert i == caches[1].get_seq_length() > 60
        for cache in caches:
            cache.crop(-30)


def test_nothing_is_left_at_a_url() -> None:
    model, cache = cached_model("pages", "memory://left")
    with torch.no_grad():
        model(torch.zeros(1, 120, dtype=torch.int64), use_cache=True, **_tiny.cached(cache))
    fs = fsspec.filesystem("memory")
    assert fs.find("/left")
    del cache
    gc.collect()
    assert not fs.find("/left")


KILLED = """
import os, signal, sys
import _tiny, torch
from test_home import cached_model
model, cache = cached_model("pages", sys.argv[1])
with torch.no_grad():
    model(torch.zeros(1, 120, dtype=torch.int64), use_cache=True, **_tiny.cached(cache))
assert cache.memory()["disk"].used
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    paths = [str(Path(lserve_ext.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "kv"], env=environment, cwd=tmp_path, capture_output=True, timeout=300
    )
    assert run.returncode == -9, run.stderr.decode()
    assert (tmp_path / "kv").is_dir() and not list((tmp_path / "kv").iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make("pages", 1, 40, 8, tmp_path / "file" / "kv")


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"disk_dir: expected a folder, or fsspec installed .*, got 's3://bucket/kv'"):
        open_tier("s3://bucket/kv", None, 100)


def test_bad_limits(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"host_bytes": 100}, "host_bytes: expected None without device_bytes, got 100"),
        ({"disk_dir": "x", "device_bytes": 100}, "disk_dir: expected None without host_bytes, got 'x'"),
        ({"disk_bytes": 1, "device_bytes": 100, "host_bytes": 9}, "disk_bytes: expected None without disk_dir, got 1"),
        ({"host_bytes": 0, "device_bytes": 100}, "host_bytes: expected an int of at least 1, got 0"),
    ]
    for fields, text in bad:
        with pytest.raises(ValueError, match="SparseConfig." + text):
            SparseConfig.dense(**fields)
    with pytest.raises(TypeError, match=r"SparseConfig.disk_dir: expected a folder or a URL, got 3"):
        SparseConfig.dense(device_bytes=1, host_bytes=1, disk_dir=3)
    config = SparseConfig.dense(device_bytes=9, host_bytes=9, disk_dir=tmp_path)
    assert SparseConfig.from_dict(config.to_dict()) == config.replace(disk_dir=str(tmp_path))


def test_pages_of_one_forward_need_not_fit() -> None:
    """A prompt seals more pages at once than there are frames."""
    layers: list[Callable[[], Any]] = [lambda: make("pages", 1, None), lambda: make("pages", 1, 60, 1, "memory://one")]
    qkv = tokens(200)
    assert torch.equal(*(feed(layer(), qkv, [100, 200]) for layer in layers))
