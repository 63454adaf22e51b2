"""Fine-tunes a backbone with adapters or LoRA, plain or SIBO: options, recipes, runs, and what they leave behind.

`python train.py` is the whole main job. Recipes: the paper's Section 4.2 and the official scripts (LLM-Adapters); what
they do not publish is chosen here and marked. Departures from the official code: the frozen model is scored too; the
plain method is the same code with λ = 0; examples that the cutoff shortens are counted and reported."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

import checkpoint
import cli
import compare
import data
import estimate
import eval as evaluation
import loop
import model
import parallel
import quantized
import resume
import scoring
import sibo
import tokenizer

METHODS = ("full", "adapter", "adapter-sibo", "lora", "lora-sibo")


@dataclass(frozen=True)
class Recipe:
    """What a run does unless an option says otherwise. The defaults here are the official scripts' for LLMs."""

    steps: int | None = None  # None: epochs decide
    epochs: float = 3.0
    lr: float = 3e-4
    warmup: float = 100  # steps; below 1: a share of all steps
    batch_size: int = 16
    micro_batch_size: int = 4
    cutoff: int = 256  # tokens
    train_on_inputs: bool = True
    lam: float = 0.1  # LLaMA: 0.1 throughout
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    bottleneck: int = 256
    dtype: str = "bfloat16"
    validate: int = 120  # examples held out of the training set, to choose the best checkpoint by; 0: the last is kept
    validate_every: int = 200  # steps


RECIPES = (  # family, kind of task, method ("" matches any): what differs. All rows that match apply, in this order.
    ("gptj", "arithmetic", "adapter-sibo", {"lam": 0.3}),  # the scripts' λ
    ("gptj", "commonsense", "lora-sibo", {"lam": 0.3}),
    ("", "word-problems", "", {"steps": 340, "warmup": 20, "batch_size": 4,
                               "train_on_inputs": False, "validate": 0}),  # ours
    ("bert", "glue", "", {"batch_size": 32, "micro_batch_size": 32, "cutoff": 128, "warmup": 0.1, "rank": 8,
                          "alpha": 16.0, "bottleneck": 64, "dtype": "float32", "epochs": 5.0,
                          "validate": 0}),  # ours: not published
    ("bert", "glue", "full", {"lr": 3e-5}),  # from {3e-5, 3e-4, 3e-3}, as Houlsby et al.
    ("bert", "glue", "adapter-sibo", {"lam": 0.2}),  # Figure 4
    ("bert", "glue", "lora-sibo", {"lam": 0.6}),
)


def recipe(family: str, kind: str, method: str) -> Recipe:
    """The recipe of a family ("llama", "gptj", "bert"), a kind of task (data.Task.kind) and a method."""
    r = Recipe()
    for *where, changes in RECIPES:
        if all(w in ("", is_) for w, is_ in zip(where, (family, kind, method), strict=True)):
            r = replace(r, **changes)
    return r


@dataclass(frozen=True)
class Run(Recipe):
    """Everything that decides a run's numbers: config.json of the run folder."""

    backbone: str = "smollm2-135m"
    method: str = "adapter-sibo"
    task: str = "word-problems"  # several: joined by +
    test: tuple[str, ...] = ()  # tasks to score; none: those of `task`
    score_on: str = "test"  # or "validation"
    protocol: str = "clean"  # or "paper": the official prompt, and beams to score with
    data_dir: str | None = None
    learn_lam: bool = False
    targets: tuple[str, ...] | None = None
    sibo_at: str | None = None
    side: str = "out"
    skip: str = "mixed"
    frozen_too: bool = False
    seed: int = 0
    limit: int | None = None
    device: str = "cpu"
    compile: bool = False
    grad_checkpoint: bool = False
    base_bits: int | None = None
    shard: bool = False
    out: str = ""

    def settings(self) -> dict:
        """Keywords of sibo.inject."""
        names = {f.name for f in fields(sibo.Settings)} - {"method"}
        return {k: v for k, v in asdict(self).items() if k in names} | {"method": self.method.removesuffix("-sibo")}

    @property
    def plain(self) -> Run:
        """The counterpart without h0: same seed, same data, λ = 0."""
        return replace(self, method=self.method.removesuffix("-sibo"), **compare.PLAIN, out=f"{self.out}-plain")


# -------------------------------------------------------------------------------------------------------------- one run


@dataclass
class Frozen:
    """What the frozen backbone scores: measured once, used by a run and its plain counterpart."""

    score: scoring.Score
    curve: list[float]


@dataclass
class Data:
    """What a run learns from, chooses its best checkpoint by, and is scored on: each test with its task."""

    task: data.Task
    train: Sequence
    valid: Sequence
    tests: Sequence[tuple[data.Task, Sequence]]


def measure(m: nn.Module, t: tokenizer.Tokenizer, tests: Sequence[tuple[data.Task, Sequence]], run: Run,
            first: int | None = None) -> scoring.Score:
    """The score of each test on its first examples, and of several their mean."""
    found = {}
    for task, test in tests:
        if task.num_labels:
            rows = [data.encode_sentence(s, t, run.cutoff) for s in test[:first]]
            found[task.name] = scoring.score_sentences(m, t, task, rows)
        else:
            found[task.name] = scoring.score_examples(m, t, task, test[:first], protocol=run.protocol)
    return scoring.mean(found)


@torch.no_grad()
def validation(m: nn.Module, t: tokenizer.Tokenizer, d: Data, rows: Sequence[data.Row], run: Run) -> float:
    """How good the model is on the validation examples: GLUE's metric, or minus the loss a labelled token."""
    if d.task.num_labels:
        return scoring.score_sentences(m, t, d.task, rows).score
    total = loss = 0.0
    for start in range(0, len(rows), run.micro_batch_size):
        b = data.to_device(data.batch(rows[start:start + run.micro_batch_size], 0), m)
        n = int((b["labels"][:, 1:] != -100).sum())
        if n:
            loss += n * float(model.loss(m, b["input_ids"], b["labels"]))
        total += n
    return -loss / total


def load(run: Run, task: data.Task) -> nn.Module:
    """The backbone, with the seed set for all that is drawn anew; to be sharded: on the CPU, where files are mapped."""
    torch.manual_seed(run.seed)
    return model.from_pretrained(run.backbone, getattr(torch, run.dtype), "cpu" if run.shard else run.device,
                                 task.num_labels or None, run.base_bits)


def command() -> str:
    """The command line of this process."""
    return cli.without_secrets(shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))


def git_state() -> str | None:
    """The commit of this code, and whether it was edited since; None where it is no git checkout."""
    said = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True,
                          text=True)
    return said.stdout.strip() or None


def execute(run: Run, d: Data, before: Frozen | None = None, every: resume.Every | None = None,
            go_on: bool = False) -> tuple[dict, Frozen]:
    """Trains, scores and writes one run; returns its result and the frozen backbone's figures."""
    out, task = Path(run.out), d.task
    estimate.peak_begins(run.device)
    m = load(run, task)
    t = tokenizer.for_model(run.backbone, m.config.vocab_size, "pad" if task.num_labels else "eos")
    pad = t.eos_id if t.pad_id is None else t.pad_id
    encode = data.encode_sentence if task.num_labels else partial(
        data.encode, train_on_inputs=run.train_on_inputs, protocol=run.protocol)
    rows, valid = ([encode(e, t, run.cutoff) for e in part] for part in (d.train, d.valid))
    cut = sum(r.cut for r in rows)
    if cut and not parallel.rank():
        print(f"{cut} of {len(rows)} training examples are cut off at {run.cutoff} tokens (--cutoff)", file=sys.stderr)
    mute, mute_valid = (sum(isinstance(r.labels, list) and set(r.labels[1:]) <= {-100} for r in part)
                        for part in (rows, valid))
    for n, part, kind in ((mute, rows, "training"), (mute_valid, valid, "validation")):
        if part and n == len(part):
            raise ValueError(f"--cutoff {run.cutoff}: found no labelled token in any of the {n} {kind} examples: "
                             "their prompts fill it; raise it")
    if mute and not parallel.rank():
        print(f"{mute} of {len(rows)} training examples have no labelled token left: they teach nothing (--cutoff)",
              file=sys.stderr)
    texts = evaluation.similarity_rows(m, t, d.tests[0][1], protocol=run.protocol)
    if before is None:
        if run.shard:
            parallel.wrap(m, run.device, True)
        before = Frozen(scoring.mean({of.name: scoring.majority(
            of, d.train, [data.encode_sentence(s, t, run.cutoff) for s in test]) for of, test in d.tests})
                        if task.num_labels else measure(m, t, d.tests, run, 50),
                        evaluation.layer_similarities(m, texts, pad))
        if run.shard:  # what is cut up takes no adapters: they come first
            m = load(run, task)
    m = m.requires_grad_(True) if run.method == "full" else sibo.inject(m, **run.settings())
    if not parallel.rank():
        checkpoint.write(out / "config.json", json.dumps(asdict(run), indent=2) + "\n")
    trace = {"versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
             "git": git_state(), "sha256": {"train": data.digest(rows), "validation": data.digest(valid)}
             | {of.name: data.digest(test) for of, test in d.tests}}
    came = loop.fit(m, rows, pad, run, valid and partial(validation, t=t, d=d, rows=valid, run=run), every, go_on)
    sibo.save(m, out)
    after = measure(m, t, d.tests, run)
    curve = evaluation.layer_similarities(m, texts, pad)
    trained = sum(p.numel() for p in m.parameters() if p.requires_grad)
    result = {
        "backbone": run.backbone, "method": run.method, "lambda": learned_lam(m) if run.learn_lam else run.lam,
        "task": run.task, "scored_on": run.score_on, "metric": after.metric, "score": after.score, "n": after.n,
        "interval": after.interval, "parts": after.parts, "more": after.more, "empty": after.empty,
        "answers_given": after.said, "baseline_score": before.score.score, "baseline_n": before.score.n,
        "trainable_parameters": trained, "total_parameters": quantized.parameters(m), **came,
        "peak_memory_bytes": estimate.peak_memory(run.device), "similarity": evaluation.last_five(curve),
        "baseline_similarity": evaluation.last_five(before.curve), "examples_cut_off": cut,
        "examples_without_label": mute,
        "test_examples_cut_off": after.cut, "seed": run.seed,
        "similarity_per_layer": curve, "baseline_similarity_per_layer": before.curve,
        "command": command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), **trace,
    }
    if not parallel.rank():
        checkpoint.write(out / "answers.jsonl", "".join(json.dumps(r) + "\n" for r in after.records))
        checkpoint.write(out / "result.json", json.dumps(result, indent=2) + "\n")
        shutil.rmtree(out / "checkpoints")  # the adapter is the best of them
    return result, before


def learned_lam(m: nn.Module) -> list[float]:
    return [round(float(parallel.whole(x.logit.detach()).sigmoid()), 4) for x in m.modules()
            if isinstance(x, sibo.Boosted) and x.fixed]


def draw(runs: Sequence[Run], results: Sequence[dict]) -> None:
    """Pictures in each run's folder: the loss of every step, faint, with its running mean, and the similarity."""
    title = f"{runs[0].backbone} on {name_of(runs[0].task)}"
    fig, ax = evaluation.figure()
    for run in runs:
        loss = compare.losses(Path(run.out))
        mean = [loss[max(0, i - 9):i + 1].mean() for i in range(len(loss))]
        line, = ax.plot(range(1, len(loss) + 1), mean, lw=1.6, label=f"{run.method} (mean of 10 steps)",
                        **compare.look(run.method))
        ax.plot(range(1, len(loss) + 1), loss, color=line.get_color(), alpha=0.3, lw=0.8)
    ax.set(xlabel="step", ylabel="loss", title=title)
    ax.set_ylim(0, None)
    ax.legend(frameon=False)
    curves = {"frozen": results[0]["baseline_similarity_per_layer"]}
    curves |= {r["method"]: r["similarity_per_layer"] for r in results}
    for run in runs:
        checkpoint.write(Path(run.out, "curves.png"), fig.savefig)
        evaluation.draw_similarity(curves, Path(run.out, "similarity.png"), title)


def table(results: Sequence[dict]) -> str:
    """The frozen model and each run side by side."""
    r = results[0]
    percent = r["metric"] == "accuracy"
    show = (lambda x: f"{100 * x:.1f} %") if percent else (lambda x: f"{x:.4f}")
    rows = [["", "before", *(x["method"] for x in results)],
            [r["metric"], show(r["baseline_score"]), *(show(x["score"]) for x in results)]]
    rows += [[f"  {p}", "", *(show(x["parts"][p]) for x in results)] for p in r["parts"]]
    rows += [["scored on", str(r["baseline_n"]), *(str(x["n"]) for x in results)],
             ["λ", "", *(f"{np.mean(x['lambda']):.3g}" for x in results)],
             ["similarity, last five layers", f"{r['baseline_similarity']:.3f}",
              *(f"{x['similarity']:.3f}" for x in results)],
             ["trainable parameters", "0", *(f"{x['trainable_parameters']:,}" for x in results)],
             ["  share", "", *(f"{x['trainable_parameters'] / x['total_parameters']:.2%}" for x in results)],
             ["training seconds", "", *(f"{x['train_seconds']:.0f}" for x in results)],
             ["tokens/s", "", *(f"{x['tokens_per_second']:.0f}" for x in results)],
             ["peak memory, GB", "", *(f"{x['peak_memory_bytes'] / 1e9:.2f}" for x in results)]]
    return cli.aligned(rows)


def name_of(backbone_or_task: str) -> str:
    """The last part of a path or hub id, without a file's ending (but with a name's own dots: llama-3.2-1b)."""
    name = Path(backbone_or_task).name
    return Path(name).stem if name.endswith((".gguf", ".json", ".jsonl")) else name


# --------------------------------------------------------------------------------------------------------- command line


def default(name: str) -> str:
    """A field of the recipes as --help tells it: the general value, then where it differs."""
    general = getattr(Recipe(), name)
    told = ["as --epochs says" if general is None else str(general)]
    told += [f"{' '.join(filter(None, where))} {changes[name]}" for *where, changes in RECIPES if name in changes]
    return f"(default: {'; '.join(told)})"


GRID = ("method", "lam", "sibo_at", "lr", "seed")  # options that take a list
USED_BY = {  # options that only some methods read: elsewhere they are an error, not ignored
    "lam": "-sibo", "learn_lam": "-sibo", "sibo_at": "-sibo", "frozen_too": "lora-sibo", "skip": "adapter-sibo",
    "side": "adapter", "bottleneck": "adapter", "rank": "lora", "alpha": "lora", "dropout": "lora", "targets": "a",
}


def uses(method: str, part: str) -> bool:
    return part in method and method != "full"


def listed(kind: type) -> Callable[[str], tuple]:
    """A type of option: one value, or several separated by commas."""
    def read(text: str) -> tuple:
        return tuple(kind(x) for x in text.split(","))

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def parser() -> cli.Parser:
    p = cli.Parser("train.py", description="Fine-tune a backbone with SIBO or its plain counterpart. Where "
                   "a default depends on the backbone's family, the kind of task and the method, the last fit holds. "
                   "Lists of methods, λ, places, learning rates and seeds (with commas) train every combination that "
                   "is not done yet and end in a table.")
    g = p.add_argument_group("what")
    g.add_argument("--backbone", default="smollm2-135m", metavar="NAME",
                   help=f"{', '.join([*checkpoint.WHEELS, *checkpoint.HUB])}, a folder, a .gguf file or a hub id "
                   "(default: %(default)s)")
    g.add_argument("--method", default=("adapter-sibo",), type=listed(str), metavar="M",
                   help=f"{', '.join(METHODS)} (default: adapter-sibo)")
    g.add_argument("--task", default="word-problems", metavar="T",
                   help=f"{', '.join(data.TASKS)}, several joined by +, or your own .json/.jsonl (default: "
                   "%(default)s)")
    g.add_argument("--test", type=listed(str), metavar="A,B", help="tasks to score (default: those of --task)")
    g.add_argument("--score-on", choices=["test", "validation"], default="test", help="(default: %(default)s)")
    g.add_argument("--protocol", choices=list(data.PROMPTS), default="clean", help="paper: the official code's "
                   "indented prompt, and 4 beams to score with (default: %(default)s)")
    g.add_argument("--data-dir", metavar="DIR", help="the tasks' files (default: $SIBO_DATA, else the cache)")
    g.add_argument("--compare", action="store_true", help="train the plain counterpart (λ = 0) as well")
    g.add_argument("--explain", action="store_true", help="draw where h0 enters this backbone, as a tree, and stop")
    g.add_argument("--dry-run", action="store_true", help="say what would be trained, its memory and FLOPs, and stop")
    def of_recipe(name: str, kind: type, metavar: str, told: str) -> None:
        g.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{told} {default(name.replace('-', '_'))}")

    g = p.add_argument_group("the method")
    of_recipe("lam", listed(float), "λ", "share of h0 in h̃ = (1−λ)h + λh0, in [0, 1)")
    g.add_argument("--learn-lam", action="store_true", default=None, help="learn one λ a module, from --lam "
                   "on, in steps 50 times those of the weights")
    g.add_argument("--sibo-at", type=listed(str), metavar="P", help="whose modules get h0: attn, ffn or both (default: "
                   "the paper's; with --targets all of these)")
    g.add_argument("--targets", type=lambda s: tuple(s.split(",")), metavar="A,B",
                   help="modules to adapt, by the end of their names (default: the paper's)")
    g.add_argument("--side", choices=["out", "in", "parallel"], help="adapters on the output, on the input or "
                   "beside the sub-layer (default: out)")
    g.add_argument("--skip", choices=["mixed", "plain"], help="adapters: h̃ + … (Eq. 4) or h + … (default: mixed)")
    g.add_argument("--frozen-too", action="store_true", default=None, help="LoRA: the frozen W sees h̃ too (Table 6)")
    of_recipe("rank", int, "R", "LoRA's rank")
    of_recipe("alpha", float, "A", "LoRA's scale is alpha / rank")
    of_recipe("dropout", float, "P", "on the input of LoRA's low-rank path, in [0, 1)")
    of_recipe("bottleneck", int, "R", "width inside an adapter")
    g = p.add_argument_group("training")
    of_recipe("steps", int, "N", "optimizer steps, instead of --epochs")
    of_recipe("epochs", float, "N", "passes over the training set")
    of_recipe("lr", listed(float), "LR", "AdamW's peak learning rate, then linear to 0")
    of_recipe("warmup", float, "N", "warm-up in steps, or below 1 as a share of all")
    of_recipe("batch-size", int, "N", "examples a step")
    of_recipe("micro-batch-size", int, "N", "examples at a time: changes memory, not results")
    of_recipe("cutoff", int, "N", "tokens an example is cut to")
    g.add_argument("--train-on-inputs", action=argparse.BooleanOptionalAction, default=None,
                   help=f"the loss counts the prompt too {default('train_on_inputs')}")
    of_recipe("validate", int, "N", "examples held out of the training set; the checkpoint that does best on them is "
              "kept, 0 keeps the last")
    of_recipe("validate-every", int, "N", "steps between validations")
    g.add_argument("--seed", "--seeds", type=listed(int), default=(0,), help="of initial weights, data order and "
                   "dropout (default: 0)")
    g = p.add_argument_group("the machine")
    g.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the frozen weights; what is trained "
                   "is float32 (default: float32 for BERT, full, and CPUs without bfloat16 units, else bfloat16)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    g.add_argument("--shard", action="store_true", help="under torchrun: each process holds a slice of all weights")
    g.add_argument("--compile", action="store_true", help="torch.compile each block: slow first steps, then faster")
    g.add_argument("--grad-checkpoint", action="store_true", help="recompute activations: less memory, a third slower")
    g.add_argument("--base-bits", type=int, choices=[8, 4], help="bits of the blocks' frozen linear weights "
                   "(default: as --dtype says; 8 and 4 need bitsandbytes)")
    g = p.add_argument_group("what comes of it")
    g.add_argument("--limit", type=int, metavar="N", help="score the first N test examples (default: all)")
    g.add_argument("--save-every", type=resume.Every.read, default=resume.Every(), metavar="N|Nm", help="save the "
                   "state of the training each N steps or minutes; the last two and the best by validation are kept "
                   "until the run is finished (default: 10m)")
    g.add_argument("--resume", action="store_true", help="go on from the newest saved state, where there is one")
    g.add_argument("--out", metavar="DIR", help="run folder (default: runs/BACKBONE-METHOD-TASK)")
    return p


def check(args: argparse.Namespace) -> None:
    """Everything about the options that can be known before anything is read or fetched."""
    if args.method not in METHODS:
        near = checkpoint.near(args.method, METHODS)
        raise ValueError(f"--method: found {args.method!r}, expected one of {', '.join(METHODS)}{near}")
    if args.sibo_at not in (None, "attn", "ffn", "both"):
        raise ValueError(f"--sibo-at: found {args.sibo_at!r}, expected attn, ffn or both")
    for name in ("rank", "alpha", "bottleneck", "steps", "epochs", "lr", "batch_size", "micro_batch_size", "cutoff",
                 "validate_every", "limit"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')}: found {value}, expected a positive number")
    if args.validate is not None and args.validate < 0:
        raise ValueError(f"--validate: found {args.validate}, expected 0 or more")
    if args.warmup is not None and not (args.warmup >= 0 and math.isfinite(args.warmup)):
        raise ValueError(f"--warmup: found {args.warmup}, expected 0 or more")
    if args.base_bits and args.method == "full":
        raise ValueError(f"--base-bits {args.base_bits}: found with --method full, which trains those weights; "
                         "expected an adapter or LoRA method")
    if args.dtype not in (None, "float32") and args.method == "full":
        raise ValueError(f"--dtype {args.dtype}: found with --method full, whose small steps 16 bits would round away; "
                         "expected float32, or a method whose frozen weights it is")
    if args.base_bits and args.shard:
        raise ValueError(f"--base-bits {args.base_bits}: found with --shard, which cannot cut their bytes; expected "
                         "one of them")
    if args.base_bits:
        quantized.check_bits(args.base_bits)
    if args.steps and args.epochs:
        raise ValueError("--steps, --epochs: found both, expected one")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: found {args.device}, expected cpu: this machine shows PyTorch no GPU")
    if args.shard and not dist.is_initialized():
        raise ValueError("--shard: found one process, expected several: torchrun --nproc_per_node=N train.py …")
    if dist.is_initialized() and args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: found {args.device} under torchrun, expected cuda: each process has its own GPU")
    if args.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node: found {os.environ['LOCAL_WORLD_SIZE']} processes, expected at most "
                         f"{torch.cuda.device_count()}, one a GPU of this machine")
    sibo.Settings(**{f.name: getattr(args, f.name) for f in fields(sibo.Settings) if f.name not in ("method", "h0")
                     and getattr(args, f.name) is not None})  # it checks its own


def resolve(args: argparse.Namespace, said: dict, task: data.Task, examples: int) -> Run:
    """Options over recipe over defaults. `examples`: size of the training set; 0: made to measure."""
    family, names = said["model_type"], {f.name for f in fields(Run)}
    r = recipe(family, task.kind, args.method)
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.epochs:
        given["steps"] = None
    run = Run(**asdict(r) | given)
    if "sibo" not in run.method:
        run = replace(run, lam=0.0)
    if args.dtype is None and (run.method == "full" or run.device == "cpu" and not fast_bfloat16()):
        run = replace(run, dtype="float32")
    if run.score_on == "validation" and not run.validate:
        raise ValueError("--score-on validation: found --validate 0, expected how many examples to hold out for it")
    left = examples - min(run.validate, examples // 10)
    steps = run.steps or math.ceil(run.epochs * max(left, 1) / run.batch_size)
    return replace(run, steps=steps, micro_batch_size=min(run.micro_batch_size, run.batch_size),
                   task="+".join(t.name for t in data.tasks(args.task)),
                   data_dir=str(data.data_dir(args.data_dir).absolute()))


def folder_of(run: Run, args: argparse.Namespace, several: bool) -> Run:
    """`run` with its folder: as given; one of several gets a folder in that, named after what sets it apart."""
    base = f"runs/{name_of(run.backbone)}-{run.method}-{name_of(run.task)}"
    if not several:
        return replace(run, out=args.out or base)
    marks = [run.method, f"lam{run.lam:g}" if run.lam else "", run.sibo_at or "", "learned" if run.learn_lam else "",
             "frozen-too" if run.frozen_too else "", f"lr{run.lr:g}", f"seed{run.seed}"]
    base = args.out or f"runs/{name_of(run.backbone)}-{name_of(run.task)}"
    return replace(run, out=str(Path(base, "-".join(filter(None, marks)))))


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; others are slower in it than in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def grid(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each run: all combinations of the lists in GRID. An option that a method does not use is left out
    of that method's runs, and is an error where no method of the list uses it."""
    for name, part in USED_BY.items():
        if getattr(args, name) is not None and not any(uses(m, part) for m in args.method):
            raise ValueError(f"--{name.replace('_', '-')}: found with --method {','.join(args.method)}, which does not "
                             "use it")
    found = []
    for values in product(*(getattr(args, name) or (None,) for name in GRID)):
        one = argparse.Namespace(**vars(args) | dict(zip(GRID, values, strict=True)))
        for name, part in USED_BY.items():
            if not uses(one.method, part):
                setattr(one, name, None)
        if one not in found:
            found.append(one)
    return found


def claim(run: Run, go_on: bool = False) -> dict | None:
    """The result of a run that is done, else None. A folder of another run is never written into, and one with a saved
    state only to go on."""
    out = Path(run.out)
    if (out / "config.json").is_file():
        found, ours = checkpoint.read_json(out / "config.json"), json.loads(json.dumps(asdict(run)))
        if other := [k for k in sorted(ours | found) if ours.get(k) != found.get(k) and k not in ("out", "data_dir")]:
            raise ValueError(f"{out}: holds a run of other settings ({other[0]}: found {found.get(other[0])}, expected "
                             f"{ours.get(other[0])}); name a new folder with --out, or delete this one")
    if (out / "result.json").is_file():
        return checkpoint.read_json(out / "result.json")
    if resume.states(out) and not go_on:
        raise ValueError(f"{out}: holds the state of a run that was stopped; go on with --resume, or delete the folder")
    return None


def main(args: argparse.Namespace, several: bool = False) -> list[Run]:
    """One run, or (with lists, or `several`) a folder of runs and their table; returns those that are there now."""
    options = grid(args)
    several |= len(options) > 1
    for one in options:
        check(one)
    tasks, folder = data.tasks(args.task), data.data_dir(args.data_dir)
    task, tests = tasks[0], data.whole(data.tasks(*args.test), tasks) if args.test else tasks
    if wrong := [t.name for t in tests if t.num_labels != task.num_labels]:
        raise ValueError(f"--test: found {wrong[0]}, expected a task that a model of {args.task} can answer")
    if task.num_labels and args.protocol == "paper":
        raise ValueError(f"--protocol paper: found --task {task.name}, expected a text-to-text task, with a prompt "
                         "and beams")
    made, dry = task.kind == "word-problems", args.dry_run or args.explain
    there = all((folder / file).is_file() for t in tasks for file in t.train)
    train = [] if made or dry and not there else [row for t in tasks for row in data.load(t, "train", folder)]
    tests = [] if dry or args.score_on == "validation" else [(t, data.load(t, "test", folder, args.limit))
                                                             for t in tests]
    said = dry and checkpoint.SHAPES.get(args.backbone) or checkpoint.config(
        parallel.in_turn(lambda: checkpoint.locate(args.backbone, config_only=dry)))
    family = model.read_config(said, args.backbone) and said["model_type"]
    if (family == "bert") != bool(task.num_labels):
        raise ValueError(f"--task {task.name}: found backbone {args.backbone}, a {family}, expected "
                         + ("a BERT, such as minilm" if task.num_labels else "an LLM, such as smollm2-135m"))
    runs = [folder_of(resolve(one, said, task, len(train)), args, several) for one in options]
    if args.explain:
        for run in runs:
            if run.method == "full":
                raise ValueError("--explain: found --method full, which adapts no module; expected an adapter or LoRA")
            m = model.build(said, run.backbone, task.num_labels or None)
            print(estimate.explain(sibo.inject(m, **run.settings())))
        return []
    if dry:
        for run in runs:
            unknown = "epochs" if made or args.steps else "" if train else "steps"
            told = [f"{f.name} {getattr(run, f.name)}" for f in fields(Recipe)
                    if f.name != unknown and (f.name not in USED_BY or uses(run.method, USED_BY[f.name]))]
            beams = [] if task.num_labels else [f"protocol {run.protocol}: {scoring.BEAMS[run.protocol]} beams"]
            print(f"{estimate.dry_run(run, said, task)}\nrecipe: {', '.join(told + beams)}")
        return []
    for run in runs:  # whatever does not fit the model is said before weights are read
        if run.method != "full":
            sibo.inject(model.build(said, args.backbone, task.num_labels or None), **run.settings())
    for of, test in () if parallel.rank() else tests:
        if of.train and not of.test:
            print(f"{of.name} has no test file: scored are {len(test)} of its examples, left out of the training",
                  file=sys.stderr)
        if seen := data.overlap(train, test):
            print(f"warning: {seen} of {of.name}'s {len(test)} test questions stand in the training set too: a right "
                  f"answer to one may be memory; see python data.py overlap --train {task.name}", file=sys.stderr)
    if args.compare:
        runs += [run.plain for run in runs if "sibo" in run.method]
    claimed = parallel.in_turn(lambda: [claim(run, args.resume) for run in runs], ranks=1)
    done = [result for _, result in sorted(parallel.union(dict(enumerate(claimed or ()))).items())]
    if not parallel.rank() and any(done):
        print(f"{sum(map(bool, done))} of {len(runs)} runs are finished already: read, not run again", file=sys.stderr)
    frozen = None
    for i, run in enumerate(runs):
        if done[i]:
            continue
        rows = data.load(task, "train", folder, run.steps * run.batch_size, run.seed) if made else train
        rows, valid = data.hold_out(rows, run.validate) if run.validate else (rows, [])
        d = Data(task, rows, valid, tests or [(task, valid)])
        with parallel.in_turn(lambda run=run: resume.lock(Path(run.out)), ranks=1) or nullcontext():
            done[i], frozen = execute(run, d, frozen, args.save_every, args.resume)
            if not parallel.rank():
                draw([run], [done[i]])
    if parallel.rank():
        return runs
    if args.compare:
        draw(runs, done)
    if several:
        folder = Path(runs[0].out).parent
        print(f"{compare.table(compare.read([folder]))}\n{folder}/")
    else:
        print(table(done) + "\n" + "\n".join(f"{r.out}/" for r in runs))
    return runs


if __name__ == "__main__":
    cli.run(main, parser())
