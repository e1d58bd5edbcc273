"""What all tests share: a seed, the devices, and a header that says what is tested."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while others work make a shared machine crawl

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

import lserve_ext

SOURCE = Path(__file__).parents[1] / "lserve_ext"

# No deadline: the machines that run this are shared. Drawn anew at each run, except in CI, where a failure must repeat.
hypothesis.settings.register_profile("lserve_ext", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("lserve_ext")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--planted-bugs", action="store_true", help="run test_planted_bugs.py, half an hour, and only that"
    )
    parser.addoption("--installed", action="store_true", help="refuse to test the source tree instead of a wheel")


def pytest_configure(config: pytest.Config) -> None:
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # of `-n`: they share the cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))
    if config.getoption("--installed") and Path(lserve_ext.__file__).parent == SOURCE:
        raise pytest.UsageError(f"--installed, but lserve_ext was imported from the source tree, {SOURCE}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--planted-bugs")
    items[:] = [item for item in items if (item.get_closest_marker("planted") is not None) == wanted]


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"lserve_ext {lserve_ext.__version__}: {lserve_ext.__file__}", f"torch {torch.__version__}, GPU: {gpu}"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is the CPU, and the GPU too for the tests marked `gpu`."""
    if "device" in metafunc.fixturenames:
        gpu = metafunc.definition.get_closest_marker("gpu") and torch.cuda.is_available()
        metafunc.parametrize("device", ["cpu", "cuda"] if gpu else ["cpu"])


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
