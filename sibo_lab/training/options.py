"""The options of train.py, and the run they add up to."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import product

import torch
from torch import distributed as dist

import sibo
from sibo_lab import cli, files
from sibo_lab.backbone import locate, quantized
from sibo_lab.data import batch, tasks
from sibo_lab.training import recipes, resume


def default(name: str) -> str:
    """A field of the recipes as --help tells it: the general value, then where it differs."""
    general = getattr(recipes.Recipe(), name)
    told = ["as --epochs says" if general is None else str(general)]
    told += [f"{' '.join(filter(None, where))} {changes[name]}" for *where, changes in recipes.RECIPES if name in changes]
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
                   help=f"{', '.join([*locate.WHEELS, *locate.HUB])}, a folder, a .gguf file or a hub id "
                   "(default: %(default)s)")
    g.add_argument("--method", default=("adapter-sibo",), type=listed(str), metavar="M",
                   help=f"{', '.join(recipes.METHODS)} (default: adapter-sibo)")
    g.add_argument("--task", default="word-problems", metavar="T",
                   help=f"{', '.join(tasks.TASKS)}, several joined by +, or your own .json/.jsonl (default: "
                   "%(default)s)")
    g.add_argument("--test", type=listed(str), metavar="A,B", help="tasks to score (default: those of --task)")
    g.add_argument("--score-on", choices=["test", "validation"], default="test", help="(default: %(default)s)")
    g.add_argument("--protocol", choices=list(batch.PROMPTS), default="clean", help="paper: the official code's "
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
    g.add_argument("--save-every", type=resume.SaveEvery.read, default=resume.SaveEvery(), metavar="N|Nm", help="save the "
                   "state of the training each N steps or minutes; the last two and the best by validation are kept "
                   "until the run is finished (default: 10m)")
    g.add_argument("--resume", action="store_true", help="go on from the newest saved state, where there is one")
    g.add_argument("--out", metavar="DIR", help="run folder (default: runs/BACKBONE-METHOD-TASK)")
    return p


def check(args: argparse.Namespace) -> None:
    """Everything about the options that can be known before anything is read or fetched."""
    if args.method not in recipes.METHODS:
        near = files.near(args.method, recipes.METHODS)
        raise ValueError(f"--method: found {args.method!r}, expected one of {', '.join(recipes.METHODS)}{near}")
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


def resolve(args: argparse.Namespace, said: dict, task: tasks.Task, examples: int) -> recipes.Run:
    """Options over recipe over defaults. `examples`: size of the training set; 0: made to measure."""
    family, names = said["model_type"], {f.name for f in fields(recipes.Run)}
    r = recipes.recipe(family, task.kind, args.method)
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.epochs:
        given["steps"] = None
    run = recipes.Run(**asdict(r) | given)
    if "sibo" not in run.method:
        run = replace(run, lam=0.0)
    if args.dtype is None and (run.method == "full" or run.device == "cpu" and not fast_bfloat16()):
        run = replace(run, dtype="float32")
    if run.score_on == "validation" and not run.validate:
        raise ValueError("--score-on validation: found --validate 0, expected how many examples to hold out for it")
    left = examples - min(run.validate, examples // 10)
    steps = run.steps or math.ceil(run.epochs * max(left, 1) / run.batch_size)
    return replace(run, steps=steps, micro_batch_size=min(run.micro_batch_size, run.batch_size),
                   task="+".join(t.name for t in tasks.parse(args.task)),
                   data_dir=str(tasks.data_dir(args.data_dir).absolute()))


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
