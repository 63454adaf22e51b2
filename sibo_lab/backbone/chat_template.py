"""A backbone's own chat template: how it writes a conversation, and which part of that the assistant says.

The text is transformers' apply_chat_template's. Templates are programs by strangers: they run in jinja2's sandbox. Two
departures: where one writes today's date, it writes a fixed day, so that numbers do not change overnight; and a turn
that it leaves out or rewrites is an error."""

import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from sibo_lab import parallel
from sibo_lab.backbone import gguf
from sibo_lab.backbone.subwords import Tokenizer
from sibo_lab.files import one_line, quoted, read_json

TODAY = datetime(2024, 7, 26)  # Llama 3's own choice where it knows no date
BEGIN, END, SAID = "\ufdd0", "\ufdd1", "\ufdd2"  # no characters: around {% generation %}, and in place of what is said
Turns = Sequence[tuple[str, str]]  # role (system, user or assistant) and text


def read(path: Path) -> tuple[str, str]:
    """The template of a folder or a .gguf file, and where it stands; ValueError if there is none."""
    if path.suffix == ".gguf":
        place, found = f"{path}: tokenizer.chat_template", gguf.read(path)[0].get("tokenizer.chat_template")
    elif (file := path / "chat_template.jinja").is_file():
        try:
            place, found = str(file), file.read_text("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{file}: expected UTF-8 text, got byte 0x{e.object[e.start]:02x}") from None
    else:
        file = path / "tokenizer_config.json"
        place, found = f"{file}: chat_template", read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):  # several, by name
        found = next((x.get("template") for x in found if isinstance(x, dict) and x.get("name") == "default"), None)
    if not found or not isinstance(found, str):
        raise ValueError(f"{path}: expected a chat template (chat_template.jinja, or chat_template in "
                         f"tokenizer_config.json or GGUF), got {quoted(found) if found else 'none'}; name a backbone "
                         "that was trained to chat, or use --protocol clean")
    return found, place


def _compiled(text: str, place: str):
    """With the filters, functions and tags that transformers gives to templates."""
    from jinja2 import TemplateError, nodes, utils
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} is around what the assistant says."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
            return nodes.Scope([begin, *body, end]).set_lineno(line)

    class Namespace(utils.Namespace):
        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise TemplateError(f"expected a name without a leading underscore, got {name}")
            super().__setitem__(name, value)

    def refuse(message):
        raise TemplateError(message)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime, "namespace": Namespace,
                    "dict": lambda *x, **more: dict(*x, **more)}  # not the class, which leads to others
    try:
        return env.from_string(text)
    except Exception as e:  # also RecursionError, and SyntaxError of a {% break %} outside of a loop
        raise ValueError(f"{place}: not a Jinja template ({one_line(e)})") from None


def _unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def _bare(text: str) -> str:
    return "".join(text.split())


class Chat:
    """A tokenizer in its backbone's chat template: encode adds nothing to a text, eos_id ends the assistant's turn."""

    def __init__(self, path: Path, t: Tokenizer):
        text, self.place = read(path)
        if "strftime_now" in text and not parallel.rank():
            print(f"{self.place} writes today's date: fixed at {TODAY:%d %b %Y} here, so that numbers do not change by "
                  "the day", file=sys.stderr)
        self.template = _compiled(text, self.place)
        self.encode, self.decode, self.pad_id = partial(t.encode, add_special_tokens=False), t.decode, t.pad_id
        added = [token for token in (*t.added.values(), *t.added_normalized.values()) if token["content"].strip()]
        self.special = {token["id"]: token["content"] for token in added} | {i: t.tokens[i] for i in t.special}
        self.tokens = {f"{role}_token": self.special[i] for role in ("bos", "eos", "pad", "unk")
                       if (i := getattr(t, f"{role}_id")) in self.special}
        # What ends the assistant's turn: up to the first special token, or all there is
        written = _unmarked(self._render([("user", "a"), ("assistant", SAID)]))
        self.end = written.partition(SAID)[2]
        ends = [(self.end.find(token), -len(token), i) for i, token in self.special.items() if token in self.end]
        at, size, self.eos_id = min(ends, default=(len(self.end), 0, t.eos_id))
        self.end = self.end[:at - size]
        self.eos_ids = list(dict.fromkeys([self.eos_id, *getattr(t, "eos_ids", [t.eos_id])]))
        for i, token in self.special.items():
            if token in written and self.encode(token) != [i]:  # as tokenizer.model has it: no text spells its own end
                raise ValueError(f"{path}: expected a tokenizer that finds {token} in a text, where its chat template "
                                 "writes it, got one that spells it in letters; bring its tokenizer.json instead")

    def prompt(self, turns: Turns) -> str:
        """What the assistant is given to answer the turns; ValueError if the template refuses or leaves out one."""
        text = _unmarked(self._render(turns, True))
        self._require(turns, text, answer=True)
        return text

    def pieces(self, turns: Turns) -> list[tuple[str, bool]]:
        """The conversation's text, cut into what the assistant says, with what ends its turns (True), and the rest.

        ValueError if the template refuses the conversation, leaves out part of it, or does not show what is whose."""
        marked = self._render(turns)
        self._require(turns, marked)
        pieces = [(piece, i % 2 == 1) for i, piece in enumerate(re.split(f"[{BEGIN}{END}]", marked))]
        return [piece for piece in (pieces if len(pieces) > 1 else self._cut(turns, marked)) if piece[0]]

    def _cut(self, turns: Turns, text: str) -> list[tuple[str, bool]]:
        """The pieces by a template that does not mark them: the assistant's begin where a prompt ends, and end where
        they do in the same conversation with SAID in place of each."""
        blank = [(role, SAID if role == "assistant" else content) for role, content in turns]
        whole, pieces, end = self._render(blank), [], 0
        ours = [k for k, (role, _) in enumerate(turns) if role == "assistant"]
        starts, blanks = ([self._start(some, k, whole) for k in ours] + [len(whole)]
                          for some, whole in ((turns, text), (blank, whole)))
        for j, k in enumerate(ours):
            lead, said, after = whole[blanks[j]:blanks[j + 1]].partition(SAID)
            chunk = text[starts[j]:starts[j + 1]]
            if lead.strip() and self._render(turns[:k]) == self._render(turns[:k], True):
                raise ValueError(f"{self.place}: expected it to say where the assistant begins "
                                 "(add_generation_prompt), got no such place: the loss cannot be on its turns alone")
            if not said or not self.end or not chunk.endswith(after) or not after.startswith(self.end):
                raise self._error("shows no end of", turns[k][1])
            stop = starts[j + 1] - len(after) + len(self.end)
            if _bare(turns[k][1]) not in _bare(text[starts[j]:stop]):
                raise self._error("rewrites", turns[k][1])
            pieces += [(text[end:starts[j]], False), (text[starts[j]:stop], True)]
            end = stop
        return [*pieces, (text[end:], False)]

    def _start(self, turns: Turns, k: int, whole: str) -> int:
        given = self._render(turns[:k], True)
        if not whole.startswith(given):
            raise self._error("gives something else to be answered than what it writes before", turns[k][1])
        return len(given)

    def _require(self, turns: Turns, text: str, answer: bool = False) -> None:
        """Every turn stands in the text, whole, but for what the assistant said before a prompt: Qwen3 is not shown its
        earlier thoughts."""
        names = [f"{SAID}{k}{SAID}" for k in range(len(turns))]
        outline = self._render([(role, name) for (role, _), name in zip(turns, names, strict=True)], answer)
        bare = _bare(text)
        for (role, content), name in zip(turns, names, strict=True):
            whole = answer and role == "assistant" or _bare(content) in bare
            if name not in outline or not whole or re.search(f"[{BEGIN}{END}{SAID}]", content):
                raise self._error("leaves out, or rewrites, a part of", content)

    def _error(self, what: str, content: str) -> ValueError:
        return ValueError(f"{self.place}: the chat template {what} the turn {quoted(content)}; make that the last turn "
                          "of a row of its own, or leave it out")

    def _render(self, turns: Turns, answer: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self.template.render(messages=messages, tools=None, documents=None, add_generation_prompt=answer,
                                        **self.tokens)
        except Exception as e:  # whatever a stranger's program may raise
            raise ValueError(f"{self.place}: the chat template refuses a conversation of "
                             f"{', '.join(role for role, _ in turns) or 'no turns'} ({one_line(e)})") from None
