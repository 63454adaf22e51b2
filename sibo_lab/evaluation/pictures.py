"""Pictures, all in one style: the loss of a run, Eq. (3) per layer, the scores of all seeds."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from sibo_lab import files
from sibo_lab.evaluation import compare, metrics


def figure(width: float = 7.0, height: float = 4.0, ratios: Sequence[float] = (1,)) -> tuple:
    """matplotlib's Figure, in inches of 150 dots, and its empty panels (Axes), of heights in these ratios."""
    from matplotlib.figure import Figure  # slow to import

    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")
    panels = fig.subplots(len(ratios), squeeze=False, height_ratios=ratios)[:, 0]
    for ax in panels:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, *panels


def look(name: str) -> dict:
    """A method's colour and line, the same in all pictures: plain methods dashed, SIBO's solid."""
    method = name.split(",")[0].removesuffix("-sibo")
    colour = {"frozen": "k", "adapter": "C0", "lora": "C1", "full": "C2"}.get(method, "C3")
    return {"color": colour, "ls": ":" if method == "frozen" else "-" if "-sibo" in name else "--"}


def draw_runs(runs: Sequence[compare.Done], path: Path) -> None:
    """Each seed's score as a dot (plain methods: a ring), their mean as a bar; one panel per table."""
    tables = compare.groups(runs)
    height = 0.8 + sum(0.8 + 0.32 * len(rows) for rows in tables)
    fig, *panels = figure(height=height, ratios=[len(rows) + 1.5 for rows in tables])
    for ax, rows in zip(panels, tables, strict=True):
        for y, g in enumerate(rows):
            score, colour = g.over_seeds("score"), look(g.config["method"])["color"]
            filled = colour if "sibo" in g.config["method"] else "none"
            ax.plot(score, [y] * len(score), "o", ms=4, alpha=0.6, color=colour, mfc=filled)
            ax.plot([score.mean()] * 2, [y - 0.3, y + 0.3], lw=2, color=colour)
        ax.set_yticks(range(len(rows)), [compare.name(g, rows) for g in rows])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        result = rows[0].first
        on = " (validation)" if result["scored_on"] == "validation" else ""
        tests = rows[0].config["test"]
        mean = f"mean of {', '.join(map(compare.name_of, tests))}: " if tests and len(tests) > 1 else ""
        ax.set(xlabel=f"{mean}{result['metric']}{on}")
        ax.set_title(f"{result['backbone']} on {result['task']}", loc="right")
    fig.supxlabel("a dot per seed, a bar their mean", fontsize="medium")  # beside long labels the axes are narrow
    files.write(path, fig.savefig)


def draw_differences(rows: dict[str, metrics.Difference], path: Path, title: str) -> None:
    """A forest plot of loss differences: the mean and its 95 % interval, a line per row; shaded, what is smaller than
    the design could show."""
    fig, ax = figure(height=1.6 + 0.4 * len(rows))
    ax.use_sticky_edges = False  # a margin beside the widest
    for y, (label, d) in enumerate(rows.items()):
        ax.barh(y, 2 * d.could_show, left=-d.could_show, height=0.7, color="0.92", lw=0, zorder=0)
        ax.errorbar(d.mean, y, xerr=d.half, fmt="o", ms=5, capsize=3, color=look(label)["color"])
    ax.axvline(0, color="0.4", lw=1)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    fig.suptitle(title, fontsize="large")  # over the labels too: they leave the axes little room
    fig.supxlabel("loss per answer in nats, minus the plain method's, and its 95 % interval; left is better\n"
                  "grey: true differences too small for such a study to find three times in four", fontsize="medium")
    files.write(path, fig.savefig)


def draw_similarity(curves: dict[str, Sequence[float]], path: Path, title: str) -> None:
    """Eq. (3) against the layer, a line per model; the last five, whose mean the paper reports, are shaded."""
    fig, ax = figure(height=4.5)
    layers = len(next(iter(curves.values())))
    ax.axvspan(layers - 5.4, layers - 0.6, color="0.93", label="last five (their mean)")
    for (name, curve), marker in zip(curves.items(), cycle("os^vD"), strict=False):
        label = f"{name} ({metrics.last_five(curve):.3f})"
        ax.plot(range(layers), curve, marker=marker, ms=3.5, lw=1.4, label=label, **look(name))
    ax.set(xlabel="hidden state (0: h0; last: after the last block, and its final norm where there is one)",
           ylabel="token-wise cosine similarity, Eq. (3)", title=title)
    fig.legend(loc="outside lower center", ncols=2 if len(curves) == 3 else 3, frameon=False)  # clear of the curves
    files.write(path, fig.savefig)


def draw_training(runs: Sequence, results: Sequence[dict]) -> None:
    """Into each run's folder: the loss of every step, faint, with its running mean, and Eq. (3) per layer."""
    title = f"{results[0]['backbone']} on {compare.name_of(results[0]['task'])}"
    curves = {"frozen": results[0]["baseline_similarity_per_layer"]}
    fig, ax = figure()
    for run, result in zip(runs, results, strict=True):
        method, loss = result["method"], compare.losses(Path(run.out))
        curves[method] = result["similarity_per_layer"]
        steps = range(1, len(loss) + 1)
        mean = [loss[max(0, i - 10):i].mean() for i in steps]
        ax.plot(steps, mean, lw=1.6, label=f"{method} (mean of 10 steps)", **look(method))
        ax.plot(steps, loss, color=look(method)["color"], alpha=0.3, lw=0.8)
    ax.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    ax.legend(frameon=False)
    for run in runs:
        files.write(Path(run.out, "curves.png"), fig.savefig)
        draw_similarity(curves, Path(run.out, "similarity.png"), title)
