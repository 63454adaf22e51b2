"""A backbone's own chat template: how it writes a conversation, and which part of that the assistant says.

The text is transformers' apply_chat_template's, with two departures: where a template writes today's date, it writes a
fixed day, so that numbers do not change overnight; and a turn that it leaves out or rewrites is an error."""

import re
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from itertools import accumulate
from pathlib import Path

from sibo_lab import parallel
from sibo_lab.backbone import gguf
from sibo_lab.backbone.subwords import Tokenizer
from sibo_lab.files import one_line, quoted, read_json

TODAY = datetime(2024, 7, 26)  # Llama 3's own choice where it knows no date
BEGIN, END, SAID = "\ufdd0", "\ufdd1", "\ufdd2"  # no characters: around {% generation %}; in place of what is said
Turns = Sequence[tuple[str, str]]  # role (system, user or assistant) and text


def find(path: Path) -> tuple[object, str]:
    """What a folder or a .gguf file has for a template, or None, and where it stands."""
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
    return found, place


def read(path: Path) -> tuple[str, str]:
    """The template of a folder or a .gguf file, and where it stands; ValueError if there is none."""
    found, place = find(path)
    if not found or not isinstance(found, str):
        raise ValueError(f"{path}: expected a chat template (chat_template.jinja, or chat_template in "
                         f"tokenizer_config.json or GGUF), got {quoted(found) if found else 'none'}; name a backbone "
                         "that was trained to chat, or use --protocol clean")
    return found, place


def _unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def _bare(text: str) -> str:
    return "".join(text.split())


class Chat:
    """A tokenizer in its backbone's chat template: encode adds nothing to a text, eos_id ends the assistant's turn."""

    def __init__(self, path: Path, t: Tokenizer):
        from sibo_lab.backbone import sandbox  # jinja2 is slow to import

        text, self.place = read(path)
        if "strftime_now" in text and not parallel.rank():
            print(f"{self.place} writes today's date: fixed at {TODAY:%d %b %Y} here, so that numbers do not change by "
                  "the day", file=sys.stderr)
        try:
            self.rendered = partial(sandbox.rendered, sandbox.compiled(text, TODAY, (BEGIN, END)))
        except Exception as e:
            raise ValueError(f"{self.place}: not a Jinja template ({one_line(e)})") from None
        self.encode, self.decode, self.pad_id = partial(t.encode, add_special_tokens=False), t.decode, t.pad_id
        added = [token for token in (*t.added.values(), *t.added_normalized.values()) if token["content"].strip()]
        self.special = {token["id"]: token["content"] for token in added} | {i: t.tokens[i] for i in t.special}
        self.tokens = {f"{role}_token": self.special[i] for role, i in t.named.items() if i in self.special}
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
        outline = self._require(turns, marked)
        pieces = self._marked(turns, marked, outline) if BEGIN in marked + outline else self._cut(turns, marked)
        said = "".join(text for text, ours in pieces if ours)
        if self.special.get(self.eos_id, SAID) not in said:  # SAID: no text has it; nothing would teach it to stop
            raise ValueError(f"{self.place}: expected what the assistant says to end in a token that ends an answer, "
                             f"got {quoted(said[-20:])}; bring a chat_template.jinja that writes {{{{ eos_token }}}} "
                             "there, within {% generation %} if it has that")
        return [piece for piece in pieces if piece[0]]

    def _marked(self, turns: Turns, *texts: str) -> list[tuple[str, bool]]:
        """The pieces by {% generation %}, in a text and in its outline; ValueError if none is the assistant's."""
        pieces, outline = (re.split(f"[{BEGIN}{END}]", text) for text in texts)
        ours = [k for k in range(len(turns)) if f"{SAID}{k}{SAID}" in "".join(outline[1::2])]
        said = _bare("".join(pieces[1::2]))
        wrong = [k for k in ours if turns[k][0] != "assistant" or _bare(turns[k][1]) not in said]
        if wrong or not ours or any(re.search(f"{BEGIN}[^{END}]*{BEGIN}", text) for text in texts):
            raise ValueError(f"{self.place}: expected {{% generation %}} around what the assistant says, and around "
                             "nothing that others say, got it elsewhere: the loss would be there")
        start = self._start(turns, ours[-1], _unmarked(texts[0]))
        if sum(end <= start for end in accumulate(map(len, pieces))) % 2 == 0:
            raise ValueError(f"{self.place}: expected {{% generation %}} where a prompt ends (add_generation_prompt), "
                             "got text before it that the assistant is neither given nor taught")
        return [(piece, i % 2 == 1) for i, piece in enumerate(pieces)]

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
        """Where its prompt ends in the whole text; ValueError if that begins with something else."""
        given = _unmarked(self._render(turns[:k], True))
        if not whole.startswith(given):
            raise self._error("gives something else to be answered than what it writes before", turns[k][1])
        return len(given)

    def _require(self, turns: Turns, text: str, answer: bool = False) -> str:
        """Every turn stands in the text, whole, but for what the assistant said before a prompt: Qwen3 is not shown its
        earlier thoughts. Returns the same with names, "SAID 0 SAID", in place of what the turns say."""
        names = [f"{SAID}{k}{SAID}" for k in range(len(turns))]
        outline = self._render([(role, name) for (role, _), name in zip(turns, names, strict=True)], answer)
        bare = _bare(text)
        for (role, content), name in zip(turns, names, strict=True):
            whole = answer and role == "assistant" or _bare(content) in bare
            if name not in outline or not whole or re.search(f"[{BEGIN}{END}{SAID}]", content):
                raise self._error("leaves out, or rewrites, a part of", content)
        return outline

    def _error(self, what: str, content: str) -> ValueError:
        return ValueError(f"{self.place}: the chat template {what} the turn {quoted(content)}; leave it out, make it "
                          "the last turn of a row of its own, or bring a chat_template.jinja with {% generation %} "
                          "where a prompt ends")

    def _render(self, turns: Turns, answer: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self.rendered(messages=messages, tools=None, documents=None, add_generation_prompt=answer,
                                 **self.tokens)
        except Exception as e:
            raise ValueError(f"{self.place}: the chat template refuses a conversation of "
                             f"{', '.join(role for role, _ in turns) or 'no turns'} ({one_line(e)})") from None
