"""A user's own rows, in the forms that people have, as examples: FORMS and BESIDE are all that a row may hold."""

import re
import shlex
import sys
from pathlib import Path

from sibo_lab.data import entries
from sibo_lab.data.tasks import Chat, Example, Task
from sibo_lab.files import quoted
from sibo_lab.parallel import rank

FORMS = {  # the column that asks, or holds the conversation: those that may answer
    "messages": (), "conversations": (), "instruction": ("output", "response"), "prompt": ("completion", "response"),
    "question": ("response", "answer"), "query": ("response", "answer"), "input": ("output",)}
BESIDE = "input", "history", "system", "answer"  # a conversation has only the last two; answer: what is scored
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TEXT = str, int, float, bool  # of what answers
OTHERS = {  # columns of data for something else, and what to do with them
    "chosen": "of each pair of answers keep the better: rename 'chosen' to 'completion' or, if a list, 'messages'",
    "parent_id": "these are single messages; join those of a conversation to a list 'messages'",
    "text": "it holds both what is asked and its answer; divide it into 'instruction' and 'output'"}


def read(task: Task, path: Path, again: bool = False) -> list[Example]:
    """A file's rows; ValueError names the column that nothing would use, stderr, unless read `again`, one that is
    ignored and not there."""
    rows, absent, found = [], () if again else task.ignored, list(entries.read(path))
    worked = any(_worked(entry) for _, entry in found)
    for place, entry in found:
        if absent:
            inner = (message for value in entry.values() if isinstance(value, list) for message in value)
            keys = set(entry).union(*(message for message in inner if isinstance(message, dict)))
            absent = [key for key in absent if key not in keys]
        row = {k: v for k, v in entry.items() if k not in task.ignored}
        rows.append(_example(place, row, task.ignored, worked))
    if absent and rows and not rank():
        print(f"{path}: no row has {entries.listed(absent)}, which --ignore-columns names", file=sys.stderr)
    return rows


def answered(rows: list[Example], paths: str, split: str, scored_only: bool) -> list[Example]:
    """The rows with an output, or, where nothing is learned from them, an answer; stderr says how many have none."""
    found = [row for row in rows if (row.answer if scored_only else row.output)]
    what, of = "answer" if scored_only else "output", "training" if split == "train" else "the test"
    if not found:
        raise ValueError(f"{paths}: expected {what}s, got none in {len(rows)} rows")
    if len(found) < len(rows) and not rank():
        print(f"{paths}: {len(rows) - len(found)} of {len(rows)} rows have no {what}: left out of {of}",
              file=sys.stderr)
    return found


def _require_none(place: str, unused: list[str], *form: str) -> None:
    if unused:
        raise ValueError(f"{place}: nothing would use {entries.listed(unused)} beside {entries.listed(form)}; put its "
                         f"text there, or pass --ignore-columns {quoted(shlex.quote(','.join(unused)))[1:-1]}")


def _missing(value: object) -> bool:
    return value in (None, [], {}) or value != value or isinstance(value, str) and not value.strip()


def _worked(row: dict) -> bool:
    """Whether a row shows that an answer is what is scored, and a response what is learned."""
    asked = not all(_missing(row.get(key)) for key in ("question", "query"))
    return asked and not _missing(row.get("response")) and not _missing(row.get("answer"))


def _example(place: str, row: dict, ignored: tuple, worked: bool) -> Example:
    given = [key for key in row if not _missing(row[key])]
    asks = next((key for keys in (given, row) for key in FORMS if key in keys), None)
    if asks and not given:  # such as an empty conversation, or the empty lines below a sheet
        return Example("")
    answers = FORMS[asks] if asks else ()
    says = next((key for keys in (given, row) for key in answers if key in keys), answers[0] if answers else asks)
    if says == "answer" and worked and "response" not in ignored:
        says, row = "response", {"response": ""} | row  # absent or null, by the file's format
    if says not in row:
        hint = next((f"; {hint}" for key, hint in OTHERS.items() if key in row), "")
        raise ValueError(f"{place}: expected the key {says or 'instruction'!r}, got {entries.listed(row)}{hint}")
    used = dict.fromkeys((asks, says))
    _require_none(place, [key for key in given if key not in (*used, *BESIDE[0 if answers else 2:])], *used)
    if answers and not isinstance(row[asks], list):
        turns = _texts(place, row, given, asks, says)
    else:
        turns = _turns(place, row, asks, ignored)
        if answers:  # a prompt and its completion, as messages
            if "assistant" in dict(turns):
                raise ValueError(f"{place}: {asks!r}: expected no assistant's turn, whose loss would count, got one; "
                                 "put all into 'messages'")
            turns += _turns(place, row, says, ignored)
        if turns[-1][0] != "assistant":
            turns.append(("assistant", ""))  # without an output
    if "system" in given:
        turns.insert(0, ("system", entries.field(place, row, "system")))
    roles = [role for role, _ in turns]
    if "system" in roles[1:] or roles[-2:] != ["user", "assistant"]:
        raise ValueError(f"{place}: expected at most one system text, first, and a user's turn before the assistant's "
                         f"last, got {', '.join(roles[-6:])}")
    scored = "answer" in given and says != "answer"
    answer = entries.field(place, row, "answer", TEXT) if scored else turns[-1][1]
    if mark := re.search(r"\n#### (.*\S)\s*+$", answer):  # GSM8K's last line is what its worked answer comes to
        answer = mark[1]
    if len(turns) > 2 or isinstance(row[asks], list):
        return Chat.of(turns, answer)
    return Example(turns[0][1], turns[1][1], answer)


def _texts(place: str, row: dict, given: list[str], asks: str, says: str) -> list[tuple[str, str]]:
    """The turns of a row of texts, its history first."""
    turns, history = [], row["history"] if "history" in given else []
    for i, pair in enumerate(history if isinstance(history, list) else [history], 1):
        here = f"{place}: 'history', pair {i}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{here}: expected what was asked and answered, got {quoted(pair)}")
        both = dict(zip(("asked", "answered"), pair, strict=True))
        turns += [("user", entries.field(here, both, "asked")),
                  ("assistant", entries.field(here, both, "answered", TEXT))]
    instruction = entries.field(place, row, asks)
    if asks != "input" and "input" in given:
        instruction += "\n\n" + entries.field(place, row, "input", TEXT)
    output = entries.field(place, row, says, TEXT) if says in given else ""
    return [*turns, ("user", instruction), ("assistant", output)]


def _turns(place: str, row: dict, key: str, ignored: tuple) -> list[tuple[str, str]]:
    """The turns of a list of messages, {role, content} or {from, value}; the last may be an assistant's empty one."""
    if not isinstance(row.get(key), list) or not row[key]:
        raise ValueError(f"{place}: {key!r}: expected a list of messages, got {quoted(row.get(key))}")
    turns = []
    for i, message in enumerate(row[key], 1):
        here = f"{place}: {key!r}, message {i}"
        if not isinstance(message, dict):
            raise ValueError(f"{here}: expected an object in braces, got {type(message).__name__}")
        who, what = ("from", "value") if "from" in message else ("role", "content")
        unused = [k for k, v in message.items() if k not in (who, what, *ignored) and not _missing(v)]
        _require_none(here, unused, who, what)
        role = ROLES.get(entries.field(here, message, who))
        if not role:
            raise ValueError(f"{here}: {who!r}: expected one of {', '.join(ROLES)}, got {quoted(message[who])}")
        empty = i == len(row[key]) and role == "assistant" and what in message and _missing(message[what])
        types = TEXT if role == "assistant" else (str,)
        turns.append((role, "" if empty else entries.field(here, message, what, types)))
    return turns
