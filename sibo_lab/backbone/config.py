"""What config.json may say: each family's settings; what is not supported is refused by name."""

from __future__ import annotations

import re
from collections import ChainMap
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

    architecture = ""  # transformers' class
    head_dim = num_key_value_heads = rotary_dim = None  # where a family has no such setting
    tie_word_embeddings = False

    @property
    def d_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def heads_kv(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


@dataclass(frozen=True)
class LlamaStyle(Config):
    """What LLaMA's block needs to know. Each family below: its own settings, and transformers' defaults of them."""

    intermediate_size: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False

    attention_bias = mlp_bias = qkv_bias = qk_norm = use_sliding_window = False  # where a family has no such setting
    max_window_layers, sliding_window, layer_types = 0, None, None

    def slides(self, layer: int) -> bool:
        """Whether a layer's tokens see only the last `sliding_window` ones, themselves included."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "sliding_attention"
        return bool(self.use_sliding_window and self.sliding_window) and layer >= self.max_window_layers

    def rotates(self, layer: int) -> bool:
        """Whether a layer knows positions."""
        return True


@dataclass(frozen=True)
class LlamaConfig(LlamaStyle):
    attention_bias: bool = False
    mlp_bias: bool = False

    architecture = "LlamaForCausalLM"


@dataclass(frozen=True)
class MistralConfig(LlamaStyle):
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    architecture, use_sliding_window = "MistralForCausalLM", True


@dataclass(frozen=True)
class Qwen2Config(LlamaStyle):
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list | None = None

    architecture, qkv_bias = "Qwen2ForCausalLM", True


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    head_dim: int | None = 128
    attention_bias: bool = False

    architecture, qkv_bias, qk_norm = "Qwen3ForCausalLM", False, True


@dataclass(frozen=True)
class SmolLM3Config(LlamaStyle):
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    rope_theta: float = 2000000.0
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = None
    layer_types: list | None = None
    no_rope_layers: list | None = None  # 0: a layer without positions; None: each 4th, as below
    no_rope_layer_interval: int = 4

    architecture = "SmolLM3ForCausalLM"

    def slides(self, layer: int) -> bool:
        return super().slides(layer) and (self.layer_types is not None or not self.rotates(layer))

    def rotates(self, layer: int) -> bool:
        if self.no_rope_layers is None:
            return (layer + 1) % self.no_rope_layer_interval != 0
        return bool(self.no_rope_layers[layer])


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

    architecture = "GPTJForCausalLM"


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

    architecture = "BertModel"


LLAMAS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
          "smollm3": SmolLM3Config}
CONFIGS = {"bert": BertConfig, "gptj": GPTJConfig} | LLAMAS
ALIASES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
           "activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps"}  # GPT-J's spelling
NOT_GPTJS = "intermediate_size", "hidden_act", "layer_norm_eps"  # which transformers reads in that spelling alone
ONLY = {  # of settings that change the result, the values that are implemented, the default first
    Config: {"quantization_config": [None], "compression_config": [None], "per_layer_config": [None],
             "transformers_weights": [None], "is_encoder_decoder": [False, None],
             "tie_last_hidden_states": [None, True]},
    BertConfig: {"position_embedding_type": [None, "absolute"], "is_decoder": [None, False],
                 "add_cross_attention": [None, False], "is_causal": [None, False], "pruned_heads": [None, {}]},
    GPTJConfig: {"is_causal": [None, True]},
    LlamaStyle: {"hidden_act": ["silu"], "partial_rotary_factor": [None, 1], "is_causal": [None, True]},
    LlamaConfig: {"sliding_window": [None], "layer_types": [None]},
    MistralConfig: {"layer_types": [None]},
}
EACH = "long_factor", "short_factor"  # a number for each frequency
ROPE_SCALINGS = {"default": (), "linear": ("factor",),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
                 "longrope": ("factor", "attention_factor", *EACH)}  # the same at all lengths, as in a .gguf file
ROPE_FIXED = {"partial_rotary_factor": 1, "attention_factor": 1}
# The largest values; for all others 2^20, so that no weight can take 2^63 bytes.
LARGEST = {"num_hidden_layers": 1000} | dict.fromkeys(
    ("vocab_size", "max_position_embeddings", "sliding_window", "max_window_layers"), 1 << 31)


# In each of Google's config.json of BERT, which name no model_type.
BERTS_KEYS = {"attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size", "intermediate_size",
              "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "type_vocab_size", "vocab_size"}


def read_spec(path: Path) -> dict:
    """config.json of a folder, or the same from a .gguf file's metadata. A BERT's may lack model_type."""
    if path.suffix == ".gguf":
        return gguf.spec(path, *gguf.read(path))
    spec = read_json(path / "config.json")
    return spec | {"model_type": "bert"} if spec.get("model_type") is None and _is_bert(spec) else spec


def _is_bert(spec: dict) -> bool:
    if names := spec.get("architectures"):
        return all(re.fullmatch(r"Bert(Model|For\w+)", str(name)) for name in names) if type(names) is list else False
    others = "embedding_size" in spec or spec.get("layer_norm_eps", 1e-12) != 1e-12  # ALBERT, ELECTRA; RoBERTa
    return spec.keys() >= BERTS_KEYS and not others


def parse(spec: dict, path: object) -> Config:
    """The family's Config; ValueError names `path` and what is missing, unsupported, or of a wrong type or size."""
    def wrong(name: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{path}: {name}: expected {expected}, got {quoted(got)}")

    family = spec.get("model_type")
    if family not in list(CONFIGS):  # it may be unhashable
        raise wrong("model_type", f"one of {', '.join(CONFIGS)}", family)
    kind = CONFIGS[family]
    known = dict(spec)
    if family == "gptj":
        known = {ALIASES.get(k, k): v for k, v in spec.items() if k not in NOT_GPTJS}
    if issubclass(kind, LlamaStyle):
        known |= _rope(known, kind, wrong)
    for name, allowed in ChainMap(*(ONLY.get(base, {}) for base in kind.__mro__)).items():
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
    if issubclass(kind, LlamaStyle):
        _check_layers(c, wrong)
    return c


def _check_layers(c: LlamaStyle, wrong) -> None:
    """What names single layers, or single frequencies, must fit their number."""
    for name, known in (("layer_types", ("full_attention", "sliding_attention")), ("no_rope_layers", (0, 1))):
        given = getattr(c, name, None)
        if given is not None and (len(given) != c.num_hidden_layers or any(x not in list(known) for x in given)):
            raise wrong(name, f"{known[0]!r} or {known[1]!r} for each of {c.num_hidden_layers} layers", given)
    if any(map(c.slides, range(c.num_hidden_layers))) and not (c.use_sliding_window and c.sliding_window):
        raise wrong("layer_types", "full_attention where no sliding_window is in use", c.layer_types)
    factors = (c.rope_scaling or {}).get("long_factor")
    if factors is not None and len(factors) != c.d_head // 2:
        raise wrong("rope scaling: long_factor", f"{c.d_head // 2} numbers", factors)


def _expected(field, value: object) -> str:
    """What a Config's field expects, or "" if `value` is that."""
    kind, *optional = field.type.split(" | ")
    number, most = type(value) in (int, float), LARGEST.get(field.name, 1 << 20)
    least = field.name != "max_window_layers"  # 0: all layers slide
    fits, expected = {
        "int": (type(value) is int and least <= value <= most, f"a positive integer, at most {most}"),
        "rope_theta": (number and 0 < value < 1e12, "a positive number below 1e12"),
        "float": (number and 0 <= value < 1, "a number from 0 to below 1"),  # dropouts and epsilons
        "bool": (isinstance(value, bool), "true or false"),
        "str": (value in list(ACTIVATIONS), ", ".join(ACTIVATIONS)),
        "list": (isinstance(value, list), "a list"),
        "dict": (True, ""),  # checked by _rope
    }["rope_theta" if field.name == "rope_theta" else kind]
    return "" if fits or value is None and optional else expected


def _rope(known: dict, kind: type[LlamaStyle], wrong) -> dict:
    """LLaMA's rotary settings, in the new spelling or the old; the old one counts, as in transformers."""
    rope = known.get("rope_scaling") or known.get("rope_parameters")
    if not isinstance(rope, dict | None):
        raise wrong("rope scaling", "an object", rope)
    rope = dict(rope or {})
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in list(ROPE_SCALINGS):
        raise wrong("rope scaling", f"one of {', '.join(ROPE_SCALINGS)}", scaling)
    trained = "original_max_position_embeddings"
    if scaling == "llama3":  # beside it, and by default the whole context
        rope[trained] = known.get(trained, rope.get(trained, known.get(
            "max_position_embeddings", kind.max_position_embeddings)))
    for name in ROPE_SCALINGS[scaling]:
        value, expected = rope.get(name), "positive numbers" if name in EACH else "a positive number"
        each = value if name in EACH else [value]
        if not isinstance(each, list) or not all(type(x) in (int, float) and 0 < x <= 1e12 for x in each):
            raise wrong(f"rope scaling {scaling!r}: {name}", expected, value)
    if scaling == "llama3" and (low := rope["low_freq_factor"]) >= (high := rope["high_freq_factor"]):
        raise wrong("low_freq_factor", f"less than high_freq_factor {high}", low)
    if scaling == "longrope" and rope["short_factor"] != rope["long_factor"]:
        raise wrong("rope scaling 'longrope': short_factor", "the same as long_factor", rope["short_factor"])
    for name in rope.keys() - {"rope_type", "type", "rope_theta", trained, *ROPE_SCALINGS[scaling]} | ROPE_FIXED.keys():
        if (value := rope.get(name)) not in (None, (fixed := ROPE_FIXED.get(name))):
            raise wrong(f"rope scaling {scaling!r}: {name}", fixed and str(fixed) or "no such setting", value)
    return {"rope_theta": rope.get("rope_theta", known.get("rope_theta", kind.rope_theta)),
            "rope_scaling": rope or None}
