"""The options of train.py, made from the fields of Run and Settings, and the runs they add up to."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import Field, fields, replace
from itertools import product

import torch
from torch import distributed as dist

from sibo_lab import cli, files
from sibo_lab.backbone import quantized
from sibo_lab.data import tasks
from sibo_lab.settings import Settings, check
from sibo_lab.training import recipes, resume
from sibo_lab.training.recipes import Run

SETTINGS = {  # the method's settings as options: metavar, what --help says of them
    "lam": ("λ", "share of h0 in h̃ = (1−λ)h + λh0, in [0, 1)"),
    "learn_lam": (None, "learn one λ per module, starting at --lam, in steps 50 times those of the weights"),
    "sibo_at": ("P", "whose modules get h0: attn, ffn or both (default: the paper's; with --targets all of these)"),
    "targets": ("A,B", "modules to adapt, by the end of their names (default: the paper's)"),
    "side": (None, "adapters on the output of a sub-layer, on its input, or parallel to it (default: out)"),
    "skip": (None, "adapters: h̃ + … (mixed, Eq. 4) or h + … (plain) (default: mixed)"),
    "frozen_too": (None, "LoRA: the frozen W sees h̃ too (Table 6)"),
    "rank": ("R", "LoRA's rank"),
    "alpha": ("A", "LoRA's scale is alpha / rank"),
    "dropout": ("P", "on the input of LoRA's low-rank path, in [0, 1)"),
    "bottleneck": ("R", "width inside an adapter"),
}
GROUPS = {  # the options of Run, as --help groups them
    "what": ("backbone", "method", "task", "test", "score_on", "protocol", "data_dir"),
    "training": ("steps", "epochs", "lr", "warmup", "batch_size", "micro_batch_size", "cutoff", "train_on_inputs",
                 "validate", "validate_every", "seed"),
    "the machine": ("dtype", "device", "shard", "compile", "grad_checkpoint", "base_bits"),
    "results": ("limit", "out"),
}
GRID = ("method", "lam", "sibo_at", "lr", "seed")  # options that take a list, and make a run of every combination
USED_BY = {f.name: f.metadata["used_by"] for f in fields(Settings) if f.name in SETTINGS}


def uses(method: str, name: str) -> bool:
    """Whether a method reads an option: those of Settings only some do."""
    return name not in USED_BY or method != "full" and USED_BY[name] in method


def several(kind: type) -> Callable[[str], tuple]:
    """A type of option: one value, or several separated by commas."""
    def read(text: str) -> tuple:
        return tuple(kind(x) for x in text.split(","))

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def default(f: Field) -> str:
    """A field's default as --help gives it: the general value, then where recipes differ."""
    rows = [(" ".join(filter(None, where)), row[f.name]) for *where, row in recipes.RECIPES if f.name in row]
    if not rows and f.default in (None, False, (), ""):
        return ""  # the option's own text says what happens without it
    general = dict(rows).pop("", "as --epochs says" if f.default is None else f.default)
    return f" (default: {'; '.join([str(general), *(f'{where} {value}' for where, value in rows if where)])})"


def parser() -> cli.Parser:
    p = cli.Parser("train.py", description="Fine-tune a backbone with SIBO or its plain counterpart. Where a default "
                   "depends on the backbone's family, the kind of task and the method, the last that matches holds. "
                   "Lists of methods, λ, places, learning rates and seeds (with commas) train every combination that "
                   "is not done yet and end in a table.")
    of_recipes, of_run = {name for *_, row in recipes.RECIPES for name in row}, {f.name: f for f in fields(Run)}
    groups = {title: p.add_argument_group(title)
              for title in ("what", "the method", "training", "the machine", "results")}
    for title, names in GROUPS.items():
        for f in map(of_run.get, names):
            rule = f.metadata
            _add(groups[title], f, rule["kind"], rule["metavar"], rule["help"], rule["choices"],
                 None if f.name in {*of_recipes, "lr", "validate_every", "steps"} else f.default)
    for f in (f for f in fields(Settings) if f.name in SETTINGS):
        words = f.metadata["allowed"] if type(f.default) is str else ()
        _add(groups["the method"], f, str if f.default is None else type(f.default), *SETTINGS[f.name], words, None)
    p.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu", out=None)
    add = groups["what"].add_argument
    add("--compare", action="store_true", help="train the plain counterpart (λ = 0) as well")
    add("--explain", action="store_true", help="draw where h0 enters this backbone, as a tree, and stop")
    add("--dry-run", action="store_true", help="say what would be trained, its memory and FLOPs, and stop")
    add = groups["results"].add_argument
    add("--save-every", type=resume.SaveEvery.read, default=resume.SaveEvery(), metavar="N|Nm", help="save the state "
        "of the training every N steps or minutes; the last two and the best by validation are kept until the run "
        "is finished (default: 10m)")
    add("--resume", action="store_true", help="continue from the newest saved state, where there is one")
    return p


def _add(group: argparse._ArgumentGroup, f: Field, kind: type, metavar: str | None, help: str, choices: tuple,
         value: object) -> None:
    names = [f"--{f.name.replace('_', '-')}"] + (["--seeds"] if f.name == "seed" else [])
    help = (help if "(default" in help else help + default(f)).replace("%", "%%")
    if kind is bool:
        action = argparse.BooleanOptionalAction if f.default else "store_true"
        group.add_argument(*names, action=action, default=value, help=help)
    else:
        lists = f.name in (*GRID, "test", "targets")
        group.add_argument(*names, type=several(kind) if lists else kind, choices=choices or None, metavar=metavar,
                           default=(value,) if f.name in GRID and value is not None else value or None, help=help)


def check_options(args: argparse.Namespace) -> None:
    """What can be known of the options before anything is read or fetched; ValueError names the one that is wrong."""
    if args.method not in recipes.METHODS:
        raise ValueError(f"--method: expected one of {', '.join(recipes.METHODS)}, got {args.method!r}"
                         + files.near(args.method, recipes.METHODS))
    if args.sibo_at not in (None, "attn", "ffn", "both"):
        raise ValueError(f"--sibo-at: expected attn, ffn or both, got {args.sibo_at!r}")
    for f in fields(Run):
        value = getattr(args, f.name, None)
        if f.metadata and f.metadata["kind"] in (int, float) and not f.metadata["choices"] and value is not None:
            least, above = f.metadata["at_least"], f.name in ("epochs", "lr")
            if not (math.isfinite(value) and (value > least if above else value >= least)):
                bound = f"{'above' if above else 'at least'} {least}"
                raise ValueError(f"--{f.name.replace('_', '-')}: expected {bound}, got {value}")
    for f in fields(Settings):
        if f.name in SETTINGS and getattr(args, f.name) is not None:
            try:
                check(f, getattr(args, f.name))
            except ValueError as e:
                raise ValueError(f"--{f.name.replace('_', '-')}{str(e).removeprefix(f.name)}") from None
    if args.learn_lam and args.lam == 0:
        raise ValueError("--lam: expected above 0 with --learn-lam (a sigmoid never starts at 0), got 0")
    if args.steps and args.epochs:
        raise ValueError("--steps, --epochs: expected one of them, got both")
    check_machine(args)


def check_machine(args: argparse.Namespace) -> None:
    """The part of `check_options` that asks whether this machine and these precisions go together with the method."""
    if args.base_bits and args.method == "full":
        raise ValueError(f"--base-bits {args.base_bits}: expected an adapter or LoRA method, got --method full, which "
                         "trains those weights")
    if args.dtype not in (None, "float32") and args.method == "full":
        raise ValueError(f"--dtype {args.dtype}: expected float32 with --method full, whose small steps 16 bits would "
                         "round away")
    if args.base_bits and args.shard:
        raise ValueError(f"--base-bits {args.base_bits}: expected no --shard, which cannot cut their bytes")
    if args.base_bits:
        quantized.check_bits(args.base_bits)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: expected cpu, as PyTorch sees no GPU on this machine, got {args.device}")
    if args.shard and not dist.is_initialized():
        raise ValueError("--shard: expected several processes (torchrun --nproc_per_node=N train.py …), got one")
    if dist.is_initialized() and args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cuda under torchrun, as each process has its own GPU, got {args.device}")
    if args.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node: expected at most {torch.cuda.device_count()}, one process per GPU of this "
                         f"machine, got {os.environ['LOCAL_WORLD_SIZE']}")


def grid(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each run: every combination of the lists in GRID. An option that a method does not use is left out
    of that method's runs, and is an error where no method of the list uses it."""
    for name in USED_BY:
        if getattr(args, name) is not None and not any(uses(method, name) for method in args.method):
            raise ValueError(f"--{name.replace('_', '-')}: expected a method that uses it, got --method "
                             f"{','.join(args.method)}")
    found = []
    for values in product(*(getattr(args, name) or (None,) for name in GRID)):
        one = argparse.Namespace(**vars(args) | dict(zip(GRID, values, strict=True)))
        for name in USED_BY:
            if not uses(one.method, name):
                setattr(one, name, None)
        if one not in found:
            found.append(one)
    return found


def resolve(args: argparse.Namespace, family: str, task: tasks.Task, examples: int) -> Run:
    """Options over recipe over defaults. `examples`: size of the training set; 0: made to measure."""
    known = {f.name for f in (*fields(Run), *fields(Settings))} - {"settings", "h0"}
    given = {k: v for k, v in vars(args).items() if k in known and v is not None}
    values = recipes.recipe(family, task.kind, args.method) | given
    if args.epochs:
        values["steps"] = None
    if args.dtype is None and (args.method == "full" or args.device == "cpu" and not fast_bfloat16()):
        values["dtype"] = "float32"
    run = recipes.run_of(**values)
    if run.score_on == "validation" and not run.validate:
        raise ValueError("--score-on validation: expected --validate N, how many examples to hold out for it, got 0")
    left = examples - min(run.validate, examples // 10)
    steps = run.steps or math.ceil(run.epochs * max(left, 1) / run.batch_size)
    return replace(run, steps=steps, micro_batch_size=min(run.micro_batch_size, run.batch_size),
                   task="+".join(t.name for t in tasks.parse(args.task)),
                   data_dir=str(tasks.data_dir(args.data_dir).absolute()))


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; others are slower in it than in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
