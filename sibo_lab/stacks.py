"""Stacks of blocks: which one a module stands in, what its first block reads, and which of its modules can take that.

What no name or shape tells, that a layer reshapes its tokens or reads weights past its modules, is listed by class."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import dropwhile
from typing import NamedTuple

import torch
from torch import nn

from sibo_lab.files import near, quoted

FUSED = re.compile("MultiheadAttention|TransformerEncoderLayer|WavLMAttention")  # they read weights, and call nothing
QKV = re.compile(r"(w|c_|to_|project_)?(q|k|v|kv|qkv|query|key|value)(_a)?(_proj|_lin|_proj_with_mqa)?|query_key_value|"
                 "c_attn|in_proj", re.I)  # also fused; q_a and kv_a project down from d
FFN_IN = re.compile(r"(gate_)?up_proj|fc_?1|fc_in|c_fc|dense_h_to_4h|w3|wi(_1)?|lin(ear)?_?1|layer_1|w_1|weights_in|"
                    r"ffn|ffn\.0|(.*\.)?intermediate(\.dense)?", re.I)
CROSS = re.compile(r"cross|encdec|(enc(oder)?(_?dec(oder)?)?|src|source|mem(ory)?|context|cond|inter|co|c|x)_?att|"
                   "attn?_?2", re.I)
EXPERT = re.compile(r"expert|moe|shared", re.I)
UNFIT = {  # by how the class of a block, or of a part of it, begins: why no h0 of (B, T, d) fits modules of that name
    "OPTDecoderLayer": (r"fc\d", "whose layer puts all tokens in one row before it"),
    "Llama4Text|HiggsAudio": ("feed_forward|mlp", "whose layer puts all tokens in one row"),
    "LongformerLayer|LEDEncoderLayer|MLCD": (r"query|key|value|[qkv]_proj", "whose attention turns (B, T, d)"),
    "Swin|Donut|Segformer|Pvt|Hiera|Cvt|GLPN|Levit|FocalNet|Nat[A-Z]|Dinat|MViT|Sam[A-Z23]|Funnel|VitDet|GroupViT|"
    "PatchTST|Time[Ss]former|PegasusX|SwiftFormer|GraniteDocling": ("", "whose layers pool, cut or add tokens"),
    "MobileBertLayer": ("", "whose layers work on other widths than they pass on"),
    "DisentangledSelfAttention": (r"(query|key)_proj", "which reads relative positions too"),
    "SuperGlue": ("key|value", "which reads the other image's keypoints in every second layer"),
    "T5Gemma2MergedAttention": ("[kv]_proj", "which reads the encoder's states too"),
    "LxmertXLayer": ("", "whose layers read two sequences"),
    "HrmText": ("", "whose stacks run in a loop, so that what they read is no token's representation"),
    r"\w*HyperConnection|Gemma3nTextAltUp": ("", "whose layers read several streams at once"),
}


class Anatomy(NamedTuple):
    """The modules of a model by name, and the stack of each that stands in one."""

    modules: dict[str, nn.Module]
    stacks: dict[str, "Stack"]

    @classmethod
    def of(cls, m: nn.Module) -> "Anatomy":
        modules, lists, stacks = dict(m.named_modules()), {}, {}
        for name in modules:
            parts = name.split(".")
            for parent in (".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()):
                if parent not in lists:
                    lists[parent] = stack_at(modules, parent)
                if lists[parent]:
                    stacks[name] = lists[parent]
                    break
        return cls(modules, stacks)


class Stack(NamedTuple):
    """A list of blocks. h0 is what the first of `sources` to run reads (an embedding: writes), in a pass of `owner`."""

    name: str  # of the list
    owner: str  # the nearest module that calls its blocks
    sources: tuple[str, ...]  # its blocks
    d: int | None  # the width of h0, where it is known
    repeats: int = 1  # how often one block stands in it
    nested: bool = False  # whether a block may be a model with blocks of its own


def widths(x: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module: nn.Linear, or GPT-2's Conv1D, which stores Wᵀ."""
    if isinstance(x, nn.Linear):
        return x.in_features, x.out_features
    return tuple(x.weight.shape) if type(x).__name__ == "Conv1D" else None


@torch.no_grad()
def is_affine(x: nn.Module) -> bool:
    """Whether a linear module computes h Wᵀ + b from a weight of 16 bits or more, and so would with another W: not if
    it is quantised, or its class, or a hook, rounds or computes something as it runs."""
    if "weight" not in x._parameters or not x.weight.is_floating_point() or x.weight.element_size() < 2:
        return False
    W, b = x.weight if isinstance(x, nn.Linear) else x.weight.T, x.bias
    h = torch.arange(1.0, 2 * W.shape[1] + 1, device=W.device).sin().view(1, 2, -1).to(W.dtype)
    out, exact = x(h), h.float() @ W.T.float() + (0 if b is None else b.float())
    out = out[0] if isinstance(out, tuple) else out
    most = max(torch.finfo(out.dtype).eps, 2.0**-9)  # TF32, and sums in float16, are no more exact
    return out.shape == exact.shape and bool((out - exact).norm() <= most * exact.norm())


def is_embedding(x: nn.Module) -> bool:
    """It reads ids, so h0 can only be what it writes: nn.Embedding, or BERT's sum of several."""
    several = any(isinstance(child, nn.Embedding) for child in x.children())
    return isinstance(x, nn.Embedding) or several and ("Embedding" in type(x).__name__ or not any(
        map(widths, x.modules())))


def caller(modules: dict[str, nn.Module], name: str) -> str:
    """The nearest module that calls what is in it, from `name` upward. nn.Sequential may be iterated over instead."""
    while name and is_list(modules[name]):
        name = name.rpartition(".")[0]
    return name


def is_list(x: nn.Module) -> bool:
    return is_container(x) or isinstance(x, nn.Sequential)


def is_container(x: nn.Module) -> bool:
    """It has no forward pass of its own: nn.ModuleList, nn.ModuleDict."""
    return type(x).forward is nn.Module.forward


def called(modules: dict[str, nn.Module], name: str) -> str:
    """The first module that runs when a block does, where blocks are lists: for attention, mlp in self.layers."""
    while is_container(modules[name]) and any(True for _ in modules[name].children()):
        name = f"{name}.{next(modules[name].named_children())[0]}"
    return name


def stack_at(modules: dict[str, nn.Module], parent: str) -> Stack | None:
    """The stack that a list of blocks is; None for a list of parts of blocks, or of whole models."""
    blocks = {k: x for k, x in modules[parent].named_children() if not is_embedding(x)}
    bare = bool(parent) and "." not in parent and is_container(modules[parent])  # of the model itself, not of a block
    may_be = partial(may_be_block, bare=bare)
    if not are_blocks([x for x in modules[parent]._modules.values() if not is_embedding(x)], may_be) or re.search(
            "(Attention|FFN|MLP)$", type(next(iter(blocks.values()))).__name__):
        return None
    d = width(next(filter(may_be, blocks.values())))
    models = [*filter(holds_blocks, blocks.values())]
    one = len(blocks) > 1 and [*filter(is_block, blocks.values())] == models[:1]  # beside an embedding's norm, a head
    if models and (one or len(models) == len(blocks) and all(makes_tokens(x, d) for x in models)):
        return None
    blocks = dict(dropwhile(lambda item: not may_be(item[1]), blocks.items()))  # positions, a norm
    first = next(iter(blocks.values()))
    inner = [(n.rpartition(".")[2], [*x.children()]) for n, x in first.named_modules() if is_list(x)]
    nested = len(models) > 1 or any(len(xs) > 1 and len({*map(type, xs)}) == 1 and any(xs[0].children()) and
                                    re.fullmatch("layers?|(res)?blocks?|h", n) for n, xs in inner)
    sources = tuple(called(modules, f"{parent}.{k}".lstrip(".")) for k in blocks)
    repeats = max(Counter(modules[parent]._modules.values()).values())
    return Stack(parent, caller(modules, parent), sources, d, repeats, nested)


def holds_blocks(x: nn.Module) -> bool:
    """Whether it is or holds a list of blocks that are told by their names."""
    return any(is_list(y) and len([*y.children()]) > 1 and all(map(is_block, y.children())) for y in x.modules())


def makes_tokens(x: nn.Module, d: int | None) -> bool:
    """Whether a model has an embedding of its own, or a convolution as a vision model's, outside of its blocks."""
    if is_block(x) and not holds_blocks(x):
        return False
    own = isinstance(x, nn.Embedding) and x.embedding_dim == d or isinstance(x, nn.modules.conv._ConvNd)
    return own or any(makes_tokens(y, d) for y in x.children())


def width(x: nn.Module) -> int | None:
    """What a block reads: as wide as its attention's or feed-forward's input, or its first linear module's."""
    linear = [(n.rpartition(".")[2], w[0]) for n, y in x.named_modules() if (w := widths(y))]
    known = [d for leaf, d in linear if QKV.fullmatch(leaf) or FFN_IN.fullmatch(leaf)]
    return (known or [d for _, d in linear] or [None])[0]


def are_blocks(xs: Sequence[nn.Module], may_be: Callable[[nn.Module], bool]) -> bool:
    """Whether one in a list is a block by its names, or two of one class may be: the parts of a block differ."""
    alike = [type(x) for x in xs if may_be(x)]
    return any(map(is_block, xs)) or len(xs) == len(alike) == 1 or len(alike) > len({*alike})


def may_be_block(x: nn.Module, bare: bool) -> bool:
    """Whether its names tell attention, or a linear module in it (`bare`: or it itself) writes as wide as it reads."""
    return any((n or bare) and (w[1] == width(x) or QKV.fullmatch(n.rpartition(".")[2])) for n, y in x.named_modules()
               if (w := widths(y)))


def is_block(x: nn.Module) -> bool:
    """Whether its names tell attention and a feed-forward."""
    names = [n for n, y in x.named_modules() if widths(y)]
    leaves = [n.rpartition(".")[2] for n in names]
    return any(map(QKV.fullmatch, leaves)) and any(map(FFN_IN.fullmatch, names + leaves))


def why_unfit(a: Anatomy, name: str, named: bool = False) -> str:
    """Why a module of a stack cannot take h0 (`named`: by h0=), by its name or its block's class, or ""."""
    if not (stack := a.stacks.get(name)):
        return ""
    block, _, inner = name.removeprefix(f"{stack.name}.").partition(".")
    if EXPERT.search(inner):
        return "whose rows are not one sequence's tokens in order, as an expert's"
    if reads_another_stack(inner):
        return "which reads another stack's states, as a cross-attention's k and v do"
    kinds = {type(x).__name__ for x in a.modules[f"{stack.name}.{block}".lstrip(".")].modules()}
    doubt = "in a list within a list, of which either may be the blocks; pass h0=" if stack.nested and not named else ""
    return next((why for kind, (leaf, why) in UNFIT.items()
                 if re.search(leaf, inner) and any(re.match(kind, x) for x in kinds)), doubt)


def reads_another_stack(inner: str) -> bool:
    """Whether it is the k or v of a cross-attention."""
    outer, _, leaf = inner.rpartition(".")
    return bool(CROSS.search(outer) and QKV.fullmatch(leaf) and not re.match("(w|c_|to_|project_)?q(?!kv)", leaf, re.I))


def named_source(a: Anatomy, h0: str, getting: Sequence[str]) -> Stack:
    """h0 as the user names it: what that module reads, in a pass of whatever calls it and those that get h0."""
    if len(sources := find(a.modules, h0)) != 1:
        raise ValueError(f"h0 {quoted(h0)}: expected one module, whose input is h0, got {sources}")
    source = a.modules[sources[0]]
    ins = [w[0] for x in source.modules() if (w := widths(x))]
    if is_embedding(source):
        d = list(source.parameters())[-1].shape[-1]
    else:
        d = ins[0] if ins else next((p.shape[-1] for p in source.parameters() if p.dim() == 1), None)  # of a norm
    if (own := a.stacks.get(sources[0])) and not is_embedding(source):
        block = {n: int(n.removeprefix(f"{own.name}.").split(".")[0]) for n in (*getting, *sources)
                 if a.stacks.get(n) == own and n.removeprefix(f"{own.name}.").split(".")[0].isdigit()}
        if early := [n for n in block if block[n] < block[sources[0]]]:
            raise ValueError(f"{early[0]}: expected a module that runs after {sources[0]}, which reads h0, got one of "
                             "a block before it; leave it out of sibo_at")
    common = os.path.commonprefix([name.split(".") for name in (*sources, *getting)])
    return Stack("", caller(a.modules, ".".join(common)), tuple(sources), d)


def own_stack(a: Anatomy, name: str) -> Stack:
    """The stack that a module stands in, or the only one beside it, in the module that runs both."""
    beside = {stack for stack in a.stacks.values() if name.startswith(f"{stack.owner}." if stack.owner else "")}
    if name not in a.stacks and len(beside) != 1:
        raise ValueError(f"{name}: expected a module in a list of blocks, whose first one reads h0, got one outside of "
                         "them; pass h0=, the name of a module that reads h0, leave it out of sibo_at, or pass lam=0")
    return a.stacks.get(name) or beside.pop()


def block_places(a: Anatomy, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of each module (in the model's order), its block's place among the blocks of its stack that have one of `names`,
    and how many these are. Outside of stacks, each module is a block."""
    def block(name):
        stack = a.stacks.get(name)
        return stack, name.removeprefix(f"{stack.name}.").partition(".")[0] if stack else name

    blocks = {}
    for stack, i in dict.fromkeys(map(block, names)):
        blocks.setdefault(stack, []).append(i)
    return {name: (blocks[stack].index(i), len(blocks[stack])) for name in names for stack, i in [block(name)]}


def adaptable_widths(a: Anatomy, name: str, side: str, d: int | None) -> tuple[int, int]:
    """Of what an adapter or LoRA on a module reads and writes. ValueError where it would not run, or be passed by."""
    x, parents = a.modules[name], [a.modules[".".join(name.split(".")[:i])] for i in range(name.count(".") + 1)]
    kinds = [type(parent).__name__ for parent in parents]
    if fused := next(filter(FUSED.fullmatch, kinds), None):
        raise ValueError(f"{name}: expected a module that is called, got one of {fused}, which reads its weights in a "
                         "fused kernel; adapt a module around it")
    if "Mamba" in kinds[-1] and name.endswith(("out_proj", "x_proj", "dt_proj")):
        raise ValueError(f"{name}: expected a module that is called, got one of {kinds[-1]}, whose fast path reads the "
                         "weight; adapt its in_proj")
    if any(is_recorded_by(parent, x) for parent in parents):
        raise ValueError(f"{name}: expected a part of a block, got a whole one, whose output transformers records, for "
                         "hidden_states, before an adapter could change it; adapt the sub-layer that it ends in")
    if linear := widths(x):
        d_in, d_out = linear
        return {"out": (d_out, d_out), "in": (d_in, d_in)}.get(side, linear)
    if d and side in ("out", "parallel") and not is_container(x):
        return d, d  # a sub-layer, as wide as h0 at both ends
    raise ValueError(f"{name}: expected an nn.Linear, or a sub-layer beside a known h0, got a {type(x).__name__}")


def is_recorded_by(m: nn.Module, x: nn.Module) -> bool:
    """Whether a model of transformers hooks `x`, a block, for its hidden_states, from which LLaVA's tower goes on."""
    kinds = (getattr(m, "_can_record_outputs", None) or {}).get("hidden_states", ())
    kinds = [getattr(kind, "target_class", kind) for kind in (kinds if isinstance(kinds, list | tuple) else [kinds])]
    return isinstance(x, tuple(kind for kind in kinds if isinstance(kind, type)))


def find(names: Iterable[str] | nn.Module, target: str) -> list[str]:
    """Those names (of a model: its modules) whose last dotted segments match `target`'s; * is any one segment."""
    names, want = [n for n, _ in names.named_modules()] if isinstance(names, nn.Module) else names, target.split(".")
    return [name for name in names if name and len(tail := name.split(".")[-len(want):]) == len(want)
            and all(w in ("*", t) for w, t in zip(want, tail, strict=True))]


def find_all(m: nn.Module, targets: Sequence[str]) -> list[str]:
    """`find` for several, in the model's order. ValueError with near names if one matches nothing."""
    modules = dict(m.named_modules())
    found = {target: find(modules, target) for target in targets}
    if lost := [target for target in targets if not found[target]]:
        known = {".".join(n.split(".")[-k:]) for n in modules for k in (1, 2)} - {""}
        raise ValueError(f"{quoted(lost[0])}: expected a module of this {type(m).__name__}, got none of that name"
                         + near(lost[0], sorted(known)))
    every = set().union(*found.values())
    return [name for name in modules if name in every]


def patterns(names: Iterable[str], *parts: Sequence[str]) -> tuple[str, ...]:
    """The shortest targets that find, of all names, each part's, and no others."""
    templates = {n: re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", n, count=1).split(".") for n in names}  # * for the block
    alike, found = {}, []
    for name, template in templates.items():
        alike.setdefault(tuple(template), set()).add(name)

    def fits(tail: Sequence[str], template: Sequence[str]) -> bool:
        end = template[-len(tail):]
        return len(end) == len(tail) and all(w == e or w == "*" or e == "*" and w.isdigit()
                                             for w, e in zip(tail, end, strict=True))

    for part in parts:
        chosen = set(part)
        for template in dict.fromkeys(tuple(templates[n]) for n in part):
            tails = (template[-k:] for k in range(1, len(template) + 1))
            short = (t for t in tails if all(same <= chosen for x, same in alike.items() if fits(t, x)))
            found += [".".join(t)] if (t := next(short, None)) else sorted(alike[template] & chosen)
    return tuple(dict.fromkeys(found))
