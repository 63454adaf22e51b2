"""The options of train.py, made from the fields of Run and Settings, and the runs they add up to."""

import math
import os
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from dataclasses import Field, fields, replace
from itertools import product
from typing import get_args

import torch
from torch import distributed as dist

from sibo_lab import cli, files
from sibo_lab.backbone import quantized
from sibo_lab.data import readers, tasks
from sibo_lab.evaluation.arguments import require_device
from sibo_lab.settings import Settings
from sibo_lab.training import log, recipes, resume
from sibo_lab.training.recipes import Run

SETTINGS = {  # the method's settings as options: metavar, what --help says of them
    "lam": ("λ", "share of h0 in h̃ = (1−λ)h + λh0, in [0, 1)"),
    "lam_by_depth": (None, "how λ goes from the first block to the last: even, rising from 0 to 2 λ, falling from 2 λ "
                     "to 0, or 0 outside the first or the last third (default: even)"),
    "learn_lam": (None, "learn one λ per module, starting at --lam, at 50 times the weights' learning rate"),
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
OF_METHOD = [f for f in fields(Settings) if f.name in SETTINGS]
USED_BY = {f.name: f.metadata["used_by"] for f in OF_METHOD}
GROUPS = {"backbone": "what", "settings": "the method", "steps": "training", "dtype": "the machine", "limit": "results"}
GRID = ("method", "lam", "sibo_at", "lr", "seed")  # options that take a list, and make a run of every combination


def uses(method: str, name: str) -> bool:
    """Whether a method reads an option: those of Settings only some do."""
    return USED_BY.get(name, "") in method


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def several(kind: type) -> Callable[[str], tuple]:
    """A type of option: one value, or several separated by commas."""
    def read(text: str) -> tuple:
        return tuple(map(kind, text.split(",")))

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def parser() -> cli.Parser:
    p = cli.Parser("train.py", description="Fine-tune a backbone with SIBO or its plain counterpart. Where a default "
                   "depends on the backbone's family, the kind of task and the method, the last that matches holds. "
                   "Lists of methods, λ, places, learning rates and seeds (with commas) train every combination not "
                   "done yet and end in a table.")
    groups = {}
    for f in fields(Run):
        if f.name in GROUPS:  # of Run's fields, the first of a group
            group = groups[GROUPS[f.name]] = p.add_argument_group(GROUPS[f.name])
        for option in OF_METHOD if f.name == "settings" else [f]:
            names, rule = as_option(option)
            group.add_argument(*names, **rule)
    p.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu", protocol=None)  # None: as the rows need
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


def as_option(f: Field) -> tuple[list[str], dict]:
    """A field's names and rules, for argparse. Where Settings or a recipe has the default, the option's is None."""
    kind = (*get_args(f.type), f.type)[0]  # int, of `int | None`
    metavar, text = SETTINGS.get(f.name) or (f.metadata["metavar"], f.metadata["help"])
    rows = [(" ".join(filter(None, where)), row[f.name]) for *where, row in recipes.RECIPES if f.name in row]
    if "(default" not in text and (rows or f.default):  # the general value, then where recipes differ
        general = dict(rows).pop("", f.default or "as --epochs says")
        text += f" (default: {'; '.join([str(general), *(f'{where} {value}' for where, value in rows if where)])})"
    default = None if rows or f.name in SETTINGS else f.default or None
    rule = {"help": text, "default": default}
    if kind is bool:
        rule["action"] = BooleanOptionalAction if f.default else "store_true"
    else:
        words = f.metadata.get("choices") or kind is str and f.metadata.get("allowed")
        rule |= {"type": kind, "metavar": metavar, "choices": words or None}
    if f.name in (*GRID, "test", "targets"):
        rule |= {"type": several(kind), "default": default and (default,)}
    return [flag(f.name)] + ["--seeds"] * (f.name == "seed"), rule


def check_options(args: Namespace) -> None:
    """What can be known before anything is read or fetched; ValueError names the option that is wrong."""
    for name, words in (("method", recipes.METHODS), ("sibo_at", ("attn", "ffn", "both"))):
        value = getattr(args, name)
        if value not in (None, *words):
            raise ValueError(f"{flag(name)}: expected one of {', '.join(words)}, got {value!r}"
                             + files.near(value, words))
    for f in fields(Run):
        value, least, above = getattr(args, f.name, None), f.metadata.get("at_least"), f.name in ("epochs", "lr")
        if None not in (value, least) and (not least <= value < math.inf or above and value == least):
            raise ValueError(f"{flag(f.name)}: expected {'above' if above else 'at least'} {least}, got {value}")
    require_device(args.device)
    full, bits, gpus = args.method == "full", args.base_bits, torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    refused = (
        (args.learn_lam and args.lam == 0,
         "--lam: expected above 0 with --learn-lam (a sigmoid never starts at 0), got 0"),
        (args.steps and args.epochs, "--steps, --epochs: expected one of them, got both"),
        ((args.stochastic_depth or 0) >= 1, f"--stochastic-depth: expected below 1, got {args.stochastic_depth}"),
        (args.similarity_loss and (args.grad_checkpoint or args.compile),
         "--similarity-loss: expected no --grad-checkpoint, whose second pass would count it twice, nor --compile"),
        (args.epochs and args.task == "word-problems",
         f"--epochs: expected --steps with word-problems, which are made as they are needed, got {args.epochs}"),
        (args.test and args.score_on == "validation",
         "--test: expected none with --score-on validation, which scores what is held out of --task's training set, "
         f"got {','.join(args.test or ())}"),
        (full and bits,
         f"--base-bits {bits}: expected an adapter or LoRA method, got --method full, which trains those weights"),
        (full and args.dtype not in (None, "float32"),
         f"--dtype {args.dtype}: expected float32 with --method full, whose small steps 16 bits would round away"),
        (bits and args.shard, f"--base-bits {bits}: expected no --shard, which cannot cut their bytes"),
        (args.shard and not dist.is_initialized(),
         "--shard: expected several processes (torchrun --nproc_per_node=N train.py …), got one"),
        (dist.is_initialized() and args.device not in ("cpu", "cuda"),
         f"--device: expected cuda under torchrun, as each process has its own GPU, got {args.device}"),
        (args.device == "cuda" and local > gpus,
         f"--nproc_per_node: expected at most {gpus}, one process per GPU of this machine, got {local}"),
    )
    for wrong, message in refused:
        if wrong:
            raise ValueError(message)
    if bits:
        quantized.check_bits(bits)
    if args.log:
        log.require_tensorboard()
    try:
        Settings(**given(args, OF_METHOD))
    except ValueError as e:
        raise ValueError(f"--{e}") from None


def given(args: Namespace, options: Iterable[Field]) -> dict:
    return {f.name: getattr(args, f.name) for f in options if getattr(args, f.name, None) is not None}


def grid(args: Namespace) -> list[Namespace]:
    """The options of each run: every combination of the lists in GRID, without what its method does not use. ValueError
    for an option that none of the methods uses."""
    for name in USED_BY:
        if getattr(args, name) is not None and not any(uses(method, name) for method in args.method):
            raise ValueError(f"{flag(name)}: expected a method that uses it, got --method {','.join(args.method)}")
    found = []
    for values in product(*(getattr(args, name) or (None,) for name in GRID)):
        one = Namespace(**vars(args) | dict(zip(GRID, values, strict=True)))
        vars(one).update({name: None for name in USED_BY if not uses(one.method, name)})
        if one not in found:
            found.append(one)
    return found


def resolve(args: Namespace, family: str, task: tasks.Task, train: list) -> Run:
    """Options over recipe over defaults. `train`: the training examples; empty: made to measure."""
    chat = {"train_on_inputs": False} if args.protocol == "chat" else {}  # the assistant's turns alone
    values = recipes.recipe(family, task.kind, args.method) | chat | given(args, (*fields(Run), *OF_METHOD))
    if args.epochs:
        values["steps"] = None
    if args.validate is None and train and (most := values.get("validate", Run.validate)):  # a tenth at most
        values["validate"] = readers.a_tenth(readers.questions(train), most)
    if args.dtype is None and (args.method == "full" or args.device == "cpu" and not fast_bfloat16()):
        values["dtype"] = "float32"
    run = recipes.run_of(**values)
    if run.score_on == "validation" and not run.validate:
        raise ValueError("--score-on validation: expected --validate N, how many examples to hold out for it, got 0")
    left = readers.hold_out(train, run.validate)[0] if train and not run.steps else train
    steps = run.steps or math.ceil(run.epochs * math.ceil(max(len(left), 1) / run.batch_size))
    if args.warmup is None and (train or run.steps) and run.warmup > steps / 10:  # a recipe's, for longer runs
        run = replace(run, warmup=0.1)
    return replace(run, steps=steps, micro_batch_size=min(run.micro_batch_size, run.batch_size),
                   task=_full_name(args.task), test=tuple(map(_full_name, run.test)),
                   data_dir=str(tasks.data_dir(args.data_dir).absolute()))


def _full_name(task: str) -> str:
    """With the whole path of a file, which a saved run finds from any folder."""
    return "+".join(t.name for t in tasks.parse(task))


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; others are slower in it than in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
