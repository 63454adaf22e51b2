"""A run's folder: its name, who may write into it, and what result.json says of the run."""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sibo
from sibo_lab import cli, files, parallel
from sibo_lab.backbone import quantized
from sibo_lab.evaluation import compare, metrics, scoring
from sibo_lab.training import estimate, options, resume
from sibo_lab.training.recipes import Run

Measured = tuple[scoring.Score, Sequence[float]]  # and Eq. (3) of each hidden state


def command() -> str:
    name = Path(sys.argv[0]).name
    program = ["-m", "sibo_lab"] if name == "__main__.py" else [name]
    return cli.without_secrets(shlex.join(["python", *program, *sys.argv[1:]]))


def git_state() -> str | None:
    """This code's commit, and whether it was edited since; None outside a git checkout."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def learned_lam(m: nn.Module) -> list[float]:
    """λ of each module that gets h0, in the model's order."""
    return [round(float(parallel.full_tensor(x.lam_logit.detach()).sigmoid()), 4) for x in m.modules()
            if isinstance(x, sibo.SIBOLayer) and x.lam_start]


def folder_of(run: Run, args: argparse.Namespace, several: bool) -> Run:
    """`run` with its folder: as given; one of several gets a folder inside that, named after what sets it apart."""
    backbone, task = compare.name_of(run.backbone), compare.name_of(run.task)
    if not several:
        return replace(run, out=args.out or f"runs/{backbone}-{run.method}-{task}")
    s, marks = run.settings, [run.method]
    if s:
        marks += [f"side-{s.side}" * (s.side != "out"), f"lam{s.lam:g}" * (s.lam > 0), s.sibo_at or "",
                  s.lam_by_depth * (s.lam_by_depth != "even"), "learned" * s.learn_lam, "frozen-too" * s.frozen_too]
    marks += [f"{name.replace('_', '-')}{getattr(run, name):g}" for name in compare.REMEDIES if getattr(run, name)]
    marks += [f"lr{run.lr:g}", f"seed{run.seed}"]
    return replace(run, out=str(Path(args.out or f"runs/{backbone}-{task}", "-".join(filter(None, marks)))))


def claim(run: Run, resuming: bool = False) -> dict | None:
    """The result of a run that is done, else None. ValueError for a folder of another run, naming the setting that
    differs, and for one with a saved state, unless it is resumed."""
    out = Path(run.out)
    if (out / "config.json").is_file():
        theirs, ours = compare.OLD | files.read_json(out / "config.json"), json.loads(json.dumps(run.config()))
        for key in sorted(ours | theirs):
            if ours.get(key) != theirs.get(key) and key not in compare.ASIDE and options.uses(run.method, key):
                raise ValueError(f"{out}: expected {key} {ours.get(key)}, got a run with {theirs.get(key)}; name a new "
                                 "--out, or delete the folder")
    if (out / "result.json").is_file():
        return files.read_json(out / "result.json")
    if resume.states(out) and not resuming:
        raise ValueError(f"{out}: expected no saved state, got a stopped run's; continue it with --resume, or delete "
                         "the folder")
    return None


def require_same_data(run: Run, done: dict, digests: dict[str, str]) -> None:
    """ValueError where a finished run began with another backbone, or learned from, or was scored on, other examples
    than it would now."""
    for name, digest in digests.items():
        if (theirs := done.get("sha256", {}).get(name, digest)) != digest:
            what = name if name == "backbone" else f"{name} examples"
            raise ValueError(f"{run.out}: expected a run on today's {what}, sha256 {digest[:9]}…, got one on "
                             f"{theirs[:9]}…; name a new --out, or delete the folder")


def result(m: nn.Module, run: Run, measured: Measured, frozen: Measured, cut: dict[str, int], trained: dict,
           digests: dict[str, str]) -> dict:
    """What result.json says: the run, its scores and similarities, its cost (`trained`, by loop.fit), and what it takes
    to repeat it (`digests`, of backbone and examples)."""
    (score, curve), (baseline, baseline_curve), s = measured, frozen, run.settings

    return {
        "backbone": run.backbone, "method": run.method, "task": run.task, "scored_on": run.score_on,
        "lambda": learned_lam(m) if s and s.learn_lam else s.lam if s else 0.0,
        **{k: getattr(score, k) for k in "metric score n interval parts more empty answers_given".split()},
        "loss": score.loss, "loss_per_token": score.loss_per_token,
        "baseline_score": baseline.score, "baseline_n": baseline.n, "baseline_loss": baseline.loss,
        "trainable_parameters": sum(p.numel() for p in m.parameters() if p.requires_grad),
        "total_parameters": quantized.parameters(m), **trained, "peak_memory_bytes": estimate.peak_memory(run.device),
        "similarity": metrics.last_five(curve), "baseline_similarity": metrics.last_five(baseline_curve),
        **cut, "test_examples_cut_off": score.cut, "seed": run.seed,
        "similarity_per_layer": curve, "baseline_similarity_per_layer": baseline_curve,
        "command": command(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "git": git_state(), "sha256": digests,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
