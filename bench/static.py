"""What ptxas made of the CUDA kernels: reads the machine code of a built library, and needs no GPU.

    python bench/static.py build/wheel/lserve_ext/_C.abi3.so             the gate, and a table of main loops
    python bench/static.py build/wheel/lserve_ext/_C.abi3.so --all       of all instantiations, not bfloat16's of 128

Fails on a stack, a spill, a wgmma that is waited for at once, an integer division in a main loop or (but for the
general kernels) an access to an address space that the compiler did not find out, and where a kernel lacks the
instructions that it is written for, or takes more registers than the blocks of threads that should share an SM leave
to it.

The table is a roofline without a GPU. A main loop is the innermost one that both copies a tile to shared memory and
multiplies (by wgmma: one that multiplies, for other warps copy). Of its instructions, all are counted, and those of a
usual turn: the fewest that lead from its start back to it by way of all copies, products, loads of operands and
powers of two, and of those that look tokens up the share of a turn. What it goes around are masks, a maximum that
rises and infinite values. Prefill of codes by mma.sync, which has a loop of its own to unpack a tile, is not listed.

Before a loop stands its prologue: how many loads from global memory lead to the first copy, on the way that has most of
them, and how many of these wait for each other. A loop without a copy of its own has none.

Each of an SM's four schedulers issues one instruction a cycle, and each of a block's four warps goes through the loop
once a tile, in decode with a quarter of it; so a tile takes at least as many cycles of a block as a turn has
instructions. Headroom is how many it takes what is to bind the kernel, over those: an H100's memory (3.0 TB/s as
measured, 132 SMs at 1.755 GHz) to bring a tile at 12.9 bytes a cycle, or the tensor cores to multiply, 8 cycles an
m16n8k16 (an A100's; on sm_90 4), 32 a wgmma of m64n64k16. A kernel wants 1.5 to 2, since schedulers rarely issue in
more than 60 to 70% of cycles.
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
    (r"^decode_kernel<\w+, (64|96|128),", 168, ["HMMA", "LDSM", "LDGSTS.128"]),
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
    "floats": "F(ADD|MUL|FMA|MNMX|SEL|SETP)|EX2|MUFU|F2F|F2FP|I2F|I2FP|H(ADD2|FMA2|MUL2)|PRMT",
    "shared memory": "LDSM|LDS|STS|LDGSTS|LDGDEPBAR|DEPBAR|SHFL",
    "global memory": "LDG|STG|LD|ST",
}
"""Of operations, by regular expressions; the others are addresses, predicates and branches."""
USUAL = "H?GMMA|HMMA|LDSM|LDGSTS|EX2"
"""What every turn of a main loop does."""
LOOK_UPS = {"decode": 1 / 32, "decode scattered": 1 / 2, "prefill": 1 / 2, "split_prefill": 1 / 2, "mass": 1 / 8}
"""How many in a turn. They are what loads from global memory. By wgmma other warps do it."""
BYTES_A_CYCLE = 3.0e12 / 132 / 1.755e9
"""Of an SM."""
PRODUCT_CYCLES = {("sm_80", "HMMA"): 8, ("sm_90a", "HMMA"): 4, ("sm_90a", "HGMMA"): 32}
"""Of the tensor cores that a warp has a part of."""
LEAST = {
    "decode plain": 8.5,
    "decode plain scattered": 6.0,
    "decode int8_per_group": 2.2,
    "decode int8_per_token": 2.5,
    "decode int8_per_token scattered": 1.9,
    "page_scores": 6.0,
    "sm_80 mass": 0.9,
    "sm_80 prefill": 1.65,
    "sm_90a prefill": 1.65,
}
"""Headroom of bfloat16 and 128 channels that a change must not fall below. On sm_90a prefill is that by wgmma."""
TRIPS = {"decode plain": 5, "decode int8_per_group": 5, "page_scores": 2}
"""Loads of a prologue that may wait for each other."""


@dataclass(frozen=True)
class Instruction:
    address: int
    op: str
    """The first word of the operation, and the size of what a load or store moves."""
    target: int | None = None
    """Of a branch."""
    always: bool = True
    """Whether a branch is taken whatever a predicate says."""
    operands: str = ""
    """With the predicate that guards it first."""

    def registers(self) -> tuple[set[str], set[str]]:
        """Written and read, predicates included. Of several predicates the first ones are written."""

        def named(text: str) -> set[str]:
            found = re.findall(r"\b(U?[RP])(\d+)(\.64)?", text)
            return {f"{kind}{int(n) + i}" for kind, n, pair in found for i in range(2 if pair else 1)}

        guard, _, rest = self.operands.partition(" ")
        if re.fullmatch(
            "BRA|EXIT|B?SYNC|BSSY|BAR|ST|ST[GS].*|RED|LDGSTS.*|DEPBAR|LDGDEPBAR|CALL|RET|WARPSYNC", self.op
        ):
            return set(), named(self.operands)
        parts = re.split(r",\s*(?![^\[]*\])", rest)
        own = 1 + (len(parts) > 2 and bool(re.fullmatch(r"U?P[\dT]", parts[1] if parts[0][0] in "RU" else parts[0])))
        written = named(", ".join(parts[:own]))
        if first := re.match(r"(U?R)(\d+)", parts[0]):
            wide = 4 if ".128" in self.op else 2 if re.search(r"\.64|WIDE", self.op) else 1
            written |= {f"{first[1]}{int(first[2]) + i}" for i in range(wide)}
        return written, named(guard) | named(", ".join(parts[own:]))


def way(code: list[Instruction], through: str) -> list[Instruction]:
    """From the first to the last, or back to the first: past the most of these operations, and the fewest others."""
    if not code:
        return []
    at = {instruction.address: i for i, instruction in enumerate(code)}
    # From each instruction on: (what it passes, the more the less; instructions), and where to go next.
    best: list[tuple[int, int]] = [(0, 0)] * len(code)
    onward: list[int | None] = [None] * len(code)
    for i in reversed(range(len(code))):
        ways: list[tuple[tuple[int, int], int | None]] = [((0, 0), None)] if i + 1 == len(code) else []
        if (target := code[i].target) is not None:
            if target == code[0].address:
                ways.append(((0, 0), None))
            elif at.get(target, 0) > i:
                ways.append((best[at[target]], at[target]))
        if i + 1 < len(code) and not (code[i].always and (target is not None or code[i].op == "EXIT")):
            ways.append((best[i + 1], i + 1))
        cost, onward[i] = min(ways, default=((len(code), 0), None))  # no way: it leads elsewhere
        best[i] = (cost[0] - bool(re.fullmatch(through, code[i].op.partition(".")[0])), cost[1] + 1)
    found, i = [code[0]], 0
    while (following := onward[i]) is not None:
        i = following
        found.append(code[i])
    return found


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    instructions: Counter[str] = field(default_factory=Counter)
    code: list[Instruction] = field(default_factory=list)

    def main_loop(self) -> list[Instruction]:
        """The longest loop without a loop of the kind in it that both copies and multiplies."""
        found: list[tuple[int, int]] = []
        for last in self.code:
            if last.target is not None and last.target <= last.address:
                ops = {i.op for i in self.code if last.target <= i.address <= last.address}
                if "HGMMA" in ops or ("HMMA" in ops and any(op.startswith("LDGSTS") for op in ops)):
                    found.append((last.target, last.address))
        # What was set apart from a loop, and jumps back into it, is no other loop.
        loops = [a for a in found if not any(b[0] < a[0] <= b[1] < a[1] for b in found)]
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        if not inner:
            return []
        start, end = max(inner, key=lambda loop: loop[1] - loop[0])
        return [i for i in self.code if start <= i.address <= end]

    def usual_turn(self) -> dict[str, float]:
        """Operations, and how many of them a turn has in the mean."""
        name = self.name.partition("_kernel")[0]
        share = LOOK_UPS.get(name + " scattered" * self.name.endswith(", true>"), LOOK_UPS.get(name, 0.0))
        without, looked_up = (Counter(i.op for i in way(self.main_loop(), ops)) for ops in (USUAL, f"{USUAL}|LDG"))
        return {op: without[op] + share * (looked_up[op] - without[op]) for op in without | looked_up}

    def prologue(self) -> tuple[int, int]:
        """Loads from global memory before a tile is asked for, and how many of them wait for each other."""
        first = next((i for i, own in enumerate(self.code) if own.op.startswith("LDGSTS")), None)
        if first is None:
            return 0, 0
        loads = trips = 0  # those that the program has waited for
        comes_with: dict[str, int] = {}  # of a register, the trip that brings it
        for instruction in way(self.code[: first + 1], "LDG"):
            writes, reads = instruction.registers()
            trips = max([trips, *(comes_with.get(register, 0) for register in reads)])
            load = instruction.op.startswith("LDG.")
            loads += load
            comes_with |= dict.fromkeys(writes, trips + 1 if load else 0)
        return loads, trips

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
        return f"{self.arch} {op}" if "HGMMA" in self.instructions or self.arch == "sm_80" else op, 0

    def headroom(self) -> float:
        turn, (_, size) = self.usual_turn(), self.tile_bytes()
        cycles = sum(count * PRODUCT_CYCLES.get((self.arch, op), 0) for op, count in turn.items())
        return (size / BYTES_A_CYCLE if size else cycles) / sum(turn.values())


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
            if guard == "@!PT":  # never executed: ptxas pads with such
                continue
            target = re.search(r"0x([0-9a-f]+)", found[4]) if op.startswith("BRA") else None
            always = not guard and not re.match(r"\s*!?U?P\d", found[4]) and not re.search(r"\.(DIV|CONV)", op)
            base = "EX2" if op.startswith("MUFU.EX2") else "I2F.RP" if op.endswith(".RP") else op.partition(".")[0]
            if base in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
                base += next((f".{n}" for n in (128, 64) if f".{n}" in op), ".32")
            kernel.instructions[base] += 1
            to = int(target[1], 16) if target else None
            kernel.code.append(Instruction(int(found[1], 16), base, to, always, f"{guard} {found[4].strip()}"))
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
    if divisions := sum(i.op == "I2F.RP" for i in kernel.main_loop()):
        found.append(f"has {divisions} integer divisions in its main loop")
    if kernel.stack:
        found.append(f"has a stack of {kernel.stack} bytes")
    if kernel.registers > registers:
        found.append(f"takes {kernel.registers} registers, more than {registers}")
    return found


def roofline(kernel: Kernel) -> list[str] | None:
    """A row of the table; None: it has no loop of the kind."""
    turn = kernel.usual_turn()
    if not turn or re.match(r"(split_)?prefill_kernel<.*, true>", kernel.name):
        return None

    def count(pattern: str) -> float:
        return sum(n for op, n in turn.items() if re.fullmatch(pattern, op.partition(".")[0]))

    classes = [count(pattern) for pattern in CLASSES.values()]
    total, (_, size) = sum(turn.values()), kernel.tile_bytes()
    prologue = "{1} of {0}".format(*kernel.prologue()) if any("LDGSTS" in i.op for i in kernel.main_loop()) else ""
    numbers = [kernel.registers, len(kernel.main_loop()), total, *classes, total - sum(classes)]
    bound = [f"{size:,}" if size else "", f"{kernel.headroom():.2f}"]
    return [kernel.name, prologue, *(f"{n:.0f}" for n in numbers), *bound]


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
        head = ["main loop", "prologue", "registers", "all", "usual", *CLASSES, "others", "bytes a tile", "headroom"]
        print("\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]))
        for k in own:
            name, _ = k.tile_bytes()
            if "<bf16, 128" in k.name and name in LEAST and roofline(k) and k.headroom() < LEAST[name]:
                bad.append(f"{arch} {k.name}: headroom {k.headroom():.2f}, expected at least {LEAST[name]}")
            if "<bf16, 128" in k.name and k.prologue()[1] > TRIPS.get(name, 100):
                bad.append(
                    f"{arch} {k.name}: {k.prologue()[1]} loads wait for each other, expected {TRIPS[name]} at most"
                )
    print("\n".join(bad) or "no stack, no spill, and the instructions that are meant")
    if bad or not kernels:
        sys.exit(1)


if __name__ == "__main__":
    main()
