"""LLaMA from a .gguf file: its metadata as config.json, its tensors by llama.cpp's names."""

import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from sibo_lab import files

NAMES = {  # llama.cpp's names of a LLaMA's weights, and Hugging Face's
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
                12: "<f8"}  # numpy's names of the value types; 8 is a string, 9 an array
TYPES = {t: gguf.GGML_QUANT_SIZES[t] for t in gguf.GGMLQuantizationType  # numbers in a block, and its bytes
              if t.name in ("F32", "F16") or t in gguf.quants._type_traits}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a .gguf file: (rows, columns) or less, and its bytes, mapped."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray

    def dequantized(self) -> torch.Tensor:
        rows = self.data.reshape(*self.shape[:-1], -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, self.kind).copy())


def read(path: Path) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    """The metadata and the tensors of a .gguf file; ValueError if it is none or is cut short.

    Read here, by ggml's docs/gguf.md: the gguf package's reader believes every count (an array of 2^40 numbers keeps it
    busy for days), and takes seconds for a vocabulary."""
    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b""
    at = 0

    def torn(found: str) -> ValueError:
        return ValueError(f"{path}: not a whole GGUF file (found {found}, at byte {at} of {len(data)})")

    def take(size: int) -> int:
        nonlocal at
        if size > len(data) - at:
            raise torn(f"{size} bytes to come")
        at += size
        return at - size

    def numbers(kind: int, count: int) -> list:
        if kind not in NUMBERS:
            raise torn(f"values of type {kind}")
        start = take(count * np.dtype(NUMBERS[kind]).itemsize)
        return np.frombuffer(data, NUMBERS[kind], count, start).tolist() if count else []

    def number(kind: int) -> int:
        return numbers(kind, 1)[0]

    def text() -> str:
        try:
            start = take(number(10))
            return data[start:at].decode()
        except UnicodeDecodeError:
            raise torn("a string that is not UTF-8") from None

    def value(kind: int) -> object:
        if kind == 8:
            return text()
        if kind != 9:
            return number(kind)
        kind, count = number(4), number(10)
        return [text() for _ in range(count)] if kind == 8 else numbers(kind, count)

    def named(count: int, what: Callable[[], object]) -> dict:
        found = {}
        for _ in range(count):
            if (name := text()) in found:
                raise torn(f"a second {files.quoted(name)}")
            found[name] = what()
        return found

    take(4)
    if data[:4] != b"GGUF" or (version := number(4)) not in (2, 3):
        raise torn(f"{data[:4]!r}" if data[:4] != b"GGUF" else f"version {version}, expected 2 or 3")
    count, fields = number(10), named(number(10), lambda: value(number(4)))
    listed = named(count, lambda: (numbers(10, number(4))[::-1], number(4), number(10)))
    align = fields.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise torn(f"general.alignment {files.quoted(align)}")
    start, left, stored = -(-at // align) * align, len(data) - at, {}
    for name, (shape, kind, offset) in listed.items():
        block, size = TYPES.get(kind, (1, 0))
        if not size or not 1 <= len(shape) <= 4 or 0 in shape or shape[-1] % block:
            raise torn(f"tensor {files.quoted(name)} of type {kind} and shape {files.quoted(shape)}")
        size *= math.prod(shape) // block
        left -= size  # no two tensors may share their bytes
        if left < 0 or start + offset + size > len(data):
            raise torn(f"{size} bytes for tensor {files.quoted(name)}")
        kind, buffer = gguf.GGMLQuantizationType(kind), np.frombuffer(data, np.uint8, size, start + offset)
        stored[name] = StoredTensor(tuple(shape), kind, buffer)
    return fields, stored


def config(path: Path, field: Mapping, stored: Mapping[str, StoredTensor]) -> dict:
    if field.get("general.architecture") != "llama":
        raise ValueError(f"{path}: found architecture {files.quoted(field.get('general.architecture'))}, expected llama")
    if (scaling := field.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{path}: found rope scaling {files.quoted(scaling)}, expected none in a GGUF")
    try:
        return {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": field["llama.embedding_length"],
            "num_attention_heads": field["llama.attention.head_count"],
            "num_hidden_layers": field["llama.block_count"], "intermediate_size": field["llama.feed_forward_length"],
            "num_key_value_heads": field.get("llama.attention.head_count_kv"),
            "head_dim": field.get("llama.attention.key_length"),
            "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": field.get("llama.rope.freq_base", 10000.0),
            "max_position_embeddings": field["llama.context_length"],
            "vocab_size": stored["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in stored,
        }
    except KeyError as e:
        raise ValueError(f"{path}: found no {e.args[0]!r} in its metadata, expected a LLaMA's") from None


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    field, stored = read(path)
    said = config(path, field, stored)
    for name, t in stored.items():
        weight = t.dequantized()
        if m := re.search(r"attn_([qk])\.weight", name):
            # llama.cpp turns a pair (i, i + d/2) of each head into neighbours, for its rotary layout: turn it back
            n = said["num_attention_heads" if m[1] == "q" else "num_key_value_heads"] or said["num_attention_heads"]
            if weight.ndim != 2 or len(weight) % (2 * n):
                raise ValueError(f"{path}: tensor {name!r}: found shape {t.shape}, expected rows for {n} heads")
            weight = weight.view(n, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        yield name, weight
