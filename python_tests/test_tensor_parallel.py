"""Two processes that share the heads of a model give the tokens of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _tiny import cached

from lserve_ext import HeadPattern, SparseCache, SparseConfig

# Which heads stream differs between the ranks: rank 0 has heads 0 and 1, rank 1 has 2 and 3.
PATTERN = HeadPattern([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], fraction=0.625)
CONFIG = SparseConfig.lserve(
    page_size=8,
    stats_group=4,
    sink_tokens=8,
    local_tokens=16,
    budget_tokens=40,
    streaming_heads=PATTERN,
    kv_dtype="auto",
)


def generate(model: torch.nn.Module) -> tuple[torch.Tensor, SparseCache]:
    ids = torch.randint(3, 258, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    cache = SparseCache(model.config, CONFIG)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, **cached(cache), max_new_tokens=20, do_sample=False)
    return out, cache


def rank_main(folder: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="lserve", distributed_config=DistributedConfig(tp_size=2)
    ).eval()
    tokens, cache = generate(model)
    rank = torch.distributed.get_rank()
    held = [layer.kv._streaming.tolist() for layer in cache.layers if layer.kv is not None]
    torch.save((tokens, held), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    import _tiny

    model = _tiny.llama(kv_heads=4, num_attention_heads=8)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("lserve")
    want, _ = generate(model)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, __file__, str(tmp_path)], check=True, timeout=300, env=environment)
    for rank in range(2):
        tokens, held = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(tokens, want)
        assert held == [list(PATTERN.streaming(layer)[2 * rank : 2 * rank + 2]) for layer in range(2)]


if __name__ == "__main__":
    rank_main(sys.argv[1])
