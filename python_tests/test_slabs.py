"""Slabs of pinned memory against one tensor of all pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lserve_ext.slabs import Slabs, gather_rows

P, D = 16, 16
LIKE = {
    "int8": {"k": ((P, D), torch.uint8), "v": ((P, D), torch.uint8), "scales": ((2, P, 2), torch.float32)},
    "auto": {"k": ((P, D), torch.bfloat16), "v": ((P, D), torch.bfloat16)},
}


def pages(kind: str, count: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    found = {}
    for name, (shape, dtype) in LIKE[kind].items():
        found[name] = torch.randint(0, 255, (count, *shape), generator=rng).to(dtype)
    return found


def ids(count: int, most: int, rng: torch.Generator) -> torch.Tensor:
    """Different ones of so many, and a few -1."""
    found = torch.randperm(most, generator=rng)[:count].to(torch.int32)
    found[torch.rand(len(found), generator=rng) < 0.2] = -1
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", LIKE)
def test_as_one_tensor(kind: str, seed: int) -> None:
    """Whatever is put, written, copied and read while they grow."""
    rng = torch.Generator().manual_seed(seed)
    like = pages(kind, 0, rng)
    slabs, whole = Slabs(like), pages(kind, 400, rng)
    count = 0
    while count < 300:
        count += int(torch.randint(1, 40, (1,), generator=rng))
        slabs.grow(count)
        new = np.arange(max(0, count - 40), count)
        slabs.write(new, {name: x[new] for name, x in whole.items()})
        src, dst = pages(kind, 30, rng), ids(30, count, rng)
        at = torch.arange(len(dst), dtype=torch.int32)
        slabs.put(src, at, dst)
        for name, x in whole.items():
            x[dst[dst >= 0].long()] = src[name][: len(dst)][dst >= 0]

        wanted = ids(25, count, rng)
        got = pages(kind, 25, rng)
        want = {name: x.clone() for name, x in got.items()}
        rows = torch.arange(len(wanted), dtype=torch.int32)
        slabs.copy(wanted, got, rows)
        for name, x in want.items():
            x[rows[wanted >= 0].long()] = whole[name][wanted[wanted >= 0].long()]
            assert torch.equal(got[name], x)

        tokens = ids(60, count * P, rng)
        places = torch.randperm(25 * P, generator=rng)[: len(tokens)].to(torch.int32)
        slabs.copy_rows(tokens, got, places)
        gather_rows(whole, tokens, want, places)
        assert all(torch.equal(got[name], want[name]) for name in want)
        read = slabs.read(np.arange(count))
        assert all(torch.equal(read[name], whole[name][:count]) for name in whole)


def test_few_and_not_much_larger_than_needed() -> None:
    slabs = Slabs(pages("int8", 0, torch.Generator()))
    page = 2 * P * D + 2 * P * 2 * 4
    addresses: list[int] = []
    for count in range(1, 5000, 7):
        slabs.grow(count)
        now = [x.data_ptr() for x in slabs.tensors()]
        assert now[: len(addresses)] == addresses  # what lies somewhere stays there
        addresses = now
        assert len(slabs) >= count and len(slabs) * page <= slabs.bytes <= (2 * count + 20) * page
    assert len(addresses) <= 3 * 20
    slabs.grow(10)
    assert [x.data_ptr() for x in slabs.tensors()] == addresses
