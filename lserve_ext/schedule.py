"""ALISA's three phases (Algorithm 2) and what they were compared with, on paper: seconds of every step of a batch.

In phase I all KV lies on the device. From step p1 on (II) a share alpha of it lies in host memory, its oldest tokens,
and what is selected of these is loaded. From step p2 on (III) a share beta, the oldest of all, is not kept at all but
recomputed from the layers' inputs when it is selected. `SparseCache` needs none of this: it moves single pages, so that
its phases follow from what fits (`plan.Plan`). Here is what a fixed split of the tokens costs.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .machine import Profile
from .plan import Model

METHODS = ("static", "static, CPU attends", "static, SWA", "scheduled", "paging")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Of a run.

    Args:
        alpha: share of all tokens that the device does not hold from step p1 on.
        beta: share of all tokens that is recomputed from step p2 on, a part of alpha.
        p1, p2: steps at which phases II and III begin; the number of steps: never.
    """

    alpha: float
    beta: float
    p1: int
    p2: int

    def phase(self, step: int) -> int:
        """1, 2 or 3."""
        return 1 + (step >= self.p1) + (step >= self.p2)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a schedule is weighed with. A token is one of every sequence, in all layers.

    Args:
        tokens: [steps] that are held in each step.
        picks: [steps] tokens that are selected among those that are not local.
        local: [steps] tokens that are selected because they are the newest.
        base: [steps] seconds, wherever KV lies.
        device, host: tokens that fit.
        load, spill, recompute: seconds of a token.
    """

    tokens: np.ndarray
    picks: np.ndarray
    local: np.ndarray
    base: np.ndarray
    device: float
    host: float
    load: float
    spill: float
    recompute: float

    @property
    def steps(self) -> int:
        return len(self.tokens)


def seconds(costs: Costs, schedule: Schedule) -> np.ndarray:
    """[steps] of each step; infinite where something does not fit."""
    step, n = np.arange(costs.steps), costs.tokens
    away = np.where(step >= schedule.p1, schedule.alpha, 0.0)
    gone = np.where(step >= schedule.p2, np.minimum(schedule.beta, away), 0.0)
    far = n - costs.local

    def attended(oldest: np.ndarray) -> np.ndarray:
        """Of so many oldest tokens."""
        share = np.divide(oldest, far, out=np.ones_like(far), where=far > oldest)
        return np.asarray(costs.picks * share + np.maximum(0.0, oldest - far))

    again = attended(gone * n)
    loaded = attended(away * n) - again
    spilled = np.diff(away * n, prepend=0.0)
    found = costs.base + loaded * costs.load + again * costs.recompute + spilled * costs.spill
    slack = 1e-9 * n
    fits = ((1 - away) * n <= costs.device + slack) & ((away - gone) * n <= costs.host + slack)
    return np.where(fits, found, np.inf)


def search(costs: Costs) -> Schedule | None:
    """The schedule of the fewest seconds, or None if none fits.

    Every second that KV is away costs something, so phase II begins as late as the device allows, and alpha is what
    does not fit at the end. Where a token is recomputed faster than it is loaded, all that is away is recomputed at
    once; else as little as the host allows, as late as it allows.
    """
    steps, last = costs.steps, float(costs.tokens[-1])
    if last <= costs.device:
        return Schedule(0.0, 0.0, steps, steps)
    alpha = 1 - costs.device / last
    p1 = int(np.argmax(costs.tokens > costs.device))
    if costs.recompute < costs.load:
        return Schedule(alpha, alpha, p1, p1)
    beta = max(0.0, alpha - costs.host / last)
    over = (alpha * costs.tokens > costs.host + 1e-9 * costs.tokens) & (np.arange(steps) >= p1)
    return Schedule(alpha, beta, p1, int(np.argmax(over)) if over.any() else steps)


@dataclasses.dataclass(frozen=True)
class Workload:
    """So many sequences, each with a prompt of so many tokens and so many to generate."""

    batch: int
    prompt: int
    output: int


class Paper:
    """A model on a machine, every token's KV kept.

    Args:
        kv_bits: 16, or 8 with a scale and a minimum for each key and value.
        sparsity: share of tokens that sparse window attention (SWA) leaves out; half of the others are the newest.
    """

    def __init__(self, model: Model, profile: Profile, kv_bits: int = 16, sparsity: float = 0.8) -> None:
        self.model, self.profile, self.kv_bits, self.sparsity = model, profile, kv_bits, sparsity

    @property
    def token_bytes(self) -> int:
        """KV of a token, in all layers."""
        m = self.model
        return 2 * m.layers * m.kv_heads * (m.head_dim * self.kv_bits // 8 + (8 if self.kv_bits == 8 else 0))

    @property
    def device_bytes(self) -> float:
        """That KV may take."""
        return max(0.0, self.profile.figure("device_bytes") - self.model.weight_bytes)

    def costs(self, work: Workload, swa: bool) -> Costs:
        """Of a batch; without SWA a step attends everything."""
        m, profile = self.model, self.profile
        size, unit = self.token_bytes * work.batch, self.token_bytes / m.layers
        tokens = work.prompt + np.arange(1, work.output + 1, dtype=float)
        picks, local = (tokens * (1 - self.sparsity) / 2,) * 2 if swa else (tokens, np.zeros_like(tokens))
        kind = "attend.int8" if self.kv_bits == 8 else "attend.auto"
        read = (picks + local) * size / profile.figure(kind)
        calls = m.layers * profile.figure("layer.mass" if swa else "layer")
        base = m.step_seconds(profile, work.batch) + calls + read
        inputs = m.layers * m.hidden * m.dtype.itemsize * work.batch
        products = 2 * m.hidden * 2 * m.kv_heads * m.head_dim * m.layers * work.batch
        again = profile.seconds("fetch", inputs, inputs) + profile.seconds("matmul.bfloat16", products)
        fetch, spill = (profile.seconds(name, size, unit * work.batch) for name in ("fetch", "spill"))
        host = profile.figure("host_bytes") / size
        return Costs(tokens, picks, local, base, self.device_bytes / size, host, fetch, spill, again)

    def prefill(self, tokens: float) -> float:
        """Seconds of so many tokens."""
        return self.profile.seconds("matmul.bfloat16", 2 * self.model.parameters * tokens)

    def throughput(self, work: Workload, method: str) -> float:
        """Tokens a second, prefill included; 0 if they do not fit.

        Args:
            method: one of `METHODS`. "static": one split for the whole run, all KV attended on the device; "static, CPU
                attends": the same, but what lies in host memory is attended there, as FlexGen does it; "static, SWA":
                the same as "static", of selected tokens; "scheduled": ALISA's phases; "paging": `paging`.
        """
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if method == "paging":
            return self.paging(work)
        costs = self.costs(work, swa=method in ("static, SWA", "scheduled"))
        if method == "static, CPU attends":
            costs = dataclasses.replace(costs, load=self.profile.seconds("host_memory", self.token_bytes * work.batch))
        if method == "scheduled":
            schedule = search(costs)
        else:
            alpha = max(0.0, 1 - costs.device / float(costs.tokens[-1]))
            schedule = Schedule(alpha, 0.0, 0, costs.steps)
        if schedule is None:
            return 0.0
        total = float(seconds(costs, schedule).sum()) + self.prefill(work.batch * work.prompt)
        return work.batch * work.output / total if math.isfinite(total) else 0.0

    def paging(self, work: Workload) -> float:
        """vLLM-like: all KV is attended on the device. As many sequences run as fit; when they grow beyond that, the
        one admitted last is dropped, and prefilled anew when there is room again."""
        m, profile = self.model, self.profile
        room = self.device_bytes / self.token_bytes
        if work.prompt + work.output > room:
            return 0.0
        waiting, running, total = [work.prompt] * work.batch, list[int](), 0.0
        goal = work.prompt + work.output
        while waiting or running:
            while waiting and sum(running) + len(running) + waiting[-1] + 1 <= room:
                running.append(waiting.pop())
                total += self.prefill(running[-1])
            while sum(running) + len(running) > room:
                waiting.append(running.pop())
            read = sum(running) * self.token_bytes / profile.figure("attend.auto")
            total += m.step_seconds(profile, len(running)) + m.layers * profile.figure("layer") + read
            running = [n + 1 for n in running if n + 1 < goal]
        return work.batch * work.output / total
