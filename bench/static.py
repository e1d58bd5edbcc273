"""What ptxas made of the CUDA kernels: reads the machine code of a built library, and needs no GPU.

    python bench/static.py build/wheel/lserve_ext/_C.abi3.so             the gate, and a table of main loops
    python bench/static.py build/wheel/lserve_ext/_C.abi3.so --all       of all instantiations, not bfloat16's of 128

Fails on a stack, a spill, a wgmma that is waited for at once or (but for the general kernels) an access to an
address space that the compiler did not find out, and where a kernel lacks the instructions that it is written for, or
takes more registers than the blocks of threads that should share an SM leave to it.

The table is a roofline without a GPU. A main loop is the innermost one that both copies a tile to shared memory and
multiplies (by wgmma: one that multiplies, for other warps copy), and its instructions are counted as they stand,
whichever way a warp takes through them. Each of an SM's four schedulers issues one instruction a cycle, and each of
a block's four warps goes through the loop once a tile, in decode with a quarter of it; so a tile takes at least that
many cycles of a block, in which an H100's memory (3.0 TB/s as measured, 132 SMs at 1.755 GHz) brings 12.9 bytes
each. Headroom is what the tile brings over what memory could have brought: a kernel that
memory is to bind wants 2 or more, since schedulers rarely issue in more than 60 to 70% of cycles. Prefill, which
tensor cores are to bind, has the share of its instructions that are theirs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# Name (regular expression), registers at most, and instructions of which some must be there. Of an SM's 65,536
# registers, blocks of 128 threads with 168 each fit three times, with 128 four times. The shared memory of prefill
# leaves two blocks, or one of 256 threads, to which all 255 belong.
RULES: list[tuple[str, int, list[str]]] = [
    (r"^decode_kernel<\w+, (64|128), (plain|int8_per_group),", 168, ["HMMA", "LDSM", "LDGSTS.128"]),
    (r"^(decode|prefill|split_prefill)_kernel<", 255, ["HMMA", "LDSM", "LDGSTS.128"]),
    (r"^sm90::prefill_kernel", 255, ["HGMMA", "LDGSTS.128"]),
    (r"^general_(decode|prefill|mass)_kernel", 128, []),
    (r"^mass_kernel<\w+, 256", 128, ["HMMA", "LDSM", "LDGSTS.128"]),
    (r"^mass_kernel", 96, ["HMMA", "LDSM", "LDGSTS.128"]),
    (r"^page_scores_kernel<.*, 256>", 184, ["HMMA", "LDGSTS.128"]),
    (r"^page_scores_kernel", 128, ["HMMA", "LDGSTS.128"]),
    (r"^select_kernel", 128, ["ATOMS"]),
    (r"^(append|quantize)_kernel<.*, [48]>", 128, ["LDG.128", "STG.64|STG.32"]),
    (r"^gather_kernel<uint4>", 128, ["LDG.128", "STG.128"]),
    (r"^page_stats_kernel<.*, [48], ", 128, ["LDG.128", "STG.128"]),
    (r"", 128, []),
]
STORAGE = {"0": "plain", "1": "int8_per_group", "2": "int8_per_token"}
CLASSES = {
    "tensor cores": "H?GMMA|HMMA",
    "floats": "F(ADD|MUL|FMA|MNMX|SEL|SETP)|MUFU|F2F|F2FP|I2F|I2FP|H(ADD2|FMA2|MUL2)|PRMT",
    "shared memory": "LDSM|LDS|STS|LDGSTS|LDGDEPBAR|DEPBAR|SHFL",
    "global memory": "LDG|STG|LD|LDC|ULDC",
}
"""Of operations, by regular expressions; the others are addresses, predicates and branches."""
BYTES_A_CYCLE = 3.0e12 / 132 / 1.755e9
"""Of an SM."""
LEAST = {
    "decode plain": 4.2,
    "decode plain scattered": 3.0,
    "decode int8_per_group": 1.4,
    "decode int8_per_token": 1.5,
    "decode int8_per_token scattered": 1.1,
    "page_scores": 5.5,
}
"""Headroom of bfloat16 and 128 channels that a change must not fall below."""


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    instructions: Counter[str] = field(default_factory=Counter)
    code: list[tuple[int, str, int | None]] = field(default_factory=list)
    """Address, operation, and where it branches to."""

    def main_loop(self) -> Counter[str]:
        """Operations of the longest loop without a loop of the kind in it that both copies and multiplies."""
        found: list[tuple[int, int]] = []
        for end, _, start in self.code:
            if start is not None and start <= end:
                ops = {op for address, op, _ in self.code if start <= address <= end}
                if "HGMMA" in ops or ("HMMA" in ops and any(op.startswith("LDGSTS") for op in ops)):
                    found.append((start, end))
        # What was set apart from a loop, and jumps back into it, is no other loop.
        loops = [a for a in found if not any(b[0] < a[0] <= b[1] < a[1] for b in found)]
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        if not inner:
            return Counter()
        start, end = max(inner, key=lambda loop: loop[1] - loop[0])
        return Counter(op for address, op, _ in self.code if start <= address <= end)

    def tile_bytes(self) -> tuple[str, int]:
        """What the kernel is called in `LEAST`, and the bytes that its loop brings; 0: that is not what binds it."""
        kind = re.match(r"(?:sm90::)?(\w+?)_kernel<(\w+), (\d+)(?:, (\w+))?(?:, (true|false))?>", self.name)
        if kind is None:
            return self.name, 0
        op, dtype, D, storage = kind[1], kind[2], int(kind[3]), kind[4] or ""
        size = 4 if dtype == "float" else 2
        if op == "decode":  # 64 keys and values; of codes the grid of 16 keys or of each, and that of each value
            grid = {"plain": 0, "int8_per_group": 4 * 2 * D * size + 64 * 8, "int8_per_token": 64 * 16}[storage]
            name = f"decode {storage}{' scattered' * (kind[5] == 'true')}"
            return name, 64 * 2 * D * (size if storage == "plain" else 1) + grid
        if op == "page_scores":  # minimum and maximum of 32 groups
            return op, 32 * 2 * D * size
        return f"{op} {storage}".strip(), 0


def tool(name: str) -> str:
    """The machine's, or PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin" / name
    return str(packaged) if packaged.exists() else name


def readable(names: list[str]) -> dict[str, str]:
    """Mangled -> kernel<template arguments>."""
    text = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout
    plain = {}
    for mangled, name in zip(names, text.splitlines(), strict=True):
        name = name.replace("(anonymous namespace)::", "").replace("lserve::cuda::", "").removeprefix("void ")
        name = re.sub(r"\(Storage\)(\d)", lambda m: STORAGE[m[1]], name)
        name = re.sub(r"\((?:int|bool)\)", "", name).replace("__nv_bfloat16", "bf16").replace("__half", "f16")
        plain[mangled] = name.partition("(")[0]
    return plain


def read(library: str) -> list[Kernel]:
    def dump(*options: str) -> str:
        command = [tool("cuobjdump"), *options, library]
        path = f"{Path(tool('nvdisasm')).parent}:/usr/local/bin:/usr/bin:/bin"
        return subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": path}).stdout

    kernels: dict[tuple[str, str], Kernel] = {}
    arch = ""
    for line in dump("--dump-resource-usage").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+?):?$", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernels[arch, name] = Kernel(arch, name, int(found[1]), int(found[2]))
    kernel = None
    for line in dump("-sass").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels[arch, found[1]]
        elif kernel and (
            found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)", line)
        ):
            guard, op = (found[2] or "").strip(), found[3]
            target = re.search(r"0x([0-9a-f]+)", found[4]) if op.startswith("BRA") else None
            if guard == "@!PT":  # never executed: ptxas pads with such
                continue
            base = op.partition(".")[0]
            if base in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
                base += next((f".{n}" for n in (128, 64) if f".{n}" in op), ".32")
            kernel.instructions[base] += 1
            kernel.code.append((int(found[1], 16), base, int(target[1], 16) if target else None))
    names = readable([k.name for k in kernels.values()])
    for k in kernels.values():
        k.name = names[k.name]
    return list(kernels.values())


def faults(kernel: Kernel) -> list[str]:
    _, registers, wanted = next(rule for rule in RULES if re.search(rule[0], kernel.name))
    found = [f"lacks {ops}" for ops in wanted if not any(kernel.instructions[op] for op in ops.split("|"))]
    unwanted = ["LDL", "STL"] if re.match("general_|mass_", kernel.name) else ["LDL", "STL", "LD", "ST"]
    found += [f"has {kernel.instructions[op]} {op}" for op in unwanted if kernel.instructions[op]]
    if 2 * kernel.instructions["WARPGROUP"] > kernel.instructions["HGMMA"]:
        found.append("waits for every product: ptxas found no way to let them run in the background")
    if kernel.stack:
        found.append(f"has a stack of {kernel.stack} bytes")
    if kernel.registers > registers:
        found.append(f"takes {kernel.registers} registers, more than {registers}")
    return found


def roofline(kernel: Kernel) -> list[str] | None:
    """A row of the table; None: it has no loop of the kind."""
    loop = kernel.main_loop()
    if not loop:
        return None
    _, size = kernel.tile_bytes()
    total, rest = loop.total(), Counter(loop)
    counts = []
    for pattern in CLASSES.values():
        own = [op for op in rest if re.fullmatch(pattern, op.partition(".")[0])]
        counts.append(sum(rest.pop(op) for op in own))
    bound = (
        f"{size:,}" if size else "",
        f"{headroom(kernel):.2f}" if size else f"{(loop['HMMA'] + loop['HGMMA']) / total:.0%} tensor cores",
    )
    return [kernel.name, str(kernel.registers), str(total), *map(str, counts), str(rest.total()), *bound]


def headroom(kernel: Kernel) -> float:
    return kernel.tile_bytes()[1] / kernel.main_loop().total() / BYTES_A_CYCLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="with CUDA kernels")
    parser.add_argument("--all", action="store_true", help="all instantiations")
    options = parser.parse_args()

    kernels = read(options.library)
    bad = [f"{k.arch} {k.name}: {fault}" for k in kernels for fault in faults(k)]
    for arch in sorted({k.arch for k in kernels}):
        own = [k for k in kernels if k.arch == arch]
        print(f"{arch}: {len(own)} kernels")
        shown = [k for k in own if options.all or "<bf16, 128" in k.name]
        rows = [row for k in sorted(shown, key=lambda k: k.name) if (row := roofline(k))]
        head = ["main loop", "registers", "instructions", *CLASSES, "others", "bytes a tile", "headroom"]
        print("\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]))
        for k in own:
            name, size = k.tile_bytes()
            if size and "<bf16, 128" in k.name and name in LEAST and headroom(k) < LEAST[name]:
                bad.append(f"{arch} {k.name}: headroom {headroom(k):.2f}, expected at least {LEAST[name]}")
    print("\n".join(bad) or "no stack, no spill, and the instructions that are meant")
    if bad or not kernels:
        sys.exit(1)


if __name__ == "__main__":
    main()
