"""LLaMA, Qwen and SmolLM3 from a .gguf file, by ggml's docs/gguf.md: metadata in config.json's words, and tensors.

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
} | {f"blk.{{}}.{theirs}.{leaf}": f"model.layers.{{}}.{hf}.{leaf}" for leaf in ("weight", "bias") for theirs, hf in {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}.items()}
FAMILIES = "llama", "qwen2", "qwen3", "smollm3"  # architectures, by the same name in config.json
PERMUTED = "llama", "smollm3"  # rows of q and k: the converter makes neighbours of each head's rotary pairs
NEEDED = {"embedding_length": "hidden_size", "attention.head_count": "num_attention_heads",
          "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
          "attention.layer_norm_rms_epsilon": "rms_norm_eps", "context_length": "max_position_embeddings"}
PER_LAYER = "attention.head_count", "attention.head_count_kv", "feed_forward_length"  # also a number for each layer
READ = (*NEEDED, "attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.scaling.type",
        "rope.scaling.factor", "rope.scale_linear")
INERT = ("vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned",
         "rope.scaling.original_context_length")
OFF = {"expert_count": 0, "expert_used_count": 0, "attention.sliding_window": 0, "attention.clamp_kqv": 0,
       "attention.max_alibi_bias": 0, "attention.causal": True, "rope.scaling.attn_factor": 1}  # change nothing
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
            return self.take(int.from_bytes(self.take(8), "little")).decode()  # a vocabulary has 100,000 of them
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
    files.refuse_pointer(path)
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
    """The metadata as a config.json, with llama.cpp's defaults; ValueError names what is missing or not supported."""
    def expect(key: str, expected: str, got: object, fits: bool) -> None:
        if not fits:
            raise ValueError(f"{path}: expected {key} {expected}, got {quoted(got)}")

    family, parts = fields.get("general.architecture"), fields.get("split.count", 0)
    kind = fields.get("general.type", "model")
    expect("general.type", "'model'", kind, kind == "model")
    expect("general.architecture", f"one of {', '.join(FAMILIES)}", family, family in list(FAMILIES))
    expect("split.count", "1, a whole model in one file", parts, parts in (0, 1))
    found = {key.removeprefix(f"{family}."): v for key, v in fields.items() if key.startswith(f"{family}.")}
    for key in PER_LAYER:
        if isinstance(each := found.get(key), list):
            alike = len(set(each)) == 1 and len(each) == found.get("block_count")
            expect(f"{family}.{key}", "the same number for each layer", each, alike)
            found[key] = each[0]
    if missing := [key for key in NEEDED if key not in found] + [k for k in ("token_embd.weight",) if k not in stored]:
        raise ValueError(f"{path}: expected a {family}'s metadata and embedding, got no {missing[0]!r}")
    config = {name: found[key] for key, name in NEEDED.items()}
    heads, d = config["num_attention_heads"], config["hidden_size"]
    head_dim = found.get("attention.key_length", d // heads if type(d) is type(heads) is int and heads else None)
    for key in found.keys() - {*READ, *INERT}:
        want = head_dim if key in ("attention.value_length", "rope.dimension_count") else OFF.get(key)
        expect(f"{family}.{key}", "to be absent" if want is None else quoted(want), found[key], found[key] == want)
    return {
        "model_type": family, **config,
        "num_key_value_heads": found.get("attention.head_count_kv"), "head_dim": head_dim,
        "rope_theta": found.get("rope.freq_base", 10000.0), "rope_scaling": _scaling(family, found, stored, expect),
        "attention_bias": family != "qwen2" and "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
        "vocab_size": stored["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in stored,
    }


def _scaling(family: str, found: dict, stored: dict[str, StoredTensor], expect) -> dict | None:
    """As llama.cpp: a factor without a type is linear; LLaMA-3's factors, one per frequency, come as a tensor."""
    kind = found.get("rope.scaling.type", "linear")
    factor = found.get("rope.scaling.factor", found.get("rope.scale_linear", 0))
    expect(f"{family}.rope.scaling.type", "'none' or 'linear'", kind, kind in ("none", "linear"))
    expect(f"{family}.rope.scaling.factor", "a number", factor, type(factor) in (int, float) and 0 <= factor < 1e12)
    factor = 1.0 if kind == "none" else factor or 1.0
    if family != "llama" or "rope_freqs.weight" not in stored:
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    each = stored["rope_freqs.weight"]
    expect("rope_freqs.weight", "in float32", each.kind, each.kind == 0)
    factors = [factor * x for x in each.data.view("<f4").tolist()]
    return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0, "short_factor": factors,
            "long_factor": factors, "original_max_position_embeddings": found["context_length"]}


def tensors(path: Path, numbers: bool = True) -> files.Tensors:
    """(llama.cpp's name, dequantized tensor) of each weight; without `numbers` an empty one of its shape."""
    fields, stored = read(path)
    config = spec(path, fields, stored)
    family = config["model_type"]
    from gguf.quants import dequantize
    for name, t in stored.items():
        if name == "rope_freqs.weight" and family == "llama":  # stands in the config
            continue
        if not numbers:
            yield name, torch.empty(t.shape, device="meta")
            continue
        weight = torch.from_numpy(dequantize(t.data.reshape(*t.shape[:-1], -1), t.kind).copy())
        if family in PERMUTED and (m := re.search(r"attn_([qk])\.(weight|bias)", name)):
            # llama.cpp makes neighbours of each head's rotary pairs (i, i + D/2): undo that
            n = m[1] == "k" and config["num_key_value_heads"] or config["num_attention_heads"]
            if weight.ndim > 2 or len(weight) % (2 * n):
                raise ValueError(f"{path}: tensor {name!r}: expected rows for {n} heads, got shape {t.shape}")
            weight = weight.view(n, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        yield name, weight
