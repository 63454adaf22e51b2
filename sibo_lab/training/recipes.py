"""What a run is told: every number that decides it, in one object, and the recipes that options start from.

Recipes: the paper's Section 4.2 and the official scripts (LLM-Adapters); what they do not publish is chosen here and
marked. Each field of `Run` is an option of train.py, and says there what it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from math import inf

from sibo_lab.evaluation import compare
from sibo_lab.settings import Settings

METHODS = ("full", "adapter", "adapter-sibo", "lora", "lora-sibo")
RECIPES = (  # family, kind of task, method ("" matches any): what differs. All rows that match apply, in this order.
    ("", "", "", {"lam": 0.1, "dropout": 0.05}),  # the scripts', for LLaMA throughout
    ("gptj", "arithmetic", "adapter-sibo", {"lam": 0.3}),
    ("gptj", "commonsense", "lora-sibo", {"lam": 0.3}),
    ("", "word-problems", "", {"steps": 340, "warmup": 20, "batch_size": 4, "train_on_inputs": False,
                               "validate": 0}),  # ours
    ("bert", "glue", "", {"batch_size": 32, "micro_batch_size": 32, "cutoff": 128, "warmup": 0.1, "rank": 8,
                          "alpha": 16.0, "bottleneck": 64, "dtype": "float32", "epochs": 5.0,
                          "validate": 0}),  # ours: not published
    ("bert", "glue", "full", {"lr": 3e-5}),  # from {3e-5, 3e-4, 3e-3}, as Houlsby et al.
    ("bert", "glue", "adapter-sibo", {"lam": 0.2}),  # Figure 4
    ("bert", "glue", "lora-sibo", {"lam": 0.6}),
)


def of(default: object, kind: type, help: str, metavar: str | None = None, *, choices: tuple = (), at_least: float = 0):
    """A field of Run, as an option: the type of its value, what --help says of it, the values it may take."""
    return field(default=default, metadata={"kind": kind, "help": help, "metavar": metavar, "choices": choices,
                                            "at_least": at_least})


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's numbers, saved as config.json. Defaults: the official scripts' for LLMs."""

    backbone: str = of("smollm2-135m", str, "short name, folder, .gguf file or hub id", "NAME")
    method: str = of("adapter-sibo", str, ", ".join(METHODS), "M")
    task: str = of("word-problems", str, "tasks joined by +, or your own .json or .jsonl file", "T")
    test: tuple[str, ...] = of((), str, "tasks to score (default: those of --task)", "A,B")
    score_on: str = of("test", str, "examples to score", choices=("test", "validation"))
    protocol: str = of("clean", str, "paper: the official code's indented prompt, and 4 beams to score with",
                       choices=("clean", "paper"))
    data_dir: str | None = of(None, str, "folder of the tasks' files (default: $SIBO_DATA, else the cache)", "DIR")
    settings: Settings | None = None  # of the method; None: full fine-tuning
    steps: int | None = of(None, int, "optimizer steps, instead of --epochs", "N", at_least=1)
    epochs: float = of(3.0, float, "passes over the training set", "N")
    lr: float = of(3e-4, float, "AdamW's peak learning rate, then linear to 0", "LR")
    warmup: float = of(100, float, "warm-up in steps, or below 1 as a share of all steps", "N")
    batch_size: int = of(16, int, "examples per step", "N", at_least=1)
    micro_batch_size: int = of(4, int, "examples at a time: changes memory, not results", "N", at_least=1)
    cutoff: int = of(256, int, "tokens that an example is cut to", "N", at_least=1)
    train_on_inputs: bool = of(True, bool, "the loss counts the prompt too")
    validate: int = of(120, int, "examples held out of training to choose the best checkpoint by; 0 keeps the last", "N")
    validate_every: int = of(200, int, "steps between validations", "N", at_least=1)
    seed: int = of(0, int, "of initial weights, data order and dropout", "N", at_least=-inf)
    dtype: str = of("bfloat16", str, "of the frozen weights; what is trained is float32 (default: float32 for BERT, "
                    "full and CPUs without bfloat16 units, else bfloat16)", choices=("float32", "bfloat16", "float16"))
    device: str = of("cpu", str, "cpu, cuda or cuda:N (default: cuda where there is a GPU)", "D")
    shard: bool = of(False, bool, "under torchrun: each process holds a slice of all weights")
    compile: bool = of(False, bool, "torch.compile each block: slow first steps, then faster")
    grad_checkpoint: bool = of(False, bool, "recompute activations: less memory, a third slower")
    base_bits: int | None = of(None, int, "bits of the blocks' frozen linear weights (default: as --dtype says; needs "
                               "bitsandbytes)", choices=(8, 4))
    limit: int | None = of(None, int, "score the first N test examples (default: all)", "N", at_least=1)
    out: str = of("", str, "run folder (default: runs/BACKBONE-METHOD-TASK)", "DIR")

    @property
    def plain(self) -> Run:
        """The counterpart without h0: same seed, same data, λ = 0."""
        return replace(self, method=self.method.removesuffix("-sibo"), settings=replace(self.settings, **compare.PLAIN),
                       out=f"{self.out}-plain")

    def config(self) -> dict:
        """What config.json holds: flat, the method's settings among the others."""
        flat = asdict(self)
        method = flat.pop("settings") or asdict(Settings(lam=0.0))
        return flat | {k: v for k, v in method.items() if k not in ("method", "h0")}


def recipe(family: str, kind: str, method: str) -> dict:
    """Where a family ("llama", "gptj", "bert"), a kind of task (Task.kind) and a method differ from the defaults."""
    found = {}
    for *where, changes in RECIPES:
        if all(w in ("", given) for w, given in zip(where, (family, kind, method), strict=True)):
            found |= changes
    return found


def run_of(method: str = "adapter-sibo", **values) -> Run:
    """A Run from flat values, as options and config.json name them; those that `method` does not use are dropped."""
    values = recipe("", "", "") | values
    of_method = {f.name: values.pop(f.name) for f in fields(Settings) if f.name in values}
    if "sibo" not in method:
        of_method["lam"] = 0.0
    settings = None if method == "full" else Settings(**of_method | {"method": method.removesuffix("-sibo")})
    return Run(method=method, settings=settings, **values)
