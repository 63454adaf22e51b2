"""What config.json may say: each family's settings; what is not supported is refused by name."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch.nn.functional as F

from sibo_lab.backbone import gguf
from sibo_lab.files import quoted, read_json

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Config:
    """By Hugging Face's names; those without a default must be there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int

    head_dim = num_key_value_heads = rotary_dim = None  # where a family has no such setting
    tie_word_embeddings = False

    @property
    def d_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def heads_kv(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


@dataclass(frozen=True)
class LlamaConfig(Config):
    intermediate_size: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class GPTJConfig(Config):
    max_position_embeddings: int = 2048
    intermediate_size: int | None = None  # None: 4 d
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
ONLY = {  # of settings that change the result, the values that are implemented
    "llama": {"hidden_act": ["silu"]},
    "bert": {"position_embedding_type": [None, "absolute"], "is_decoder": [None, False],
             "add_cross_attention": [None, False]},
}
ROPE_SCALINGS = {"default": (), "linear": ("factor",),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
# The largest values; for all others 2^20, so that no weight can take 2^63 bytes.
LARGEST = {"num_hidden_layers": 1000, "vocab_size": 1 << 31, "max_position_embeddings": 1 << 31}


def read_spec(path: Path) -> dict:
    """config.json of a folder, or the same from a .gguf file's metadata."""
    return gguf.spec(path, *gguf.read(path)) if path.suffix == ".gguf" else read_json(path / "config.json")


def parse(spec: dict, path: object) -> Config:
    """The family's Config; ValueError names `path` and what is missing, unsupported, or of a wrong type or size."""
    def wrong(name: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{path}: {name}: expected {expected}, got {quoted(got)}")

    family = spec.get("model_type")
    if family not in list(CONFIGS):  # it may be unhashable
        raise wrong("model_type", f"one of {', '.join(CONFIGS)}", family)
    kind = CONFIGS[family]
    known = {ALIASES.get(k, k) if family == "gptj" else k: v for k, v in spec.items()}
    if family == "llama":
        known |= _rope(known, wrong)
    for name, allowed in ({"quantization_config": [None]} | ONLY.get(family, {})).items():
        if (value := known.get(name, allowed[0])) not in allowed:
            raise wrong(name, " or ".join(map(repr, allowed)), value)
    settings = {f: known.get(f.name) for f in fields(kind) if f.default is MISSING or f.name in known}
    for field, value in settings.items():
        if expected := _expected(field, value):
            raise wrong(field.name, expected, value)
    c = kind(**{field.name: value for field, value in settings.items()})
    if not c.head_dim and c.hidden_size % c.num_attention_heads:
        raise wrong("hidden_size", f"a multiple of the {c.num_attention_heads} heads", c.hidden_size)
    if c.num_attention_heads % c.heads_kv:
        raise wrong("num_attention_heads", f"a multiple of num_key_value_heads {c.heads_kv}", c.num_attention_heads)
    rotary = c.rotary_dim or c.d_head
    if family != "bert" and (rotary % 2 or rotary > c.d_head):
        raise wrong("rotary dimensions", f"an even number, at most {c.d_head}", rotary)
    return c


def _expected(field, value: object) -> str:
    """What a Config's field expects, or "" if `value` is that."""
    kind, *optional = field.type.split(" | ")
    number, most = type(value) in (int, float), LARGEST.get(field.name, 1 << 20)
    fits, expected = {
        "int": (type(value) is int and 1 <= value <= most, f"a positive integer, at most {most}"),
        "rope_theta": (number and 0 < value < 1e12, "a positive number below 1e12"),
        "float": (number and 0 <= value < 1, "a number from 0 to below 1"),  # dropouts and epsilons
        "bool": (isinstance(value, bool), "true or false"),
        "str": (value in list(ACTIVATIONS), ", ".join(ACTIVATIONS)),
        "dict": (True, ""),  # checked by _rope
    }["rope_theta" if field.name == "rope_theta" else kind]
    return "" if fits or value is None and optional else expected


def _rope(known: dict, wrong) -> dict:
    """LLaMA's rotary settings, in the new spelling or the old."""
    rope = known.get("rope_scaling") if known.get("rope_parameters") is None else known["rope_parameters"]
    if not isinstance(rope, dict | None):
        raise wrong("rope scaling", "an object", rope)
    rope = rope or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in list(ROPE_SCALINGS):
        raise wrong("rope scaling", f"one of {', '.join(ROPE_SCALINGS)}", scaling)
    for name in ROPE_SCALINGS[scaling]:
        if type(value := rope.get(name)) not in (int, float) or not 0 < value <= 1e12:
            raise wrong(f"rope scaling {scaling!r}: {name}", "a positive number", value)
    if scaling == "llama3" and (low := rope["low_freq_factor"]) >= (high := rope["high_freq_factor"]):
        raise wrong("low_freq_factor", f"less than high_freq_factor {high}", low)
    return {"rope_theta": rope.get("rope_theta", known.get("rope_theta", 10000.0)), "rope_scaling": rope or None}
