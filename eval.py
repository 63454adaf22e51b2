"""Scores a run or a backbone, measures over-smoothing (paper, Eq. 3), and draws both.

`python eval.py runs/NAME` scores a saved run again, to the same number; what a score is and how the official code's
differs stands in scoring.py. Source of Eq. (3): the paper's Section 3.1; padding has no part in it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import model
import sibo
from sibo_lab import cli, export, files
from sibo_lab.backbone import generate, locate, subwords, tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import compare, metrics, pictures, scoring


def similarity(hidden: Tensor, attention_mask: Tensor) -> float:
    """Eq. (3): the mean cosine over all pairs i ≠ j of a sentence's tokens, then the mean over the sentences.

    hidden (B, T, d), attention_mask (B, T) with 0 on padding, which is left out, as are sentences of one token.
    ValueError if no sentence is left."""
    found = _similarities(hidden, attention_mask)
    if not len(found):
        raise ValueError("similarity: found no sentence of two tokens or more, expected at least one")
    return float(found.mean())


def _similarities(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    mask = attention_mask.bool()
    units = nn.functional.normalize(hidden.double(), dim=-1) * mask[..., None]  # (B, T, d), padding 0
    m = mask.sum(1)  # (B,): tokens of each sentence
    # Σ_{i≠j} cos(h_i, h_j) = |Σ_i u_i|² − Σ_i |u_i|² with u = h / |h|
    pairs = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return (pairs / (m * (m - 1)))[m > 1]


@torch.no_grad()
def layer_similarities(m: nn.Module, rows: Sequence[batch.Row], pad_id: int, batch_size: int = 16) -> list[float]:
    """Eq. (3) of each of the L+1 hidden states, over all rows: the curve of Figures 1 and 2."""
    generate.require_eval(m)
    totals, count = 0, 0
    for start in range(0, len(rows), batch_size):
        b = batch.to_device(batch.collate(rows[start:start + batch_size], pad_id), m)
        b.pop("labels", None)
        found = torch.stack([_similarities(h, b["attention_mask"]) for h in m.hidden_states(**b)])  # (L+1, sentences)
        totals, count = totals + found.sum(1), count + found.shape[1]
    if not count:
        raise ValueError("similarity: found no sentence of two tokens or more, expected at least one")
    return (totals / count).tolist()


def similarity_rows(m: nn.Module, t: subwords.Tokenizer, test: Sequence, most: int = 64,
                    protocol: str = "clean") -> list[batch.Row]:
    """The first texts of a test set as Eq. (3) sees them: an LLM's prompts, BERT's sentences."""
    texts = [tasks.Sentence(x.instruction, None, 0) if isinstance(x, tasks.Example) else x for x in test[:most]]
    if isinstance(m, model.Bert):
        return [batch.encode_sentence(s, t, m.config.max_position_embeddings) for s in texts]
    return [batch.Row(t.encode(batch.prompt(s.text, protocol))) for s in texts]


def parser() -> argparse.ArgumentParser:
    p = cli.Parser("eval.py", description="Score a run or a backbone; ask it; measure its over-smoothing.")
    what = p.add_argument_group("what is evaluated: a run, or a backbone as it is")
    what.add_argument("run", nargs="?", help="folder that train.py wrote, such as runs/NAME")
    what.add_argument("--backbone", help="short name, folder, .gguf file or hub id, without any training")
    what.add_argument("--table", nargs="+", type=Path, metavar="DIR", help="instead: all runs in DIR side by side")
    what.add_argument("--save", type=Path, metavar="FILE.jsonl", help="of --table: the runs as lines of JSON, which "
                      "--table reads too")
    what.add_argument("--markdown", action="store_true", help="of --table: as Markdown")
    what.add_argument("--peft", type=Path, metavar="DIR", help="with --backbone: a LoRA that peft saved, put onto it")
    what.add_argument("--merge", action="store_true", help="fold the run's LoRA into the weights first")
    on = p.add_argument_group("on what")
    on.add_argument("--task", metavar="A,B", help="tasks, each a short name or a .json or .jsonl file (default: the "
                    "run's; else word-problems)")
    on.add_argument("--data-dir", help="folder of the tasks' files (default: $SIBO_DATA, else the cache)")
    on.add_argument("--limit", type=int, help="score the first N examples (default: the run's; else all)")
    on.add_argument("--ask", metavar="QUESTION", help="answer one question instead")
    on.add_argument("--similarity", action="store_true", help="draw Eq. (3) per layer instead")
    on.add_argument("--export", nargs=2, metavar=("peft|hf", "DIR"), help="instead: write the run as peft's adapter (a "
                    "plain LoRA), or folded as a Hugging Face checkpoint")
    how = p.add_argument_group("how")
    how.add_argument("--batch-size", type=int, default=64, help="examples at a time (default: 64)")
    how.add_argument("--protocol", choices=list(batch.PROMPTS), help="prompt and beams (default: the run's; else "
                     "clean)")
    how.add_argument("--num-beams", type=int, help="1 is greedy (default: clean 1, paper 4)")
    how.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the run's; else float32")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    how.add_argument("--out", type=Path, help="the picture (default: similarity.png or table.png in the "
                     "run's folder, or here)")
    return p


def main(args: argparse.Namespace) -> None:
    if args.table:
        runs, first = compare.read(args.table), args.table[0]
        out = args.out or (first if first.is_dir() else first.parent) / "table.png"
        print(compare.tables(runs, args.markdown))
        if args.save:
            compare.save(runs, args.save)
        pictures.draw_runs(runs, out)
        print(f"\n{out}")
        return
    if bool(args.run) == bool(args.backbone):
        raise ValueError(f"found {'both a run and' if args.run else 'neither a run nor'} --backbone, expected one of "
                         "them; see python eval.py --help")
    for name in ("limit", "batch_size", "num_beams"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected at least 1")
    if args.run and not Path(args.run, "config.json").is_file():
        raise FileNotFoundError(f"{Path(args.run)}: found no config.json, expected a run folder that train.py wrote")
    run = files.read_json(Path(args.run, "config.json")) if args.run else {}
    backbone = run.get("backbone", args.backbone)
    trained = tasks.parse(run.get("task", "word-problems"))
    named = args.task.split(",") if args.task else run.get("test")
    tests = tasks.scored_whole(tasks.parse(*named) if named else trained, trained if run else [])
    task = tests[0]
    folder = tasks.data_dir(args.data_dir or run.get("data_dir"))
    limit = args.limit or (None if args.task and tests != trained else run.get("limit"))
    examples = [[] if args.ask or args.export else readers.load(of, "test", folder, limit) for of in tests]
    head = trained[0].num_labels if run else 0
    if args.export and (args.export[0] not in ("peft", "hf") or not run or args.merge or run.get("base_bits")):
        raise ValueError(f"--export {args.export[0]}: expected peft or hf, with a run, without --merge, on a backbone "
                         "of 16 bits or more")
    if args.peft and args.run:
        raise ValueError(f"--peft {args.peft}: found with a run, expected with --backbone")
    if args.similarity and args.task and len(tests) > 1:
        raise ValueError(f"--similarity: found --task {args.task}, expected one task, whose texts it is measured on")
    if args.ask and head:
        raise ValueError(f"--ask: found {args.run}, a BERT that knows the classes of {run['task']}, expected an LLM's "
                         "run")
    if bool(head) != bool(task.num_labels) and run and not args.ask:
        raise ValueError(f"{args.run}: found a run on {run['task']}, expected one that can answer {task.name}")
    if task.num_labels and (args.protocol or args.num_beams):
        raise ValueError(f"--protocol, --num-beams: found with --task {task.name}, expected a text-to-text task, which "
                         "has a prompt and beams")

    dtype = getattr(torch, args.dtype or run.get("dtype", "float32"))
    protocol = args.protocol or run.get("protocol", "clean")
    m = model.from_pretrained(backbone, dtype, args.device, head or None, run.get("base_bits"))
    t = tokenizer.for_model(backbone, m.config.vocab_size, "pad" if isinstance(m, model.Bert) else "eos")
    if args.similarity:
        rows = similarity_rows(m, t, examples[0], protocol=protocol)
        curves = {backbone: layer_similarities(m, rows, t.pad_id or 0)}
    if run:
        sibo.load(m, args.run)
    if args.peft:
        export.from_peft(m, args.peft)
    if args.merge:
        sibo.merge(m)
    if args.export:
        kind, out = args.export[0], Path(args.export[1])
        if kind == "peft":
            export.to_peft(m, out, backbone)
        else:
            export.to_hugging_face(m, out, locate.locate(backbone))
        print(f"{out}/")
    elif args.similarity:
        if run:
            curves[run["method"]] = layer_similarities(m, rows, t.pad_id or 0)
        out = args.out or Path(args.run or ".", "similarity.png")
        pictures.draw_similarity(curves, out, f"{backbone} on {task.name}")
        for name, curve in curves.items():
            print(f"{name:14} {' '.join(f'{x:.3f}' for x in curve)}   last five {metrics.last_five(curve):.4f}")
        print(out)
    elif not head and (isinstance(m, model.Bert) or task.num_labels):
        raise ValueError(f"{backbone}: found no trained head, expected a run that train.py wrote; only an LLM on a "
                         "text-to-text task needs none")
    elif args.ask:
        beams = args.num_beams or scoring.BEAMS[protocol]
        print(scoring.responses(m, t, [batch.prompt(args.ask, protocol)], 256, 1, beams)[0])
    else:
        for of, test in zip(tests, examples, strict=True):
            if of.train and not of.test:
                print(f"{of.name} has no test file: scored are {len(test)} of its examples, left out of the training",
                      file=sys.stderr)
            score = (scoring.score_sentences(m, t, of, [batch.encode_sentence(s, t, run["cutoff"]) for s in test],
                                     args.batch_size) if of.num_labels
                     else scoring.score_examples(m, t, of, test, args.batch_size, args.num_beams, protocol))
            print((f"{of.name}: " if len(tests) > 1 else "") + str(score))


if __name__ == "__main__":
    cli.run(main, parser())
