"""Tiny random models for several test files, and adapters and LoRA on them."""

import re

import torch
from torch import nn

import model
import sibo

CONFIGS = {
    "llama": {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24},
    "gptj": {"model_type": "gptj", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4,
             "n_positions": 64},
    "bert": {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 32,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
FAMILIES = list(CONFIGS)
METHODS = {  # the command line's four, then their variants
    "adapter": {"method": "adapter", "lam": 0.0},
    "adapter-sibo": {"method": "adapter", "lam": 0.3},
    "lora": {"method": "lora", "lam": 0.0},
    "lora-sibo": {"method": "lora", "lam": 0.3},
    "adapter, plain skip": {"method": "adapter", "lam": 0.3, "skip": "plain"},
    "adapter, learned λ": {"method": "adapter", "lam": 0.3, "learn_lam": True},
    "adapter, learned λ, plain skip": {"method": "adapter", "lam": 0.3, "learn_lam": True, "skip": "plain"},
    "adapter on the input": {"method": "adapter", "lam": 0.3, "side": "in"},  # BERT has no such place
    "parallel adapter": {"method": "adapter", "lam": 0.3, "side": "parallel"},
    "parallel adapter, learned λ": {"method": "adapter", "lam": 0.3, "side": "parallel", "learn_lam": True},
    "lora, learned λ": {"method": "lora", "lam": 0.3, "learn_lam": True},
    "lora, frozen too": {"method": "lora", "lam": 0.3, "frozen_too": True},
    "lora, frozen too, learned λ": {"method": "lora", "lam": 0.3, "frozen_too": True, "learn_lam": True},
}
LORAS = {name: s for name, s in METHODS.items() if s["method"] == "lora"}
CASES = [(f, name) for f in FAMILIES for name in METHODS if (f, name) != ("bert", "adapter on the input")]
LORA_CASES = [(f, name) for f in FAMILIES for name in LORAS]


def tiny(family="llama", dtype=torch.float64, num_labels=None, **config):
    """One of our models with random weights, the same at every call, in eval mode."""
    m = model.build(CONFIGS[family] | config, num_labels=num_labels).to_empty(device="cpu").to(dtype)
    g = torch.Generator().manual_seed(1)
    for p in m.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3)
    return m.eval()


def inject(m, name, **more):
    return sibo.inject(m, **METHODS[name] | {"rank": 3, "alpha": 6.0, "bottleneck": 3} | more)


def sibo_layers(m):
    """(name, module) of all adapters and LoRAs, in an order that our models and transformers' share."""
    found = [(n, x) for n, x in m.named_modules() if isinstance(x, sibo.SIBOLayer)]
    return sorted(found, key=lambda nx: (re.findall(r"\.(\d+)\.", nx[0]), nx[0].split(".")[-1]))


def stir(m, seed=0, move_lam=True):
    """As if trained: W_down, W_up (no longer 0) and, where it is learned, λ get other, random values."""
    g = torch.Generator().manual_seed(seed)
    for i, (_, x) in enumerate(sibo_layers(m)):
        for p in (x.down, x.up):
            p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4)
        if x.lam_logit is not None and move_lam:
            x.lam_logit.data += (-1) ** i / (i + 1)
    return m


def ids(seed=0, B=2, T=7):
    return torch.randint(1, 40, (B, T), generator=torch.Generator().manual_seed(seed))


def hooks(m):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())


class Toy(nn.Module):
    """embed → first → sub, all linear: h0 is the embedding, and h, what enters `sub`, is something else."""

    def __init__(self, vocab=5, d=2, out=None):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.first = nn.Linear(d, d, bias=False)
        self.sub = nn.Linear(d, out or d, bias=False)

    def forward(self, x):
        return self.sub(self.first(self.embed(x)))


def hugging_face(family, head=False):
    """A tiny random model of transformers, its outputs far from 0."""
    import transformers as hf

    kind = {"llama": hf.LlamaForCausalLM, "gptj": hf.GPTJForCausalLM,
            "bert": hf.BertForSequenceClassification if head else hf.BertModel}[family]
    c = {k: v for k, v in CONFIGS[family].items() if k != "model_type"} | ({"num_labels": 3} if head else {})
    m = kind(kind.config_class(**c, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    g = torch.Generator().manual_seed(2)
    for p in m.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return m.eval()


def twins(family, folder, head=False):
    """(transformers' model, ours) with the same weights."""
    theirs = hugging_face(family, head)
    theirs.save_pretrained(folder)
    return theirs, model.from_pretrained(folder, num_labels=3 if head else None)


def output(m, *args, **kwargs):
    """The first tensor, whether the model is transformers' or ours."""
    out = m(*args, **kwargs)
    return out if isinstance(out, torch.Tensor) else out[0]
