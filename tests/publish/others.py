"""A model scored by eval.py and by code that is not ours, example by example:
`python tests/publish/others.py RUN --hf DIR --task boolq,arc-e,obqa,mawps --limit 100`.

DIR is what `eval.py RUN --export hf DIR` wrote; instead of both, --backbone NAME. Multiple choice goes to
lm-evaluation-harness, by the task files of `python -m sibo_lab data harness`; all else to transformers' generate,
greedily and with four beams. Prints a row of a table for each, and a line for each answer that differs."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
from sibo_lab.data import batch, harness, readers, tasks
from sibo_lab.evaluation import answers, arguments, scoring


def where(args: argparse.Namespace) -> tuple[str, dict]:
    """What transformers' from_pretrained takes to open the exported folder, or the backbone."""
    if args.hf or args.path.suffix != ".gguf":
        return str(args.hf or args.path), {"trust_remote_code": bool(args.hf)}
    return str(args.path.parent), {"gguf_file": args.path.name}


def by_harness(args, m, t, some: dict[str, list]) -> None:
    """acc and acc_norm; ours are of score_examples, without the answers, which are generated."""
    at, how = where(args)
    lm = HFLM(pretrained=at, dtype="float32", device="cpu", batch_size=args.batch_size, **how)
    with tempfile.TemporaryDirectory() as folder:
        for name, examples in some.items():
            harness.write(Path(folder), name, [harness.document(e, t, args.protocol) for e in examples], {})
        found = simple_evaluate(lm, tasks=[f"sibo_{name}" for name in some], bootstrap_iters=0,
                                task_manager=TaskManager(include_path=folder, include_defaults=False))
    for name, examples in some.items():
        with mock.patch.object(scoring, "responses", lambda m, t, prompts, *_: [""] * len(prompts)):
            records = scoring.score_examples(m, t, tasks.task(name), examples, args.batch_size).records
        samples = sorted(found["samples"][f"sibo_{name}"], key=lambda s: s["doc_id"])
        cells, off = [name, str(len(examples))], 0.0
        for record, sample in zip(records, samples, strict=True):
            logps = zip(record["choices"].values(), sample["resps"], strict=True)
            off = max(off, *(abs(ours - theirs) for ours, ((theirs, _),) in logps))
        for theirs, ours in (("acc", "likelihood"), ("acc_norm", "likelihood, per character"),
                             ("acc_norm", "likelihood, per token")):
            right = [r[ours] == r["gold"] for r in records]
            differ = [i for i, (s, is_right) in enumerate(zip(samples, right, strict=True)) if s[theirs] != is_right]
            cells += [f"{sum(right) / len(right):.2f}", f"{found['results'][f'sibo_{name}'][f'{theirs},none']:.2f}",
                      str(len(differ))]
        print("|", " | ".join([*cells, f"{off:.0e}"]), "|", flush=True)


@torch.no_grad()
def by_generate(args, m, t, task: tasks.Task, examples: list) -> None:
    """Answers of the same words, and how many are right."""
    at, how = where(args)
    theirs = AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32, **how).eval()
    speller = AutoTokenizer.from_pretrained(at, padding_side="left", **how)
    speller.pad_token = speller.pad_token or speller.eos_token
    prompts, most = [batch.prompt_of(e, t, args.protocol) for e in examples], args.new_tokens or task.max_new_tokens
    for beams in (1, 4):
        ours, written = scoring.responses(m, t, prompts, most, args.batch_size, beams), []
        for start in range(0, len(prompts), args.batch_size):
            b = speller(prompts[start:start + args.batch_size], padding=True, return_tensors="pt")
            out = theirs.generate(**b, max_new_tokens=most, num_beams=beams, do_sample=False)
            written += speller.batch_decode(out[:, b["input_ids"].shape[1]:], skip_special_tokens=True)
        right = [sum(answers.is_right(task, text, e.answer) for text, e in zip(texts, examples, strict=True))
                 for texts in (ours, written)]
        same = [a == b for a, b in zip(ours, written, strict=True)]
        print("|", " | ".join(map(str, (task.name, beams, len(same), sum(same), *right))), "|", flush=True)
        for i in (i for i, equal in enumerate(same) if not equal):
            print(f"{i}: {ours[i]!r}, transformers: {written[i]!r}", flush=True)


def main() -> None:
    p = evaluation.parser()
    p.add_argument("--hf", metavar="DIR")
    p.add_argument("--new-tokens", type=int, help="of each answer, at most (default: the task's)")
    args = p.parse_args()
    arguments.complete(args)
    args.protocol = args.protocol or "clean"
    some = {t: readers.load(t, "test", args.data_dir, args.limit) for t in args.tests}
    m, t = evaluation.load(args)
    evaluation.adapt(m, args)
    chosen = {task.name: examples for task, examples in some.items() if examples[0].choices}
    if chosen:
        by_harness(args, m, t, chosen)
    for task, examples in some.items():
        if task.name not in chosen:
            by_generate(args, m, t, task, examples)


if __name__ == "__main__":
    main()
