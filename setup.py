"""Builds lserve_ext._C: one abi3 library for every torch from 2.11 on, with CPU and, where wanted, CUDA kernels.

Everything else about the package stands in pyproject.toml. The build listens to

    FORCE_CUDA            1: with CUDA kernels, nvcc from PyPI if there is no toolkit; 0: without;
                          unset: with them if there is a toolkit and the installed torch is a CUDA build
    CUDA_HOME             the toolkit, else it is looked for
    TORCH_CUDA_ARCH_LIST  "8.0+PTX;9.0a" by default
    MAX_JOBS              compilers at a time, ninja's choice by default
    CC, CXX               compilers; ccache is used when it is on PATH
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]  # torch 2.11
CUDA_FROM_PYPI = "cuda-toolkit[nvcc,cccl,crt,nvvm]==13.0.2"
# Contraction and the two "-fno" flags let selects and rintf vectorise; none of them reorders a sum.
FLOAT_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def site_packages() -> list[Path]:
    """sys.path, and the environment's own packages, which pip's build isolation hides from it."""
    return [Path(entry) for entry in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]]


def find_torch() -> Path | None:
    """The folder of the installed torch, of any flavour. It is never imported: only its headers are read."""
    return next((path / "torch" for path in site_packages() if (path / "torch/version.py").is_file()), None)


def torch_has_cuda(torch: Path) -> bool:
    return re.search(r"^cuda\b.*=\s*['\"]", (torch / "version.py").read_text(), re.MULTILINE) is not None


def find_cuda() -> Path | None:
    """A toolkit is a compiler and its headers: an nvcc on PATH may be a script that lives elsewhere."""
    nvcc = shutil.which("nvcc")
    places = [
        os.environ.get("CUDA_HOME"),
        nvcc and Path(nvcc).resolve().parent.parent,
        "/usr/local/cuda",
        *sorted(Path("/usr/local").glob("cuda-*"), reverse=True),
        *(path / "nvidia/cu13" for path in site_packages()),
    ]
    toolkits = (Path(place) for place in places if place)
    return next((p for p in toolkits if (p / "bin/nvcc").exists() and (p / "include/cuda_runtime.h").exists()), None)


def wants_cuda() -> bool:
    if "FORCE_CUDA" in os.environ:
        return os.environ["FORCE_CUDA"] == "1"
    torch = find_torch()
    return torch is not None and torch_has_cuda(torch) and find_cuda() is not None


def build_requirements() -> list[str]:
    """What pip adds to its isolated build environment: only what the machine does not have."""
    torch = [] if find_torch() else ["torch>=2.11"]
    cuda = [CUDA_FROM_PYPI] if wants_cuda() and not find_cuda() else []
    return torch + cuda


def architectures() -> list[str]:
    flags = []
    for arch in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0a"):
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = f"sm_{number}" + (f",compute_{number}" if arch.endswith("+PTX") else "")
        flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
    return flags


def has_sm90() -> bool:
    return any("sm_90a" in flag for flag in architectures())


def sources(cuda: bool, sm90: bool) -> list[Path]:
    patterns = [
        "module.c",
        "*.cpp",
        "cpu/*.cpp",
        *(["cuda/*.cu"] if cuda else []),
        *(["cuda/sm90/*.cu"] if sm90 else []),
    ]
    return [path for pattern in patterns for path in sorted(CSRC.glob(pattern))]


def ninja_file(output: Path, torch: Path, cuda: Path | None) -> str:
    """Only csrc/*.cpp sees torch's headers, so a kernel cannot come to depend on them."""
    launcher = ["ccache"] if shutil.which("ccache") else []
    host = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *FLOAT_FLAGS]
    # __FILE__ must not tell where the wheel was built.
    host += [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch}/=", f"-I{CSRC}"]
    compilers = {
        ".c": [*launcher, os.environ.get("CC", "cc"), *host, "-isystem", sysconfig.get_path("include")],
        ".cpp": [*launcher, os.environ.get("CXX", "c++"), "-std=c++17", "-fvisibility-inlines-hidden", *host],
    }
    link = [os.environ.get("CXX", "c++"), "-shared", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if cuda:
        nvcc = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", f"-I{CSRC}"]
        compilers[".cu"] = [*launcher, str(cuda / "bin/nvcc"), *nvcc]
        # libtorch_cuda is not linked, and cudart is linked in: the wheel must also load where neither exists.
        runtime = next(path for path in cuda.glob("lib*/libcudart_static.a"))
        libraries += [f"-L{runtime.parent}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    lines = []
    for suffix, command in compilers.items():
        text = f"{shlex.join(command)} $flags -MMD -MF $out.d -c $in -o $out"
        lines += [f"rule compile{suffix}", f"  command = {text}", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", f"  command = {shlex.join(link)} $in -o $out {shlex.join(libraries)}"]
    objects = []
    for source in sources(cuda=cuda is not None, sm90=cuda is not None and has_sm90()):
        objects.append(f"{source.relative_to(CSRC)}.o")
        lines.append(f"build {objects[-1]}: compile{source.suffix} {source}")
        if source.parent == CSRC and source.suffix == ".cpp":
            flags = [*STABLE_ABI, *(["-DLSERVE_CUDA"] if cuda else []), "-isystem", str(torch / "include")]
            lines.append(f"  flags = {shlex.join(flags)}")
        if source.suffix == ".cu":  # a folder holds the kernels of one architecture
            only = [flag for flag in architectures() if source.parent.name != "sm90" or "sm_90a" in flag]
            lines.append(f"  flags = {shlex.join([*only, *(['-DLSERVE_SM90'] if has_sm90() else [])])}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            sys.exit("lserve_ext needs torch's headers: pip install 'torch>=2.11'")
        cuda = find_cuda() if wants_cuda() else None
        if wants_cuda() and cuda is None:
            sys.exit(f"FORCE_CUDA=1, but there is no CUDA toolkit: set CUDA_HOME, or pip install '{CUDA_FROM_PYPI}'")
        print(f"lserve_ext: torch {torch}, CUDA kernels: {cuda or 'none'}", flush=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(output, torch, cuda))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *jobs], check=True)


def relative(paths: Iterable[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# All sources and headers, whatever is compiled here: an sdist takes them from this list.
extension = Extension(
    "lserve_ext._C",
    sources=relative(sources(cuda=True, sm90=True)),
    depends=relative([*sorted(CSRC.rglob("*.h")), *sorted(CSRC.rglob("*.cuh"))]),
    py_limited_api=True,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=build_requirements(),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
