"""What config.json may say: a family's settings, checked, with every unknown one refused by name."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path

import torch.nn.functional as F

from sibo_lab import files
from sibo_lab.backbone import gguf


def read_spec(path: Path) -> dict:
    """config.json of a folder, or the same read from a .gguf file's metadata."""
    return gguf.config(path, *gguf.read(path)) if path.suffix == ".gguf" else files.read_json(path / "config.json")


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Config:
    """What config.json says, by Hugging Face's names; fields without a default must stand there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int

    @property
    def d_head(self) -> int:
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LlamaConfig(Config):
    intermediate_size: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class GPTJConfig(Config):
    max_position_embeddings: int = 2048
    intermediate_size: int | None = None  # n_inner; None: 4 d
    rotary_dim: int | None = 64  # None: the whole head
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class BertConfig(Config):
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob


CONFIGS = {"bert": BertConfig, "gptj": GPTJConfig, "llama": LlamaConfig}
ALIASES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
           "activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps"}  # GPT-J's spelling
REFUSED = {  # settings that would change the result, and the only values this file implements
    "llama": {"hidden_act": ["silu"], "quantization_config": [None]},
    "gptj": {"quantization_config": [None]},
    "bert": {"position_embedding_type": [None, "absolute"], "is_decoder": [None, False],
             "add_cross_attention": [None, False], "quantization_config": [None]},
}
ROPE_SCALINGS = {"default": (), "linear": ("factor",),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
LARGEST = {"num_hidden_layers": 1000, "vocab_size": 1 << 31, "max_position_embeddings": 1 << 31}  # others: 2^20, which


# keeps the bytes of any weight below 2^63; a model of a thousand blocks, still without weights, is built in a second
def expected_of(field: Field, value: object) -> str:
    """What a Config's `field` asks for and `value` is not, or ""."""
    kind, *optional = field.type.split(" | ")
    number = type(value) in (int, float)
    low, high = (0, 1e12) if field.name == "rope_theta" else (-1, 1)  # else eps, or a dropout
    known = {"int": (type(value) is int and 1 <= value <= LARGEST.get(field.name, 1 << 20),
                     f"a positive number, at most {LARGEST.get(field.name, 1 << 20)}"),
             "float": (number and low < value and 0 <= value < high, f"a number from 0 to below {high:g}"),
             "bool": (isinstance(value, bool), "true or false"), "str": (isinstance(value, str), "a name"),
             "dict": (isinstance(value, dict), "an object")}
    fits, expected = known[kind]
    return "" if fits or value is None and optional else expected


def parse(said: dict, path: object = "config.json") -> Config:
    """The family's Config from what config.json said. ValueError names a setting that is unknown here, missing, of
    another type, or out of all bounds."""
    family = said.get("model_type")
    if not isinstance(family, str) or family not in CONFIGS:
        raise ValueError(f"{path}: found model_type {files.quoted(family)}, expected one of {', '.join(CONFIGS)}")
    kind = CONFIGS[family]
    known = {ALIASES.get(k, k) if family == "gptj" else k: v for k, v in said.items()}
    if family == "llama":
        if known.get("num_key_value_heads") is None:
            known["num_key_value_heads"] = known.get("num_attention_heads")
        known |= _rope(known, path)
    for key, allowed in REFUSED[family].items():
        if known.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{path}: found {key} {files.quoted(known[key])}, expected {' or '.join(map(repr, allowed))}")
    for f in fields(kind):
        if (f.default is MISSING or f.name in known) and (expected := expected_of(f, known.get(f.name))):
            raise ValueError(f"{path}: found {f.name} {files.quoted(known.get(f.name))}, expected {expected}")
    c = kind(**{f.name: known[f.name] for f in fields(kind) if f.name in known})
    if c.hidden_act not in ACTIVATIONS:
        raise ValueError(f"{path}: found hidden_act {files.quoted(c.hidden_act)}, expected {', '.join(ACTIVATIONS)}")
    groups = getattr(c, "num_key_value_heads", 1)
    if (not getattr(c, "head_dim", None) and c.hidden_size % c.num_attention_heads) or c.num_attention_heads % groups:
        raise ValueError(f"{path}: found hidden_size {c.hidden_size}, {c.num_attention_heads} heads in {groups} groups"
                         ", expected the one to be a multiple of the next")
    turning = {"llama": c.d_head, "gptj": getattr(c, "rotary_dim", None) or c.d_head, "bert": 0}[family]
    if turning % 2 or turning > c.d_head:
        raise ValueError(f"{path}: found {turning} rotary dimensions in heads of {c.d_head}, expected an even number, "
                         "no more than there are")
    return c


def _rope(known: dict, path: object) -> dict:
    """LLaMA's rotary settings, from the new spelling or the old."""
    rope = known.get("rope_scaling") if known.get("rope_parameters") is None else known["rope_parameters"]
    if not isinstance(rope, dict | None):
        raise ValueError(f"{path}: found rope scaling {files.quoted(rope)}, expected an object")
    rope = rope or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(scaling, str) or scaling not in ROPE_SCALINGS:
        raise ValueError(f"{path}: found rope scaling {files.quoted(scaling)}, expected one of {', '.join(ROPE_SCALINGS)}")
    for key in ROPE_SCALINGS[scaling]:
        if key not in rope:
            raise ValueError(f"{path}: found rope scaling {scaling!r} without {key}, expected a number there")
        if type(rope[key]) not in (int, float) or not 0 < rope[key] <= 1e12:
            raise ValueError(f"{path}: found {key} {files.quoted(rope[key])} in the rope scaling, expected a positive number")
    if scaling == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"{path}: found low_freq_factor {rope['low_freq_factor']} and high_freq_factor "
                         f"{rope['high_freq_factor']} in the rope scaling, expected the one below the other")
    return {"rope_theta": rope.get("rope_theta", known.get("rope_theta", 10000.0)), "rope_scaling": rope or None}
