"""What each choice costs in accuracy: budgets, page sizes, scorers, reuse, INT8, and which heads stream.

    python bench/accuracy.py --save                SmolLM2, 192 positions after 4,096 and 7,900 tokens of a text;
                                                   goes on with bench/results/accuracy.json, if there is one, and
                                                   draws pareto.png beside it
    python bench/accuracy.py --only moments --lengths 4096

`lserve eval` does the same for presets and models of yours.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from lserve_ext import HeadPattern, SparseConfig, models
from lserve_ext.doctor import table
from lserve_ext.eval import plots
from lserve_ext.eval.evaluate import Evaluation, Settings, summary


def configs(layers: int, kv_heads: int) -> dict[str, SparseConfig]:
    """By name, dense first. `lserve` and `moments` are without streaming heads where no half is named."""
    found = {"dense": SparseConfig.dense(), "int8": SparseConfig.dense(kv_dtype="int8")}
    for preset, sizes in {"lserve": (64, 32, 16), "moments": (64, 32, 16)}.items():
        for size in sizes:
            own = SparseConfig.preset(preset, page_size=size, streaming_heads=None)
            is_main = size == {"lserve": 64, "moments": 32}[preset]
            for budget in (512, 1024, 2048) if is_main else (1024,):
                for reuse in (1, 2, 4, 8, 16) if is_main and budget == 1024 else (1, 4) if budget == 1024 else (1,):
                    name = f"{preset}, pages of {size}, {budget}, reuse {reuse}"
                    found[name] = own.replace(budget_tokens=budget, reuse_interval=reuse)
    for budget in (128, 512, 1024, 2048):
        found[f"quest, {budget}"] = SparseConfig.quest(budget_tokens=budget)
    rng = random.Random(0)
    halves = {"calibrated": HeadPattern.load("smollm2-135m-instruct")}
    for draw in range(2):
        halves[f"random {draw}"] = HeadPattern([[rng.random() for _ in range(kv_heads)] for _ in range(layers)])
    for half, pattern in halves.items():
        found[f"lserve, {half} half streaming, 1024"] = SparseConfig.lserve(budget_tokens=1024, streaming_heads=pattern)
        found[f"duo, {half} half streaming"] = SparseConfig.duo(streaming_heads=pattern)
    found["streaming"] = SparseConfig.streaming()
    for budget in (512, 1024, 2048):
        found[f"h2o, {budget}"] = SparseConfig.h2o(budget_tokens=budget)
    for sparsity in (0.5, 0.8):
        found[f"alisa, sparsity {sparsity}"] = SparseConfig.alisa(kv_sparsity=sparsity)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 7900], help="tokens read before")
    parser.add_argument("--positions", type=int, default=192, help="tokens that are decoded after them (%(default)s)")
    parser.add_argument("--only", default="", help="configs whose name contains this, beside dense")
    parser.add_argument("--out", type=Path, help="a file of results, which is gone on with")
    parser.add_argument("--save", action="store_true", help="the same with bench/results/accuracy.json")
    options = parser.parse_args()

    model, tokenizer = models.load_model()
    known = configs(model.config.num_hidden_layers, model.config.num_key_value_heads)
    asked = {name: config for name, config in known.items() if name == "dense" or options.only in name}
    settings = Settings(("text",), options.lengths, positions=options.positions)
    out = Path(__file__).parent / "results" / "accuracy.json" if options.save else options.out
    results = Evaluation(model, tokenizer, asked, settings, out).run()
    for length in options.lengths:
        print(f"\n{length:,} tokens\n\n{table(summary(results, length))}")
    if options.save:
        plots.save(results, out.parent)


if __name__ == "__main__":
    main()
