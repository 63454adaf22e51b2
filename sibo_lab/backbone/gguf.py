"""LLaMA from a .gguf file, by ggml's docs/gguf.md: metadata in config.json's words, and tensors.

The gguf package only dequantizes: its reader believes every count."""

import math
import mmap
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sibo_lab import files
from sibo_lab.files import quoted

NAMES = {  # llama.cpp's names, and Hugging Face's
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
} | {f"blk.{{}}.{theirs}.weight": f"model.layers.{{}}.{hf}.weight" for theirs, hf in {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}.items()}
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
U32, STRING, ARRAY, U64 = 4, 8, 9, 10  # types of values, as in NUMBERS


class StoredTensor(NamedTuple):
    shape: tuple[int, ...]  # (rows, columns)
    kind: int  # ggml's type
    data: np.ndarray  # its bytes, mapped


class Reader(files.Reader):
    def numbers(self, kind: int, count: int) -> list:
        if kind not in NUMBERS:
            raise self.error(f"values of type {kind}")
        return np.frombuffer(self.take(count * np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind]).tolist()

    def number(self, kind: int) -> int:
        return self.numbers(kind, 1)[0]

    def text(self) -> str:
        try:
            return self.take(self.number(U64)).decode()
        except UnicodeDecodeError:
            raise self.error("a string that is not UTF-8") from None

    def value(self) -> object:
        if (kind := self.number(U32)) != ARRAY:
            return self.text() if kind == STRING else self.number(kind)
        kind, count = self.number(U32), self.number(U64)
        return [self.text() for _ in range(count)] if kind == STRING else self.numbers(kind, count)

    def named(self, count: int, read) -> dict:
        entries = {}
        for _ in range(count):
            if (name := self.text()) in entries:
                raise self.error(f"a second {quoted(name)}")
            entries[name] = read()
        return entries

    def tensors(self, headers: dict, alignment: int) -> dict[str, StoredTensor]:
        """The tensors of these headers, (shape, type, offset) by name."""
        try:
            import gguf  # folders load without it
        except ImportError:
            raise ValueError("a .gguf file needs the gguf package: pip install gguf") from None
        known, sizes = {0, 1, *gguf.quants._type_traits}, gguf.GGML_QUANT_SIZES  # 0 and 1: F32 and F16
        start, left, stored = -(-self.at // alignment) * alignment, len(self.data) - self.at, {}
        for name, (shape, kind, offset) in headers.items():
            block, size = sizes[kind] if kind in known else (1, 0)  # numbers in a block, and its bytes
            if not size or not 1 <= len(shape) <= 4 or 0 in shape or shape[-1] % block:
                raise self.error(f"tensor {quoted(name)} of type {kind} and shape {quoted(shape)}")
            size *= math.prod(shape) // block
            left -= size  # no two tensors may share their bytes
            if left < 0 or start + offset + size > len(self.data):
                raise self.error(f"{size} bytes for tensor {quoted(name)}")
            stored[name] = StoredTensor(tuple(shape), kind, np.frombuffer(self.data, np.uint8, size, start + offset))
        return stored


def read(path: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """Metadata and tensors; ValueError if the file is no whole GGUF."""
    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    r = Reader(data, f"{path}: not a whole GGUF file")
    magic, version = r.take(4), r.number(U32)
    if magic != b"GGUF" or version not in (2, 3):
        raise r.error(f"{magic!r} of version {version}, expected b'GGUF' of 2 or 3")
    count, fields = r.number(U64), r.named(r.number(U64), r.value)
    headers = r.named(count, lambda: (r.numbers(U64, r.number(U32))[::-1], r.number(U32), r.number(U64)))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise r.error(f"general.alignment {quoted(alignment)}")
    return fields, r.tensors(headers, alignment)


def spec(path: Path, fields: dict, stored: dict[str, StoredTensor]) -> dict:
    """The metadata as a config.json; ValueError names what is missing or not supported."""
    for key, expected in {"general.architecture": "llama", "llama.rope.scaling.type": "none"}.items():
        if (got := fields.get(key, "none")) != expected:
            raise ValueError(f"{path}: expected {key} {expected!r}, got {quoted(got)}")
    try:
        return {
            "model_type": "llama", "hidden_size": fields["llama.embedding_length"],
            "num_attention_heads": fields["llama.attention.head_count"],
            "num_hidden_layers": fields["llama.block_count"], "intermediate_size": fields["llama.feed_forward_length"],
            "num_key_value_heads": fields.get("llama.attention.head_count_kv"),
            "head_dim": fields.get("llama.attention.key_length"),
            "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
            "max_position_embeddings": fields["llama.context_length"],
            "vocab_size": stored["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in stored,
        }
    except KeyError as e:
        raise ValueError(f"{path}: expected a LLaMA's metadata, got no {e.args[0]!r}") from None


def tensors(path: Path) -> files.Tensors:
    """(llama.cpp's name, dequantized tensor) of each weight."""
    fields, stored = read(path)
    config = spec(path, fields, stored)
    from gguf.quants import dequantize
    for name, t in stored.items():
        weight = torch.from_numpy(dequantize(t.data.reshape(*t.shape[:-1], -1), t.kind).copy())
        if m := re.search(r"attn_([qk])\.weight", name):
            # llama.cpp makes neighbours of each head's rotary pairs (i, i + D/2): undo that
            n = m[1] == "k" and config["num_key_value_heads"] or config["num_attention_heads"]
            if weight.ndim != 2 or len(weight) % (2 * n):
                raise ValueError(f"{path}: tensor {name!r}: expected rows for {n} heads, got shape {t.shape}")
            weight = weight.view(n, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        yield name, weight
