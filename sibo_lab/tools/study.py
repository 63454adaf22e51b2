"""The paper's analyses, a command each: `python -m sibo_lab study NAME [options of train.py]` trains what is missing, writes
results/NAME-BACKBONE-TASK.csv and .png, prints a line for a table of results. A study sets what it varies (the methods,
λ, the places) unless an option of yours does.

`norms` and `cost` train nothing. Where we depart from the paper: its figures stand on one seed each; here every point
is a mean over --seeds, with its standard deviation, and `--score-on validation` keeps the test set out of choices."""

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import model
import sibo
import train
from sibo_lab import cli, files, parallel, placement
from sibo_lab.backbone import tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import compare, pictures
from sibo_lab.tools import bench
from sibo_lab.training import loop, options, run_folder

ALL = ("adapter", "lora", "adapter-sibo", "lora-sibo")


@dataclass(frozen=True)
class Study:
    """What is trained (options of train.py that hold where the user gives none), and how it is drawn and summed up in
    one line."""

    where: str  # in the paper
    runs: tuple[dict, ...]
    draw: Callable[[list[compare.SeedGroup], Path], None]
    says: Callable[[list[compare.SeedGroup]], str]


def draw_groups(rows: list[compare.SeedGroup], path: Path) -> None:
    pictures.draw_runs([run for g in rows for run in g.runs.values()], path)


def draw_lam(rows: list[compare.SeedGroup], path: Path) -> None:
    """Figure 4: the score against λ, a line per method; dashed, the plain method (λ = 0)."""
    fig, ax = pictures.figure()
    seeds = max(len(g.runs) for g in rows)
    for method in (m for m in ("adapter", "lora") if any(g.config["method"] == m for g in rows)):
        colour = pictures.look(method)["color"]
        points = sorted((g.config["lam"], g.over_seeds("score")) for g in rows
                        if g.config["method"] == f"{method}-sibo")
        plain = next(g for g in rows if g.config["method"] == method).over_seeds("score")
        spread = [deviation(y) for _, y in points] if seeds > 1 else None
        ax.errorbar([x for x, _ in points], [y.mean() for _, y in points], spread, fmt="o-", color=colour, capsize=3,
                    ms=4, label=f"{method}-sibo")
        ax.axhline(plain.mean(), color=colour, ls="--", lw=1, label=f"{method} ({plain.mean():.3f})")
        ax.axhspan(plain.mean() - deviation(plain), plain.mean() + deviation(plain), color=colour, alpha=0.1, lw=0)
    ax.set(xlabel="λ, share of h0 in h̃", ylabel=rows[0].first["metric"],
           title=f"{title(rows)}, n = {rows[0].first['n']}")
    ax.legend(frameon=False)
    files.write(path, fig.savefig)


def draw_curves(rows: list[compare.SeedGroup], path: Path) -> None:
    """Figures 1, 2, 5, 6: Eq. (3) per layer, frozen, plain and SIBO, means over seeds."""
    curves = {"frozen": rows[0].first["baseline_similarity_per_layer"]}
    for g in rows:
        name = compare.name(g, rows)
        name += f", λ {g.config['lam']:g}" if g.config["lam"] and "λ" not in name else ""
        curves[name] = g.over_seeds("similarity_per_layer").mean(0)
    pictures.draw_similarity(curves, path, title(rows))


def draw_learned(rows: list[compare.SeedGroup], path: Path) -> None:
    """Section 7: where λ went in each block, a line for each of its modules that get h0; with --targets, which may take
    more of one block than of another, in each module."""
    rows = [g for g in rows if g.config["learn_lam"]]
    free, blocks = any(g.config["targets"] for g in rows), len(rows[0].first["similarity_per_layer"]) - 1
    fig, ax = pictures.figure()
    markers = cycle("os^vD")
    for g in rows:
        lam = g.over_seeds("lambda")  # (seeds, modules)
        lines = lam.reshape(len(lam), lam.shape[1] if free else blocks, -1).transpose(2, 1, 0)  # (lines, x, seeds)
        for i, line in enumerate(lines):
            ax.errorbar(np.arange(1, len(line) + 1) + 0.04 * i, line.mean(1), [deviation(x) for x in line], capsize=3,
                        fmt=f"{next(markers)}-", ms=4, color=pictures.look(g.config["method"])["color"],
                        alpha=1 - 0.6 * i / len(lines), label=compare.name(g, rows) +
                        (f", {i + 1}. of {len(lines)} modules" if len(lines) > 1 else ""))
        ax.axhline(g.config["lam"], color="0.5", ls="--", lw=1)
    ax.set(xlabel="module that gets h0, first block to last" if free else "block", title=title(rows), ylim=(0, None),
           ylabel="learned λ (dashed: its start; bars: deviation)")
    ax.legend(frameon=False)
    files.write(path, fig.savefig)


def deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def title(rows: Sequence[compare.SeedGroup]) -> str:
    first, seeds = rows[0].first, max(len(g.runs) for g in rows)
    return (f"{first['backbone']} on {first['task']}" + (", validation" if first["scored_on"] == "validation" else "")
            + (f", {seeds} seeds" if seeds > 1 else ", one seed"))


def best(rows: list[compare.SeedGroup]) -> str:
    """Each method's best setting, and every plain method beside it."""
    said = []
    for method in sorted({g.config["method"] for g in rows}):
        same = [g for g in rows if g.config["method"] == method]
        top = max(same, key=lambda g: g.over_seeds("score").mean())
        said.append(score_of(top, rows))
    return "; ".join(said)


def all_of(rows: list[compare.SeedGroup]) -> str:
    return "; ".join(score_of(g, rows) for g in rows)


def score_of(g: compare.SeedGroup, rows: list[compare.SeedGroup]) -> str:
    scores = g.over_seeds("score")
    return f"{compare.name(g, rows)} {scores.mean():.3f}" + (
        f" ± {deviation(scores):.3f}" if len(scores) > 1 else " (one seed)")


def last_five(rows: list[compare.SeedGroup]) -> str:
    return f"frozen {rows[0].first['baseline_similarity']:.3f}; " + "; ".join(
        f"{compare.name(g, rows)} {g.over_seeds('similarity').mean():.3f}" for g in rows)


def learned(rows: list[compare.SeedGroup]) -> str:
    return "; ".join(score_of(g, rows) + (f", {g.over_seeds('lambda').min():.3f} to {g.over_seeds('lambda').max():.3f}"
                                       if g.config["learn_lam"] else "") for g in rows)


STUDIES = {
    "lambda": Study("Figure 4", ({"method": ALL, "lam": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},), draw_lam, best),
    "placement": Study("Table 5", ({"method": ("adapter", "adapter-sibo"), "sibo_at": ("attn", "ffn", "both")},),
                       draw_groups, all_of),
    "low-rank": Study("Table 6", ({"method": ("lora", "lora-sibo")}, {"method": ("lora-sibo",), "frozen_too": True}),
                      draw_groups, all_of),
    "similarity": Study("Figures 1, 2, 5, 6", ({"method": ALL},), draw_curves, last_five),
    "learned": Study("Section 7", ({"method": ALL}, {"method": ("adapter-sibo", "lora-sibo"), "learn_lam": True}),
                     draw_learned, learned),
}


def trained(study: Study, args: argparse.Namespace, file: Path) -> str:
    """Runs what is missing of a study, writes its CSV and picture; says what came of it."""
    given = {k: v for k, v in vars(args).items() if v is not None} | {"out": args.out or f"runs/{file.name}"}
    runs = [run.out for own in study.runs
            for run in train.main(argparse.Namespace(**vars(args) | own | given), several=True)]
    if not runs:  # --dry-run, --explain
        return ""
    table, = compare.groups(compare.read(dict.fromkeys(runs)))
    columns = ("method", "lam", "sibo_at", "frozen_too", "learn_lam", "lr", "steps", "seed")
    lines = [[run.config[c] for c in columns] + [run.result[k] for k in ("metric", "score", "n", "similarity", "date")]
             + [" ".join(f"{x:.4f}" for x in np.atleast_1d(x)) for x in (
                 run.result["lambda"], run.result["similarity_per_layer"], run.losses)]
             for g in table for run in g.runs.values()]
    write_csv(file.with_suffix(".csv"), [*columns, "metric", "score", "n", "similarity", "date", "lambda",
                                         "similarity_per_layer", "loss_per_quarter"], lines)
    study.draw(table, file.with_suffix(".png"))
    return study.says(table)


def write_csv(path: Path, columns: Sequence[str], lines: Sequence[Sequence]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *lines])
    files.write(path, text.getvalue())


def examples(args: argparse.Namespace, n: int) -> tuple[nn.Module, list[batch.Row], int]:
    """The frozen backbone, the first test examples of the task, and the padding id."""
    task, t = tasks.parse(args.task)[0], tokenizer.from_pretrained(args.backbone)
    m = model.from_pretrained(args.backbone, getattr(torch, args.dtype or "float32"), args.device,
                              task.num_labels or None)
    test = readers.load(task, "test", tasks.data_dir(args.data_dir), n)
    return m, evaluation.similarity_rows(m, t, test, n), t.pad_id or 0


@torch.no_grad()
def norms(args: argparse.Namespace, file: Path) -> str:
    """Root mean square of h, where h0 is mixed into it, and of h0 itself, per module: what a λ means there. Of the
    tokens' the median: the first token's activations can be a hundred times the others'."""
    m, rows, pad = examples(args, 64)
    b = batch.to_device(batch.collate(rows, pad), m)
    b.pop("labels", None)
    real, found = b["attention_mask"].bool(), {}

    def rms(h: Tensor) -> float:
        return float(h[real].float().square().mean(-1).sqrt().median())

    hooks, lines = [], []
    for method in ("adapter", "lora"):
        where = placement.place(m, sibo.Settings(method))
        for name in where.mixed:
            def hook(_, args, output, key=(method, name)):
                found[key] = rms(output if key[0] == "adapter" else args[0])
            hooks.append(m.get_submodule(name).register_forward_hook(hook))
    hooks.append(m.get_submodule(where.settings.h0).register_forward_hook(
        lambda _, args, output: found.update(h0=rms(output))))
    m(**b)
    for h in hooks:
        h.remove()
    fig, ax = pictures.figure()
    for method in ("adapter", "lora"):
        names = [n for n, _ in m.named_modules() if (method, n) in found]
        values = [found[method, n] for n in names]
        blocks = [next(int(s) for s in n.split(".") if s.isdigit()) for n in names]
        ax.semilogy(blocks, values, "o-", ms=4, label=f"h at {method} ({names[0].split('.')[-1]} "
                                              f"{'output' if method == 'adapter' else 'input'})")
        lines += [[method, n, f"{v:.5f}", f"{found['h0']:.5f}", f"{found['h0'] / v:.5f}"]
                  for n, v in zip(names, values, strict=True)]
    ax.axhline(found["h0"], color="k", ls="--", lw=1, label=f"h0 ({found['h0']:.3f})")
    ax.set(xlabel="block", ylabel="root mean square, median token", title=f"{args.backbone}, frozen, "
           f"{compare.name_of(args.task)}")
    ax.legend(frameon=False)
    files.write(file.with_suffix(".png"), fig.savefig)
    write_csv(file.with_suffix(".csv"), ["method", "module", "rms_h", "rms_h0", "ratio"], lines)
    return "; ".join(f"{method}: ‖h0‖/‖h‖ from {min(r):.3f} to {max(r):.3f}" for method in ("adapter", "lora")
                     for r in [[float(line[4]) for line in lines if line[0] == method]])


def cost(args: argparse.Namespace, file: Path) -> str:
    """Table 9: FLOPs of a training step, counted by PyTorch plus the mixing by hand (its counter sees products only:
    h̃ = h + λ(h0 − h) is three operations an element), and its seconds, 30 pairs in turn."""
    lines, said = [], []
    task = tasks.parse(args.task)[0]
    for method in ("adapter", "lora"):
        flops, step = {}, {}
        for lam in (0.0, args.lam[0] if args.lam else 0.2):
            m, rows, pad = examples(args, args.batch_size or 16)
            rows = [batch.Row(r.ids, 0 if task.num_labels else r.ids, r.cut, r.types) for r in rows]
            sibo.inject(m, method, lam).train()
            with FlopCounterMode(display=False) as counter:
                loop.train_step(m, rows, len(rows), pad)
            width = max(len(r.ids) for r in rows)
            mixed = sum(isinstance(x, sibo.SIBOLayer) and x.lam_start > 0 for x in m.modules())
            flops[lam] = counter.get_total_flops(), 3 * len(rows) * width * m.config.hidden_size * mixed
            step[lam] = partial(bench.seconds, partial(loop.train_step, m, rows, len(rows), pad))
        lam = max(flops)
        step[0.0](), step[lam]()
        times = [(step[lam](), step[0.0]()) if i % 2 else (step[0.0](), step[lam]())[::-1] for i in range(30)]
        row = bench.compare("", "s", *map(list, zip(*times, strict=True)), None, interval=True)
        more = sum(flops[lam]) / sum(flops[0.0])
        lines.append([method, lam, *map(sum, (flops[0.0], flops[lam])), f"{more:.6f}", f"{row.peer:.4f}",
                      f"{row.ours:.4f}", f"{row.ratio:.4f}", *(f"{x:.4f}" for x in row.interval)])
        said.append(f"{method}: FLOPs × {more:.4f}, time × {row.ratio:.3f} ({row.interval[0]:.3f}–"
                    f"{row.interval[1]:.3f})")
    fig, ax = pictures.figure(height=2.6)
    for y, line in enumerate(lines):
        low, middle, high = float(line[8]), float(line[7]), float(line[9])
        ax.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", capsize=3, label=f"{line[0]}: time")
        ax.plot(float(line[4]), y, "k|", ms=14, label="FLOPs" if not y else None)
    ax.axvline(1, color="0.5", lw=1)
    ax.set_yticks(range(len(lines)), [f"{line[0]}-sibo" for line in lines])
    ax.set(xlabel="a training step, SIBO against plain (95 % interval)", title=args.backbone, ylim=(-0.6, 1.6))
    ax.legend(frameon=False, loc="center right")
    files.write(file.with_suffix(".png"), fig.savefig)
    write_csv(file.with_suffix(".csv"), ["method", "lam", "flops_plain", "flops_sibo", "flops_ratio", "seconds_plain",
                                         "seconds_sibo", "time_ratio", "low", "high"], lines)
    return "; ".join(said)


FROZEN = {"norms": ("–", norms), "cost": ("Table 9", cost)}


def parser() -> cli.Parser:
    p = options.parser()
    p.prog, p.description = "-m sibo_lab study", "The paper's analyses; what is not said here is train.py's."
    p.add_argument("study", choices=[*STUDIES, *FROZEN])
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="(default: %(default)s)")
    p.set_defaults(method=None)
    return p


def main(args: argparse.Namespace) -> None:
    file = args.results / f"{args.study}-{compare.name_of(args.backbone)}-{compare.name_of(args.task)}"
    where, says = FROZEN.get(args.study) or (STUDIES[args.study].where, partial(trained, STUDIES[args.study]))
    said = says(args, file)
    if said and not parallel.rank():
        print(f"| {where} | `{run_folder.command()}` | {said} |")
