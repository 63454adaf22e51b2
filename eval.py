"""Scores a run or a backbone, measures over-smoothing (paper, Eq. 3), and draws both.

`python eval.py runs/NAME` scores a saved run again, to the same number. Sources: the paper's Sections 3.1 and 4.1,
LLM-Adapters' scoring (see data.py), GLUE's metrics. Where the official code departs: its evaluation leaves dropout on
and pads on the left without a mask, so that its scores change with the batch size; here the model is in eval mode,
padding has no position and no weight, and nothing is scored in silence on a part of the examples."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cli
import compare
import data
import model
import parallel
import sibo
import tokenizer

# ---------------------------------------------------------------------------------------------- over-smoothing, Eq. (3)


def similarity(hidden: Tensor, attention_mask: Tensor) -> float:
    """Eq. (3): the mean cosine over all pairs i ≠ j of a sentence's tokens, then the mean over the sentences.

    hidden (B, T, d), attention_mask (B, T) with 0 on padding, which is left out, as are sentences of one token.
    ValueError if no sentence is left."""
    found = _similarities(hidden, attention_mask)
    if not len(found):
        raise ValueError("similarity: found no sentence of two tokens or more, expected at least one")
    return float(found.mean())


def _similarities(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    mask = attention_mask.bool()
    units = nn.functional.normalize(hidden.double(), dim=-1) * mask[..., None]  # (B, T, d), padding 0
    m = mask.sum(1)  # (B,): tokens of each sentence
    # Σ_{i≠j} cos(h_i, h_j) = |Σ_i u_i|² − Σ_i |u_i|² with u = h / |h|
    pairs = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return (pairs / (m * (m - 1)))[m > 1]


@torch.no_grad()
def layer_similarities(m: nn.Module, rows: Sequence[data.Row], pad_id: int, batch_size: int = 16) -> list[float]:
    """Eq. (3) of each of the L+1 hidden states, over all rows: the curve of Figures 1 and 2."""
    totals, count = 0, 0
    for start in range(0, len(rows), batch_size):
        b = _to(data.batch(rows[start:start + batch_size], pad_id), m)
        b.pop("labels", None)
        found = torch.stack([_similarities(h, b["attention_mask"]) for h in m.hidden_states(**b)])  # (L+1, sentences)
        totals, count = totals + found.sum(1), count + found.shape[1]
    if not count:
        raise ValueError("similarity: found no sentence of two tokens or more, expected at least one")
    return (totals / count).tolist()


def last_five(curve: Sequence[float]) -> float:
    """The paper's summary of a curve (Figures 5 and 6): the mean over the last five layers."""
    return float(np.mean(curve[-5:]))


# --------------------------------------------------------------------------------------------------------------- scores


@dataclass
class Score:
    """A task's score in [−1, 1], its metric, on n examples; `parts`: the same of each group; `more`: other metrics."""

    metric: str
    score: float
    n: int
    parts: dict[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)


def _to(batch: dict[str, Tensor], m: nn.Module) -> dict[str, Tensor]:
    device = next(m.parameters()).device
    return {k: v.to(device) for k, v in batch.items()}


def answers(m: nn.Module, t: tokenizer.Tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64,
            num_beams: int = 1) -> list[str]:
    """What the model writes to each prompt, greedily or with beams; prompts of like length share a batch. Of several
    processes each asks for its share."""
    ids = [t.encode(p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))[parallel.rank()::parallel.world()]
    said, pad = {}, t.eos_id if t.pad_id is None else t.pad_id
    bar = tqdm(range(0, len(order), batch_size), "answers", unit="batch", leave=False, disable=parallel.rank() > 0)
    with parallel.in_step(m):
        for start in bar:
            some = order[start:start + batch_size]
            b = _to(data.batch([data.Row(ids[i]) for i in some], pad, "left"), m)
            out = model.generate(m, **b, max_new_tokens=max_new_tokens, num_beams=num_beams, eos_token_id=t.eos_id,
                                 pad_token_id=pad)
            for i, new in zip(some, out[:, b["input_ids"].shape[1]:].tolist(), strict=True):
                said[i] = t.decode(new[: new.index(t.eos_id)] if t.eos_id in new else new)
    return [text for _, text in sorted(parallel.union(said).items())]


def score_examples(m: nn.Module, t: tokenizer.Tokenizer, task: data.Task, examples: Sequence[data.Example],
                   batch_size: int = 64, num_beams: int = 1) -> Score:
    """Accuracy of the generated answers, over all and over each part that is reported on its own."""
    said = answers(m, t, [data.prompt(e.instruction) for e in examples], task.max_new_tokens, batch_size, num_beams)
    right = [data.is_right(task, text, e.answer) for text, e in zip(said, examples, strict=True)]
    groups = {p: [r for r, e in zip(right, examples, strict=True) if e.part == p] for p in {e.part for e in examples}}
    parts = {p or "the rest": float(np.mean(g)) for p, g in sorted(groups.items())} if len(groups) > 1 else {}
    return Score("accuracy", float(np.mean(right)), len(right), parts)


def mean(scores: dict[str, Score]) -> Score:
    """Of several tasks: the mean of their scores, which are its parts; one task's score is itself."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    each = list(scores.values())
    return Score(each[0].metric, float(np.mean([s.score for s in each])), sum(s.n for s in each),
                 {name: s.score for name, s in scores.items()})


@torch.no_grad()
def score_sentences(m: nn.Module, t: tokenizer.Tokenizer, task: data.Task, rows: Sequence[data.Row],
                    batch_size: int = 64) -> Score:
    """GLUE's metrics of a BERT's predictions. Of several processes each predicts its share."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))[parallel.rank()::parallel.world()]
    found = {}
    with parallel.in_step(m):
        for start in range(0, len(order), batch_size):
            some = order[start:start + batch_size]
            b = _to(data.batch([rows[i] for i in some], t.pad_id), m)
            b.pop("labels")
            logits = m(**b).float().cpu()  # (B, n)
            found |= zip(some, (logits[:, 0] if task.num_labels == 1 else logits.argmax(-1)).tolist(), strict=True)
    predicted = np.array([x for _, x in sorted(parallel.union(found).items())], dtype=float)
    return score_predictions(task, predicted, np.array([r.labels for r in rows]))


def score_predictions(task: data.Task, predicted: np.ndarray, labels: np.ndarray) -> Score:
    """The task's metric, and the others that GLUE reports beside it."""
    if task.num_labels == 1:
        found = {"pearson": pearson(predicted, labels), "spearman": pearson(ranks(predicted), ranks(labels))}
    else:
        found = {"accuracy": float(np.mean(predicted == labels)), "matthews": matthews(predicted, labels),
                 "f1": f1(predicted, labels)}
    return Score(task.metric, found.pop(task.metric), len(labels), more=found)


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes: the Pearson correlation of their 0/1 values; 0 if either is constant."""
    return pearson(predicted, labels)


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if it is neither predicted nor there."""
    hits = np.sum((predicted == 1) & (labels == 1))
    return float(2 * hits / max(np.sum(predicted == 1) + np.sum(labels == 1), 1))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation coefficient; 0 if either is constant."""
    a, b = a - a.mean(dtype=float), b - b.mean(dtype=float)
    scale = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def ranks(a: np.ndarray) -> np.ndarray:
    """1 for the smallest, equal values sharing the mean of their ranks."""
    _, inverse, counts = np.unique(a, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def majority(task: data.Task, train: Sequence[data.Sentence], test: Sequence[data.Row]) -> Score:
    """What a BERT scores before it has a trained head: always the commonest class (or the mean) of the training set."""
    labels = np.array([s.label for s in train], dtype=float)
    guess = labels.mean() if task.num_labels == 1 else np.bincount(labels.astype(int)).argmax()
    return score_predictions(task, np.full(len(test), guess, dtype=float), np.array([r.labels for r in test]))


# ------------------------------------------------------------------------------------------------------------- pictures


def figure(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Axes]:
    """An empty picture in the project's style, in inches at 150 dots each."""
    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")
    ax = fig.subplots()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def draw_similarity(curves: dict[str, Sequence[float]], path: Path, title: str) -> None:
    """Eq. (3) against the layer, a line a model; the last five layers, which the paper sums up, are shaded."""
    fig, ax = figure()
    layers = len(next(iter(curves.values())))
    ax.axvspan(layers - 5.4, layers - 0.6, color="0.93", label="last five")
    for (name, curve), style in zip(curves.items(), ("o--", "s-", "^-", "v-"), strict=False):
        ax.plot(range(layers), curve, style, ms=3.5, lw=1.4, label=f"{name} ({last_five(curve):.3f})")
    ax.set(xlabel="hidden state (0: token representation h0, last: after the last block)",
           ylabel="token-wise cosine similarity, Eq. (3)", title=title)
    ax.legend(frameon=False)
    checkpoint.write(path, fig.savefig)


# -------------------------------------------------------------------------------------------------------- command line


def similarity_rows(m: nn.Module, t: tokenizer.Tokenizer, test: Sequence, most: int = 64) -> list[data.Row]:
    """The first texts of a test set as Eq. (3) sees them: an LLM's prompts, BERT's sentences."""
    texts = [data.Sentence(x.instruction, None, 0) if isinstance(x, data.Example) else x for x in test[:most]]
    if isinstance(m, model.Bert):
        return [data.encode_sentence(s, t, m.config.max_position_embeddings) for s in texts]
    return [data.Row(t.encode(data.prompt(s.text))) for s in texts]


def parser() -> argparse.ArgumentParser:
    p = cli.Parser("eval.py", description="Score a run or a backbone; ask it; measure its over-smoothing.")
    what = p.add_argument_group("what is evaluated: a run, or a backbone as it is")
    what.add_argument("run", nargs="?", help="folder that train.py wrote, such as runs/NAME")
    what.add_argument("--backbone", help="short name, folder, .gguf file or hub id, without any training")
    what.add_argument("--table", nargs="+", type=Path, metavar="DIR", help="instead: all runs in DIR side by side")
    what.add_argument("--save", type=Path, metavar="FILE.jsonl", help="of --table: the runs as lines of JSON, which "
                      "--table reads too")
    what.add_argument("--markdown", action="store_true", help="of --table: as Markdown")
    what.add_argument("--merge", action="store_true", help="fold the run's LoRA into the weights first")
    on = p.add_argument_group("on what")
    on.add_argument("--task", help="short name or a .json/.jsonl file (default: the run's; else word-problems)")
    on.add_argument("--data-dir", help="folder of the tasks' files (default: $SIBO_DATA, else the cache)")
    on.add_argument("--limit", type=int, help="score the first N examples (default: the run's; else all)")
    on.add_argument("--ask", metavar="QUESTION", help="answer one question instead")
    on.add_argument("--similarity", action="store_true", help="draw Eq. (3) per layer instead")
    how = p.add_argument_group("how")
    how.add_argument("--batch-size", type=int, default=64, help="examples at a time (default: 64)")
    how.add_argument("--num-beams", type=int, default=1, help="beams, 1 is greedy (default: 1)")
    how.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the run's; else float32")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    how.add_argument("--out", type=Path, help="the picture (default: similarity.png or table.png in the "
                     "run's folder, or here)")
    return p


def main(args: argparse.Namespace) -> None:
    if args.table:
        runs, first = compare.read(args.table), args.table[0]
        out = args.out or (first if first.is_dir() else first.parent) / "table.png"
        print(compare.table(runs, args.markdown))
        if args.save:
            compare.save(runs, args.save)
        compare.draw(runs, out)
        print(f"\n{out}")
        return
    if bool(args.run) == bool(args.backbone):
        raise ValueError(f"found {'both' if args.run else 'neither'} a run and --backbone, expected one of them")
    for name in ("limit", "batch_size", "num_beams"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected at least 1")
    if args.run and not Path(args.run, "config.json").is_file():
        raise FileNotFoundError(f"{Path(args.run)}: found no config.json, expected a run folder that train.py wrote")
    run = checkpoint.read_json(Path(args.run, "config.json")) if args.run else {}
    backbone = run.get("backbone", args.backbone)
    trained = data.tasks(run.get("task", "word-problems"))
    tests = data.tasks(args.task or "+".join(run.get("test", [])) or run.get("task", "word-problems"))
    task = tests[0]
    folder = data.data_dir(args.data_dir or run.get("data_dir"))
    limit = args.limit or (None if args.task and tests != trained else run.get("limit"))
    examples = [[] if args.ask else data.load(of, "test", folder, limit) for of in tests]
    head = trained[0].num_labels if run else 0
    if (bool(head) != bool(task.num_labels) and run and not args.ask) or (args.ask and head):
        raise ValueError(f"{args.run}: found a run on {run['task']}, expected one that can answer {task.name}")

    t = tokenizer.from_pretrained(backbone)
    dtype = getattr(torch, args.dtype or run.get("dtype", "float32"))
    m = model.from_pretrained(backbone, dtype, args.device, head or None, run.get("base_bits"))
    if args.similarity:
        rows = similarity_rows(m, t, examples[0])
        curves = {backbone: layer_similarities(m, rows, t.pad_id or 0)}
    if run:
        sibo.load(m, args.run)
    if args.merge:
        sibo.merge(m)
    if args.ask:
        print(answers(m, t, [data.prompt(args.ask)], 256, 1, args.num_beams)[0])
    elif args.similarity:
        if run:
            curves[run["method"]] = layer_similarities(m, rows, t.pad_id or 0)
        out = args.out or Path(args.run or ".", "similarity.png")
        draw_similarity(curves, out, f"{backbone} on {task.name}")
        for name, curve in curves.items():
            print(f"{name:14} {' '.join(f'{x:.3f}' for x in curve)}   last five {last_five(curve):.4f}")
        print(out)
    elif isinstance(m, model.Bert) and not head:
        raise ValueError(f"{backbone}: found a BERT without a trained head, expected a run; train one first")
    else:
        for of, test in zip(tests, examples, strict=True):
            score = (score_sentences(m, t, of, [data.encode_sentence(s, t, run["cutoff"]) for s in test],
                                     args.batch_size) if of.num_labels
                     else score_examples(m, t, of, test, args.batch_size, args.num_beams))
            more = ", ".join(f"{k} {v:.4f}" for k, v in (score.parts | score.more).items())
            print((f"{of.name}: " if len(tests) > 1 else "") +
                  f"{score.metric} {score.score:.4f} (n {score.n}{'; ' + more if more else ''})")


if __name__ == "__main__":
    cli.run(main, parser())
