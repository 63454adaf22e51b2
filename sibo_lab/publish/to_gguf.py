"""A run as a .gguf file, for llama.cpp: a plain LoRA folded, or a fully trained model, as its convert_hf_to_gguf.py
writes one. h0 and an adapter's tanh have no place there.

backbone/gguf.py is the reader, and its tables the only ones: what they do not read back is refused."""

import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import model
import sibo
from sibo_lab import files
from sibo_lab.backbone import config, gguf
from sibo_lab.export import require_new, require_on, their_name
from sibo_lab.publish import gguf_tokenizer

OUTTYPES = {"f32": (0, 0), "f16": (1, 1), "bf16": (30, 32), "q8_0": (8, 7)}  # numbers of the tensors' type, the file's
F32, F16, BF16, Q8_0 = 0, 1, 30, 8
LARGEST = {F32: torch.finfo(torch.float32).max, F16: 65504.0, BF16: torch.finfo(torch.bfloat16).max, Q8_0: 65504 * 127}
NAMES = {hf: theirs for theirs, hf in gguf.NAMES.items()}
# Of a Config: what changes nothing without training, and what _same compares as the layers use it.
INERT = {"attention_dropout", "head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "use_sliding_window",
         "sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval"}


class Header(NamedTuple):
    """What a file says of a backbone: all but the weights of a run."""

    arch: str
    fields: dict[str, object]
    rope_freqs: np.ndarray | None
    heads: dict[str, int]  # of the letters q and k, where rows are permuted


def header(source: Path) -> Header:
    """For the backbone of a folder or .gguf file, without its weights. ValueError names what llama.cpp's format cannot
    say: the family, a setting, a bias, a tokenizer."""
    spec = config.read_spec(source)
    c, family = config.parse(spec, source), spec["model_type"]
    arch = "llama" if family == "mistral" else family
    if arch not in gguf.FAMILIES:
        raise ValueError(f"{source}: --export gguf: expected one of mistral, {', '.join(gguf.FAMILIES)}, got {family}, "
                         "which llama.cpp does not run, or not with its head; hf writes it")
    rope, freqs = _rope(c)
    known = {key: getattr(c, name) for key, name in gguf.NEEDED.items()} | rope | {
        "attention.head_count_kv": c.heads_kv, "vocab_size": c.vocab_size, "rope.freq_base": float(c.rope_theta)}
    known["attention.layer_norm_rms_epsilon"] = float(c.rms_norm_eps)
    known |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), c.d_head)
    found = {f"{arch}.{key}": value for key, value in known.items()}
    m = model.build(spec, source)
    shapes = {_name(their_name(m, n)): tuple(p.shape) for n, p in m.named_parameters()
              if n != "head.weight" or not c.tie_word_embeddings}
    _require_same(c, found, shapes, freqs, arch, source)
    return Header(arch, found | gguf_tokenizer.fields(source, c.vocab_size), freqs,
                  {"q": c.num_attention_heads, "k": c.heads_kv} if arch in gguf.PERMUTED else {})


def _name(hf: str) -> str:
    return NAMES[re.sub(r"\.\d+\.", ".{}.", hf, count=1)].format(*re.findall(r"\.(\d+)\.", hf))


def _rope(c: config.LlamaStyle) -> tuple[dict, np.ndarray | None]:
    """How positions are stretched: fields, or what each frequency is divided by."""
    scaling = c.rope_scaling or {}
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) == "default":
        return {}, None
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}, None
    factors = scaling.get("long_factor") or (_frequencies(c, plain=True) / _frequencies(c)).tolist()
    return {}, np.array(factors, np.float32)


def _frequencies(c: config.LlamaStyle, plain: bool = False) -> Tensor:
    return model.rotary_angles(torch.ones(1), c.d_head, c.rope_theta, None if plain else c.rope_scaling)[0]


def _require_same(c: config.LlamaStyle, found: dict, shapes: dict, freqs: np.ndarray | None, arch: str,
                  source: Path) -> None:
    """ValueError names what our reader finds otherwise, or llama.cpp has no place for."""
    stored = {name: gguf.StoredTensor(shape, F32, np.empty(0, np.uint8)) for name, shape in shapes.items()}
    if freqs is not None and arch != "llama":
        raise ValueError(f"{source}: rope scaling: expected none or linear in llama.cpp's {arch}, got "
                         f"{files.quoted(c.rope_scaling)}")
    if freqs is not None:
        stored["rope_freqs.weight"] = gguf.StoredTensor(freqs.shape, F32, freqs.view(np.uint8))
    again = config.parse(gguf.spec(source, {"general.architecture": arch} | found, stored), source)
    layers = range(c.num_hidden_layers)
    same = {f.name: lambda c, name=f.name: getattr(c, name) for f in fields(c) if f.name not in INERT} | {
        "head_dim": lambda c: c.d_head, "num_key_value_heads": lambda c: c.heads_kv, "qk_norm": lambda c: c.qk_norm,
        "qkv_bias": lambda c: c.qkv_bias or c.attention_bias, "sliding_window": lambda c: [*map(c.slides, layers)],
        "no_rope_layers": lambda c: [*map(c.rotates, layers)]}
    for name, of in same.items():
        want, got = (np.float32(x) if isinstance(x := of(each), float) else x for each in (c, again))
        if want != got:
            raise ValueError(f"{source}: {name}: expected {files.quoted(got)}, all that llama.cpp's {arch} has, got "
                             f"{files.quoted(want)}")
    if not torch.allclose(_frequencies(c), _frequencies(again), rtol=1e-6, atol=0):
        raise ValueError(f"{source}: rope scaling: expected one that a .gguf file can say, got "
                         f"{files.quoted(c.rope_scaling)}")
    strange = [n for n in shapes if arch != "llama" and re.search(r"(attn_output|ffn_\w+)\.bias$", n)]
    if strange or arch == "qwen2" and c.d_head * c.num_attention_heads != c.hidden_size:
        raise ValueError(f"{source}: expected what llama.cpp's {arch} has a place for, got "
                         f"{strange[0] if strange else f'head_dim {c.d_head}'}")


def write(m: nn.Module, file: Path, head: Header, outtype: str | None = None) -> None:
    """Folds the LoRA of `m`, in place, and writes the file: matrices as `outtype` (one of OUTTYPES; None: as their
    dtype), norms and biases in float32. ValueError for adapters and λ > 0, and for numbers that `outtype` cannot
    hold."""
    require_new(file)
    require_on(m)
    s = getattr(m, "sibo", None)
    if s and (s.lam or s.method != "lora"):
        raise ValueError(f"--export gguf: expected a plain LoRA, got {f'λ = {s.lam}' if s.lam else 'adapters'}: "
                         "llama.cpp has no place for h0 or an adapter's tanh")
    sibo.merge(m)
    tied = m.head.weight is m.embed.weight
    tensors = {_name(their_name(m, n)): p for n, p in m.state_dict().items() if n != "head.weight" or not tied}
    of = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    kind, file_type = OUTTYPES[outtype or of[m.embed.weight.dtype]]
    if head.rope_freqs is not None:
        tensors["rope_freqs.weight"] = torch.from_numpy(head.rope_freqs)
    general = {"general.type": "model", "general.name": file.stem, "general.file_type": file_type,
               "general.quantization_version": 2}
    files.write(file, lambda draft: _write(draft, head, general | head.fields, tensors, kind))


def _write(draft: Path, head: Header, metadata: dict, tensors: dict[str, Tensor], kind: int) -> None:
    """One tensor in memory at a time."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    kinds = {name: _kind(p, kind) for name, p in tensors.items()}
    w = GGUFWriter(draft, head.arch)
    add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, p in tensors.items():
        block, size = GGML_QUANT_SIZES[kinds[name]]
        w.add_tensor_info(name, p.shape, np.dtype(np.float32), p.numel() // block * size,
                          GGMLQuantizationType(kinds[name]))
    try:
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        for name, p in tensors.items():
            w.write_tensor_data(_stored(name, p.detach().float().cpu(), kinds[name], head.heads))
    finally:
        w.close()


def _kind(p: Tensor, kind: int) -> int:
    """As llama.cpp: vectors stay as they are, and rows that are no whole blocks of Q8_0 become F16."""
    return F32 if p.ndim == 1 else F16 if kind == Q8_0 and p.shape[-1] % 32 else kind


def _stored(name: str, weight: Tensor, kind: int, heads: dict[str, int]) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    if not weight.abs().max() <= LARGEST[kind]:  # nor NaN
        raise ValueError(f"--export gguf: tensor {name}: expected numbers up to {LARGEST[kind]:g}, the most that "
                         f"{GGMLQuantizationType(kind).name} holds, got {weight.abs().max():g}")
    if m := re.search(r"attn_([qk])\.", name):
        if n := heads.get(m[1]):  # neighbours of each head's rotary pairs (i, i + D/2), which the reader undoes
            weight = weight.view(n, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    return quants.quantize(np.ascontiguousarray(weight.numpy()), GGMLQuantizationType(kind))
