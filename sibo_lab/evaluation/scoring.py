"""Scores: what a model answers, whether that is right, and how far to trust it (paper, Section 4.1): LLM-Adapters' and
GLUE's. The official code leaves dropout on and padding unmasked, so that its scores change with the batch size; here
neither has an effect."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from sibo_lab import cores, fast, parallel
from sibo_lab.backbone import generate, subwords
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import answers, metrics

BEAMS = {"clean": 1, "paper": 4, "chat": 1}  # by protocol
LOSSES_AT_ONCE = 8  # answers: their logits are the largest tensors here


@dataclass
class Score:
    """A task's score, in [−1, 1] or, if it is the loss, in nats per answer, and how far to trust it."""

    metric: str
    score: float
    n: int  # examples
    interval: tuple[float, float] | None  # 95 %: Wilson's of a share, normal of losses (of one: None), or bootstrapped
    parts: dict[str, float] = field(default_factory=dict)  # the score of each group
    more: dict[str, float] = field(default_factory=dict)  # other metrics
    empty: float = 0.0  # share of responses without an answer
    answers_given: dict[str, float] = field(default_factory=dict)  # with their shares: shows a collapse
    records: list[dict] = field(default_factory=list, repr=False)  # one per example
    cut: int = 0  # examples that the cutoff shortened
    loss: float | None = None  # mean over the answers of what each costs, in nats; None: they are unknown
    loss_per_token: float | None = None  # BERT: None

    def __str__(self) -> str:
        loss = {"loss per answer": self.loss, "per token": self.loss_per_token}
        details = [f"n {self.n}", *("95 % {:.4f} to {:.4f}".format(*x) for x in [self.interval] if x),
                   *(f"{k} {v:.4f}" for k, v in loss.items() if v is not None),
                   *(f"{k} {v:.4f}" for k, v in (self.parts | self.more).items()),
                   *[f"no answer {self.empty:.1%}"] * (self.empty > 0), *[f"cut off {self.cut}"] * (self.cut > 0)]
        given = ", ".join(f"{k} {v:.1%}" for k, v in self.answers_given.items())
        return f"{self.metric} {self.score:.4f} ({'; '.join(details)})" + (f"\n  answers: {given}" if given else "")


def by_part(parts: Sequence[str], score: Callable[[np.ndarray], float]) -> dict[str, float]:
    """`score` of each group's mask; empty for a single group."""
    names = sorted(set(parts))
    return {name or "the rest": score(np.array(parts) == name) for name in names} if len(names) > 1 else {}


def shares(answers: Sequence[str | None]) -> dict[str, float]:
    """Of the six commonest answers (the ends of long ones) and "other"; None is no answer."""
    counts = Counter(a.splitlines()[-1][-40:].rstrip(" .") for a in answers if a is not None).most_common()
    other = sum(n for _, n in counts[6:])
    return {a: n / len(answers) for a, n in counts[:6] + [("other", other)] * (other > 0)}


@torch.no_grad()
def _in_batches(m: nn.Module, items: Sequence, length: Callable, batch_size: int, work: Callable[[list], Sequence],
                bar: str = "") -> list:
    """`work`'s result for each item, in their order, from batches of like `length`; each process does its share."""
    generate.require_eval(m)
    order = sorted(range(len(items)), key=lambda i: length(items[i]))[parallel.rank()::parallel.world()]
    found, hidden = {}, not bar or parallel.rank() > 0
    with parallel.in_step(m), cores.shared(m):
        for start in tqdm(range(0, len(order), batch_size), bar, unit="batch", leave=False, disable=hidden):
            some = order[start:start + batch_size]
            found |= zip(some, work([items[i] for i in some]), strict=True)
    return [result for _, result in sorted(parallel.all_gather_dicts(found).items())]


def responses(m: nn.Module, t: subwords.Tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64,
              num_beams: int = 1, bar: str = "answers") -> list[str]:
    """What the model writes after each prompt, up to any token that ends a text; ValueError if prompts end in one."""
    ends = getattr(t, "eos_ids", [t.eos_id])
    last, empty = (t.encode(text)[-1:] for text in ("a", ""))
    if last == empty and last in [[i] for i in ends]:
        raise ValueError(f"expected a prompt that goes on, got a tokenizer that ends each text in id {last[0]}, which "
                         "nothing follows; take add_eos_token out of its tokenizer_config.json, or the token out of "
                         "tokenizer.json's post_processor")

    def work(some):
        b = batch.to_device(batch.collate(list(map(batch.Row, some)), side="left"), m)
        out = generate.generate(m, *b.values(), max_new_tokens, num_beams, ends)
        written = out[:, b["input_ids"].shape[1]:].tolist()
        return [t.decode(list(takewhile(lambda i: i not in ends, ids))) for ids in written]

    with fast.packed_weights(m):  # once for all batches
        return _in_batches(m, list(map(t.encode, prompts)), len, batch_size, work, bar)


def likelihoods(m: nn.Module, t: subwords.Tokenizer, prompts: Sequence[str], choices: Sequence[Sequence[str]],
                batch_size: int = 64) -> list[list[list[float]]]:
    """For each choice of each prompt: the log-probabilities of its tokens after the prompt. A prompt is read once, with
    what all its choices begin with."""
    spelled = [[batch.continuation(p, c, t) for c in some] for p, some in zip(prompts, choices, strict=True)]
    work = partial(_log_probabilities, m)
    with fast.packed_weights(m):
        return _in_batches(m, spelled, lambda some: len(some[0][0]), batch_size, work, "choices")


def _log_probabilities(m: nn.Module, spelled: Sequence) -> list:
    """`spelled`: per prompt, per choice, the ids of the prompt and of the choice."""
    def of(logp, ids, asked):  # (B, T, V), (B, T), bool (B, T) -> B lists
        return [row[keep].tolist() for row, keep in zip(logp.gather(-1, ids[..., None])[..., 0], asked, strict=True)]

    choices = [[ids for _, ids in some] for some in spelled]
    # how many tokens all choices of a prompt begin with
    alike = [len(list(takewhile(lambda ids: len(set(ids)) == 1, zip(*some, strict=False)))) for some in choices]
    shared = [batch.Row(prompt + ids[:n]) for ((prompt, ids), *_), n in zip(spelled, alike, strict=True)]
    b = batch.to_device(batch.collate(shared, side="left"), m)
    n = torch.tensor(alike, device=b["input_ids"].device)[:, None]  # (B, 1)
    T, most, longest = b["input_ids"].shape[1], max(alike), max(len(ids) for some in choices for ids in some)
    logits, mask, cache = generate.prefill(m, b["input_ids"], b["attention_mask"], T + longest, most + 1)
    logp = generate.to_float32(logits).log_softmax(-1)  # (B, most + 1, V)
    i = torch.arange(most, device=n.device)
    begun = of(logp[:, :-1], b["input_ids"][:, T - most:], i >= most - n)
    columns = []
    for place in range(max(map(len, choices))):  # a prompt with fewer choices repeats its last, dropped at the end
        own = [batch.Row(some[min(place, len(some) - 1)][k:]) for some, k in zip(choices, alike, strict=True)]
        ids, asked = batch.to_device(batch.collate(own), m).values()  # (B, T')
        next_logp = logp[:, -1:]
        if ids.shape[1] > 1:
            for kv in cache:
                kv.length = T  # overwrite the choice before
            logits = m(ids[:, :-1], torch.cat((mask, asked[:, :-1]), 1), cache=cache, last=ids.shape[1] - 1)
            next_logp = torch.cat((next_logp, generate.to_float32(logits).log_softmax(-1)), 1)
        columns.append([a + b for a, b in zip(begun, of(next_logp, ids, asked.bool()), strict=True)])
    return [list(row[:len(some)]) for row, some in zip(zip(*columns, strict=True), choices, strict=True)]


def losses(m: nn.Module, t: subwords.Tokenizer, examples: Sequence[tasks.Example],
           protocol: str = "clean") -> list[dict[str, float]]:
    """What each example's answer costs in nats, its end included, as training counts it (of a conversation, all that
    the assistant says), and its tokens. Empty where an example has no answer to learn, as in the arithmetic test files.
    """
    if not all(e.output for e in examples):
        return []

    def work(some):
        b = batch.to_device(batch.collate(some, side="left"), m)
        ids, labels, mask = b["input_ids"][:, :-1], b["labels"][:, 1:], b["attention_mask"][:, :-1]
        labels = labels[:, int((labels != -100).any(0).nonzero()[0]):]  # the head is needed nowhere else
        (logits, *_), asked = generate.prefill(m, ids, mask, ids.shape[1], labels.shape[1]), labels != -100
        each = F.cross_entropy(generate.to_float32(logits[asked]), labels[asked], reduction="none")
        return [{"loss": _finite(float(x.sum())), "tokens": len(x)} for x in each.split(asked.sum(1).tolist())]

    rows = [batch.encode(e, t, sys.maxsize, protocol=protocol) for e in examples]
    return _in_batches(m, rows, lambda row: len(row.ids), LOSSES_AT_ONCE, work, "losses")


def _finite(x: float) -> float | None:  # JSON has no other numbers
    return x if math.isfinite(x) else None


def require_answers(tests: Sequence[tuple[tasks.Task, Sequence[tasks.Example]]], by: str) -> None:
    """ValueError for examples to score by their loss that have no answer to learn."""
    for task, test in tests if by == "loss" else ():
        if not all(e.output for e in test):
            raise ValueError(f"--score-by loss: expected test examples with an answer to learn, got {task.name}'s, "
                             "with the result alone; use --score-on validation")


def score_losses(records: Sequence[dict], parts: Sequence[str]) -> Score:
    """The mean loss per answer, as a score, of records with a task and what `losses` gives; ValueError where a loss is
    not finite."""
    if endless := [r["task"] for r in records if r["loss"] is None]:
        raise ValueError(f"{endless[0]}: expected a finite loss of each answer, got {len(endless)} of {len(records)} "
                         "that are not; score with --dtype float32")
    each = np.array([r["loss"] for r in records])
    score, interval = float(each.mean()), None
    if len(each) > 1:
        half = 1.96 * float(each.std(ddof=1)) / math.sqrt(len(each))
        interval = score - half, score + half
    return Score("loss", score, len(each), interval,
                 by_part(parts, lambda mask: float(each[mask].mean())), records=records, **_mean_losses(records))


def _mean_losses(lost: Sequence[dict[str, float]]) -> dict[str, float]:
    if not lost or any(one["loss"] is None for one in lost):
        return {}
    total, tokens = sum(one["loss"] for one in lost), sum(one.get("tokens", 0) for one in lost)
    return {"loss": total / len(lost), "loss_per_token": total / tokens if tokens else None}


def score_examples(m: nn.Module, t: subwords.Tokenizer, task: tasks.Task, examples: Sequence[tasks.Example],
                   batch_size: int = 64, num_beams: int | None = None, protocol: str = "clean",
                   by: str = "answers") -> Score:
    """Accuracy of the generated answers, of AQuA's last letters, and of the likeliest choice, where examples offer any;
    the loss of the right answers, where they are known, or, by "loss", that alone. num_beams None: the protocol's."""
    lost = losses(m, t, examples, protocol)
    if by == "loss":
        return score_losses([{"task": task.name} | one for one in lost], [e.part for e in examples])
    prompts = [batch.prompt_of(e, t, protocol) for e in examples]
    texts = responses(m, t, prompts, task.max_new_tokens, batch_size, num_beams or BEAMS[protocol], task.name)
    beside = [{"last letter": answers.last_letter(text)} if task.answers == tasks.LETTER else {} for text in texts]
    if all(e.choices for e in examples):
        written = [[f"{tasks.LEAD} {c}" for c in e.choices] for e in examples]
        beside = list(map(partial(_likeliest, t), examples, prompts, likelihoods(m, t, prompts, written, batch_size)))
    names = [name for name in beside[0] if name != "choices"]
    records = [{"task": task.name, "gold": e.answer, "response": text, "answer": answers.answer_of(task, text),
                "right": answers.is_right(task, text, e.answer)} | b | cost
               for e, text, b, cost in zip(examples, texts, beside, lost or [{}] * len(examples), strict=True)]
    right, given = np.array([r["right"] for r in records]), [r["answer"] for r in records]
    score = float(right.mean())
    return Score("accuracy", score, len(right), metrics.wilson(score, len(right)),
                 by_part([e.part for e in examples], lambda mask: float(right[mask].mean())),
                 {name: float(np.mean([r[name] == r["gold"] for r in records])) for name in names},
                 given.count(None) / len(given), shares(given), records, **_mean_losses(lost))


def _likeliest(t: subwords.Tokenizer, example: tasks.Example, prompt: str, found: list[list[float]]) -> dict:
    """The choice with the likeliest answer, in all and per token, and, as lm-evaluation-harness has acc_norm, by what
    comes after LEAD, per character; and the log-probability of that."""
    lead = len(t.encode(prompt + tasks.LEAD)) - len(t.encode(prompt))
    own = {c: sum(logp[lead:]) for c, logp in zip(example.choices, found, strict=True)}
    by = {"likelihood": map(sum, found), "likelihood, per token": map(np.mean, found),
          "likelihood, per character": (logp / len(c) for c, logp in own.items())}
    return {name: example.choices[np.argmax(list(scores))] for name, scores in by.items()} | {"choices": own}


def mean(scores: dict[str, Score]) -> Score:
    """Of several tasks' scores, which become its parts; one stays as it is. Its interval: Zou and Donner 2008. Losses
    are averaged over all answers."""
    each, records = list(scores.values()), [r for s in scores.values() for r in s.records]
    if len(each) == 1:
        return each[0]
    if each[0].metric == "loss":
        return score_losses(records, [r["task"] for r in records])

    def named(field):
        return {f"{task} {k}": v for task, s in scores.items() for k, v in getattr(s, field).items()}

    score, n = float(np.mean([s.score for s in each])), sum(s.n for s in each)
    low, high = (math.hypot(*(s.interval[side] - s.score for s in each)) / len(each) for side in (0, 1))
    return Score(each[0].metric, score, n, (score - low, score + high), {task: s.score for task, s in scores.items()},
                 named("more"), sum(s.empty * s.n for s in each) / n, named("answers_given"),
                 records, sum(s.cut for s in each),
                 **_mean_losses(records if all("loss" in r for r in records) else []))


def score_sentences(m: nn.Module, t: subwords.Tokenizer, task: tasks.Task, rows: Sequence[batch.Row],
                    batch_size: int = 64) -> Score:
    """GLUE's metrics of a BERT's predictions."""
    def work(some):
        b = batch.to_device(batch.collate(some), m)
        b.pop("labels")
        logits = m(**b).float().cpu()  # (B, n)
        predicted = logits[:, 0] if task.num_labels == 1 else logits.argmax(-1)
        confidence = logits.softmax(-1).amax(-1).nan_to_num()  # a model gone wrong is sure of nothing
        gold = torch.tensor([row.labels for row in some])
        lost = (F.mse_loss(logits[:, 0], gold, reduction="none") if task.num_labels == 1 else
                F.cross_entropy(logits, gold, reduction="none"))
        return list(zip(predicted.tolist(), confidence.tolist(), lost.tolist(), strict=True))

    found = _in_batches(m, rows, lambda row: len(row.ids), batch_size, work)
    predicted, confidence, lost = zip(*found, strict=True)
    return score_predictions(task, predicted, rows, confidence if task.num_labels > 1 else None, lost)


def score_predictions(task: tasks.Task, predicted: Sequence[float], rows: Sequence[batch.Row],
                      confidence: Sequence[float] | None = None, lost: Sequence[float] = ()) -> Score:
    """The task's metric, in all and on each part (MNLI has two), and what else GLUE reports. predicted: a class or
    score per row; confidence: the probability of that class; lost: the cross-entropy, or of a score squared error."""
    gold = [r.labels for r in rows]
    a, b = np.array(predicted, float), np.array(gold, float)
    names = {1: ("pearson", "spearman"), 2: ("accuracy", "matthews", "f1")}.get(task.num_labels, ("accuracy",))
    more, metric = {name: getattr(metrics, name)(a, b) for name in names}, getattr(metrics, task.metric)
    score = more.pop(task.metric)
    records = [{"task": task.name, "gold": y, "predicted": x} for x, y in zip(predicted, gold, strict=True)]
    if confidence:
        more |= {"confidence": float(np.mean(confidence)),
                 "calibration error": metrics.calibration_error(np.array(confidence), a == b)}
        for record, p in zip(records, confidence, strict=True):
            record["confidence"] = round(p, 4)
    for record, one in zip(records, lost, strict=bool(lost)):
        record["loss"] = _finite(one)
    return Score(task.metric, score, len(rows),
                 metrics.wilson(score, len(rows)) if metric is metrics.accuracy else metrics.bootstrap(metric, a, b),
                 by_part([r.part for r in rows], lambda mask: metric(a[mask], b[mask])), more,
                 answers_given=shares([task.classes[x] for x in predicted]) if task.classes else {},
                 records=records, cut=sum(r.cut for r in rows), **_mean_losses(records if lost else []))


def majority(task: tasks.Task, train: Sequence[tasks.Sentence], test: Sequence[batch.Row]) -> Score:
    """The score of the training set's commonest class or mean: a BERT's before its head is trained."""
    labels = [s.label for s in train]
    guess = float(np.mean(labels)) if task.num_labels == 1 else int(np.bincount(labels).argmax())
    return score_predictions(task, [guess] * len(test), test)
