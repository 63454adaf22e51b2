"""The answer that a response gives, and whether it is right."""

import re

from sibo_lab.data import tasks

FURTHER = "### Response:"  # LLM-Adapters' code reads an answer up to where the model begins another


def _read(task: tasks.Task, text: str) -> str:
    return text.partition(FURTHER)[0] if task.kind in ("arithmetic", "commonsense") else text


def answer_of(task: tasks.Task, text: str) -> str | None:
    """The answer in a response, or None, as the official code finds it: the last number, without commas; AQuA's first
    capital A-E anywhere; the first of a commonsense task's words. Elsewhere, the response itself; see is_right."""
    text = _read(task, text)
    if not task.answers:
        return text.strip() or None
    if task.answers == tasks.NUMBER:
        return last_number(text)
    return (re.findall(task.answers, text) or [None])[0]


def last_letter(text: str) -> str | None:
    """AQuA's answer, read with care: the last capital A-E that stands alone ("By Bayes, (D)": D, not B)."""
    return (re.findall(rf"\b{tasks.LETTER}\b", text.partition(FURTHER)[0]) or [None])[-1]


def last_number(text: str) -> str | None:
    return (re.findall(tasks.NUMBER, text.replace(",", "")) or [None])[-1]


def is_right(task: tasks.Task, text: str, gold: str) -> bool:
    """Whether a response gives the gold answer: numbers to within 1e-3, letters and words exactly. Where gold is no
    number and there is no pattern, the response must end in it, but for case and closing punctuation."""
    text, gold = _read(task, text), gold.strip()
    if task.answers and task.answers != tasks.NUMBER:
        return answer_of(task, text) == gold
    if re.fullmatch(tasks.NUMBER, number := gold.replace(",", "")):
        return abs(float(last_number(text) or "nan") - float(number)) <= 1e-3  # nan is close to nothing
    ours, theirs = (re.sub(r"(?<=[^\s.!?)])[\s.!?)]++$", "", words.strip().lower()) for words in (text, gold))
    return re.search(rf"(?<!\w){re.escape(theirs)}$", ours) is not None
