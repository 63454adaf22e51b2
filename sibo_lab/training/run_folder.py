"""A run's folder: its name, who may write into it, what it says of the run."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

import sibo
from sibo_lab import cli, files, parallel
from sibo_lab.evaluation import compare
from sibo_lab.training import recipes, resume


def command() -> str:
    """The command line of this process."""
    name = Path(sys.argv[0]).name
    program = ["-m", "sibo_lab"] if name == "__main__.py" else [name]
    return cli.without_secrets(shlex.join(["python", *program, *sys.argv[1:]]))


def git_state() -> str | None:
    """The commit of this code, and whether it was edited since; None where it is no git checkout."""
    said = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True,
                          text=True)
    return said.stdout.strip() or None


def learned_lam(m: nn.Module) -> list[float]:
    return [round(float(parallel.full_tensor(x.logit.detach()).sigmoid()), 4) for x in m.modules()
            if isinstance(x, sibo.SIBOLayer) and x.fixed]


def folder_of(run: recipes.Run, args: argparse.Namespace, several: bool) -> recipes.Run:
    """`run` with its folder: as given; one of several gets a folder in that, named after what sets it apart."""
    base = f"runs/{compare.name_of(run.backbone)}-{run.method}-{compare.name_of(run.task)}"
    if not several:
        return replace(run, out=args.out or base)
    marks = [run.method, f"lam{run.lam:g}" if run.lam else "", run.sibo_at or "", "learned" if run.learn_lam else "",
             "frozen-too" if run.frozen_too else "", f"lr{run.lr:g}", f"seed{run.seed}"]
    base = args.out or f"runs/{compare.name_of(run.backbone)}-{compare.name_of(run.task)}"
    return replace(run, out=str(Path(base, "-".join(filter(None, marks)))))


def claim(run: recipes.Run, go_on: bool = False) -> dict | None:
    """The result of a run that is done, else None. A folder of another run is never written into, and one with a saved
    state only to go on."""
    out = Path(run.out)
    if (out / "config.json").is_file():
        found, ours = files.read_json(out / "config.json"), json.loads(json.dumps(asdict(run)))
        if other := [k for k in sorted(ours | found) if ours.get(k) != found.get(k) and k not in ("out", "data_dir")]:
            raise ValueError(f"{out}: holds a run of other settings ({other[0]}: found {found.get(other[0])}, expected "
                             f"{ours.get(other[0])}); name a new folder with --out, or delete this one")
    if (out / "result.json").is_file():
        return files.read_json(out / "result.json")
    if resume.states(out) and not go_on:
        raise ValueError(f"{out}: holds the state of a run that was stopped; go on with --resume, or delete the folder")
    return None
