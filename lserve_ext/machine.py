"""What this machine can do at best: one clock, and the ceilings that benchmarks and the cost model measure with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch


class Machine:
    """A clock, sums and copies of memory that no cache holds, and matmuls.

    Args:
        cold: bytes that pass through the caches in one measurement of the bandwidth, more than they hold.
        device: "cpu" or "cuda".

    With one thread, CPU time is taken, which other processes on a shared machine do not stretch.
    """

    def __init__(self, cold: int, device: str) -> None:
        self.device = device
        self._cuda = device == "cuda"
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self._parts = cycle(torch.ones(4, cold // 8, 2, device=device).transpose(1, 2).contiguous().unbind())
        self._squares: dict[torch.dtype, torch.Tensor] = {}
        self._side = 8192 if self._cuda else 1024

    def seconds(self, call: Callable[[], Any]) -> float:
        """What one call takes; on a GPU, from its first kernel to its last."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        start = self._clock()
        _result = call()  # kept, because giving its memory back is not the call's time
        return self._clock() - start

    def bandwidth(self, copy: bool = False) -> float:
        """Bytes a second, of reading or of copying; afterwards no cache holds anything else."""
        part = next(self._parts)
        return part.nbytes / self.seconds(lambda: part[0].copy_(part[1]) if copy else part.sum())

    def matmul(self, *dtypes: torch.dtype) -> float:
        """Operations a second of torch's matmul of large squares, in the fastest of these dtypes."""
        for dtype in dtypes:
            if dtype not in self._squares:
                self._squares[dtype] = torch.randn(self._side, self._side, device=self.device).to(dtype)
        squares = [self._squares[dtype] for dtype in dtypes]
        times = [self.seconds(partial(torch.matmul, square, square)) for square in squares]
        return 2 * self._side**3 / min(times)
