"""What the CUDA kernels move, counted by the emulator of python_tests/twin; needs no GPU.

    cd build/twin && PYTHONPATH=$PWD/package python ../../bench/traffic.py        (the emulator: see docs/emulator.md)

The cases are those of bench/kernels.py, on a cache of 2,048 tokens of llama3-8b's heads. `bytes` are what a case cannot
do without, as the speed benchmark counts them; `read` and `written` are sectors of 32 bytes that warps ask of global
memory, all requests together, over those bytes; `first` leaves out what has been read before, which a cache may hold.
`conflicts` are the turns that plain loads and stores of shared memory (and ldmatrix) wait for banks, beside the turns
that they take at best. What wgmma reads in shared memory is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from typing import Any

import kernels
import torch

from lserve_ext import _C

LIBRARY = ctypes.CDLL(_C.__file__)
SECTOR = 32


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


def counted(call: Callable[[], Any]) -> Stats:
    stats = Stats()
    LIBRARY.simt_start()
    try:
        call()
    finally:
        LIBRARY.simt_stop(ctypes.byref(stats))
    return stats


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=256)
    options = parser.parse_args()
    head = ["case", "bytes", "read", "first", "written", "conflicts", "products", "barriers", "atomics", "launches"]
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head))))
    for kv in ("auto", "int8"):
        for name, case in kernels.CASES.items():
            if not any(word in name for word in options.only):
                continue
            if kv == "int8" and not name.startswith(kernels.READS_POOLS):
                continue
            layer = kernels.Layer("llama3-8b", options.tokens, 1, "bfloat16", kv, options.prompt, "cpu")
            work = case(layer)
            s, size = counted(work.call), work.reads + work.writes
            parts = (s.read_sectors, s.first_read_sectors, s.written_sectors)
            conflicts = f"{s.shared_conflicts + s.ldmatrix_conflicts:,} of {s.shared_wavefronts:,}"
            row = [f"{name}{', int8' if kv == 'int8' else ''}", f"{size:,}"]
            row += [f"{part * SECTOR / size:.2f}" for part in parts] + [conflicts]
            row += [f"{x:,}" for x in (s.mma, s.barriers, s.atomics, s.launches)]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
