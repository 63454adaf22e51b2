"""From examples to token ids, labels and padded batches."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from sibo_lab.data import tasks


@dataclass(frozen=True)
class Row:
    """One example as token ids. labels: one per token (-100: no loss there), or the GLUE label, or None (a prompt)."""

    ids: list[int]
    labels: list[int] | int | float | None = None
    cut: bool = False  # the cutoff took something away
    types: list[int] | None = None  # BERT's token types: 0 first sentence, 1 second
    part: str = ""  # as of its Sentence


_ABOVE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_INDENT = " " * 16
PROMPTS = {  # by protocol
    "clean": _ABOVE + "\n\n### Instruction:\n{}\n\n### Response:\n",
    # the official string, with all that its author did not mean to be in it: the linter's comment is part of the text
    "paper": (f"{_ABOVE}  # noqa: E501\n\n{_INDENT}### Instruction:\n{_INDENT}{{}}\n{_INDENT}\n"
              f"{_INDENT}### Response:\n{_INDENT}"),
}


def prompt(instruction: str, protocol: str = "clean") -> str:
    """The Alpaca form, up to where the model begins to write: plain, or ("paper") indented as the official code's."""
    return PROMPTS[protocol].format(instruction)


def continuation(text: str, output: str, tokenizer) -> tuple[list[int], list[int]]:
    """The ids of a prompt, as the model is given them at generation, and those of `output` behind it.

    Where the tokenizer would merge across the border, the output is spelled as it is alone, or behind a line feed.
    ValueError if none of these continues the prompt."""
    given, whole = tokenizer.encode(text), tokenizer.encode(text + output)
    for before in (text, "", "\n"):  # alone, SentencePiece puts a space before the output; BPE merges line feeds
        start, both = tokenizer.encode(before), tokenizer.encode(before + output)
        written = both[len(start):]
        if both[:len(start)] == start and tokenizer.decode(given + written) == tokenizer.decode(whole):
            return given, written
    raise ValueError(f"the tokenizer cannot continue the prompt with the output {output[:40]!r}")


def encode(example: tasks.Example, tokenizer, cutoff: int, train_on_inputs: bool = False, protocol: str = "clean") -> Row:
    """Prompt, output and EOS as ids; the labels are the ids, with -100 on the prompt unless train_on_inputs.

    The ids begin with exactly the ids of the prompt, which are what the model is given at generation. They are cut to
    `cutoff` tokens from the right; a cut example has no EOS (it would teach to stop in mid-sentence), and one whose
    prompt fills the cutoff has no label left. ValueError if the tokenizer cannot spell the output after the prompt."""
    given, written = continuation(prompt(example.instruction, protocol), example.output, tokenizer)
    ids = given + written + [tokenizer.eos_id]
    labels = ids if train_on_inputs else [-100] * len(given) + ids[len(given):]
    return Row(ids[:cutoff], labels[:cutoff], cut=len(ids) > cutoff)


def encode_sentence(sentence: tasks.Sentence, tokenizer, cutoff: int) -> Row:
    """[CLS] text [SEP] or [CLS] text [SEP] pair [SEP], at most `cutoff` tokens: the longer one loses its end first."""
    if len(special := tokenizer.encode("")) != 2:
        raise ValueError(f"the tokenizer puts {len(special)} special tokens around a text, expected BERT's two: "
                         "GLUE tasks need a BERT backbone")
    cls, sep = special
    parts = [tokenizer.encode(text)[1:-1] for text in (sentence.text, sentence.pair) if text is not None]
    room = max(0, cutoff - 1 - len(parts))
    cut = sum(map(len, parts)) > room
    while sum(map(len, parts)) > room:
        max(reversed(parts), key=len).pop()  # of two as long, the second
    ids, types = [cls], [0]
    for i, part in enumerate(parts):
        ids += [*part, sep]
        types += [i] * (len(part) + 1)
    return Row(ids, sentence.label, cut, types, sentence.part)


def collate(rows: list[Row], pad_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows padded to the longest: input_ids, attention_mask (B, T); labels (B, T) padded with -100, or (B,) for GLUE
    (int64 classes, float32 scores); token_type_ids (B, T) for BERT. side: "right" to train, "left" to generate."""
    if side not in ("right", "left"):
        raise ValueError(f'padding side is {side!r}, expected "right" or "left"')

    def pad(lists: list[list[int]], value: int) -> torch.Tensor:
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


def to_device(batch: dict[str, torch.Tensor], m: torch.nn.Module) -> dict[str, torch.Tensor]:
    device = next(m.parameters()).device
    return {k: v.to(device) for k, v in batch.items()}


def batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices into `lengths`: in an epoch each once, shuffled anew; its last batch may be smaller.
    Neighbours of 16 batches are sorted by length before they are cut into batches, since padding is wasted work."""
    rng = random.Random(f"batches {seed}")
    while True:
        order = sorted(range(len(lengths)), key=lambda _: rng.random())
        epoch = []
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start:start + 16 * batch_size], key=lambda i: lengths[i])
            cut = [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
            epoch += sorted(cut, key=lambda _: rng.random())
        yield from epoch


def digest(rows: Iterable) -> str:
    """sha256 of examples or rows, in their order: what a run was trained or scored on."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode())
    return found.hexdigest()
