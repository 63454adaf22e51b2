"""What decides a run, in one object, and the recipes that options start from.

Source: the paper's Section 4.2 and the official scripts (LLM-Adapters); what they do not publish is marked as ours."""

from dataclasses import asdict, dataclass, field, fields, replace

from sibo_lab.data import batch
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
                          "validate": 0}),  # ours
    ("bert", "glue", "full", {"lr": 3e-5}),  # from {3e-5, 3e-4, 3e-3}, as Houlsby et al.
    ("bert", "glue", "adapter-sibo", {"lam": 0.2}),  # Figure 4
    ("bert", "glue", "lora-sibo", {"lam": 0.6}),
)


def of(default: object, help: str, metavar: str | None = None, at_least: int | None = None, *, choices: tuple = ()):
    """A field of Run, as an option of train.py."""
    return field(default=default, metadata={"metavar": metavar, "help": help, "at_least": at_least, "choices": choices})


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's numbers, saved as config.json. Defaults: the official scripts' for LLMs."""

    backbone: str = of("smollm2-135m", "short name, folder, .gguf file or hub id", "NAME")
    method: str = of("adapter-sibo", ", ".join(METHODS), "M")
    task: str = of("word-problems", "tasks joined by +, or your own file: .json, .jsonl, .csv (each also with .gz), "
                   ".parquet", "T")
    test: tuple[str, ...] = of((), "tasks to score (default: those of --task)", "A,B")
    score_on: str = of("test", "examples to score", choices=("test", "validation"))
    score_by: str = of("answers", "answers: what share of those that the model generates is right; loss: the loss of "
                       "the right ones, alone", choices=("answers", "loss"))
    protocol: str = of("clean", "how a question is put. paper: the official code's indented prompt, and 4 beams to "
                       "score with; chat: the backbone's own chat template (default: chat for rows with messages, a "
                       "system text or history, clean for others)", choices=batch.PROTOCOLS)
    ignore_columns: str | None = of(None, "columns of your own file that are not used", "A,B")
    data_dir: str | None = of(None, "folder of the tasks' files (default: $SIBO_DATA, else the cache)", "DIR")
    settings: Settings | None = None  # of the method; None: full fine-tuning
    steps: int | None = of(None, "optimizer steps, instead of --epochs", "N", 1)
    epochs: float = of(3.0, "passes over the training set", "N", 0)
    lr: float = of(3e-4, "AdamW's peak learning rate, then linear to 0", "LR", 0)
    warmup: float = of(100, "warm-up in steps, or below 1 as a share of all steps; by default at most a tenth", "N", 0)
    batch_size: int = of(16, "examples per step", "N", 1)
    micro_batch_size: int = of(4, "examples at a time: changes memory, not results", "N", 1)
    cutoff: int = of(256, "tokens that an example is cut to", "N", 1)
    train_on_inputs: bool = of(True, "the loss counts the prompt too; with --protocol chat only if asked for")
    stochastic_depth: float = of(0.0, "probability that a sequence skips the last block in training, linearly less "
                                 "for earlier ones: another remedy, to compare", "P", 0)
    similarity_loss: float = of(0.0, "weight of Eq. (3), over all blocks, in a BERT's training loss: another remedy",
                                "W", 0)
    validate: int = of(120, "questions held out of training to choose the best checkpoint, by default at most a "
                       "tenth; 0 keeps the last", "N", 0)
    validate_every: int = of(200, "steps between validations", "N", 1)
    seed: int = of(0, "of initial weights, data order and dropout (default: 0)", "N")
    dtype: str = of("bfloat16", "of the frozen weights; what is trained is float32 (default: float32 for BERT, "
                    "full and CPUs without bfloat16 units, else bfloat16)", choices=("float32", "bfloat16", "float16"))
    device: str = of("cpu", "cpu, cuda or cuda:N (default: cuda where there is a GPU)", "D")
    shard: bool = of(False, "under torchrun: each process holds a slice of all weights")
    compile: bool = of(False, "torch.compile each block: slow first steps, then faster")
    grad_checkpoint: bool = of(False, "recompute activations: less memory, steps up to half as long again")
    base_bits: int | None = of(None, "bits of the blocks' frozen linear weights (default: as --dtype says; needs "
                               "bitsandbytes)", choices=(8, 4))
    limit: int | None = of(None, "score the first N test examples (default: all)", "N", 1)
    log: str | None = of(None, "follow each step in TensorBoard too, whose event file then stands beside metrics.jsonl "
                         "(needs tensorboard)", choices=("tensorboard",))
    out: str = of("", "run folder (default: runs/BACKBONE-METHOD-TASK)", "DIR")

    @property
    def plain(self) -> "Run":
        """The counterpart without h0: same seed, same data, λ = 0."""
        return replace(self, method=self.method.removesuffix("-sibo"), settings=replace(self.settings, **compare.PLAIN),
                       out=f"{self.out}-plain")

    def config(self) -> dict:
        """What config.json holds: flat, the method's settings among the others."""
        flat = asdict(self)
        method = flat.pop("settings") or asdict(Settings(lam=0.0))
        return flat | {k: v for k, v in method.items() if k not in ("method", "h0", "modules_to_save")}  # no options


def recipe(family: str, kind: str, method: str) -> dict:
    """Where a family ("gptj"), a kind of task (Task.kind) and a method differ from the defaults."""
    return {k: v for *where, row in RECIPES for k, v in row.items()
            if all(w in ("", given) for w, given in zip(where, (family, kind, method), strict=True))}


def run_of(method: str = "adapter-sibo", **values) -> Run:
    """A Run from flat values, as options and config.json name them."""
    values = recipe("", "", "") | values
    of_method = {f.name: values.pop(f.name) for f in fields(Settings) if f.name in values}
    if "sibo" not in method:
        of_method["lam"] = 0.0
    settings = None if method == "full" else Settings(**of_method | {"method": method.removesuffix("-sibo")})
    return Run(method=method, settings=settings, **values)
