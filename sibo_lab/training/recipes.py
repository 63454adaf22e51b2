"""What a run does unless an option says otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

import sibo
from sibo_lab.evaluation import compare

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
