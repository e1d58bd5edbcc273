"""What ptxas made of the CUDA kernels: reads the machine code of a built library, and needs no GPU.

    python .ci/sass.py build/wheel/lserve_ext/_C.abi3.so

Fails on a stack, a spill or (but for the general kernels) an access to an address space that the compiler did not
find out, and where a kernel lacks the instructions that it is written for, or takes more registers than the blocks of
threads that should share an SM leave to it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# Name (regular expression), registers at most, and instructions of which some must be there. Of an SM's 65,536
# registers, blocks of 128 threads with 168 each fit three times, with 128 four times. The shared memory of decode and
# prefill leaves two blocks, to which all 255 belong.
RULES: list[tuple[str, int, list[str]]] = [
    (r"^(decode|prefill)_kernel<", 255, ["HMMA", "LDSM", "LDGSTS.128"]),
    (r"^general_(decode|prefill|mass)_kernel", 128, []),
    (r"^mass_kernel", 80, ["HMMA", "LDSM"]),
    (r"^page_scores_kernel<.*, 256>", 176, ["HMMA", "LDGSTS.128"]),
    (r"^page_scores_kernel", 128, ["HMMA", "LDGSTS.128"]),
    (r"^select_kernel", 128, ["ATOMS"]),
    (r"^(append|quantize)_kernel<.*, [48]>", 128, ["LDG.128", "STG.64|STG.32"]),
    (r"^gather_kernel<uint4>", 128, ["LDG.128", "STG.128"]),
    (r"^page_stats_kernel<.*, [48], ", 128, ["LDG.128", "STG.128"]),
    (r"", 128, []),
]
STORAGE = {"0": "plain", "1": "codes_of_groups", "2": "codes_of_tokens"}


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    instructions: Counter[str] = field(default_factory=Counter)


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
        elif kernel and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)):
            guard, op = (found[1] or "").strip(), found[2]
            if guard == "@!PT":  # never executed: ptxas pads with such
                continue
            base = op.partition(".")[0]
            if base in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
                base += next((f".{n}" for n in (128, 64) if f".{n}" in op), ".32")
            kernel.instructions[base] += 1
    names = readable([k.name for k in kernels.values()])
    for k in kernels.values():
        k.name = names[k.name]
    return list(kernels.values())


def faults(kernel: Kernel) -> list[str]:
    _, registers, wanted = next(rule for rule in RULES if re.search(rule[0], kernel.name))
    found = [f"lacks {ops}" for ops in wanted if not any(kernel.instructions[op] for op in ops.split("|"))]
    unwanted = ["LDL", "STL"] if re.match("general_|mass_", kernel.name) else ["LDL", "STL", "LD", "ST"]
    found += [f"has {kernel.instructions[op]} {op}" for op in unwanted if kernel.instructions[op]]
    if kernel.stack:
        found.append(f"has a stack of {kernel.stack} bytes")
    if kernel.registers > registers:
        found.append(f"takes {kernel.registers} registers, more than {registers}")
    return found


def main() -> None:
    kernels = read(sys.argv[1])
    bad = [f"{k.arch} {k.name}: {fault}" for k in kernels for fault in faults(k)]
    for arch in sorted({k.arch for k in kernels}):
        print(f"{arch}: {sum(k.arch == arch for k in kernels)} kernels")
    print("\n".join(bad) or "no stack, no spill, and the instructions that are meant")
    if bad or not kernels:
        sys.exit(1)


if __name__ == "__main__":
    main()
