"""Scores: what a model answers, whether that is right, and how far to trust it (paper, Section 4.1).

Sources: LLM-Adapters' scoring (see data/tasks.py), GLUE's metrics. Departs from the official code, which evaluates
with dropout on and with left padding unmasked, so that its scores change with the batch size: here the model is in
eval mode, padding has no position and no weight, and no example is skipped in silence. The score itself is the
official one, to compare with published scores. Beside it stand measures that depend less on an answer's form (the
last letter, the likeliest choice), an interval, and the answers given."""

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

BEAMS = {"clean": 1, "paper": 4}  # by protocol


@dataclass
class Score:
    """A task's score in [−1, 1], its metric, on n examples, and what says how far to trust it."""

    metric: str
    score: float
    n: int
    interval: tuple[float, float]  # 95 %: Wilson's for an accuracy, else bootstrapped over the examples
    parts: dict[str, float] = field(default_factory=dict)  # the score of each group
    more: dict[str, float] = field(default_factory=dict)  # other metrics
    empty: float = 0.0  # share of the responses without an answer
    answers_given: dict[str, float] = field(default_factory=dict)  # with their shares: shows a collapse
    records: list[dict] = field(default_factory=list, repr=False)  # per example: gold, response, whether right
    cut: int = 0  # examples that the cutoff shortened before scoring

    def __str__(self) -> str:
        details = [f"n {self.n}", f"95 % {self.interval[0]:.4f} to {self.interval[1]:.4f}"]
        details += [f"{k} {v:.4f}" for k, v in (self.parts | self.more).items()]
        details += [f"no answer {self.empty:.1%}"] if self.empty else []
        details += [f"cut off {self.cut}"] if self.cut else []
        given = ", ".join(f"{k} {v:.1%}" for k, v in self.answers_given.items())
        return f"{self.metric} {self.score:.4f} ({'; '.join(details)})" + (f"\n  answers: {given}" if given else "")


def by_part(parts: Sequence[str], score: Callable[[np.ndarray], float]) -> dict[str, float]:
    """`score` of each group's mask, for groups that are reported on their own; empty if there is only one."""
    names = sorted(set(parts))
    return {name or "the rest": score(np.array(parts) == name) for name in names} if len(names) > 1 else {}


def shares(answers: Sequence[str | None]) -> dict[str, float]:
    """The six most frequent answers and "other", each with its share of all; None (no answer) is not listed. A
    long answer, as your own data may have, is shown by its end."""
    counts = Counter(a.splitlines()[-1][-40:].rstrip(" .") for a in answers if a is not None).most_common()
    other = sum(n for _, n in counts[6:])
    return {a: n / len(answers) for a, n in [*counts[:6], *([("other", other)] if other else [])]}


def responses(m: nn.Module, t: subwords.Tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64,
              num_beams: int = 1, name: str = "answers") -> list[str]:
    """What the model writes after each prompt, greedily or with beams; `name` labels the progress bar."""
    ids, pad = [t.encode(p) for p in prompts], t.eos_id if t.pad_id is None else t.pad_id

    def work(some: list[int]) -> list[str]:
        b = batch.to_device(batch.collate([batch.Row(ids[i]) for i in some], pad, "left"), m)
        out = generate.generate(m, **b, max_new_tokens=max_new_tokens, num_beams=num_beams, eos_token_id=t.eos_id,
                                pad_token_id=pad)
        written = out[:, b["input_ids"].shape[1]:].tolist()
        return [t.decode(list(takewhile(lambda i: i != t.eos_id, new))) for new in written]

    return _in_batches(m, list(map(len, ids)), batch_size, work, name)


@torch.no_grad()
def _in_batches(m: nn.Module, lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], Sequence],
                name: str | None = None) -> list:
    """The results of `work`, called on the indices of a batch at a time, in the order of `lengths`. Examples of like
    length share a batch; each process does its share; `name` labels a progress bar."""
    generate.require_eval(m)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])[parallel.rank()::parallel.world()]
    bar = tqdm(range(0, len(order), batch_size), name, unit="batch", leave=False,
               disable=not name or parallel.rank() > 0)
    found = {}
    with parallel.in_step(m):
        for start in bar:
            some = order[start:start + batch_size]
            found |= zip(some, work(some), strict=True)
    return [result for _, result in sorted(parallel.all_gather_dicts(found).items())]


def likelihoods(m: nn.Module, t: subwords.Tokenizer, prompts: Sequence[str], choices: Sequence[Sequence[str]],
                batch_size: int = 64) -> list[list[tuple[float, int]]]:
    """For each choice of each prompt, its log-probability after the prompt and the number of tokens it sums over.

    Each prompt is read once, with the tokens that all its choices begin with. Then the first choice of every prompt
    in the batch is read after it, then the second in its place, and so on."""
    spelled = [[batch.continuation(p, c, t) for c in some] for p, some in zip(prompts, choices, strict=True)]
    pad = t.eos_id if t.pad_id is None else t.pad_id

    def work(some: list[int]) -> list[list[float]]:
        written = [[ids for _, ids in spelled[i]] for i in some]
        return _log_probabilities(m, [spelled[i][0][0] for i in some], written, pad)

    with fast.prepacked_weights(m):
        found = _in_batches(m, [len(each[0][0]) for each in spelled], batch_size, work, "choices")
    return [[(logp, len(ids)) for logp, (_, ids) in zip(logps, each, strict=True)]
            for logps, each in zip(found, spelled, strict=True)]


def _log_probabilities(m: nn.Module, given: list[list[int]], written: list[list[list[int]]],
                       pad: int) -> list[list[float]]:
    """log p of each choice in `written`, by prompt, after its prompt in `given`."""
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
    for place in range(max(map(len, written))):  # a prompt with fewer choices repeats its last, dropped at the end
        own = [batch.Row(some[min(place, len(some) - 1)][k:]) for some, k in zip(written, alike, strict=True)]
        ids, asked = batch.to_device(batch.collate(own, pad), m).values()  # (B, T')
        next_logp = logp[:, -1:]
        if ids.shape[1] > 1:
            for kv in cache:
                kv.length = T  # overwrite the choice before
            logits = m(ids[:, :-1], torch.cat((mask, asked[:, :-1]), 1), cache=cache, last=ids.shape[1] - 1)
            next_logp = torch.cat((next_logp, generate.to_float32(logits).log_softmax(-1)), 1)
        columns.append(begun + of(next_logp, ids, asked.bool()))
    return [row[:len(some)] for row, some in zip(torch.stack(columns, 1).tolist(), written, strict=True)]


def score_examples(m: nn.Module, t: subwords.Tokenizer, task: tasks.Task, examples: Sequence[tasks.Example],
                   batch_size: int = 64, num_beams: int | None = None, protocol: str = "clean") -> Score:
    """Accuracy of the generated answers; beside it AQuA's by the last letter and, where every example offers choices,
    that of the likeliest choice, in total and per token. num_beams None: as many as the protocol says."""
    prompts = [batch.prompt(e.instruction, protocol) for e in examples]
    texts = responses(m, t, prompts, task.max_new_tokens, batch_size, num_beams or BEAMS[protocol], task.name)
    records = [{"task": task.name, "gold": e.answer, "response": text, "answer": answers.answer_of(task, text),
                "right": answers.is_right(task, text, e.answer)} for e, text in zip(examples, texts, strict=True)]
    more = {}
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
    """The mean of several tasks' scores, which become its parts; a single score stays as it is. The interval is that of
    a mean of independent scores, each with its own (Zou and Donner 2008)."""
    each = list(scores.values())
    if len(each) == 1:
        return each[0]

    def named(field: str) -> dict[str, float]:
        return {f"{task} {k}": v for task, s in scores.items() for k, v in getattr(s, field).items()}

    score, n = float(np.mean([s.score for s in each])), sum(s.n for s in each)
    low, high = (math.hypot(*(s.interval[side] - s.score for s in each)) / len(each) for side in (0, 1))
    return Score(each[0].metric, score, n, (score - low, score + high), {name: s.score for name, s in scores.items()},
                 named("more"), sum(s.empty * s.n for s in each) / n, named("answers_given"),
                 [r for s in each for r in s.records], sum(s.cut for s in each))


def score_sentences(m: nn.Module, t: subwords.Tokenizer, task: tasks.Task, rows: Sequence[batch.Row],
                    batch_size: int = 64) -> Score:
    """GLUE's metrics of a BERT's predictions."""
    def work(some: list[int]) -> list[tuple[float, float]]:
        b = batch.to_device(batch.collate([rows[i] for i in some], t.pad_id), m)
        b.pop("labels")
        logits = m(**b).float().cpu()  # (B, n)
        predicted = logits[:, 0] if task.num_labels == 1 else logits.argmax(-1)
        confidence = logits.softmax(-1).amax(-1).nan_to_num()  # a model gone wrong is sure of nothing
        return list(zip(predicted.tolist(), confidence.tolist(), strict=True))

    found = _in_batches(m, [len(row.ids) for row in rows], batch_size, work)
    predicted, confidence = zip(*found, strict=True)
    return score_predictions(task, predicted, rows, confidence if task.num_labels > 1 else None)


def score_predictions(task: tasks.Task, predicted: Sequence[float], rows: Sequence[batch.Row],
                      confidence: Sequence[float] | None = None) -> Score:
    """The task's metric, in all and on each part (MNLI has two), and the others that GLUE reports beside it.
    predicted: a class number or a score per row; confidence: the probability that the model gave this class."""
    gold = [r.labels for r in rows]
    a, b = np.array(predicted, dtype=float), np.array(gold, dtype=float)
    names = {1: ("pearson", "spearman"), 2: ("accuracy", "matthews", "f1")}.get(task.num_labels, ("accuracy",))
    more, metric = {name: metrics.METRICS[name](a, b) for name in names}, metrics.METRICS[task.metric]
    score = more.pop(task.metric)
    interval = metrics.wilson(score, len(rows)) if metric is metrics.accuracy else metrics.bootstrap(metric, a, b)
    records = [{"task": task.name, "gold": y, "predicted": x} for x, y in zip(predicted, gold, strict=True)]
    if confidence:
        more |= {"confidence": float(np.mean(confidence)),
                 "calibration error": metrics.calibration_error(np.array(confidence), a == b)}
        records = [r | {"confidence": round(p, 4)} for r, p in zip(records, confidence, strict=True)]
    return Score(task.metric, score, len(rows), interval,
                 by_part([r.part for r in rows], lambda mask: metric(a[mask], b[mask])), more,
                 answers_given=shares([task.classes[x] for x in predicted]) if task.classes else {},
                 records=records, cut=sum(r.cut for r in rows))


def majority(task: tasks.Task, train: Sequence[tasks.Sentence], test: Sequence[batch.Row]) -> Score:
    """The score of a BERT before its head is trained: always the training set's commonest class, or its mean."""
    labels = [s.label for s in train]
    guess = float(np.mean(labels)) if task.num_labels == 1 else int(np.bincount(labels).argmax())
    return score_predictions(task, [guess] * len(test), test)
