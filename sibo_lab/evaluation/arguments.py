"""The options of eval.py, and what they add up to."""

import argparse
from pathlib import Path

import torch

from sibo_lab import cli, export, files
from sibo_lab.backbone import config, locate
from sibo_lab.data import batch, tasks


def require_device(device: str) -> None:
    """ValueError unless PyTorch has it here."""
    gpu = torch.cuda.is_available()
    if device != "cpu" and not (gpu and device.partition(":")[0] == "cuda"):
        known = "cpu, cuda or cuda:N" if gpu else "cpu, as PyTorch sees no GPU here"
        raise ValueError(f"--device: expected {known}, got {device}")


def at_least_1(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def parser() -> cli.Parser:
    p = cli.Parser("eval.py", description="Score a run or a backbone; ask it; measure its over-smoothing.")
    what = p.add_argument_group("what")
    add = what.add_mutually_exclusive_group(required=True).add_argument
    add("run", nargs="?", help="folder that train.py wrote, such as runs/NAME")
    add("--backbone", help="instead, as it is: short name, folder, .gguf file or hub id")
    add("--table", nargs="+", type=Path, metavar="DIR", help="instead: all runs in DIR side by side")
    add = what.add_argument
    add("--save", type=Path, metavar="FILE.jsonl", help="of --table: the runs as JSON lines, which --table reads too")
    add("--markdown", action="store_true", help="of --table: as Markdown")
    add("--peft", type=Path, metavar="DIR", help="of --backbone: a LoRA for it that peft saved")
    add("--merge", action="store_true", help="fold LoRA into the weights first")
    add = p.add_argument_group("on what").add_argument
    add("--task", metavar="A,B", help="short names, or files of your own (default: what the run was scored on, or "
        "word-problems)")
    add("--ignore-columns", metavar="A,B", help="columns of your own file that are not used (default: the run's)")
    add("--data-dir", help="the tasks' files (default: the run's, else $SIBO_DATA, else the cache)")
    add("--limit", type=at_least_1, help="score the first N examples (default: the run's, or all)")
    add("--score-by", choices=["answers", "loss"], help="the answers that the model generates, or the loss of "
        "the right ones (default: the run's, or answers)")
    add("--ask", metavar="QUESTION", help="answer one question instead")
    add("--similarity", action="store_true", help="draw Eq. (3) per layer instead")
    add("--export", nargs=2, metavar=("hf|peft|gguf", "DIR|FILE"), help="instead: write the run for Hugging Face, or a "
        "plain LoRA for peft, with a model card; or a plain LoRA or full model for llama.cpp")
    add("--push", metavar="ORG/NAME", help="of --export: upload it to the Hugging Face hub too (a new repository is "
        "public, unless the organization's default is private)")
    add("--outtype", choices=["f32", "f16", "bf16", "q8_0"], help="of --export gguf: how matrices are stored (default: "
        "as --dtype)")
    add = p.add_argument_group("how").add_argument
    add("--batch-size", type=at_least_1, default=64, help="examples at a time (default: %(default)s)")
    add("--protocol", choices=batch.PROTOCOLS, help="prompt and beams (default: the run's; else chat for rows with "
        "messages, a system text or history, clean for others)")
    add("--num-beams", type=at_least_1, help="1 is greedy (default: 1, paper 4)")
    add("--compile", action="store_true", help="torch.compile the steps of an answer: ready after seconds, then faster")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the run's, or float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--out", type=Path, help="the picture (default: similarity.png or table.png in the run's folder, or here)")
    return p


def require_exportable(args: argparse.Namespace, kind: str, out: str) -> None:
    """ValueError for what --export `kind` does not write, before anything is loaded."""
    run, peer = args.config, {"peft": "peft", "gguf": "llama.cpp"}.get(kind)
    adapter = run.get("method", "").startswith("adapter")
    wrong = ("expected hf, peft or gguf, got " + kind if not peer and kind != "hf" else
             f"expected a run, got {args.backbone} alone" if not run else
             f"expected weights of 16 bits or wider, got {run['base_bits']}; train without --base-bits"
             if run.get("base_bits") else
             f"expected a plain LoRA, got adapters, which {peer} has no place for; use hf" if peer and adapter else
             f"expected λ = 0, got λ = {run['lam']}, and {peer} has no h0; use hf" if peer and run.get("lam") else
             f"expected --merge with hf only, got {kind}" if args.merge and peer else
             "expected --merge with LoRA, got adapters, whose tanh does not fold" if args.merge and adapter else "")
    if wrong:
        raise ValueError(f"--export {kind}: {wrong}")
    require = export.require_new if kind == "gguf" else export.require_empty
    require(Path(out))


def complete(args: argparse.Namespace) -> None:
    """Adds what the run and the backbone say; ValueError or FileNotFoundError where the options do not fit them."""
    require_device(args.device)
    if of_table := f"--save {args.save}" if args.save else "--markdown" if args.markdown else "":
        raise ValueError(f"{of_table}: expected --table DIR, got none")
    if args.run and not Path(args.run, "config.json").is_file():
        got = "no config.json in it" if Path(args.run).is_dir() else "no such folder"
        raise FileNotFoundError(f"{args.run}: expected a run folder that train.py wrote, got {got}")
    args.config = run = files.read_json(Path(args.run, "config.json")) if args.run else {}
    done = Path(args.run, "result.json") if args.run else None
    args.sha256 = files.read_json(done).get("sha256", {}) if done and done.is_file() else {}
    ignored = args.ignore_columns or run.get("ignore_columns")
    trained = tasks.parse(run.get("task", "word-problems"), ignore_columns=ignored)
    names = args.task.split(",") if args.task else run.get("test")
    tests = tasks.parse(*names, ignore_columns=ignored) if names else trained
    tasks.require_own(args.ignore_columns, *tests)
    args.tests = tasks.scored_whole(tests, trained if run else [])
    args.classes = trained[0].classes if run else ()
    name, labels, args.head = args.tests[0].name, args.tests[0].num_labels, trained[0].num_labels if run else 0
    if args.outtype and (args.export or [""])[0] != "gguf":
        raise ValueError(f"--outtype {args.outtype}: expected --export gguf FILE, got "
                         f"{'--export ' + args.export[0] if args.export else 'none'}")
    if args.export:
        require_exportable(args, *args.export)
    if args.merge and not (run or args.peft):
        raise ValueError(f"--merge: expected a run, or --peft, got {args.backbone} alone, which has nothing to fold")
    if args.peft and run:
        raise ValueError(f"--peft {args.peft}: expected --backbone, got a run")
    if args.peft and "classifier" in (export.peft_spec(args.peft)["modules_to_save"] or ()):  # as of task_type SEQ_CLS
        args.head = labels
    if args.compile and (labels or args.export or args.similarity):
        raise ValueError("--compile: expected an LLM that answers questions, got "
                         f"{'--export' if args.export else '--similarity' if args.similarity else 'the task ' + name}")
    if args.similarity and args.task and len(args.tests) > 1:
        raise ValueError(f"--similarity: expected one task, got --task {args.task}")
    if args.ask and args.head:
        raise ValueError(f"--ask: expected an LLM's run, got {args.run}, a BERT on {run['task']}")
    kind = bool if args.similarity or args.export else int  # to be scored, a head needs the task's classes
    if run and not args.ask and kind(args.head) != kind(labels):
        raise ValueError(f"{args.run}: expected a run that can answer {name}, got one on {run['task']}")
    if labels and (args.protocol or args.num_beams):
        raise ValueError(f"--protocol, --num-beams: expected a text-to-text task, got {name}")
    args.trained = trained
    args.held_out = run["validate"] if run.get("score_on") == "validation" and not args.task else 0
    args.score_by = args.score_by or ("answers" if labels else run.get("score_by", "answers"))
    if labels and args.score_by == "loss":
        raise ValueError(f"--score-by loss: expected a text-to-text task, got {name}, whose loss stands beside its "
                         "score")
    args.limit = args.limit or (None if args.task and args.tests != trained else run.get("limit"))
    args.data_dir = tasks.data_dir(args.data_dir or run.get("data_dir"))
    args.protocol = args.protocol or (run.get("protocol", "clean") if run else None)
    args.dtype = getattr(torch, args.dtype or run.get("dtype", "float32"))
    args.backbone = run.get("backbone", args.backbone)
    args.path = locate.locate(args.backbone)
    args.spec = config.read_spec(args.path)
    if (labels or args.spec.get("model_type") == "bert") and not (args.head or args.similarity or args.export):
        raise ValueError(f"{args.backbone}: expected a trained classifier head, got none; name a run that train.py "
                         "wrote, or a --peft with a classifier (only LLMs are scored without one)")
