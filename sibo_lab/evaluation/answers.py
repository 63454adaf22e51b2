"""The answer that a response gives, and whether it is right."""

import re

from sibo_lab.data import tasks


def answer_of(task: tasks.Task, text: str) -> str | None:
    """The answer that a response gives, found as the official code finds it, or None.

    Numbers: the last one, without commas. AQuA: the first capital A-E anywhere. Commonsense: the first of the
    task's words. Others (your data, mixed training sets): the response itself; see is_right."""
    if not task.answers:
        return text.strip() or None
    if task.answers == tasks.NUMBER:
        return last_number(text)
    found = re.search(task.answers, text)
    return found[0] if found else None


def last_letter(text: str) -> str | None:
    """AQuA's answer, read with more care: the last capital A-E that stands alone ("By Bayes, (D)": D, not B)."""
    return (re.findall(rf"\b{tasks.LETTER}\b", text) or [None])[-1]


def last_number(text: str) -> str | None:
    return (re.findall(tasks.NUMBER, text.replace(",", "")) or [None])[-1]


def is_right(task: tasks.Task, text: str, gold: str) -> bool:
    """Whether a response gives the gold answer: numbers to within 1e-3, letters and words exactly. Where a task has no
    pattern of answers and gold is no number, the response must end in gold, but for case and closing punctuation."""
    gold = gold.strip()
    if task.answers and task.answers != tasks.NUMBER:
        return answer_of(task, text) == gold
    if re.fullmatch(tasks.NUMBER, number := gold.replace(",", "")):
        found = last_number(text)
        return found is not None and abs(float(found) - float(number)) <= 1e-3
    ours, theirs = (re.sub(r"(?<![\s.!?)])[\s.!?)]++$", "", words.strip().lower()) for words in (text, gold))
    return re.search(rf"(?<!\w){re.escape(theirs)}$", ours) is not None
