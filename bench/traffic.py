"""What the CUDA kernels move, counted by the emulator of python_tests/twin; needs no GPU.

    cd build/twin && PYTHONPATH=$PWD/package python ../../bench/traffic.py        (the emulator: see docs/emulator.md)

The cases are those of bench/kernels.py, on a cache of 2,048 tokens of llama3-8b's heads. `bytes` are what a case cannot
do without, as the speed benchmark counts them; `read` and `written` are sectors of 32 bytes that warps ask of global
memory, all requests together, over those bytes; `first` leaves out what has been read before, which a cache may hold.
`conflicts` are the turns that plain loads and stores of shared memory (and ldmatrix) wait for banks, of all turns that
they take. What wgmma reads in shared memory is not counted. --lines shows which lines do it.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import Any

import kernels
import torch

from lserve_ext import _C

LIBRARY = ctypes.CDLL(_C.__file__)
SECTOR = 32
CASES = [(name, "auto") for name in kernels.CASES]
CASES += [(name, "int8") for name in kernels.CASES if name.startswith(kernels.READS_POOLS)]
"""Of kernels.py, with every kind of pools that a case reads."""


class Stats(ctypes.Structure):
    """Of python_tests/twin/simt.h, field by field."""

    _fields_ = [
        (name, ctypes.c_long)
        for name in (
            *("launches", "blocks", "barriers", "warp_ops", "mma", "ldmatrix", "ldmatrix_conflicts"),
            *("copies_never_waited", "atomics", "read_bytes", "written_bytes", "read_sectors", "written_sectors"),
            *("first_read_sectors", "copied_bytes", "copied_sectors", "shared_wavefronts", "shared_conflicts"),
        )
    ]


class Instruction(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_long)
        for name in ("offset", "write", "shared", "requests", "bytes", "sectors", "wavefronts", "conflicts")
    ]


def work_of(name: str, kv: str, tokens: int = 2048, prompt: int = 256) -> kernels.Work:
    return kernels.CASES[name](kernels.Layer("llama3-8b", tokens, 1, "bfloat16", kv, prompt, "cpu"))


def counted(call: Callable[[], Any]) -> Stats:
    stats = Stats()
    LIBRARY.simt_start()
    try:
        call()
    finally:
        LIBRARY.simt_stop(ctypes.byref(stats))
    return stats


def lines() -> dict[str, Counter[str]]:
    """What each line of csrc/cuda did in the last call that was counted; for inlined ones, with their callers."""
    room = LIBRARY.simt_instructions(None, 0)
    found = (Instruction * room)()
    LIBRARY.simt_instructions(found, room)
    command = ["addr2line", "-i", "-a", "-e", _C.__file__, *(hex(x.offset - 1) for x in found)]
    places = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("0x")[1:]
    sums: dict[str, Counter[str]] = {}
    for x, place in zip(found, places, strict=True):
        frames = [line.split("csrc/cuda/")[1].split()[0] for line in place.splitlines() if "csrc/cuda/" in line]
        kind = f"{'shared' if x.shared else 'global'} {'write' if x.write else 'read'}"
        own = sums.setdefault(f"{kind}  {' < '.join(frames[:3])}", Counter())
        own.update({name: getattr(x, name) for name in ("requests", "bytes", "sectors", "wavefronts", "conflicts")})
    return sums


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--lines", type=int, default=0, help="show so many lines with most sectors, or conflicts")
    options = parser.parse_args()
    head = ["case", "bytes", "read", "first", "written", "conflicts", "products", "barriers", "atomics", "launches"]
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head))))
    for name, kv in CASES:
        if not any(word in name for word in options.only):
            continue
        work = work_of(name, kv, options.tokens, options.prompt)
        s, size = counted(work.call), work.reads + work.writes
        parts = (s.read_sectors, s.first_read_sectors, s.written_sectors)
        conflicts = f"{s.shared_conflicts + s.ldmatrix_conflicts:,} of {s.shared_wavefronts:,}"
        row = [f"{name}{', int8' if kv == 'int8' else ''}", f"{size:,}"]
        row += [f"{part * SECTOR / size:.2f}" for part in parts] + [conflicts]
        row += [f"{x:,}" for x in (s.mma, s.barriers, s.atomics, s.launches)]
        print(f"| {' | '.join(row)} |", flush=True)
        found = lines() if options.lines else {}
        for key, wanted in (("sectors", "global"), ("conflicts", "shared")):
            own = sorted((place for place in found if wanted in place), key=lambda p: -found[p][key])
            for place in own[: options.lines]:
                print(f"    {dict(found[place])}  {place}")


if __name__ == "__main__":
    main()
