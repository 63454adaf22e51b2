"""The answer that a response gives, and whether it is right."""

import re
import unicodedata
from decimal import Decimal

import regex

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
    """Whether a response gives the gold answer: numbers to within 1e-3, letters and words exactly. Where there is no
    pattern, the response must end in it, but for spelling: see _spelled."""
    text = _read(task, text)
    if task.answers == tasks.NUMBER:
        return abs(float(last_number(text) or "nan") - float(gold.replace(",", ""))) <= 1e-3  # nan is close to nothing
    if task.answers:
        return answer_of(task, text) == gold.strip()
    ours, theirs = _spelled(text), _spelled(gold)
    if (right := _number(theirs)) is not None:
        given = _number((regex.findall(r"-?\d+(?:,\d+)*(?:\.\d+)?", ours) or [""])[-1])
        return given is not None and abs(given - right) <= Decimal("1e-3")
    before = ours.removesuffix(theirs)
    number = regex.match(r"\p{Sc}?\p{N}", theirs)  # of 5 %, 12.5 % and -5 % are others
    other = number and regex.search(r"(\p{N}[.,/:\p{Zs}]|[\p{Pd}^])\Z", before)
    denied = regex.search(r"(\b(not|no|non|never|nicht|keine?|pas)|n['’]t)\p{Zs}+\Z", before)
    apart = regex.search(r"(?<!\w|\w[-‐‑])\Z|(是|為|为|は|คือ)\Z", before)  # "is", where no space follows it
    return ours.endswith(theirs) and not other and not denied and apart is not None


def _number(text: str) -> Decimal | None:
    """None for 1,5, too: a decimal comma, or two numbers."""
    whole = regex.fullmatch(r"-?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", text)
    return Decimal(text.replace(",", "")) if whole else None


def _spelled(text: str) -> str:
    """In lower case and one spelling of accents, minus and .5, without closing punctuation."""
    text = unicodedata.normalize("NFC", text.strip().lower()).replace("\u2212", "-")
    closing = r"\s*`…\p{Pe}\p{Quotation_Mark}\p{Terminal_Punctuation}"
    return regex.sub(rf"(?<=[^{closing}])[{closing}]++$", "", regex.sub(r"(?<!\w)\.(?=\d)", "0.", text))
