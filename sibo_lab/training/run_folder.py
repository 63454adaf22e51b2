"""A run's folder: its name, who may write into it, and what result.json says of the run."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
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


def command() -> str:
    """The command line of this process."""
    name = Path(sys.argv[0]).name
    program = ["-m", "sibo_lab"] if name == "__main__.py" else [name]
    return cli.without_secrets(shlex.join(["python", *program, *sys.argv[1:]]))


def git_state() -> str | None:
    """The commit of this code, and whether it was edited since; None where it is no git checkout."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True,
                         text=True)
    return git.stdout.strip() or None


def learned_lam(m: nn.Module) -> list[float]:
    """λ of each module that gets h0, in the model's order."""
    return [round(float(parallel.full_tensor(x.lam_logit.detach()).sigmoid()), 4) for x in m.modules()
            if isinstance(x, sibo.SIBOLayer) and x.lam_start]


def folder_of(run: Run, args: argparse.Namespace, several: bool) -> Run:
    """`run` with its folder: as given; one of several gets a folder inside that, named after what sets it apart."""
    base = f"runs/{compare.name_of(run.backbone)}-{run.method}-{compare.name_of(run.task)}"
    if not several:
        return replace(run, out=args.out or base)
    s, marks = run.settings, [run.method]
    if s:
        marks += [f"lam{s.lam:g}" if s.lam else "", s.sibo_at or "", "learned" if s.learn_lam else "",
                  "frozen-too" if s.frozen_too else ""]
    marks += [f"lr{run.lr:g}", f"seed{run.seed}"]
    base = args.out or f"runs/{compare.name_of(run.backbone)}-{compare.name_of(run.task)}"
    return replace(run, out=str(Path(base, "-".join(filter(None, marks)))))


def claim(run: Run, resuming: bool = False) -> dict | None:
    """The result of a run that is done, else None. A folder of another run is never written into, and one with a saved
    state only to resume it. ValueError names the setting that differs."""
    out = Path(run.out)
    if (out / "config.json").is_file():
        theirs, ours = files.read_json(out / "config.json"), json.loads(json.dumps(run.config()))
        for key in sorted(ours | theirs):
            if ours.get(key) != theirs.get(key) and key not in ("out", "data_dir") and options.uses(run.method, key):
                raise ValueError(f"{out}: expected {key} {ours.get(key)}, got a run with {theirs.get(key)}; name a new "
                                 "folder with --out, or delete this one")
    if (out / "result.json").is_file():
        return files.read_json(out / "result.json")
    if resume.states(out) and not resuming:
        raise ValueError(f"{out}: expected no saved state, got that of a stopped run; continue it with --resume, or "
                         "delete the folder")
    return None


def result(m: nn.Module, run: Run, score: scoring.Score, curve: list[float], baseline: scoring.Score,
           baseline_curve: list[float], cut: int, unlabelled: int, trained: dict, digests: dict[str, str]) -> dict:
    """What result.json says: the run, its scores and similarities, its cost, and what it takes to repeat it. `cut` and
    `unlabelled` count training examples; `trained`: what loop.fit returned; `digests`: sha256 of the examples."""
    learned = run.settings and run.settings.learn_lam
    return {
        "backbone": run.backbone, "method": run.method, "task": run.task, "scored_on": run.score_on,
        "lambda": learned_lam(m) if learned else run.settings.lam if run.settings else 0.0,
        "metric": score.metric, "score": score.score, "n": score.n, "interval": score.interval,
        "parts": score.parts, "more": score.more, "empty": score.empty, "answers_given": score.answers_given,
        "baseline_score": baseline.score, "baseline_n": baseline.n,
        "trainable_parameters": sum(p.numel() for p in m.parameters() if p.requires_grad),
        "total_parameters": quantized.parameters(m), **trained, "peak_memory_bytes": estimate.peak_memory(run.device),
        "similarity": metrics.last_five(curve), "baseline_similarity": metrics.last_five(baseline_curve),
        "examples_cut_off": cut, "examples_without_label": unlabelled, "test_examples_cut_off": score.cut,
        "seed": run.seed, "similarity_per_layer": curve, "baseline_similarity_per_layer": baseline_curve,
        "command": command(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "git": git_state(), "sha256": digests,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
