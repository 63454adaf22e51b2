"""The paper's analyses: `python -m sibo_lab study NAME [options of train.py]` trains what is missing, writes
docs/results/NAME-BACKBONE-TASK.csv and .png, and prints a row for a table of results. Departs from the paper, whose
figures show one seed: points are means over --seeds, bars their standard deviation."""

import csv
import io
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from sibo_lab import cli, files, parallel
from sibo_lab.backbone import tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import pictures
from sibo_lab.evaluation.arguments import require_device
from sibo_lab.evaluation.compare import SeedGroup, groups, loss_difference, name, name_of, read, save
from sibo_lab.placement import place
from sibo_lab.tools import bench_rows, depth
from sibo_lab.training import loop, options, run_folder

Groups = Sequence[SeedGroup]


def trained(draw: Callable[[Groups, str], list | None], choices: Sequence[dict], args: Namespace, file: str) -> list:
    """Trains what is missing of `choices` (options of train.py, where the user gives none), and writes file.csv;
    `draw` draws file.png. Returns its summary or, where it has none, all scores."""
    given = {k: v for k, v in vars(args).items() if v is not None} | {"out": args.out or f"runs/{Path(file).name}"}
    folders = [run.out for own in choices for run in train.main(Namespace(**vars(args) | own | given), several=True)]
    if not folders or parallel.rank():  # --dry-run, --explain; or another process writes
        return []
    (rows,) = groups(read(dict.fromkeys(folders)))
    single = ("method lam sibo_at side frozen_too lam_by_depth learn_lam stochastic_depth similarity_loss lr steps "
              "seed metric score loss n similarity date")
    lists = "lambda similarity_per_layer loss_per_quarter"
    runs = [run.result | run.config | {"loss_per_quarter": run.losses} for g in rows for run in g.runs.values()]
    write_csv(file, f"{single} {lists}", [
        [run[k] for k in single.split()]
        + [" ".join(f"{x:.4f}" for x in np.atleast_1d(run[k])) for k in lists.split()] for run in runs])
    return draw(rows, file) or [score(g, rows) for g in rows]


def write_csv(file: str, columns: str, lines: Sequence[Sequence]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns.split(), *lines])
    files.write(Path(f"{file}.csv"), text.getvalue())


def finish(ax, file: str, **labels) -> None:
    ax.set(**labels)
    ax.legend(frameon=False)
    files.write(Path(f"{file}.png"), ax.figure.savefig)


def title(rows: Groups) -> str:
    first, seeds = rows[0].first, " to ".join(map(str, sorted({len(g.runs) for g in rows})))
    validation = ", validation" if first["scored_on"] == "validation" else ""
    return f"{first['backbone']} on {first['task']}{validation}, " + ("one seed" if seeds == "1" else f"{seeds} seeds")


def deviation(values: np.ndarray) -> np.ndarray:
    """Over seeds, the last axis; 0 for one seed."""
    return values.std(-1, ddof=int(values.shape[-1] > 1))


def draw_means(ax, x: Sequence[float], values: np.ndarray, method: str, marker: str = "o", **style) -> None:
    ax.errorbar(x, values.mean(-1), deviation(values), fmt=f"{marker}-", capsize=3, ms=4,
                color=pictures.look(method)["color"], **style)


def score(g: SeedGroup, rows: Groups) -> str:
    scores, lam = g.over_seeds("score"), g.over_seeds("lambda")
    spread = f"± {deviation(scores):.3f}" if len(scores) > 1 else "(one seed)"
    learned = f", {lam.min():.3f} to {lam.max():.3f}" if g.config["learn_lam"] else ""
    return f"{name(g, rows)} {scores.mean():.3f} {spread}{learned}"


def all_scores(rows: Groups, file: str) -> None:
    pictures.draw_runs([run for g in rows for run in g.runs.values()], Path(f"{file}.png"))


def score_by_lam(rows: Groups, file: str) -> list[str]:
    """Figure 4: the score against λ; dashed, the plain methods (λ = 0). Names each method's best."""
    _, ax = pictures.figure()
    best, sign = [], -1 if rows[0].first["metric"] == "loss" else 1  # a loss: the least
    for method in dict.fromkeys(g.config["method"] for g in rows):
        same, style = [g for g in rows if g.config["method"] == method], pictures.look(method)
        scores = np.array([g.over_seeds("score") for g in same])  # (λ, seeds)
        best.append(score(same[(sign * scores.mean(1)).argmax()], rows))
        if "sibo" in method:
            draw_means(ax, [g.config["lam"] for g in same], scores, method, label=method)
        else:
            mean, spread = scores[0].mean(), deviation(scores[0])
            ax.axhline(mean, lw=1, label=f"{method} ({mean:.3f})", **style)
            ax.axhspan(mean - spread, mean + spread, color=style["color"], alpha=0.1, lw=0)
    finish(ax, file, xlabel="λ, share of h0 in h̃", ylabel=rows[0].first["metric"],
           title=f"{title(rows)}, n = {rows[0].first['n']}")
    return best


def with_lam(g: SeedGroup, rows: Groups) -> str:
    label, lam = name(g, rows), g.config["lam"]
    return label + (f", λ {lam:g}" if lam and "λ" not in label else "")


def similarity(rows: Groups, file: str) -> list[str]:
    """Figures 1, 2, 5, 6: Eq. (3) per layer. Names the last five's mean."""
    curves = {"frozen": rows[0].first["baseline_similarity_per_layer"]}
    last_five = [f"frozen {rows[0].first['baseline_similarity']:.3f}"]
    for g in rows:
        last_five.append(f"{name(g, rows)} {g.over_seeds('similarity').mean():.3f}")
        curves[with_lam(g, rows)] = g.over_seeds("similarity_per_layer").mean(0)
    pictures.draw_similarity(curves, Path(f"{file}.png"), title(rows))
    return last_five


def learned(rows: Groups, file: str) -> None:
    """Section 7: where λ went in each block, a line for each of its modules that get h0; with --targets, which need not
    be in every block, in each module."""
    rows = [g for g in rows if g.config["learn_lam"]]
    free = any(g.config["targets"] or g.config["lam_by_depth"] != "even" for g in rows)
    blocks = len(rows[0].first["similarity_per_layer"]) - 1
    _, ax = pictures.figure()
    markers = cycle("os^vD")
    for g in rows:
        lam = g.over_seeds("lambda")  # (seeds, modules)
        lines = lam.reshape(len(lam), lam.shape[1] if free else blocks, -1).transpose(2, 1, 0)  # (lines, x, seeds)
        for i, line in enumerate(lines):
            which = f", module {i + 1} of {len(lines)}" if len(lines) > 1 else ""
            draw_means(ax, np.arange(1, len(line) + 1) + 0.04 * i, line, g.config["method"], next(markers),
                       label=name(g, rows) + which, alpha=1 - 0.6 * i / len(lines))
        ax.axhline(g.config["lam"], color="0.5", ls="--", lw=1)
    finish(ax, file, xlabel="module that gets h0, first block to last" if free else "block", title=title(rows),
           ylim=(0, None), ylabel="learned λ (dashed: its start; bars: deviation)")


def gain(rows: Groups, file: str) -> list[str]:
    """The held-out loss per answer against the plain method's, of each SIBO group; all losses go into file.jsonl."""
    save([run for g in rows for run in g.runs.values()], Path(f"{file}.jsonl"))
    found = {with_lam(g, rows): loss_difference(g) for g in rows if g.plain}
    if None in found.values():
        raise ValueError(f"{rows[0].config['task']}: expected the loss of each answer in all runs, got runs without; "
                         "use --score-by loss, with --score-on validation where a test file has no answers to learn")
    pictures.draw_differences(found, Path(f"{file}.png"), title(rows))
    shown = "± {:.4f} (could show {:.4f})".format
    return [f"{label} {d.mean:+.4f} " + ("(one answer: no interval)" if math.isnan(d.half) else
                                         shown(d.half, d.could_show)) for label, d in found.items()]


def examples(args: Namespace, n: int) -> tuple[nn.Module, list[batch.Row], int]:
    """The frozen backbone, `n` test examples with labels, and the padding id."""
    require_device(args.device)
    task, t = tasks.parse(args.task)[0], tokenizer.from_pretrained(args.backbone)
    m = model.from_pretrained(args.backbone, getattr(torch, args.dtype or "float32"), args.device, task.num_labels)
    rows = evaluation.similarity_rows(m, t, readers.load(task, "test", tasks.data_dir(args.data_dir), n), n)
    return m, rows if task.num_labels else [replace(r, labels=r.ids) for r in rows], t.pad_id or 0


@torch.no_grad()
def norms(args: Namespace, file: str) -> list[str]:
    """Root mean squares of h, where h0 is mixed into it, and of h0: what a λ means in each module. Of the median token,
    as the first one's activations can be a hundred times the others'."""
    m, rows, pad = examples(args, 64)
    b = batch.to_device(batch.collate(rows, pad), m)
    del b["labels"]
    real, rms, lines, summary = b["attention_mask"].bool(), {}, [], []

    def measure(module: str, _, inputs: tuple, output: Tensor) -> None:  # (B, T, d)
        rms[module] = [float(h[real].float().square().mean(-1).sqrt().median()) for h in (inputs[0], output)]

    placed = {method: place(m, sibo.Settings(method)) for method in ("adapter", "lora")}
    source = next(iter(placed["lora"].mixed.values())).sources[0]
    for module in {source}.union(*(where.mixed for where in placed.values())):
        m.get_submodule(module).register_forward_hook(partial(measure, module))
    m(**b)
    h0 = rms[source][0]
    _, ax = pictures.figure()
    for method, side in (("adapter", "output"), ("lora", "input")):
        modules = [module for module in placed[method].widths if module in placed[method].mixed]
        values = [rms[module][side == "output"] for module in modules]
        blocks = [int(next(filter(str.isdigit, module.split(".")))) for module in modules]
        ax.semilogy(blocks, values, "o-", ms=4, label=f"h at {method} ({modules[0].split('.')[-1]} {side})")
        lines += [[method, module, *(f"{x:.5f}" for x in (h, h0, h0 / h))]
                  for module, h in zip(modules, values, strict=True)]
        summary.append(f"{method}: ‖h0‖/‖h‖ from {h0 / max(values):.3f} to {h0 / min(values):.3f}")
    ax.axhline(h0, color="k", ls="--", lw=1, label=f"h0 ({h0:.3f})")
    finish(ax, file, xlabel="block", ylabel="root mean square, median token",
           title=f"{args.backbone}, frozen, {name_of(args.task)}")
    write_csv(file, "method module rms_h rms_h0 ratio", lines)
    return summary


def cost(args: Namespace, file: str) -> list[str]:
    """Table 9: FLOPs and seconds (30 pairs) of a training step, SIBO against plain."""
    _, ax = pictures.figure(height=2.6)
    lam, lines, summary = args.lam[0] if args.lam else 0.2, [], []
    for y, method in enumerate(("adapter", "lora")):
        (ours, rows, flops), (plain, _, plain_flops) = (step_and_flops(args, method, x) for x in (lam, 0.0))
        row = bench_rows.paired("", "s", *bench_rows.clocked([ours, plain], [rows] * 30))
        ratio, time, (low, high) = flops / plain_flops, row.ratio, row.interval
        ax.errorbar(time, y, xerr=[[time - low], [high - time]], fmt="o", capsize=3, label=f"{method}: time")
        ax.plot(ratio, y, "k|", ms=14, label=None if y else "FLOPs")
        lines.append([method, lam, plain_flops, flops, f"{ratio:.6f}",
                      *(f"{x:.4f}" for x in (row.peer, row.ours, time, low, high))])
        summary.append(f"{method}: FLOPs × {ratio:.4f}, time × {time:.3f} ({low:.3f}–{high:.3f})")
    ax.axvline(1, color="0.5", lw=1)
    ax.set_yticks([0, 1], ["adapter-sibo", "lora-sibo"])
    finish(ax, file, xlabel="a training step, SIBO against plain (95 % interval)", title=args.backbone,
           ylim=(-0.6, 1.6))
    write_csv(file, "method lam flops_plain flops_sibo flops_ratio seconds_plain seconds_sibo time_ratio low high",
              lines)
    return summary


def step_and_flops(args: Namespace, method: str, lam: float) -> tuple[Callable, list[batch.Row], int]:
    """A training step, its rows, and its FLOPs: PyTorch's count of products, and 3 for each mixed element,
    h̃ = h + λ(h0 − h)."""
    m, rows, pad = examples(args, args.batch_size or 16)
    sibo.inject(m, method, lam).train()
    step = partial(loop.train_step, m, micro_batch_size=len(rows), pad_id=pad)
    with FlopCounterMode(display=False) as counter:
        step(rows)
    mixed = sum(isinstance(x, sibo.SIBOLayer) and x.lam_start > 0 for x in m.modules())
    elements = len(rows) * max(len(r.ids) for r in rows) * m.config.hidden_size
    return step, rows, counter.get_total_flops() + 3 * mixed * elements


ALL = {"method": ("adapter", "lora", "adapter-sibo", "lora-sibo")}
METHODS = {"method": ("adapter", "adapter-sibo"), "lam": (0.2,)}
LOSS = {"score_by": "loss", "lr": (1e-3,)}  # the better of 3e-4 and 1e-3 for the plain adapter and LoRA
ADAPTERS = LOSS | {"method": ("adapter", "adapter-sibo"), "lam": (0.1,)}  # the authors' λ for LLaMA throughout
INPUTS = {"side": "in", "lr": (3e-4,)}  # where 3e-4 was the better one
ONE = ADAPTERS | {"method": ("adapter-sibo",)}
STUDIES = {  # where in the paper; a function of the options and the files' path without its ending
    "lambda": ("Figure 4", partial(trained, score_by_lam, [ALL | {"lam": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}])),
    "placement": ("Table 5", partial(trained, all_scores, [
        {"method": ("adapter", "adapter-sibo"), "sibo_at": ("attn", "ffn", "both")}])),
    "low-rank": ("Table 6", partial(trained, all_scores, [
        {"method": ("lora", "lora-sibo")}, {"method": ("lora-sibo",), "frozen_too": True}])),
    "similarity": ("Figures 1, 2, 5, 6", partial(trained, similarity, [ALL])),
    "learned": ("Section 7", partial(trained, learned, [
        ALL, {"method": ("adapter-sibo", "lora-sibo"), "learn_lam": True}])),
    "gain": ("–", partial(trained, gain, [
        ADAPTERS, ADAPTERS | INPUTS, LOSS | {"method": ("lora", "lora-sibo"), "lam": (0.3,)}])),
    "where": ("–", partial(trained, gain, [
        ADAPTERS, ADAPTERS | INPUTS, ONE | {"learn_lam": True}, ONE | INPUTS | {"learn_lam": True},
        *(ONE | {"lam_by_depth": where} for where in ("rising", "falling", "first-third", "last-third"))])),
    "remedies": ("–", partial(trained, gain, [
        METHODS | more for more in ({"similarity_loss": 0.1}, {}, {"stochastic_depth": 0.1})])),  # for a BERT
    "depth": ("–", depth.study),
    "norms": ("–", norms),
    "cost": ("Table 9", cost),
}
OPTIONS = {  # of train.py's, those that a study reads which does not train by it
    "norms": ("backbone", "task", "data_dir", "dtype", "device"),
    "cost": ("backbone", "task", "data_dir", "dtype", "device", "lam", "batch_size"),
    "depth": ("backbone", "data_dir", "seed", "steps", "lr", "batch_size", "resume", "out"),
}


def parser() -> cli.Parser:
    p = options.parser()
    p.prog = "-m sibo_lab study"
    p.description = ("The paper's analyses, and ours: gain, where, depth, remedies (docs/experiments.md says what each "
                     "is). Their other options are train.py's.")
    p.add_argument("study", choices=STUDIES)
    p.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR", help="(default: %(default)s)")
    p.set_defaults(method=None, score_by=None)  # None: the study's own
    return p


def main(args: Namespace) -> None:
    where, study = STUDIES[args.study]
    usual = vars(parser().parse_args([args.study])) if args.study in OPTIONS else {}
    if args.study == "lambda" and (lists := [k for k in ("lr", "sibo_at") if len(getattr(args, k) or ()) > 1]):
        raise ValueError(f"{options.flag(lists[0])}: expected one value, as study lambda draws scores against λ alone, "
                         f"got {','.join(map(str, getattr(args, lists[0])))}")
    read = ("results", "offline", *OPTIONS.get(args.study, ()))
    if unread := [k for k, v in usual.items() if vars(args)[k] != v and k not in read]:
        raise ValueError(f"{options.flag(unread[0])}: expected an option that study {args.study} reads ("
                         f"{', '.join(map(options.flag, OPTIONS[args.study]))}), got {vars(args)[unread[0]]}")
    summary = study(args, f"{args.results}/{args.study}-{name_of(args.backbone)}-{name_of(args.task)}")
    if summary:
        print(f"| {where} | `{run_folder.command()}` | {'; '.join(summary)} |")
