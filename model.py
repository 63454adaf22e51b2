"""BERT, GPT-J and LLaMA side by side, with the weights of Hugging Face's files.

Sources: Devlin et al. 2019 (BERT), Wang and Komatsuzaki 2021 (GPT-J), Touvron et al. 2023 (LLaMA); names and layouts of
Hugging Face transformers. Departs from the official code: padding changes no result.
Shapes: B sequences, T tokens, d hidden_size, H heads, D head_dim, S tokens seen so far (T without a cache), V words."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sibo_lab import fast, files, parallel
from sibo_lab.backbone import config, locate, quantized, weights
from sibo_lab.backbone.generate import KeyValues, generate, to_float32  # noqa: F401  (model.generate is public)


def rotary_angles(positions: Tensor, dim: int, theta: float, scaling: dict | None = None) -> Tensor:
    """The angles of the dim/2 pairs at each position, (…, T) -> (…, T, dim/2): Su et al. 2021; llama3's scaling, as in
    transformers' modeling_rope_utils.py, stretches only wavelengths beyond the trained context."""
    # first the power, then the inverse, as in training: else logits differ by 1e-4 after 30 layers
    frequency = 1 / theta ** (torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    kind = scaling and scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "longrope":
        frequency = frequency / torch.tensor(scaling["long_factor"], device=positions.device)
    elif kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # over the trained context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    return positions[..., None].float() * frequency


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """LLaMA's layout: element i is paired with i + D/2."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J's layout: element 2i is paired with 2i + 1; only the first rotary_dim elements turn."""
    turning, still = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = turning[..., ::2], turning[..., 1::2]
    return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), still), -1)


@dataclass(frozen=True)
class SharedPrefix:
    """What all rows of a batch begin with, such as a prompt's template, is computed once.

    The rows (B, T, ·) become one, (1, P + B (T−P), ·): P common tokens, then each row's own; only attention sees rows.
    Exact: gradients of common tokens add up (dropout draws one mask for them)."""

    rows: int  # B
    common: int  # P
    own: int  # T − P

    @classmethod
    def of(cls, input_ids: Tensor, labels: Tensor) -> "SharedPrefix | None":
        """Without the last common token: the label after it differs."""
        alike = ((input_ids == input_ids[:1]) & (labels == labels[:1])).all(0)
        common = int(alike.int().cumprod(0).sum()) - 1
        B, T = labels.shape
        return cls(B, common, T - common) if B > 1 and common > 0 else None

    def pack(self, x: Tensor) -> Tensor:
        return fast.pack(x, self.rows, self.common, self.own)

    def unpack(self, x: Tensor) -> Tensor:
        return fast.unpack(x, self.rows, self.common, self.own)


@dataclass
class Context:  # of one forward pass
    mask: Tensor | None  # bool (B, 1, T, S); None: every token sees all earlier ones (BERT: all)
    near: Tensor | None = None  # the same for the layers with a sliding window
    cos: Tensor | None = None  # (B, 1, T, rotary/2)
    sin: Tensor | None = None
    shared: SharedPrefix | None = None


Past = tuple[Tensor, Tensor] | None  # a layer's keys and values, (B, H, S, D), the last T to be written


class Attention(nn.Module):
    """Groups of query heads may share a key/value head (GQA). `slides`: only the last tokens are seen."""

    def __init__(self, c: config.Config, *, bias: bool, out_bias: bool, causal: bool, rotate: Callable | None,
                 dropout: float, out_dropout: float = 0.0, head_norm: Callable = nn.Identity, slides: bool = False):
        super().__init__()
        d, D = c.hidden_size, c.d_head
        self.q_proj = nn.Linear(d, c.num_attention_heads * D, bias)
        self.k_proj = nn.Linear(d, c.heads_kv * D, bias)
        self.v_proj = nn.Linear(d, c.heads_kv * D, bias)
        self.o_proj = nn.Linear(c.num_attention_heads * D, d, out_bias)
        self.q_norm, self.k_norm, self.dropout = head_norm(), head_norm(), nn.Dropout(out_dropout)
        self.head_dim, self.causal, self.rotate, self.p, self.slides = D, causal, rotate, dropout, slides

    def forward(self, h: Tensor, ctx: Context, past: Past) -> Tensor:
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if ctx.shared:
            q, k, v = map(ctx.shared.unpack, (q, k, v))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        T = q.shape[2]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotate:
            q, k = (self.rotate(x, ctx.cos, ctx.sin) for x in (q, k))
        if past:
            for seen, new in zip(past, (k, v), strict=True):
                seen[:, :, -T:] = new
            k, v = past  # (B, H, S, D)
        mask = ctx.near if self.slides else ctx.mask
        groups, causal = q.shape[1] // k.shape[1], self.causal and mask is None
        if T == 1:  # a group's heads pass as queries of one head, without copies of k and v
            q, causal = q.reshape(q.shape[0], -1, groups, self.head_dim), False
        elif groups > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        out = fast.attend(q, k, v, mask, causal, self.p if self.training else 0.0)
        out = out.reshape(out.shape[0], -1, T, self.head_dim).transpose(1, 2).flatten(2)
        return self.dropout(self.o_proj(ctx.shared.pack(out) if ctx.shared else out))  # (B, T, d)


class MLP(nn.Module):
    """GPT-J's and BERT's."""

    def __init__(self, c: config.Config, dropout: float):
        super().__init__()
        d, inner = c.hidden_size, c.intermediate_size or 4 * c.hidden_size
        self.fc_in, self.fc_out = nn.Linear(d, inner), nn.Linear(inner, d)
        self.act, self.dropout = config.ACTIVATIONS[c.hidden_act], nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.dropout(self.fc_out(self.act(self.fc_in(h))))


class SwiGLU(nn.Module):
    """LLaMA's."""

    def __init__(self, c: config.LlamaStyle):
        super().__init__()
        d, inner = c.hidden_size, c.intermediate_size
        self.gate_proj = nn.Linear(d, inner, c.mlp_bias)
        self.up_proj = nn.Linear(d, inner, c.mlp_bias)
        self.down_proj = nn.Linear(inner, d, c.mlp_bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def layer_norm(c: config.Config) -> nn.Module:
    return nn.LayerNorm(c.hidden_size, c.layer_norm_eps)


class LlamaBlock(nn.Module):
    """LLaMA's, Mistral's, Qwen's and SmolLM3's: the config says what differs."""

    def __init__(self, c: config.LlamaStyle, layer: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attn = Attention(c, bias=c.attention_bias or c.qkv_bias, out_bias=c.attention_bias, causal=True,
                              rotate=rotate_halves if c.rotates(layer) else None, dropout=c.attention_dropout,
                              head_norm=partial(nn.RMSNorm, c.d_head, c.rms_norm_eps) if c.qk_norm else nn.Identity,
                              slides=c.slides(layer))
        self.mlp_norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, h: Tensor, ctx: Context, past: Past) -> Tensor:
        h = h + self.attn(self.attn_norm(h), ctx, past)
        return h + self.mlp(self.mlp_norm(h))


class GPTJBlock(nn.Module):
    def __init__(self, c: config.GPTJConfig):
        super().__init__()
        self.norm = layer_norm(c)
        self.attn = Attention(c, bias=False, out_bias=False, causal=True, rotate=rotate_neighbours,
                              dropout=c.attn_pdrop, out_dropout=c.resid_pdrop)
        self.mlp = MLP(c, c.resid_pdrop)

    def forward(self, h: Tensor, ctx: Context, past: Past) -> Tensor:
        normed = self.norm(h)
        return h + self.attn(normed, ctx, past) + self.mlp(normed)  # both in parallel


class BertBlock(nn.Module):
    def __init__(self, c: config.BertConfig):
        super().__init__()
        self.attn = Attention(c, bias=True, out_bias=True, causal=False, rotate=None,
                              dropout=c.attention_probs_dropout_prob, out_dropout=c.hidden_dropout_prob)
        self.attn_norm = layer_norm(c)
        self.mlp = MLP(c, c.hidden_dropout_prob)
        self.mlp_norm = layer_norm(c)

    def forward(self, h: Tensor, ctx: Context, past: Past) -> Tensor:
        h = self.attn_norm(h + self.attn(h, ctx, past))
        return self.mlp_norm(h + self.mlp(h))


class Transformer(nn.Module):
    drawn = ()  # the parameters that load_weights drew at random
    grad_checkpoint = False  # compute a block's activations again in the backward pass instead of keeping them
    kernels = {"dropout": fast.dropout, "linear": fast.mixed_linear}  # for what adapts this model

    def run(self, h: Tensor, ctx: Context, cache: list[KeyValues] | None = None) -> list[Tensor]:
        states, T = [h], h.shape[1]  # (B, T, d)
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            past = past and past.grow(T)
            step = partial(recompute, block, use_reentrant=False) if self.grad_checkpoint and self.training else block
            states.append(step(states[-1], ctx, past))
        return states

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> list[Tensor]:
        """L+1 tensors (B, T, d): what enters the first block, then each block's output, the last one normalized."""
        return self(input_ids, attention_mask, return_hidden=True, **inputs)


class CausalLM(Transformer):
    window = None  # how many tokens a layer sees where it slides
    share_prefix = True  # in training, what all rows begin with is computed once

    def __init__(self, c: config.Config, block: Callable, norm: nn.Module, dropout: nn.Module, head_bias: bool):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(map(block, range(c.num_hidden_layers)))
        self.norm = norm
        self.head = nn.Linear(c.hidden_size, c.vocab_size, head_bias)
        self.dropout = dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor | None = None,
                cache: list[KeyValues] | None = None, last: int = 1,
                return_hidden: bool = False) -> Tensor | list[Tensor]:
        """Logits (B, T, V) of the next token at each position.

        `labels` (B, T): instead, the mean cross-entropy of the labelled tokens; -100 marks the others.
        `cache` (see new_cache): input_ids continue it, in place, attention_mask (B, S) covers both; logits (B, last, V)
        of the `last` positions. `return_hidden`: see hidden_states."""
        T, past = input_ids.shape[1], cache[0].length if cache else 0
        i, mask = torch.arange(past + T, device=input_ids.device), None
        positions = i[None]  # (B, S), of all tokens seen so far
        if past and T > 1 and attention_mask is None:
            raise ValueError(f"{T} tokens at once after a cache of {past}: pass the attention_mask, padding included")
        if attention_mask is not None and (past and T > 1 or not attention_mask.all()):
            seen = attention_mask.bool()
            positions = (seen.cumsum(-1) - 1).clamp(min=0)  # padding takes no position
            # padding sees itself: no row of the softmax is empty
            mask = (i <= i[past:, None]) & seen[:, None, None] | (i == i[past:, None])
        most = self.config.max_position_embeddings
        if past + T > most and (n := int(positions.max()) + 1) > most:
            self.beyond(n)
        near = mask
        if self.window and past + T > self.window:
            near = positions[:, None, None] > positions[:, None, -T:, None] - self.window
            near = near & ((i <= i[past:, None]) if mask is None else mask)
        sharing = self.share_prefix and labels is not None and mask is None
        shared = SharedPrefix.of(input_ids, labels) if sharing else None
        h = self.embed(shared.pack(input_ids) if shared else input_ids)  # (B, T, d): this is h0
        angles = self.rotary(positions[:, -T:])[:, None]  # (B, 1, T, rotary/2)
        ctx = Context(mask, near, angles.cos().to(h.dtype), angles.sin().to(h.dtype), shared)
        states = self.run(self.dropout(h), ctx, cache)
        if return_hidden:
            return [*states[:-1], self.norm(states[-1])]
        if labels is not None:
            return self.mean_loss(states[-1], labels, shared)
        return self.head(self.norm(states[-1] if cache is None else states[-1][:, -last:]))

    def beyond(self, n: int) -> None:
        """Of `n` tokens in a text, more than the config's positions; as in transformers, rotary ones go on."""
        say_beyond(self.config.max_position_embeddings)

    def mean_loss(self, h: Tensor, labels: Tensor, shared: SharedPrefix | None) -> Tensor:
        targets, weight = F.pad(labels[:, 1:], (0, 1), value=-100), torch.ones_like(labels)
        if shared:
            targets, weight = shared.pack(targets), shared.pack(weight)
            weight[:, :shared.common] = shared.rows
        asked = targets != -100  # the head is needed nowhere else
        h, targets, weight = self.norm(h[asked]), targets[asked], weight[asked]
        if type(self.head) is nn.Linear:
            return fast.cross_entropy(h, self.head.weight, self.head.bias, targets, weight)
        losses = F.cross_entropy(to_float32(self.head(h)), targets, reduction="none")  # a head with LoRA on it
        return (losses * weight).sum() / weight.sum()

    def new_cache(self, batch: int, capacity: int) -> list[KeyValues]:
        """Empty, for `batch` sequences of up to `capacity` tokens."""
        c, like = self.config, self.norm.weight  # like.new_empty would be sharded too
        empty = partial(torch.empty, (batch, c.heads_kv, capacity, c.d_head), dtype=like.dtype, device=like.device)
        return [KeyValues(empty(), empty()) for _ in self.blocks]


@cache
def say_beyond(most: int) -> None:
    """Once in a process."""
    if not parallel.rank():
        print(f"a text has more tokens than this model has positions, {most} (max_position_embeddings in config.json): "
              "it goes on beyond what it was trained on", file=sys.stderr)


class Llama(CausalLM):
    prefix = "model."
    names = weights.names({"embed_tokens": "embed", "norm": "norm", "lm_head": "head"}, "layers.{}", {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
        "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj", "self_attn.o_proj": "attn.o_proj",
        "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
        "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
    })

    def __init__(self, c: config.LlamaStyle):
        super().__init__(c, partial(LlamaBlock, c), nn.RMSNorm(c.hidden_size, c.rms_norm_eps), nn.Identity(),
                         head_bias=False)
        self.window = c.sliding_window if any(map(c.slides, range(c.num_hidden_layers))) else None
        self.rotary = partial(rotary_angles, dim=c.d_head, theta=c.rope_theta, scaling=c.rope_scaling)


class GPTJ(CausalLM):
    prefix = "transformer."
    names = weights.names({"wte": "embed", "ln_f": "norm", "lm_head": "head"}, "h.{}", {
        "ln_1": "norm", "attn.q_proj": "attn.q_proj", "attn.k_proj": "attn.k_proj", "attn.v_proj": "attn.v_proj",
        "attn.out_proj": "attn.o_proj", "mlp.fc_in": "mlp.fc_in", "mlp.fc_out": "mlp.fc_out",
    }, unused=["h.{}.attn.bias", "h.{}.attn.masked_bias"])  # old files hold the causal mask

    def __init__(self, c: config.GPTJConfig):
        super().__init__(c, lambda _: GPTJBlock(c), layer_norm(c), nn.Dropout(c.embd_pdrop), head_bias=True)
        self.rotary = partial(rotary_angles, dim=c.rotary_dim or c.d_head, theta=10000.0)

    def beyond(self, n: int) -> None:
        """ValueError: transformers has a table of so many positions."""
        raise ValueError(f"expected at most {self.config.max_position_embeddings} tokens, the positions of this GPT-J, "
                         f"got {n}; shorten the text")


class BertEmbeddings(nn.Module):
    """Word + position + segment, normalized: this is BERT's h0."""

    def __init__(self, c: config.BertConfig):
        super().__init__()
        d = c.hidden_size
        self.word = nn.Embedding(c.vocab_size, d)
        self.position = nn.Embedding(c.max_position_embeddings, d)
        self.segment = nn.Embedding(c.type_vocab_size, d)
        self.norm = layer_norm(c)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor) -> Tensor:
        h = self.word(input_ids) + self.position(positions) + self.segment(token_type_ids)
        return self.dropout(self.norm(h))


class BertHead(nn.Module):
    """The pooler, on the first token, and a linear layer to num_labels classes (1: to a number)."""

    def __init__(self, c: config.BertConfig, num_labels: int):
        super().__init__()
        self.pooler = nn.Linear(c.hidden_size, c.hidden_size)
        self.out = nn.Linear(c.hidden_size, num_labels)
        self.dropout = nn.Dropout(c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = h[:, 0].to(self.pooler.weight.dtype)
        return self.out(self.dropout(torch.tanh(self.pooler(h))))  # (B, num_labels)


class Bert(Transformer):
    prefix = "bert."
    names = weights.names({
        "embeddings.word_embeddings": "embeddings.word", "embeddings.position_embeddings": "embeddings.position",
        "embeddings.token_type_embeddings": "embeddings.segment", "embeddings.LayerNorm": "embeddings.norm",
        "pooler.dense": "classifier.pooler", "classifier": "classifier.out",
        "qa_outputs": None, "cls.seq_relationship": None, "cls.predictions.decoder": None,  # other tasks' heads
        "cls.predictions.transform.dense": None, "cls.predictions.transform.LayerNorm": None,
    }, "encoder.layer.{}", {
        "attention.self.query": "attn.q_proj", "attention.self.key": "attn.k_proj",
        "attention.self.value": "attn.v_proj", "attention.output.dense": "attn.o_proj",
        "attention.output.LayerNorm": "attn_norm", "output.LayerNorm": "mlp_norm",
        "intermediate.dense": "mlp.fc_in", "output.dense": "mlp.fc_out",
    }, unused=["cls.predictions.bias"])

    def __init__(self, c: config.BertConfig, num_labels: int | None = None):
        super().__init__()
        self.config = c
        self.embeddings = BertEmbeddings(c)
        self.blocks = nn.ModuleList(BertBlock(c) for _ in range(c.num_hidden_layers))
        self.classifier = BertHead(c, num_labels) if num_labels else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, *,
                labels: Tensor | None = None, return_hidden: bool = False) -> Tensor | list[Tensor]:
        """Hidden states (B, T, d); with a head its logits (B, n); with `labels` (B,) too the mean cross-entropy, or for
        n = 1 the mean squared error. ValueError for more tokens than positions."""
        T, most = input_ids.shape[1], self.config.max_position_embeddings
        if T > most:
            raise ValueError(f"expected at most {most} tokens, the positions of this BERT, got {T}; shorten the text")
        positions, mask = torch.arange(T, device=input_ids.device)[None], None
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask.bool()[:, None, None]  # (B, 1, 1, T)
            if not attention_mask[:, 0].all():  # padding on the left takes no position
                positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        if self.config.type_vocab_size == 1 and token_type_ids is not None and types.any():
            raise ValueError("token_type_ids: expected 0 throughout, this BERT has one type (type_vocab_size 1), got "
                             "others, as of pairs of sentences; use another BERT")
        states = self.run(self.embeddings(input_ids, positions, types), Context(mask))
        if return_hidden:
            return states
        out = self.classifier(states[-1]) if self.classifier else states[-1]
        if labels is None:
            return out
        logits = to_float32(out)
        if logits.shape[1] == 1:
            return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)


FAMILIES = {"bert": Bert, "gptj": GPTJ} | dict.fromkeys(config.LLAMAS, Llama)


def from_pretrained(name_or_dir: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu",
                    num_labels: int | None = None, base_bits: int | None = None) -> nn.Module:
    """The model of a short name, folder, .gguf file or hub id (see locate.py), in eval mode; m.config is its Config.
    The rest as in build and load_weights."""
    path = locate.locate(name_or_dir)
    return load_weights(build(config.read_spec(path), path, num_labels), path, dtype, device, base_bits)


def build(spec: dict, path: object = "config.json", num_labels: int | None = None) -> nn.Module:
    """A model without weights (on the meta device) from a config.json's contents; `num_labels`: a BERT with a head of
    so many classes (1: a number). ValueError names `path` and what is not supported."""
    c, family = config.parse(spec, path), FAMILIES[spec["model_type"]]
    if num_labels and family is not Bert:
        raise ValueError(f"num_labels {num_labels}: expected a BERT, only it has a classifier, got a {family.__name__}")
    with torch.device("meta"), SkipInit():
        return family(c, num_labels) if num_labels else family(c)


def check(m: nn.Module, path: Path) -> None:
    """Whether load_weights could fill `m`, by the names and shapes alone; says on stderr if a pooler is drawn."""
    found = {name for name, _ in fitting(m, path, numbers=False)}
    if getattr(m, "classifier", None) and "classifier.pooler.weight" not in found and not parallel.rank():
        print(f"{path}: has no pooler; a random one is trained with the head", file=sys.stderr)


def fitting(m: nn.Module, path: Path, numbers: bool = True) -> files.Tensors:
    """The tensors of the folder or .gguf file at `path` by our names; without `numbers` a .gguf file's are on the meta
    device. ValueError names a missing, unexpected or mis-shaped one."""
    expected = dict(m.named_parameters())
    for name, tensor in weights.tensors(path, numbers):
        new = weights.rename(name, m.names, path, m.prefix)
        if new is None or new.startswith("classifier.") and m.classifier is None:
            continue
        if new not in expected:
            raise ValueError(f"{path}: unexpected tensor {files.quoted(name)} for this config.json")
        if tensor.shape != expected[new].shape or tensor.dtype not in weights.DTYPES:
            raise ValueError(f"{path}: tensor {name!r}: expected float16 to float64 numbers of shape "
                             f"{list(expected[new].shape)}, got {tensor.dtype} of shape {list(tensor.shape)}")
        del expected[new]
        yield new, tensor
    if m.config.tie_word_embeddings and expected.pop("head.weight", None) is None:  # one of the two is enough
        expected.pop("embed.weight", None)
    if missing := [n for n in expected if not n.startswith("classifier.")]:
        raise ValueError(f"{path}: {len(missing)} tensors are missing for a {type(m).__name__}, such as {missing[0]!r}")


def load_weights(m: nn.Module, path: Path, dtype: torch.dtype, device: str, base_bits: int | None) -> nn.Module:
    """Fills `m`, as built, from the folder or .gguf file at `path`; returns it in eval mode.

    A BERT's head that the file lacks starts small and random: `m.drawn`. `base_bits` 8 or 4: the blocks' matrices are
    quantized as they come from disk. ValueError as in `fitting`."""
    empty = dict(m.named_parameters())
    for name, tensor in fitting(m, path):
        del empty[name]
        if base_bits and name.startswith("blocks.") and tensor.ndim == 2:  # norms and biases stay as they are
            name = name.removesuffix(".weight")
            m.set_submodule(name, quantized.QuantizedLinear(m.get_submodule(name), tensor.to(device), base_bits))
        else:
            put(m, name, tensor.to(device, stored_as(dtype, name)))
    if m.config.tie_word_embeddings:
        tie(m, empty)
    for name, like in empty.items():  # a new head: small weights, no bias
        draw = torch.randn if name.endswith("weight") else torch.zeros
        put(m, name, (draw(like.shape, dtype=stored_as(dtype, name)) * 0.02).to(device))
    m.drawn = tuple(empty)
    return m.eval()


def stored_as(dtype: torch.dtype, name: str) -> torch.dtype:
    """A parameter's dtype in a model of `dtype`: a BERT's head is trained, and 16 bits would round small steps away."""
    return torch.promote_types(dtype, torch.float32) if name.startswith("classifier.") else dtype


def tie(m: nn.Module, missing: dict) -> None:
    """The head becomes the embedding, or what is there of the two both; as in transformers, a head that the file has
    and that differs stays a head of its own."""
    there = [m.get_parameter(name) for name in ("head.weight", "embed.weight") if missing.pop(name, None) is None]
    if len(there) == 2 and not torch.equal(*there):
        m.config = replace(m.config, tie_word_embeddings=False)
    else:
        m.head.weight = m.embed.weight = there[-1]


class SkipInit(torch.overrides.TorchFunctionMode):
    """Draws no weights on the meta device, which holds none: PyTorch would import for a second."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        drawing = f in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)
        return None if drawing else f(*args, **(kwargs or {}))


def put(m: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(m.get_submodule(owner), leaf, nn.Parameter(tensor))


def loss(m: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, **inputs) -> Tensor:
    """The mean cross-entropy of the labelled tokens, each predicted from those before it: labels (B, T), -100 for none;
    of a BERT with a head: labels (B,)."""
    return m(input_ids, attention_mask, labels=labels, **inputs)
