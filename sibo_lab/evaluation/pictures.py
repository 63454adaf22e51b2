"""Pictures, in one style: losses, similarity per layer, scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sibo_lab import files
from sibo_lab.evaluation import compare, metrics
from sibo_lab.training import recipes


def look(name: str) -> dict:
    """A method's colour and line, the same in all pictures: plain methods are dashed, SIBO's are solid."""
    method = name.split(",")[0].removesuffix("-sibo")
    colour = {"frozen": "k", "adapter": "C0", "lora": "C1", "full": "C2"}.get(method, "C3")
    return {"color": colour, "ls": ":" if method == "frozen" else "-" if "-sibo" in name else "--"}


def draw_runs(runs: Sequence[compare.Done], path: Path) -> None:
    """Every seed's score as a dot (plain methods: a ring), their mean as a bar; a panel for each table."""
    tables = compare.groups(runs)
    fig = Figure(figsize=(7, 0.6 + sum(0.8 + 0.32 * len(rows) for rows in tables)), dpi=150, layout="constrained")
    panels = fig.subplots(len(tables), squeeze=False, height_ratios=[len(rows) + 1.5 for rows in tables])[:, 0]
    for ax, rows in zip(panels, tables, strict=True):
        for y, g in enumerate(rows):
            score, colour = g.over_seeds("score"), look(g.config["method"])["color"]
            filled = colour if "sibo" in g.config["method"] else "none"
            ax.plot(score, [y] * len(score), "o", ms=4, alpha=0.6, color=colour, mfc=filled)
            ax.plot([score.mean()] * 2, [y - 0.3, y + 0.3], lw=2, color=colour)
        ax.set_yticks(range(len(rows)), [compare.name(g, rows) for g in rows])
        ax.invert_yaxis()
        ax.grid(alpha=0.3, axis="x")
        ax.spines[["top", "right"]].set_visible(False)
        result = rows[0].first
        ax.set(xlabel=result["metric"] + (" (validation)" if result["scored_on"] == "validation" else "")
               + "; a dot per seed, a bar their mean", title=f"{result['backbone']} on {result['task']}")
    files.write(path, fig.savefig)


def figure(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Axes]:
    """An empty picture in the project's style, in inches at 150 dots each."""
    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")
    ax = fig.subplots()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def draw_similarity(curves: dict[str, Sequence[float]], path: Path, title: str) -> None:
    """Eq. (3) against the layer, a line per model; the last five layers, which the paper sums up, are shaded."""
    fig, ax = figure(height=4.5)
    layers = len(next(iter(curves.values())))
    ax.axvspan(layers - 5.4, layers - 0.6, color="0.93", label="last five (their mean)")
    for (name, curve), marker in zip(curves.items(), cycle("os^vD"), strict=False):
        ax.plot(range(layers), curve, marker=marker, ms=3.5, lw=1.4, label=f"{name} ({metrics.last_five(curve):.3f})",
                **look(name))
    ax.set(xlabel="hidden state (0: h0; last: after the last block, and its final norm where there is one)",
           ylabel="token-wise cosine similarity, Eq. (3)", title=title)
    fig.legend(loc="outside lower center", ncols=2 if len(curves) == 3 else 3, frameon=False)  # it would cover curves
    files.write(path, fig.savefig)


def draw_training(runs: Sequence[recipes.Run], results: Sequence[dict]) -> None:
    """Pictures in each run's folder: the loss of every step, faint, with its running mean, and the similarity."""
    title = f"{runs[0].backbone} on {compare.name_of(runs[0].task)}"
    fig, ax = figure()
    for run in runs:
        loss = compare.losses(Path(run.out))
        mean = [loss[max(0, i - 9):i + 1].mean() for i in range(len(loss))]
        line, = ax.plot(range(1, len(loss) + 1), mean, lw=1.6, label=f"{run.method} (mean of 10 steps)",
                        **look(run.method))
        ax.plot(range(1, len(loss) + 1), loss, color=line.get_color(), alpha=0.3, lw=0.8)
    ax.set(xlabel="step", ylabel="loss", title=title)
    ax.set_ylim(0, None)
    ax.legend(frameon=False)
    curves = {"frozen": results[0]["baseline_similarity_per_layer"]}
    curves |= {r["method"]: r["similarity_per_layer"] for r in results}
    for run in runs:
        files.write(Path(run.out, "curves.png"), fig.savefig)
        draw_similarity(curves, Path(run.out, "similarity.png"), title)
