"""BERT, GPT-J and LLaMA side by side: whole, plain, and with the weights that Hugging Face's files hold.

Sources: Devlin et al. 2019 (BERT), Wang and Komatsuzaki 2021 (GPT-J), Touvron et al. 2023 (LLaMA); config.json and the
tensors' names and layouts as in Hugging Face transformers. Nothing here knows of adapters: sibo.py attaches to names.
Departures from the official code: positions and masks follow the attention mask, so that padding changes no result.

Shapes: B sequences, T tokens, d hidden_size, H heads, D head_dim, S tokens seen so far (T without a cache), V words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute

from sibo_lab import fast, files
from sibo_lab.backbone import config, generate, locate, quantized, weights


def rotary_angles(positions: Tensor, dim: int, theta: float, scaling: dict | None = None) -> Tensor:
    """Angle of each of the dim/2 pairs at each position, (…, T) -> (…, T, dim/2). Su et al. 2021; llama3's scaling
    as in transformers' modeling_rope_utils.py: wavelengths past the trained context are stretched, the rest kept."""
    # the power is taken, then the inverse, as in training: elsewhere rounded, logits differ by 1e-4 after 30 layers
    frequency = 1 / theta ** (torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the trained context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    return positions[..., None].float() * frequency


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """LLaMA's layout: element i is paired with i + D/2."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J's layout: element 2i is paired with 2i + 1, and only the first rotary_dim elements turn."""
    turning, still = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = turning[..., ::2], turning[..., 1::2]
    return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), still), -1)


@dataclass(frozen=True)
class SharedPrefix:
    """A prompt's frame stands at the beginning of every row: computed once, it saves a third of a step. The rows
    (B, T, ·) become one, (1, P + B (T−P), ·), P common tokens and then what is each row's own; only attention, where
    a token meets those before it, sees them as rows again. Exact: the gradients of the common part add up (dropout
    draws one mask for it, where rows of their own would have drawn several)."""

    rows: int  # B
    common: int  # P

    def pack(self, x: Tensor) -> Tensor:
        return torch.cat((x[:1, :self.common], x[:, self.common:].flatten(0, 1)[None]), 1)

    def unpack(self, x: Tensor) -> Tensor:
        own = x[0, self.common:].unflatten(0, (self.rows, -1))
        return torch.cat((x[:, :self.common].expand(self.rows, -1, -1), own), 1)


@dataclass
class Context:
    """What every block of one forward pass shares; `mask` None: every token sees all earlier ones (BERT: all)."""

    mask: Tensor | None  # bool (B, 1, T, S)
    cos: Tensor | None = None  # (B, 1, T, rotary/2)
    sin: Tensor | None = None
    frame: SharedPrefix | None = None  # in training, where the rows of a batch begin alike


class Attention(nn.Module):
    """Multi-head attention; fewer key/value heads than query heads (GQA) share them in groups."""

    def __init__(self, c: config.Config, *, heads_kv: int, bias: bool, out_bias: bool, causal: bool, rotate: Callable | None,
                 dropout: float, out_dropout: float):
        super().__init__()
        d, D = c.hidden_size, c.d_head
        self.q_proj = nn.Linear(d, c.num_attention_heads * D, bias)
        self.k_proj = nn.Linear(d, heads_kv * D, bias)
        self.v_proj = nn.Linear(d, heads_kv * D, bias)
        self.o_proj = nn.Linear(c.num_attention_heads * D, d, out_bias)
        self.dropout = nn.Dropout(out_dropout)
        self.head_dim, self.causal, self.rotate, self.p = D, causal, rotate, dropout

    def forward(self, h: Tensor, ctx: Context, past: generate.KeyValues | None = None) -> Tensor:
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if ctx.frame:
            q, k, v = ctx.frame.unpack(q), ctx.frame.unpack(k), ctx.frame.unpack(v)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if self.rotate:
            q, k = self.rotate(q, ctx.cos, ctx.sin), self.rotate(k, ctx.cos, ctx.sin)
        if past is not None:
            k, v = past.extend(k, v)  # (B, H, S, D)
        groups, T, causal = q.shape[1] // k.shape[1], q.shape[2], self.causal and ctx.mask is None
        if T == 1:  # one new token: the heads of a group are as good as further queries, and k, v need no copies
            q, causal = q.reshape(q.shape[0], k.shape[1], groups, -1), False
        elif groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = fast.attend(q, k, v, ctx.mask, causal, self.p if self.training else 0.0)
        if T == 1:
            out = out.reshape(out.shape[0], -1, 1, self.head_dim)
        out = out.transpose(1, 2).flatten(2)
        return self.dropout(self.o_proj(ctx.frame.pack(out) if ctx.frame else out))  # (B, T, d)


class MLP(nn.Module):
    """GPT-J's and BERT's feed-forward sub-layer."""

    def __init__(self, c: config.Config, dropout: float):
        super().__init__()
        inner = c.intermediate_size or 4 * c.hidden_size
        self.fc_in, self.fc_out = nn.Linear(c.hidden_size, inner), nn.Linear(inner, c.hidden_size)
        self.act, self.dropout = config.ACTIVATIONS[c.hidden_act], nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.dropout(self.fc_out(self.act(self.fc_in(h))))


class SwiGLU(nn.Module):
    """LLaMA's feed-forward sub-layer."""

    def __init__(self, c: config.LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class LlamaBlock(nn.Module):
    def __init__(self, c: config.LlamaConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attn = Attention(c, heads_kv=c.num_key_value_heads, bias=c.attention_bias, out_bias=c.attention_bias,
                              causal=True, rotate=rotate_halves, dropout=c.attention_dropout, out_dropout=0.0)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, h: Tensor, ctx: Context, past: generate.KeyValues | None = None) -> Tensor:
        h = h + self.attn(self.attn_norm(h), ctx, past)
        return h + self.mlp(self.mlp_norm(h))


class GPTJBlock(nn.Module):
    def __init__(self, c: config.GPTJConfig):
        super().__init__()
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attn = Attention(c, heads_kv=c.num_attention_heads, bias=False, out_bias=False, causal=True,
                              rotate=rotate_neighbours, dropout=c.attn_pdrop, out_dropout=c.resid_pdrop)
        self.mlp = MLP(c, c.resid_pdrop)

    def forward(self, h: Tensor, ctx: Context, past: generate.KeyValues | None = None) -> Tensor:
        normed = self.norm(h)
        return h + self.attn(normed, ctx, past) + self.mlp(normed)  # in parallel


class BertBlock(nn.Module):
    def __init__(self, c: config.BertConfig):
        super().__init__()
        self.attn = Attention(c, heads_kv=c.num_attention_heads, bias=True, out_bias=True, causal=False, rotate=None,
                              dropout=c.attention_probs_dropout_prob, out_dropout=c.hidden_dropout_prob)
        self.attn_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = MLP(c, c.hidden_dropout_prob)
        self.mlp_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, h: Tensor, ctx: Context, past: generate.KeyValues | None = None) -> Tensor:
        h = self.attn_norm(h + self.attn(h, ctx, past))
        return self.mlp_norm(h + self.mlp(h))


def common_beginning(input_ids: Tensor, labels: Tensor) -> int:
    """How many tokens all rows begin with and are asked alike, but for the last of them: what follows it differs."""
    alike = ((input_ids == input_ids[:1]) & (labels == labels[:1])).all(0)
    return max(int(alike.int().cumprod(0).sum()) - 1, 0) if len(labels) > 1 else 0


class Transformer(nn.Module):
    """What the three families share: blocks, run one after the other."""

    grad_checkpoint = False  # recompute each block's activations in the backward pass instead of keeping them

    def run(self, h: Tensor, ctx: Context, cache: list[generate.KeyValues] | None = None) -> list[Tensor]:
        """h (B, T, d) and what it is after each block."""
        states = [h]
        for i, block in enumerate(self.blocks):
            if self.grad_checkpoint and self.training:
                h = recompute(block, h, ctx, use_reentrant=False)
            else:
                h = block(h, ctx, cache[i] if cache else None)
            states.append(h)
        return states

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> list[Tensor]:
        """L+1 tensors (B, T, d): what enters the first block, then each block's output, the last one normalised."""
        return self(input_ids, attention_mask, return_hidden=True, **inputs)


class CausalLM(Transformer):
    """Embedding, blocks, norm, head. A subclass gives the blocks, the rotary settings and the names of its weights."""

    def __init__(self, c: config.Config, block: type[nn.Module], norm: nn.Module, head_bias: bool):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(block(c) for _ in range(c.num_hidden_layers))
        self.norm = norm
        self.head = nn.Linear(c.hidden_size, c.vocab_size, head_bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor | None = None,
                cache: list[generate.KeyValues] | None = None, last: int = 1,
                return_hidden: bool = False) -> Tensor | list[Tensor]:
        """Logits (B, T, V) of the next token at each position.

        `labels` (B, T), -100 where nothing is asked: the mean cross-entropy instead, a scalar, of the tokens that are.
        `cache` (see new_cache): input_ids continue what it holds, attention_mask (B, S) covers both; logits of the
        `last` positions, (B, last, V), and the cache is extended in place. `return_hidden`: see hidden_states."""
        T, past = input_ids.shape[1], cache[0].length if cache else 0
        positions = torch.arange(past, past + T, device=input_ids.device)[None]  # (1, T)
        mask, several = None, past > 0 and T > 1
        if several and attention_mask is None:
            raise ValueError(f"{T} tokens at once behind a cache of {past}: give the attention_mask with its padding")
        if attention_mask is not None and (several or not bool(attention_mask.all())):
            seen = attention_mask.bool()
            positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T): padding takes no position
            if T == 1:
                mask = seen[:, None, None]
            else:  # a padding token sees itself, so that its row of the softmax is not empty
                i = torch.arange(past + T, device=seen.device)
                mask = (i <= i[past:, None]) & seen[:, None, None] | (i == i[past:, None])
        frame = None
        if labels is not None and mask is None and (common := common_beginning(input_ids, labels)):
            frame = SharedPrefix(len(input_ids), common)
        h = self.embed(frame.pack(input_ids) if frame else input_ids)  # (B, T, d): this is h0
        angles = self.rotary(positions)[:, None]  # (B, 1, T, rotary/2)
        ctx = Context(mask, angles.cos().to(h.dtype), angles.sin().to(h.dtype), frame)
        states = self.run(self.dropout(h), ctx, cache)
        if return_hidden:
            return [*states[:-1], self.norm(states[-1])]
        h = states[-1]
        if cache is not None:
            return self.head(self.norm(h[:, -last:]))
        if labels is None:
            return self.head(self.norm(h))
        targets, weight = F.pad(labels[:, 1:], (0, 1), value=-100), torch.ones_like(labels)
        if frame:
            targets, weight = frame.pack(targets), frame.pack(weight)
            weight[:, :frame.common] = frame.rows
        asked = targets != -100  # nowhere else is the head needed
        h, targets, weight = self.norm(h[asked]), targets[asked], weight[asked]
        if type(self.head) is nn.Linear:
            return fast.cross_entropy(h, self.head.weight, self.head.bias, targets, weight)
        losses = F.cross_entropy(generate.to_float32(self.head(h)), targets, reduction="none")  # a head with LoRA on it
        return (losses * weight).sum() / weight.sum()

    def new_cache(self, batch: int, capacity: int) -> list[generate.KeyValues]:
        """An empty cache for `batch` sequences of up to `capacity` tokens, a layer an entry."""
        heads_kv = getattr(self.config, "num_key_value_heads", self.config.num_attention_heads)
        like, shape = self.norm.weight, (batch, heads_kv, capacity, self.config.d_head)
        empty = partial(torch.empty, shape, dtype=like.dtype, device=like.device)  # of a sharded model too: no slice
        return [generate.KeyValues(empty(), empty()) for _ in self.blocks]


class Llama(CausalLM):
    prefix = "model."
    names = {
        "embed_tokens.weight": "embed.weight",
        "norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
        "layers.{}.self_attn.rotary_emb.inv_freq": None,  # None: known, and not needed
        "layers.{}.input_layernorm.weight": "blocks.{}.attn_norm.weight",
        "layers.{}.post_attention_layernorm.weight": "blocks.{}.mlp_norm.weight",
    } | {f"layers.{{}}.self_attn.{p}.{w}": f"blocks.{{}}.attn.{p}.{w}"
         for p in ("q_proj", "k_proj", "v_proj", "o_proj") for w in ("weight", "bias")
    } | {f"layers.{{}}.mlp.{p}.{w}": f"blocks.{{}}.mlp.{p}.{w}"
         for p in ("gate_proj", "up_proj", "down_proj") for w in ("weight", "bias")}

    def __init__(self, c: config.LlamaConfig):
        super().__init__(c, LlamaBlock, nn.RMSNorm(c.hidden_size, c.rms_norm_eps), head_bias=False)
        self.dropout = nn.Identity()

    def rotary(self, positions: Tensor) -> Tensor:
        return rotary_angles(positions, self.config.d_head, self.config.rope_theta, self.config.rope_scaling)


class GPTJ(CausalLM):
    prefix = "transformer."
    names = {
        "wte.weight": "embed.weight",
        "h.{}.attn.bias": None, "h.{}.attn.masked_bias": None,  # old files hold the causal mask
        "h.{}.attn.out_proj.weight": "blocks.{}.attn.o_proj.weight",
    } | {f"{a}.{w}": f"{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("ln_f", "norm"), ("lm_head", "head"), ("h.{}.ln_1", "blocks.{}.norm"),
        ("h.{}.mlp.fc_in", "blocks.{}.mlp.fc_in"), ("h.{}.mlp.fc_out", "blocks.{}.mlp.fc_out"))
    } | {f"h.{{}}.attn.{p}.weight": f"blocks.{{}}.attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj")}

    def __init__(self, c: config.GPTJConfig):
        super().__init__(c, GPTJBlock, nn.LayerNorm(c.hidden_size, c.layer_norm_eps), head_bias=True)
        self.dropout = nn.Dropout(c.embd_pdrop)

    def rotary(self, positions: Tensor) -> Tensor:
        return rotary_angles(positions, self.config.rotary_dim or self.config.d_head, 10000.0)


class BertEmbeddings(nn.Module):
    """Word + position + segment, normalised: its output is BERT's h0."""

    def __init__(self, c: config.BertConfig):
        super().__init__()
        self.word = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.segment = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor) -> Tensor:
        h = self.word(input_ids) + self.position(positions) + self.segment(token_type_ids)
        return self.dropout(self.norm(h))


class BertHead(nn.Module):
    """BERT's pooler (tanh of a linear of the first token) and a linear on it: n classes, or n = 1 number."""

    def __init__(self, c: config.BertConfig, num_labels: int):
        super().__init__()
        self.pooler = nn.Linear(c.hidden_size, c.hidden_size)
        self.out = nn.Linear(c.hidden_size, num_labels)
        self.dropout = nn.Dropout(c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.pooler(h[:, 0]))))  # (B, num_labels)


class Bert(Transformer):
    prefix = "bert."
    names = {
        "embeddings.word_embeddings.weight": "embeddings.word.weight",
        "embeddings.position_embeddings.weight": "embeddings.position.weight",
        "embeddings.token_type_embeddings.weight": "embeddings.segment.weight",
        "embeddings.position_ids": None,
        "cls.predictions.bias": None, "cls.predictions.decoder.weight": None, "cls.predictions.decoder.bias": None,
    } | {f"{a}.{w}": b and f"{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("embeddings.LayerNorm", "embeddings.norm"), ("pooler.dense", "classifier.pooler"),
        ("classifier", "classifier.out"), ("cls.seq_relationship", None), ("cls.predictions.transform.dense", None),
        ("cls.predictions.transform.LayerNorm", None),
        ("encoder.layer.{}.attention.self.query", "blocks.{}.attn.q_proj"),
        ("encoder.layer.{}.attention.self.key", "blocks.{}.attn.k_proj"),
        ("encoder.layer.{}.attention.self.value", "blocks.{}.attn.v_proj"),
        ("encoder.layer.{}.attention.output.dense", "blocks.{}.attn.o_proj"),
        ("encoder.layer.{}.attention.output.LayerNorm", "blocks.{}.attn_norm"),
        ("encoder.layer.{}.intermediate.dense", "blocks.{}.mlp.fc_in"),
        ("encoder.layer.{}.output.dense", "blocks.{}.mlp.fc_out"),
        ("encoder.layer.{}.output.LayerNorm", "blocks.{}.mlp_norm"))}

    def __init__(self, c: config.BertConfig, num_labels: int | None = None):
        super().__init__()
        self.config = c
        self.embeddings = BertEmbeddings(c)
        self.blocks = nn.ModuleList(BertBlock(c) for _ in range(c.num_hidden_layers))
        self.classifier = BertHead(c, num_labels) if num_labels else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, *,
                labels: Tensor | None = None, return_hidden: bool = False) -> Tensor | list[Tensor]:
        """Last hidden states (B, T, d); with a classification head its logits (B, n), with `labels` (B,) too the mean
        cross-entropy, or the mean squared error for n = 1. ValueError for more tokens than there are positions."""
        T, most = input_ids.shape[1], self.config.max_position_embeddings
        if T > most:
            raise ValueError(f"found {T} tokens, expected at most {most}, the positions this BERT was trained with")
        positions = torch.arange(T, device=input_ids.device)[None]
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask.bool()[:, None, None]  # (B, 1, 1, T)
            if not bool(attention_mask[:, 0].all()):  # padded on the left: the first real token has position 0
                positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        states = self.run(self.embeddings(input_ids, positions, types), Context(mask))
        if return_hidden:
            return states
        if self.classifier is None:
            return states[-1]
        logits = self.classifier(states[-1])
        if labels is None:
            return logits
        if logits.shape[-1] == 1:
            return F.mse_loss(generate.to_float32(logits).squeeze(-1), labels.to(generate.to_float32(logits).dtype))
        return F.cross_entropy(generate.to_float32(logits), labels)


FAMILIES = {"bert": Bert, "gptj": GPTJ, "llama": Llama}


def from_pretrained(name_or_dir: str | PathLike, dtype: torch.dtype = torch.float32, device: str = "cpu",
                    num_labels: int | None = None, base_bits: int | None = None) -> nn.Module:
    """The model of a short name, folder, .gguf file or hub id (see locate.py), in eval mode; .config is the
    family's Config. `num_labels`: BERT with a head of so many classes (1: a number), new where the file has none.
    `base_bits` 8 or 4: the blocks' linear weights in so many bits (see quantized.py), each as it comes from disk.

    Raises ValueError naming an unsupported setting or a missing, unknown or mis-shaped tensor."""
    path = locate.locate(name_or_dir)
    m = build(config.read_spec(path), path, num_labels)
    expected, tied = dict(m.named_parameters()), getattr(m.config, "tie_word_embeddings", False)
    for name, tensor in weights.tensors(path):
        new = weights.rename(weights.old_spelling(name, m.prefix), m.names, path)
        if new is None or new == "head.weight" and tied or new.startswith("classifier.") and not num_labels:
            continue
        if new not in expected:
            raise ValueError(f"{path}: found tensor {files.quoted(name)}, expected none of that name with this config.json")
        if tensor.shape != expected[new].shape:
            raise ValueError(f"{path}: tensor {name!r}: found shape {list(tensor.shape)}, expected "
                             f"{list(expected[new].shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: tensor {name!r}: found {tensor.dtype}, expected floating-point numbers")
        if base_bits and new.startswith("blocks.") and tensor.ndim == 2:  # norms and biases stay as they are
            name = new.removesuffix(".weight")
            m.set_submodule(name, quantized.QuantizedLinear(m.get_submodule(name), tensor.to(device), base_bits))
        else:
            put(m, new, tensor.to(device, dtype))
        del expected[new]
    if tied:
        expected.pop("head.weight")
        m.head.weight = m.embed.weight
    if missing := [n for n in expected if not n.startswith("classifier.")]:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]!r}; "
                         f"expected a whole {type(m).__name__}")
    for name, empty in expected.items():  # a new head: small weights, no bias
        put(m, name, torch.randn(empty.shape, dtype=dtype).to(device) * 0.02 if name.endswith("weight") else
            torch.zeros(empty.shape, dtype=dtype, device=device))
    return m.eval()


def build(said: dict, path: object = "config.json", num_labels: int | None = None) -> nn.Module:
    """A model without weights (on the meta device), from what config.json said."""
    c = config.parse(said, path)
    kind = FAMILIES[said["model_type"]]
    if num_labels and kind is not Bert:
        raise ValueError(f"num_labels {num_labels}: found a {kind.__name__}, expected a BERT; only it has a classifier")
    with torch.device("meta"), Undrawn():
        return kind(c, num_labels) if num_labels else kind(c)


class Undrawn(TorchFunctionMode):
    """Skips the drawing of initial weights: without storage there is nothing to draw, and PyTorch takes a second to
    import what that needs."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        drawn = f in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)
        return None if drawn else f(*args, **(kwargs or {}))


def put(m: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(m.get_submodule(owner), leaf, nn.Parameter(tensor))


def loss(m: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, **inputs) -> Tensor:
    """Mean cross-entropy of the labelled tokens, each predicted from those before it; labels (B, T), -100: not asked.
    For a BERT with a head: of labels (B,). Goes through m.__call__, as do hidden_states and generate."""
    return m(input_ids, attention_mask, labels=labels, **inputs)
