"""Tiny random models of transformers and ours from the files they write, for several test files.

All weights are large, biases and norms included, so that nothing that is mixed up can hide."""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GenerationConfig,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import model

LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
GPTJ = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128}
BERT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64}
LLAMAS = {  # with windows that are shorter than the texts
    "llama": (LlamaConfig, LLAMA), "mistral": (MistralConfig, LLAMA | {"sliding_window": 5}),
    "qwen2": (Qwen2Config, LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, LLAMA | {"head_dim": 12}),
    "smollm3": (SmolLM3Config, LLAMA | {"no_rope_layer_interval": 2, "pad_token_id": 0})}
CAUSAL = LLAMAS | {"gptj": (GPTJConfig, GPTJ)}
FAMILIES = CAUSAL | {"bert": (BertConfig, BERT)}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def rope_freqs(theta: float, dim: int, factor: float, low: float, high: float, trained: int) -> np.ndarray:
    """What llama.cpp divides each frequency by, as its converter computes it from LLaMA-3's settings."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        smooth = (trained / wavelength - low) / (high - low)
        out.append(1 if wavelength < trained / high else factor if wavelength > trained / low else
                   1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def theirs_of(family: str, seed: int = 0, kind: str | None = None, **changes) -> torch.nn.Module:
    """A tiny random model of transformers', in eval mode."""
    Config, base = FAMILIES[family]
    kind = kind or ("BertModel" if family == "bert" else Config.__name__.replace("Config", "ForCausalLM"))
    torch.manual_seed(seed)
    m = getattr(transformers, kind)(Config(**{**base, **changes})).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else p + 0.2 * torch.randn_like(p))
    return m


def pair(family: str, folder: Path, seed: int = 0, kind: str | None = None, num_labels: int | None = None, **changes):
    """(transformers' model, ours from the files it wrote)."""
    theirs = theirs_of(family, seed, kind, **changes, **({"num_labels": num_labels} if num_labels else {}))
    theirs.save_pretrained(folder)
    return theirs, model.from_pretrained(folder, num_labels=num_labels)


def generated(theirs, ids, mask=None, **how) -> torch.Tensor:
    """What transformers' generate gives for our arguments, with nothing from the model's own generation settings."""
    how = {"pad_token_id": 2, "eos_token_id": None, "num_beams": 1, **how}
    theirs.generation_config = GenerationConfig(bos_token_id=0, do_sample=False, **how)
    mask = torch.ones_like(ids) if mask is None else mask
    return theirs.generate(ids, attention_mask=mask, generation_config=theirs.generation_config)


def edit_config(folder: Path, **changes) -> None:
    """Changes config.json; a value of None takes the key away."""
    file = folder / "config.json"
    spec = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in spec.items() if v is not None}))


def words(B: int, T: int, V: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[list[int]], side: str, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention_mask of rows of different lengths, padded with id 1 by `extra` more than needed."""
    T = max(map(len, rows)) + extra
    gaps = [[0] * (T - len(r)) for r in rows]
    ids = [[1] * len(g) + r if side == "left" else r + [1] * len(g) for r, g in zip(rows, gaps, strict=True)]
    mask = [g + [1] * len(r) if side == "left" else [1] * len(r) + g for r, g in zip(rows, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= tolerance


@torch.no_grad()
def assert_same_model(ours: torch.nn.Module, theirs: torch.nn.Module, ids: torch.Tensor | None = None,
                      **inputs: torch.Tensor) -> None:
    """Outputs, and all hidden states one by one: to 1e-4, or 1e-6 of the largest where they reach thousands."""
    ids = words(2, 20) if ids is None else ids
    expected = theirs(ids, output_hidden_states=True, **inputs)
    assert_near(ours(ids, **inputs), expected.logits if "logits" in expected else expected.last_hidden_state)
    hidden = ours.hidden_states(ids, **inputs)
    assert len(hidden) == len(expected.hidden_states) == ours.config.num_hidden_layers + 1
    for mine, other in zip(hidden, expected.hidden_states, strict=True):
        assert_near(mine, other, max(1e-4, 1e-6 * float(other.abs().max())))


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    """Lets `change` work on the tensors of model.safetensors."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


@contextmanager
def refused(*named: str, by: type[Exception] = ValueError):
    """Expects an error of one line that contains all of `named`."""
    with pytest.raises(by) as error:
        yield
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)
