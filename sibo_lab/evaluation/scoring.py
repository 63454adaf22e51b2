"""Scores: what a model answers, whether that is right, and how far to trust it (paper, Section 4.1).

Sources: LLM-Adapters' scoring (see data/tasks.py), GLUE's metrics. Where the official code departs: its evaluation leaves
dropout on and pads on the left without a mask, so that its scores change with the batch size; here the model is in eval
mode, padding has no position and no weight, and nothing is scored in silence on a part of the examples. The score is
the official one, to compare with what is published; beside it stand what does not depend on the form of an answer (a
last letter, the likeliest choice), how sure the score is, and which answers were given."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sibo_lab import fast, parallel
from sibo_lab.backbone import generate, subwords
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import answers, metrics


@dataclass
class Score:
    """A task's score in [−1, 1], its metric, on n examples, and all that says how far to trust it."""

    metric: str
    score: float
    n: int
    interval: tuple[float, float]  # 95 % of the score: Wilson's of an accuracy, else bootstrapped over the examples
    parts: dict[str, float] = field(default_factory=dict)  # the same of each group
    more: dict[str, float] = field(default_factory=dict)  # other metrics
    empty: float = 0.0  # share of the responses without an answer
    said: dict[str, float] = field(default_factory=dict)  # the answers given, with their shares: a collapse is seen
    records: list[dict] = field(default_factory=list, repr=False)  # each example: gold, what was said, whether right
    cut: int = 0  # examples that the cutoff shortened before they were scored

    def __str__(self) -> str:
        told = [f"n {self.n}", f"95 % {self.interval[0]:.4f} to {self.interval[1]:.4f}"]
        told += [f"{k} {v:.4f}" for k, v in (self.parts | self.more).items()]
        told += [f"no answer {self.empty:.1%}"] if self.empty else []
        told += [f"cut off {self.cut}"] if self.cut else []
        said = ", ".join(f"{k} {v:.1%}" for k, v in self.said.items())
        return f"{self.metric} {self.score:.4f} ({'; '.join(told)})" + (f"\n  said: {said}" if said else "")


def by_part(parts: Sequence[str], score: Callable[[np.ndarray], float]) -> dict[str, float]:
    """`score` of the mask of each group that is reported on its own; nothing where all examples are one group."""
    names = sorted(set(parts))
    return {name or "the rest": score(np.array(parts) == name) for name in names} if len(names) > 1 else {}


def shares(answers: Sequence[str | None]) -> dict[str, float]:
    """The six most frequent answers and "other", each with its share of all; None is no answer and not among them. Of
    a long one, such as a user's own data may have, the end."""
    counts = Counter(a.splitlines()[-1][-40:].rstrip(" .") for a in answers if a is not None)
    found = {a: n / len(answers) for a, n in counts.most_common(6)}
    other = sum(n for _, n in counts.most_common()[6:])
    return found | ({"other": other / len(answers)} if other else {})


def responses(m: nn.Module, t: subwords.Tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64,
            num_beams: int = 1, name: str = "answers") -> list[str]:
    """What the model writes to each prompt, greedily or with beams; prompts of like length share a batch. Of several
    processes each asks for its share. `name` stands beside the progress bar."""
    ids = [t.encode(p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))[parallel.rank()::parallel.world()]
    said, pad = {}, t.eos_id if t.pad_id is None else t.pad_id
    bar = tqdm(range(0, len(order), batch_size), name, unit="batch", leave=False, disable=parallel.rank() > 0)
    with parallel.in_step(m):
        for start in bar:
            some = order[start:start + batch_size]
            b = batch.to_device(batch.collate([batch.Row(ids[i]) for i in some], pad, "left"), m)
            out = generate.generate(m, **b, max_new_tokens=max_new_tokens, num_beams=num_beams, eos_token_id=t.eos_id,
                                 pad_token_id=pad)
            for i, new in zip(some, out[:, b["input_ids"].shape[1]:].tolist(), strict=True):
                said[i] = t.decode(new[: new.index(t.eos_id)] if t.eos_id in new else new)
    return [text for _, text in sorted(parallel.all_gather_dicts(said).items())]


@torch.no_grad()
def likelihoods(m: nn.Module, t: subwords.Tokenizer, prompts: Sequence[str], choices: Sequence[Sequence[str]],
                batch_size: int = 64) -> list[list[tuple[float, int]]]:
    """Of each prompt's choices (texts) the log-probability behind the prompt, and the number of tokens it sums over.

    Each prompt is read once, together with what all its choices begin with; then the first choices of all prompts of a
    batch are read behind it, then the second ones in their place. Of several processes each reads its share."""
    generate.require_eval(m)
    spelled = [[batch.continuation(p, c, t) for c in some] for p, some in zip(prompts, choices, strict=True)]
    order = sorted(range(len(spelled)), key=lambda i: len(spelled[i][0][0]))[parallel.rank()::parallel.world()]
    found, pad = {}, t.eos_id if t.pad_id is None else t.pad_id
    bar = tqdm(range(0, len(order), batch_size), "choices", unit="batch", leave=False, disable=parallel.rank() > 0)
    with parallel.in_step(m), fast.prepacked_weights(m):
        for start in bar:
            some = order[start:start + batch_size]
            written = [[ids for _, ids in spelled[i]] for i in some]
            found |= zip(some, _log_probabilities(m, [spelled[i][0][0] for i in some], written, pad), strict=True)
    return [[(logp, len(ids)) for logp, (_, ids) in zip(logps, some, strict=True)]
            for (_, logps), some in zip(sorted(parallel.all_gather_dicts(found).items()), spelled, strict=True)]


def _log_probabilities(m: nn.Module, given: list[list[int]], written: list[list[list[int]]],
                       pad: int) -> list[list[float]]:
    """log p of each of `written`, by prompt, behind its prompt in `given`."""
    def of(logp: Tensor, ids: Tensor, asked: Tensor) -> Tensor:  # (B, T, V), (B, T), bool (B, T) -> (B,)
        return torch.where(asked, logp.gather(-1, ids[..., None])[..., 0], 0).sum(1)

    # how many tokens all choices of a prompt begin with
    alike = [len(list(takewhile(lambda ids: len(set(ids)) == 1, zip(*some, strict=False)))) for some in written]
    shared = [batch.Row(g + some[0][:n]) for g, some, n in zip(given, written, alike, strict=True)]
    b = batch.to_device(batch.collate(shared, pad, "left"), m)
    n = torch.tensor(alike, device=b["input_ids"].device)[:, None]  # (B, 1)
    T, most, longest = b["input_ids"].shape[1], max(alike), max(len(w) for some in written for w in some)
    logits, mask, cache = generate.prefill(m, b["input_ids"], b["attention_mask"], T + longest, most + 1)
    logp = generate.to_float32(logits).log_softmax(-1)  # (B, most + 1, V)
    i = torch.arange(most, device=n.device)
    begun = of(logp[:, :-1], b["input_ids"][:, T - most:], i >= most - n)
    columns = []
    for place in range(max(map(len, written))):  # a prompt with fewer choices repeats its last, and drops it in the end
        own = [batch.Row(some[min(place, len(some) - 1)][k:]) for some, k in zip(written, alike, strict=True)]
        ids, asked = batch.to_device(batch.collate(own, pad), m).values()  # (B, T')
        next_logp = logp[:, -1:]
        if ids.shape[1] > 1:
            for kv in cache:
                kv.length = T  # the next choice stands where the last one stood
            seen = torch.cat((mask, asked[:, :-1]), 1)
            logits = m(ids[:, :-1], seen, cache=cache, last=ids.shape[1] - 1)
            next_logp = torch.cat((next_logp, generate.to_float32(logits).log_softmax(-1)), 1)
        columns.append(begun + of(next_logp, ids, asked.bool()))
    return [row[:len(some)] for row, some in zip(torch.stack(columns, 1).tolist(), written, strict=True)]


BEAMS = {"clean": 1, "paper": 4}  # by protocol


def score_examples(m: nn.Module, t: subwords.Tokenizer, task: tasks.Task, examples: Sequence[tasks.Example],
                   batch_size: int = 64, num_beams: int | None = None, protocol: str = "clean") -> Score:
    """Accuracy of the generated answers, over all and over each part that is reported on its own; beside it AQuA's by
    the last letter, and that of the likeliest choice where the examples offer some, in all or a token.

    num_beams None: as many as the protocol says."""
    prompts = [batch.prompt(e.instruction, protocol) for e in examples]
    texts = responses(m, t, prompts, task.max_new_tokens, batch_size, num_beams or BEAMS[protocol], task.name)
    records, more = [], {}
    for e, text in zip(examples, texts, strict=True):
        records.append({"task": task.name, "gold": e.answer, "response": text, "answer": answers.answer_of(task, text),
                        "right": answers.is_right(task, text, e.answer)})
    if task.answers == tasks.LETTER:
        more["last letter"] = [answers.last_letter(text) for text in texts]
    if all(e.choices for e in examples):  # written as the training files write them
        found = likelihoods(m, t, prompts, [[f"the correct answer is {c}" for c in e.choices] for e in examples],
                            batch_size)
        for name, value in (("likelihood", lambda x: x[0]), ("likelihood, per token", lambda x: x[0] / x[1])):
            more[name] = [e.choices[max(range(len(x)), key=lambda i, x=x: value(x[i]))]
                          for e, x in zip(examples, found, strict=True)]
    for name, given in more.items():
        for record, answer in zip(records, given, strict=True):
            record[name] = answer
    right, given = np.array([r["right"] for r in records]), [r["answer"] for r in records]
    score = float(right.mean())
    return Score("accuracy", score, len(right), metrics.wilson(score, len(right)),
                 by_part([e.part for e in examples], lambda mask: float(right[mask].mean())),
                 {name: float(np.mean([r[name] == r["gold"] for r in records])) for name in more},
                 given.count(None) / len(given), shares(given), records)


def mean(scores: dict[str, Score]) -> Score:
    """Of several tasks: the mean of their scores, which are its parts; one task's score is itself. The interval is that
    of a mean of independent scores, each with its own (Zou and Donner 2008)."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    each = list(scores.values())

    def named(name: str) -> dict[str, float]:
        return {f"{task} {k}": v for task, s in scores.items() for k, v in getattr(s, name).items()}

    score, n = float(np.mean([s.score for s in each])), sum(s.n for s in each)
    low, high = (math.hypot(*(s.interval[side] - s.score for s in each)) / len(each) for side in (0, 1))
    return Score(each[0].metric, score, n, (score - low, score + high), {name: s.score for name, s in scores.items()},
                 named("more"), sum(s.empty * s.n for s in each) / n, named("said"),
                 [r for s in each for r in s.records], sum(s.cut for s in each))


@torch.no_grad()
def score_sentences(m: nn.Module, t: subwords.Tokenizer, task: tasks.Task, rows: Sequence[batch.Row],
                    batch_size: int = 64) -> Score:
    """GLUE's metrics of a BERT's predictions. Of several processes each predicts its share."""
    generate.require_eval(m)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))[parallel.rank()::parallel.world()]
    found = {}
    with parallel.in_step(m):
        for start in range(0, len(order), batch_size):
            some = order[start:start + batch_size]
            b = batch.to_device(batch.collate([rows[i] for i in some], t.pad_id), m)
            b.pop("labels")
            logits = m(**b).float().cpu()  # (B, n)
            predicted = logits[:, 0] if task.num_labels == 1 else logits.argmax(-1)
            confidence = logits.softmax(-1).amax(-1).nan_to_num()  # a model gone wrong is sure of nothing
            found |= zip(some, zip(predicted.tolist(), confidence.tolist(), strict=True), strict=True)
    predicted, confidence = zip(*(x for _, x in sorted(parallel.all_gather_dicts(found).items())), strict=True)
    return score_predictions(task, predicted, rows, confidence if task.num_labels > 1 else None)


def score_predictions(task: tasks.Task, predicted: Sequence[float], rows: Sequence[batch.Row],
                      confidence: Sequence[float] | None = None) -> Score:
    """The task's metric, over all and over each part (MNLI's two), and the others that GLUE reports beside it.
    predicted: a class number (or a score) for each row; confidence: the probability that the model gave this class."""
    gold = [r.labels for r in rows]
    a, b = np.array(predicted, dtype=float), np.array(gold, dtype=float)
    names = {1: ("pearson", "spearman"), 2: ("accuracy", "matthews", "f1")}.get(task.num_labels, ("accuracy",))
    found, metric = {name: metrics.METRICS[name](a, b) for name in names}, metrics.METRICS[task.metric]
    score = found.pop(task.metric)
    interval = metrics.wilson(score, len(rows)) if metric is metrics.accuracy else metrics.bootstrap(metric, a, b)
    records = [{"task": task.name, "gold": y, "predicted": x} for x, y in zip(predicted, gold, strict=True)]
    if confidence:
        found |= {"confidence": float(np.mean(confidence)),
                  "calibration error": metrics.calibration_error(np.array(confidence), a == b)}
        records = [r | {"confidence": round(p, 4)} for r, p in zip(records, confidence, strict=True)]
    return Score(task.metric, score, len(rows), interval,
                 by_part([r.part for r in rows], lambda mask: metric(a[mask], b[mask])), found,
                 said=shares([task.classes[x] for x in predicted]) if task.classes else {},
                 records=records, cut=sum(r.cut for r in rows))


def majority(task: tasks.Task, train: Sequence[tasks.Sentence], test: Sequence[batch.Row]) -> Score:
    """What a BERT scores before it has a trained head: always the commonest class (or the mean) of the training set."""
    labels = [s.label for s in train]
    guess = float(np.mean(labels)) if task.num_labels == 1 else int(np.bincount(labels).argmax())
    return score_predictions(task, [guess] * len(test), test)
