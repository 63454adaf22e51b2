"""From examples to token ids, labels and padded batches. The official code's Alpaca prompt, indented by accident, is
the protocol "paper"; "clean" is the default; "chat" is the backbone's own chat template (backbone/chat_template.py)."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from sibo_lab.data import tasks
from sibo_lab.files import quoted


@dataclass(frozen=True)
class Row:  # its repr enters the digests of saved runs
    """One example as token ids."""

    ids: list[int]
    labels: list[int] | int | float | None = None  # one per token (-100: no loss), a GLUE label, or a prompt's None
    cut: bool = False  # the cutoff removed something
    types: list[int] | None = None  # BERT's token types: 0 first sentence, 1 second
    part: str = ""  # its Sentence's


_ABOVE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_FORM = "\n### Instruction:\n{}\n\n### Response:\n"
PROMPTS = {  # by protocol
    "clean": f"{_ABOVE}\n{_FORM}",
    "paper": f"{_ABOVE}  # noqa: E501\n" + _FORM.replace("\n", "\n" + " " * 16),  # the official string has the comment
}


PROTOCOLS = *PROMPTS, "chat"


def protocol_for(given: str | None, examples: Iterable[tasks.Example | tasks.Sentence]) -> str:
    """The given protocol, else the one that has a place for all that the examples hold; ValueError if it has none."""
    chat = next((e for e in examples if isinstance(e, tasks.Chat)), None)
    if chat and given not in (None, "chat"):
        raise ValueError(f"--protocol {given}: expected rows of a question and its answer, got one with messages, a "
                         f"system text or history ({quoted(chat.instruction)}), for which it has no place; use "
                         "--protocol chat")
    return given or ("chat" if chat else "clean")


def prompt(instruction: str, protocol: str = "clean") -> str:
    """The Alpaca form, up to where the model begins to write."""
    return PROMPTS[protocol].format(instruction)


def prompt_of(example: tasks.Example, tokenizer, protocol: str = "clean") -> str:
    """What the model is given to answer an example: with "chat" (and a chat_template.Chat as tokenizer) all turns but
    the last."""
    if protocol == "chat":
        return tokenizer.prompt(example.turns[:-1])
    return prompt(example.instruction, protocol_for(protocol, [example]))


def continuation(text: str, output: str, tokenizer) -> tuple[list[int], list[int]]:
    """The ids of a prompt, the same as at generation, and those of the `output` that follows it. Where the tokenizer
    merges across the border, the output's are as alone, or after a line feed; ValueError if neither continues it."""
    given, whole = tokenizer.encode(text), tokenizer.encode(text + output)
    # An output alone gets a space before it from SentencePiece; after a prompt, BPE merges its line feeds.
    for before in (text, "", "\n"):
        start, both = tokenizer.encode(before), tokenizer.encode(before + output)
        written = both[len(start):]
        if both[:len(start)] == start and tokenizer.decode(given + written) == tokenizer.decode(whole):
            return given, written
    raise ValueError(f"the tokenizer cannot continue the prompt with the output {output[:40]!r}; remove the example")


def encode(example: tasks.Example, tokenizer, cutoff: int, train_on_inputs: bool = False,
           protocol: str = "clean") -> Row:
    """Prompt, output and EOS as ids, or a conversation in the chat template of `tokenizer`, a chat_template.Chat; the
    labels are the ids, but -100 on what the model does not say, if not trained on.

    Cut to `cutoff` tokens from the right. A cut example has no EOS, which would teach the model to stop mid-sentence,
    and no label left if its prompt fills the cutoff. Raises what continuation and Chat.pieces raise."""
    if protocol == "chat":
        texts, said = zip(*tokenizer.pieces(example.turns), strict=True)
        spelled = _spelled(texts, tokenizer)
    else:
        given, written = continuation(prompt_of(example, tokenizer, protocol), example.output, tokenizer)
        spelled, said = (given, [*written, tokenizer.eos_id]), (False, True)
    ids = [i for some in spelled for i in some]
    labels = [i if ours or train_on_inputs else -100 for some, ours in zip(spelled, said, strict=True) for i in some]
    return Row(ids[:cutoff], labels[:cutoff], cut=len(ids) > cutoff)


def _spelled(texts: Sequence[str], tokenizer) -> list[list[int]]:
    """The ids of each of the texts, as in all of them together; where a token would join two, each as it continues
    those before it."""
    whole, found, before = tokenizer.encode("".join(texts)), [], ""
    at = 0
    for text in texts:
        before += text
        end = at + len(alone := tokenizer.encode(text))
        if whole[at:end] != alone:  # a tokenizer may look at what comes before
            end = len(given := tokenizer.encode(before))
            if whole[:end] != given:
                starts = ("".join(texts[:i]) for i in range(1, len(texts)))
                return [tokenizer.encode(texts[0]), *(continuation(start, text, tokenizer)[1]
                                                      for start, text in zip(starts, texts[1:], strict=True))]
        found.append(whole[at:end])
        at = end
    return found


def encode_sentence(sentence: tasks.Sentence, tokenizer, cutoff: int) -> Row:
    """[CLS] text [SEP] or [CLS] text [SEP] pair [SEP], in at most `cutoff` tokens: the longer sentence loses its end.
    ValueError if the tokenizer is not BERT's."""
    if len(special := tokenizer.encode("")) != 2:
        raise ValueError(f"GLUE: expected a BERT's tokenizer, with two special tokens on a text, got {len(special)}")
    cls, sep = special
    parts = [tokenizer.encode(text)[1:-1] for text in (sentence.text, sentence.pair) if text is not None]
    room = max(0, cutoff - 1 - len(parts))
    cut = sum(map(len, parts)) > room
    while sum(map(len, parts)) > room:
        max(reversed(parts), key=len).pop()  # of two equally long ones, the second
    ids, types = [cls], [0]
    for i, part in enumerate(parts):
        ids += [*part, sep]
        types += [i] * (len(part) + 1)
    return Row(ids, sentence.label, cut, types, sentence.part)


def encode_all(examples: Iterable[tasks.Example | tasks.Sentence], tokenizer, cutoff: int,
               train_on_inputs: bool = False, protocol: str = "clean") -> list[Row]:
    return [encode_sentence(e, tokenizer, cutoff) if isinstance(e, tasks.Sentence) else
            encode(e, tokenizer, cutoff, train_on_inputs, protocol) for e in examples]


def collate(rows: list[Row], pad_id: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows padded to the longest, on the "right" to train or the "left" to generate: input_ids, attention_mask (B, T);
    labels (B, T) padded with -100, or (B,) for GLUE (int64 classes, float32 scores); token_type_ids (B, T) for BERT.

    Any `pad_id` does: nothing attends to padding."""
    if side not in ("right", "left"):
        raise ValueError(f'padding side: expected "right" or "left", got {side!r}')

    def pad(lists, value):
        return pad_sequence([torch.tensor(items, dtype=torch.int64) for items in lists], True, value, side)

    tensors = {"input_ids": pad([row.ids for row in rows], pad_id),
               "attention_mask": pad([[1] * len(row.ids) for row in rows], 0)}
    labels = [row.labels for row in rows]
    if isinstance(labels[0], list):
        tensors["labels"] = pad(labels, -100)
    elif labels[0] is not None:
        tensors["labels"] = torch.tensor(labels)
    if rows[0].types is not None:
        tensors["token_type_ids"] = pad([row.types for row in rows], 0)
    return tensors


def to_device(tensors: dict[str, torch.Tensor], m: torch.nn.Module) -> dict[str, torch.Tensor]:
    device = next(m.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices into `lengths`, each once per epoch, in a new order; an epoch's last may be smaller.
    Every 16 batches are sorted by length before they are cut: less padding."""
    rng = random.Random(f"batches {seed}")
    while True:
        order = sorted(range(len(lengths)), key=lambda _: rng.random())
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start:start + 16 * batch_size], key=lambda i: lengths[i])
            cut = [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
            yield from sorted(cut, key=lambda _: rng.random())


def digest(rows: Iterable) -> str:
    """sha256 of examples or rows, in order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode())
    return found.hexdigest()
