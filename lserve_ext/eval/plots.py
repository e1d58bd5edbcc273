"""Pictures of an evaluation's results. Needs matplotlib (`lserve_ext[demo]`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import GENERATION, TEXT
from .evaluate import QUARTERS, Result


def save(results: Sequence[Result], folder: Path) -> list[Path]:
    """What the results have of: KL against bytes read, KL along a generation, and where pass keys are found.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("agg")
    found = []
    makers = {"pareto": _pareto, "generation": _generation, "passkey": _passkey}
    for name, make in makers.items():
        figure = make(results)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120, metadata={"Software": None})
            found.append(path)
    return found


def _pareto(results: Sequence[Result]) -> Any:
    """KL against bytes read, a panel a length, and those that none beats in both. The first config is what the others
    are compared with; those whose names agree up to a comma have a colour in common."""
    from matplotlib import ticker

    of_text = [result for result in results if result["task"] == TEXT]
    lengths = sorted({result["length"] for result in of_text})
    if not lengths:
        return None
    figure, panels = _panels(len(lengths))
    for panel, length in zip(panels, lengths, strict=True):
        here = [result for result in of_text if result["length"] == length and result["sample"] == 0]
        dense, others = here[0], here[1:]
        points = defaultdict[str, list[tuple[float, float]]](list)
        for result in others:
            family = result["config"].partition(",")[0]
            points[family].append((result["read_bytes"] / dense["read_bytes"], max(result["kl"], 1e-7)))
        for i, (family, of) in enumerate(points.items()):
            panel.loglog(*zip(*of, strict=True), "osD^v<>ph*"[i % 10], label=family, alpha=0.8)
        front: list[tuple[float, float]] = []
        for share, kl in sorted(point for of in points.values() for point in of):
            if not front or kl < front[-1][1]:
                front.append((share, kl))
        panel.step(*zip(*front, strict=True), "k:", where="post", linewidth=1)
        panel.set(title=f"{length:,} tokens", xlabel=f"KV bytes that a step reads, of {dense['config']}'s")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.PercentFormatter(1))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panels[0].set_ylabel(f"KL to {of_text[0]['config']}, nats")
    panels[-1].legend(fontsize=7)
    return figure


def _generation(results: Sequence[Result]) -> Any:
    """KL along what the first config generates, a line a config."""
    of = [result for result in results if result["task"] == GENERATION and result["sample"] == 0]
    lengths = sorted({result["length"] for result in of})
    if not lengths:
        return None
    figure, panels = _panels(len(lengths))
    for panel, length in zip(panels, lengths, strict=True):
        for result in [result for result in of if result["length"] == length][1:]:
            panel.semilogy(range(1, QUARTERS + 1), result["kl_quarters"], "o-", label=result["config"])
        panel.set(title=f"after {length:,} tokens", xlabel="quarter of what is generated")
        panel.set_xticks(range(1, QUARTERS + 1))
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[0].set_ylabel(f"KL to {of[0]['config']}, nats")
    return figure


def _passkey(results: Sequence[Result]) -> Any:
    """Whether the key was found, by length and depth, a panel a config, those that agree up to a comma in turn."""
    of = [result for result in results if result["task"] == "passkey"]
    names = list(dict.fromkeys(result["config"] for result in of))
    families = [name.partition(",")[0] for name in names]
    names = [name for _, name in sorted(zip(families, names, strict=True), key=lambda pair: families.index(pair[0]))]
    if not names:
        return None
    lengths, depths = (sorted({result[field] for result in of}) for field in ("length", "depth"))
    figure, panels = _panels(len(names), size=(2.2, 2.4), columns=7)
    for panel, name in zip(panels, names, strict=True):
        scores = {(r["depth"], r["length"]): r["score"] for r in of if r["config"] == name}
        grid = [[scores.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        panel.set_title(name, fontsize=8)
    for panel in panels[::7]:
        panel.set_ylabel("depth of the pass key")
    return figure


def _panels(count: int, size: tuple[float, float] = (4.5, 3.6), columns: int | None = None) -> tuple[Any, list[Any]]:
    """A figure of so many panels, each of so many inches, in rows of so many (None: one row)."""
    from matplotlib import pyplot as plt

    columns = min(count, columns or count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]
