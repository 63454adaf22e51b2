"""The paper's analyses, one command each: `python -m sibo_lab study NAME [options of train.py]`.

A study trains what is missing, writes docs/results/NAME-BACKBONE-TASK.csv and .png, and prints a row for a table of
results. It sets what it varies (methods, λ, places) unless your options do; `norms` and `cost` train nothing. Departs
from the paper, whose figures show one seed each: points are means over --seeds, with standard deviations, and
`--score-on validation` keeps the test set out of choices."""

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, groupby
from pathlib import Path

import numpy as np
import torch
from torch import nn
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

Groups = Sequence[compare.SeedGroup]


def trained(draw: Callable[[Groups, str], None], summary: Callable[[Groups], str], runs: Sequence[dict],
            args: argparse.Namespace, file: str) -> str:
    """Trains what is missing of `runs` (options of train.py, where the user gives none), writes file.csv, draws
    file.png, and returns a summary."""
    given = {k: v for k, v in vars(args).items() if v is not None} | {"out": args.out or f"runs/{Path(file).name}"}
    folders = [run.out for own in runs
               for run in train.main(argparse.Namespace(**vars(args) | own | given), several=True)]
    if not folders or parallel.rank():  # --dry-run, --explain; or another process writes
        return ""
    (rows,) = compare.groups(compare.read(dict.fromkeys(folders)))
    settings = "method lam sibo_at frozen_too learn_lam lr steps seed".split()
    figures = "metric score n similarity date".split()
    write_csv(file, [*settings, *figures, "lambda", "similarity_per_layer", "loss_per_quarter"], [
        [run.config[k] for k in settings] + [run.result[k] for k in figures]
        + [" ".join(f"{x:.4f}" for x in np.atleast_1d(values))
           for values in (run.result["lambda"], run.result["similarity_per_layer"], run.losses)]
        for g in rows for run in g.runs.values()])
    draw(rows, file)
    return summary(rows)


def write_csv(file: str, columns: Sequence[str], lines: Sequence[Sequence]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *lines])
    files.write(Path(f"{file}.csv"), text.getvalue())


def finish(ax, file: str, legend: str = "best", **labels) -> None:
    ax.set(**labels)
    ax.legend(frameon=False, loc=legend)
    files.write(Path(f"{file}.png"), ax.figure.savefig)


def title(rows: Groups) -> str:
    first, seeds = rows[0].first, max(len(g.runs) for g in rows)
    validation = ", validation" if first["scored_on"] == "validation" else ""
    return f"{first['backbone']} on {first['task']}{validation}, " + (f"{seeds} seeds" if seeds > 1 else "one seed")


def deviation(values: np.ndarray) -> np.ndarray:
    """Over seeds, the last axis; 0 for one seed."""
    return values.std(-1, ddof=1) if values.shape[-1] > 1 else np.zeros(values.shape[:-1])


def draw_means(ax, x: Sequence[float], values: np.ndarray, method: str, label: str, marker: str = "o",
               alpha: float = 1.0) -> None:
    """Means over seeds, the last axis of `values`, against x; bars: deviations."""
    ax.errorbar(x, values.mean(-1), deviation(values), fmt=f"{marker}-", capsize=3, ms=4, alpha=alpha, label=label,
                color=pictures.look(method)["color"])


def draw_groups(rows: Groups, file: str) -> None:
    pictures.draw_runs([run for g in rows for run in g.runs.values()], Path(f"{file}.png"))


def draw_lam(rows: Groups, file: str) -> None:
    """Figure 4: the score against λ, one line per method; dashed, the plain method (λ = 0)."""
    _, ax = pictures.figure()
    for method, same in by_method(rows):
        lams, scores = [g.config["lam"] for g in same], np.array([g.over_seeds("score") for g in same])
        if "sibo" in method:
            draw_means(ax, lams, scores, method, method)
            continue
        style, mean, spread = pictures.look(method), scores[0].mean(), deviation(scores[0])
        ax.axhline(mean, lw=1, label=f"{method} ({mean:.3f})", **style)
        ax.axhspan(mean - spread, mean + spread, color=style["color"], alpha=0.1, lw=0)
    finish(ax, file, xlabel="λ, share of h0 in h̃", ylabel=rows[0].first["metric"],
           title=f"{title(rows)}, n = {rows[0].first['n']}")


def draw_curves(rows: Groups, file: str) -> None:
    """Figures 1, 2, 5, 6: Eq. (3) per layer, frozen, plain and SIBO, means over seeds."""
    curves = {"frozen": rows[0].first["baseline_similarity_per_layer"]}
    for g in rows:
        name = compare.name(g, rows)
        name += f", λ {g.config['lam']:g}" if g.config["lam"] and "λ" not in name else ""
        curves[name] = g.over_seeds("similarity_per_layer").mean(0)
    pictures.draw_similarity(curves, Path(f"{file}.png"), title(rows))


def draw_learned(rows: Groups, file: str) -> None:
    """Section 7: where λ went in each block, one line for each of its modules that get h0; with --targets, which may
    take more of one block than of another, in each module."""
    rows = [g for g in rows if g.config["learn_lam"]]
    free, blocks = any(g.config["targets"] for g in rows), len(rows[0].first["similarity_per_layer"]) - 1
    _, ax = pictures.figure()
    markers = cycle("os^vD")
    for g in rows:
        lam = g.over_seeds("lambda")  # (seeds, modules)
        lines = lam.reshape(len(lam), lam.shape[1] if free else blocks, -1).transpose(2, 1, 0)  # (lines, x, seeds)
        for i, line in enumerate(lines):
            which = f", {i + 1}. of {len(lines)} modules" if len(lines) > 1 else ""
            draw_means(ax, np.arange(1, len(line) + 1) + 0.04 * i, line, g.config["method"],
                       compare.name(g, rows) + which, next(markers), 1 - 0.6 * i / len(lines))
        ax.axhline(g.config["lam"], color="0.5", ls="--", lw=1)
    finish(ax, file, xlabel="module that gets h0, first block to last" if free else "block", title=title(rows),
           ylim=(0, None), ylabel="learned λ (dashed: its start; bars: deviation)")


def by_method(rows: Groups) -> list[tuple[str, Groups]]:
    return [(method, list(same)) for method, same in groupby(rows, lambda g: g.config["method"])]  # as they are sorted


def score(g: compare.SeedGroup, rows: Groups) -> str:
    scores, lam = g.over_seeds("score"), g.over_seeds("lambda")
    spread = f"± {deviation(scores):.3f}" if len(scores) > 1 else "(one seed)"
    learned = f", {lam.min():.3f} to {lam.max():.3f}" if g.config["learn_lam"] else ""
    return f"{compare.name(g, rows)} {scores.mean():.3f} {spread}{learned}"


def all_scores(rows: Groups) -> str:
    return "; ".join(score(g, rows) for g in rows)


def best_scores(rows: Groups) -> str:
    return "; ".join(score(max(same, key=lambda g: g.over_seeds("score").mean()), rows) for _, same in by_method(rows))


def similarities(rows: Groups) -> str:
    return "; ".join([f"frozen {rows[0].first['baseline_similarity']:.3f}"] + [
        f"{compare.name(g, rows)} {g.over_seeds('similarity').mean():.3f}" for g in rows])


def examples(args: argparse.Namespace, n: int) -> tuple[nn.Module, list[batch.Row], int]:
    """The frozen backbone, the first test examples of the task, and the padding id."""
    task, t = tasks.parse(args.task)[0], tokenizer.from_pretrained(args.backbone)
    dtype = getattr(torch, args.dtype or "float32")
    m = model.from_pretrained(args.backbone, dtype, args.device, task.num_labels or None)
    test = readers.load(task, "test", tasks.data_dir(args.data_dir), n)
    return m, evaluation.similarity_rows(m, t, test, n), t.pad_id or 0


@torch.no_grad()
def norms(args: argparse.Namespace, file: str) -> str:
    """Root mean squares of h, where h0 is mixed into it, and of h0: what a λ means in each module. The median token
    counts, as the first token's activations can be a hundred times the others'."""
    m, rows, pad = examples(args, 64)
    b = batch.to_device(batch.collate(rows, pad), m)
    b.pop("labels", None)
    real, rms, mixed = b["attention_mask"].bool(), {}, {}

    def watch(name: str, key: object, of_output: bool) -> None:
        def hook(_, inputs, output):
            h = output if of_output else inputs[0]  # (B, T, d)
            rms[key] = float(h[real].float().square().mean(-1).sqrt().median())
        m.get_submodule(name).register_forward_hook(hook)

    for method in ("adapter", "lora"):
        where = placement.place(m, sibo.Settings(method))
        mixed[method] = [name for name, _ in m.named_modules() if name in where.mixed]
        for name in mixed[method]:
            watch(name, (method, name), of_output=method == "adapter")
    watch(where.settings.h0, "h0", of_output=True)
    m(**b)
    _, ax = pictures.figure()
    lines, summary = [], []
    for method, names in mixed.items():
        values = [rms[method, name] for name in names]
        ratios = [rms["h0"] / value for value in values]
        blocks = [next(int(part) for part in name.split(".") if part.isdigit()) for name in names]
        side = "output" if method == "adapter" else "input"
        ax.semilogy(blocks, values, "o-", ms=4, label=f"h at {method} ({names[0].split('.')[-1]} {side})")
        lines += [[method, name, f"{value:.5f}", f"{rms['h0']:.5f}", f"{ratio:.5f}"]
                  for name, value, ratio in zip(names, values, ratios, strict=True)]
        summary.append(f"{method}: ‖h0‖/‖h‖ from {min(ratios):.3f} to {max(ratios):.3f}")
    ax.axhline(rms["h0"], color="k", ls="--", lw=1, label=f"h0 ({rms['h0']:.3f})")
    finish(ax, file, xlabel="block", ylabel="root mean square, median token",
           title=f"{args.backbone}, frozen, {compare.name_of(args.task)}")
    write_csv(file, "method module rms_h rms_h0 ratio".split(), lines)
    return "; ".join(summary)


def cost(args: argparse.Namespace, file: str) -> str:
    """Table 9: FLOPs and seconds (30 pairs) of a training step, SIBO against plain."""
    _, ax = pictures.figure(height=2.6)
    lam, lines, summary = args.lam[0] if args.lam else 0.2, [], []
    for y, method in enumerate(("adapter", "lora")):
        (ours, rows, flops), (plain, _, plain_flops) = (step_and_flops(args, method, x) for x in (lam, 0.0))
        row, ratio = bench.timed("", ours, plain, [rows] * 30), flops / plain_flops
        low, high = row.interval
        ax.errorbar(row.ratio, y, xerr=[[row.ratio - low], [high - row.ratio]], fmt="o", capsize=3,
                    label=f"{method}: time")
        ax.plot(ratio, y, "k|", ms=14, label=None if y else "FLOPs")
        lines.append([method, lam, plain_flops, flops, f"{ratio:.6f}",
                      *(f"{x:.4f}" for x in (row.peer, row.ours, row.ratio, low, high))])
        summary.append(f"{method}: FLOPs × {ratio:.4f}, time × {row.ratio:.3f} ({low:.3f}–{high:.3f})")
    ax.axvline(1, color="0.5", lw=1)
    ax.set_yticks([0, 1], ["adapter-sibo", "lora-sibo"])
    finish(ax, file, "center right", xlabel="a training step, SIBO against plain (95 % interval)",
           title=args.backbone, ylim=(-0.6, 1.6))
    write_csv(file, "method lam flops_plain flops_sibo flops_ratio seconds_plain seconds_sibo time_ratio low high"
              .split(), lines)
    return "; ".join(summary)


def step_and_flops(args: argparse.Namespace, method: str, lam: float) -> tuple[Callable, list[batch.Row], int]:
    """A training step, the rows it takes, and its FLOPs: of products, as PyTorch counts them, and 3 for each mixed
    element, h̃ = h + λ(h0 − h)."""
    m, rows, pad = examples(args, args.batch_size or 16)
    rows = [replace(r, labels=0 if tasks.parse(args.task)[0].num_labels else r.ids) for r in rows]
    sibo.inject(m, method, lam).train()
    step = partial(loop.train_step, m, micro_batch_size=len(rows), pad_id=pad)
    with FlopCounterMode(display=False) as counter:
        step(rows)
    mixed = sum(isinstance(x, sibo.SIBOLayer) and x.lam_start > 0 for x in m.modules())
    elements = len(rows) * max(len(r.ids) for r in rows) * m.config.hidden_size
    return step, rows, counter.get_total_flops() + 3 * mixed * elements


ALL = {"method": ("adapter", "lora", "adapter-sibo", "lora-sibo")}
STUDIES = {  # where in the paper, and what does it, given the options and the files to write, without their endings
    "lambda": ("Figure 4", partial(trained, draw_lam, best_scores, [
        ALL | {"lam": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}])),
    "placement": ("Table 5", partial(trained, draw_groups, all_scores, [
        {"method": ("adapter", "adapter-sibo"), "sibo_at": ("attn", "ffn", "both")}])),
    "low-rank": ("Table 6", partial(trained, draw_groups, all_scores, [
        {"method": ("lora", "lora-sibo")}, {"method": ("lora-sibo",), "frozen_too": True}])),
    "similarity": ("Figures 1, 2, 5, 6", partial(trained, draw_curves, similarities, [ALL])),
    "learned": ("Section 7", partial(trained, draw_learned, all_scores, [
        ALL, {"method": ("adapter-sibo", "lora-sibo"), "learn_lam": True}])),
    "norms": ("–", norms), "cost": ("Table 9", cost),
}


def parser() -> cli.Parser:
    p = options.parser()
    p.prog, p.description = "-m sibo_lab study", "The paper's analyses. Their other options are train.py's."
    p.add_argument("study", choices=STUDIES)
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="(default: %(default)s)")
    p.set_defaults(method=None)
    return p


def main(args: argparse.Namespace) -> None:
    where, study = STUDIES[args.study]
    file = args.results / f"{args.study}-{compare.name_of(args.backbone)}-{compare.name_of(args.task)}"
    summary = study(args, str(file))
    if summary and not parallel.rank():
        print(f"| {where} | `{run_folder.command()}` | {summary} |")
