"""The instructions of cuda/ptx.cuh do what the kernels rely on: those of the twin on a CPU, and those of a GPU.

So whatever the kernels' tests show on the twin is worth as much as this test is on a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
TWIN = ROOT / "python_tests" / "twin"

INPUT = np.dtype(
    [
        ("rows", "u2", (32, 8)), ("a", "u2", (2, 16, 16)), ("b", "u2", (2, 16, 8)), ("c", "f4", (16, 8)),
        ("x", "f4", 32), ("wide_a", "u2", (2, 64, 16)), ("wide_b", "u2", (2, 16, 64)),
    ]
)  # fmt: skip
OUTPUT = np.dtype(
    [
        ("misaligned", "u4"), ("copied", "u2", (2, 32, 8)), ("matrices", "u4", (32, 4)), ("transposed", "u4", (32, 4)),
        ("d", "f4", (2, 16, 8)), ("power", "f4", 32), ("logarithm", "f4", 32), ("codes", "f4", (32, 4)),
        ("packed", "u4", (2, 32)),
        ("unpacked", "f4", (2, 32, 2)), ("butterfly", "f4", 32), ("up", "f4", 32), ("down", "f4", 32),
        ("broadcast", "f4", 32), ("ballot", "u4"), ("any", "u4"), ("all", "u4"), ("quotients", "f4", (2, 65536)),
        ("turned", "u4", 32),
        ("wide_d", "f4", (2, 2, 64, 64)), ("met", "u4", (128, 3)),
    ]
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16)


def headers() -> Path:
    places = [Path(sysconfig.get_path("purelib")) / "nvidia/cu13/include", Path("/usr/local/cuda/include")]
    for place in places:
        if (place / "cuda_bf16.h").exists() and (place / "crt/host_defines.h").exists():
            return place
    pytest.skip("needs the headers of CUDA: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl")


def compiled(folder: Path, device: str) -> ctypes.CDLL:
    library, source = folder / f"{device}.so", TWIN / "instructions.cu"
    if device == "cuda":
        source = Path(shutil.copy(source, folder))  # beside it lie the twin's headers, which would be found first
        arch = "sm_90a" if torch.cuda.get_device_capability() == (9, 0) else "native"
        command = ["nvcc", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-std=c++17", f"-I{ROOT / 'csrc'}"]
        command += ["-o", str(library), str(source)]
    else:
        command = ["c++", "-shared", "-fPIC", "-std=c++17", "-O1", "-fno-strict-aliasing", f"-I{TWIN}"]
        command += [f"-I{ROOT / 'csrc'}", "-isystem", str(headers()), "-o", str(library)]
        command += [*map(str, (TWIN / "simt").glob("*.cpp")), "-xc++", str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def as_words(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.gpu
def test_instructions(device: str, tmp_path: Path) -> None:
    if device == "cuda" and not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    rng = np.random.default_rng(0)
    given = np.zeros((), INPUT)
    given["rows"] = rng.integers(0, 2**16, (32, 8))
    a, b = (torch.from_numpy(rng.integers(-8, 9, shape)).float() for shape in ((16, 16), (16, 8)))
    for i, dtype in enumerate(DTYPES):  # whole numbers this small are exact in both
        given["a"][i], given["b"][i] = as_words(a.to(dtype)), as_words(b.to(dtype))
    wide_a, wide_b = (torch.from_numpy(rng.integers(-8, 9, shape)).float() for shape in ((64, 16), (16, 64)))
    for i, dtype in enumerate(DTYPES):
        given["wide_a"][i], given["wide_b"][i] = as_words(wide_a.to(dtype)), as_words(wide_b.to(dtype))
    given["c"] = rng.integers(-100, 101, (16, 8))
    given["x"] = rng.standard_normal(32) * 10
    given["x"][:4] = [-np.inf, 0, -200, 1]

    run = compiled(tmp_path, device).run
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    sizes = (ctypes.c_int * 2)()
    run(None, None, sizes)
    assert list(sizes) == [INPUT.itemsize, OUTPUT.itemsize]
    source = torch.from_numpy(np.frombuffer(given.tobytes(), np.uint8).copy()).to(device)
    target = torch.full((OUTPUT.itemsize,), 255, dtype=torch.uint8, device=device)
    run(source.data_ptr(), target.data_ptr(), sizes)
    out = np.frombuffer(target.cpu().numpy().tobytes(), OUTPUT)[0]

    rows, x = given["rows"], given["x"]
    assert out["misaligned"] == 0
    assert (out["copied"][0] == rows).all()
    assert (out["copied"][1] == rows * (np.arange(32) % 2 == 0)[:, None]).all()
    matrices = rows.reshape(4, 8, 8).astype(np.uint32)
    for name, m in (("matrices", matrices), ("transposed", matrices.transpose(0, 2, 1))):
        lane = np.arange(32)
        low, high = m[:, lane // 4, lane % 4 * 2], m[:, lane // 4, lane % 4 * 2 + 1]
        assert (out[name] == (high << 16 | low).T).all()
    product = a.numpy() @ b.numpy() + given["c"]
    assert (out["d"][0] == product).all() and (out["d"][1] == product).all()
    assert (out["turned"] == out["transposed"][:, 0]).all()
    if device == "cpu" or torch.cuda.get_device_capability()[0] == 9:
        assert (out["wide_d"] == 2 * (wide_a @ wide_b).numpy()).all()
        assert (out["met"] == np.stack([np.ones(128), np.zeros(128), 2 * (127 - np.arange(128)) + 1], 1)).all()
    with np.errstate(under="ignore"):
        np.testing.assert_allclose(out["power"], np.exp2(x), rtol=4e-7, atol=1e-37)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(out["logarithm"], np.log2(np.abs(x)), rtol=4e-7, atol=4e-7)
    lane = np.arange(32)
    assert (out["codes"] == np.stack([lane * 8, np.full(32, 128), lane, 255 - lane], 1)).all()
    for i, dtype in enumerate(DTYPES):
        rounded = torch.from_numpy(np.stack([x, -x], 1)).to(dtype)
        assert (out["packed"][i] == as_words(rounded).astype(np.uint32) @ np.array([1, 2**16], np.uint32)).all()
        assert (out["unpacked"][i] == rounded.float().numpy()).all()
    every = torch.arange(65536).to(torch.int16)  # wraps around
    for quotients, dtype in zip(out["quotients"], DTYPES, strict=True):
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(quotients, every.view(dtype).float().numpy() / np.float32(255))
    assert (out["butterfly"] == x[lane ^ 5]).all() and (out["broadcast"] == x[31 - lane]).all()
    assert (out["up"] == x[np.where(lane < 3, lane, lane - 3)]).all()
    assert (out["down"] == x[np.where(lane > 24, lane, lane + 7)]).all()
    assert out["ballot"] == sum(1 << i for i in range(32) if x[i] > 0) and (out["any"], out["all"]) == (1, 0)
