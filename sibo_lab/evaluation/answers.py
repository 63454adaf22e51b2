"""The answer a response gives, and whether it is right."""

import re

from sibo_lab.data import tasks


def answer_of(task: tasks.Task, text: str) -> str | None:
    """The answer that a response gives, found as the official code finds it, or None.

    Numbers: commas stripped, the last one. AQuA: the first capital A-E anywhere. Commonsense: the first of the task's
    own words. Other tasks (a user's data, training sets of several kinds): the response itself; see is_right."""
    if not task.answers:
        return text.strip() or None
    if task.answers == tasks.NUMBER:
        return last_number(text)
    found = re.search(task.answers, text)
    return found[0] if found else None


def last_letter(text: str) -> str | None:
    """AQuA's answer read with care: the last capital A-E that stands alone ("By Bayes, (D)" gives D, not B)."""
    found = re.findall(rf"\b{tasks.LETTER}\b", text)
    return found[-1] if found else None


def last_number(text: str) -> str | None:
    found = re.findall(tasks.NUMBER, text.replace(",", ""))
    return found[-1] if found else None


def is_right(task: tasks.Task, text: str, gold: str) -> bool:
    """Whether a response gives the gold answer: numbers within 1e-3, letters and words exactly.

    Tasks without an answer pattern: if gold is a number, the response's last number counts; otherwise the response must
    end in gold, case and closing punctuation aside."""
    gold = gold.strip()
    if task.answers and task.answers != tasks.NUMBER:
        return answer_of(task, text) == gold
    if re.fullmatch(tasks.NUMBER, number := gold.replace(",", "")):
        found = last_number(text)
        return found is not None and abs(float(found) - float(number)) <= 1e-3
    said, wanted = (re.sub(r"(?<![\s.!?)])[\s.!?)]++$", "", words.strip().lower()) for words in (text, gold))
    return re.search(rf"(?<!\w){re.escape(wanted)}$", said) is not None
