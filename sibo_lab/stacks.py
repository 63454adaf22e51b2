"""Stacks of blocks: which one a module stands in, what its first block reads, and which of its modules can take that.

What no name or shape tells, that a layer reshapes its tokens or reads weights past its modules, is listed by class."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from sibo_lab.files import near, quoted

FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
QKV = re.compile(r"(w|c_|to_|project_)?(q|k|v|kv|qkv|query|key|value)(_a)?(_proj|_lin|_proj_with_mqa)?|query_key_value|"
                 "c_attn|in_proj", re.I)  # also fused; q_a and kv_a project down from d
FFN_IN = re.compile(r"(gate_)?up_proj|fc_?1|fc_in|c_fc|dense_h_to_4h|w3|wi(_1)?|lin(ear)?_?1|layer_1|w_1|weights_in|"
                    r"ffn|ffn\.0|(.*\.)?intermediate(\.dense)?", re.I)
CROSS = re.compile(r"cross|(enc(oder)?(_?dec(oder)?)?|src|source|memory|context|inter)_?att", re.I)
EXPERT = re.compile(r"expert|moe|shared", re.I)
UNFIT = {  # by the class of what a block is or holds: why no h0 of (B, T, d) reaches modules of that name
    "OPTDecoderLayer": (r"fc\d", "whose layer puts all tokens in one row before it"),
    "(Longformer|LEDEncoder)Layer": (r"query|key|value", "whose attention turns (B, T, d) to (T, B, d)"),
    "(Swin|Donut|Segformer|Pvt|Hiera|Cvt|Glpn|Levit|Focal|Nat|Dinat|MViT|Sam|Funnel)": (
        "", "whose layers pool tokens or cut them into windows"),
    "DisentangledSelfAttention": (r"(query|key)_proj", "which reads relative positions too"),
    "HrmTextDecoderLayer": ("", "whose stacks run in a loop, so that what they read is no token's representation"),
    "HyperConnection": ("", "whose layers read several streams at once"),
}


class Stack(NamedTuple):
    """A list of blocks. h0 is what the first of `sources` to run reads (an embedding: writes), in a pass of `owner`."""

    name: str  # of the list
    owner: str  # the nearest module that calls its blocks
    sources: tuple[str, ...]  # its blocks
    d: int | None  # the width of h0, where it is known


def widths(x: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module: nn.Linear, or GPT-2's Conv1D, which stores Wᵀ."""
    if isinstance(x, nn.Linear):
        return x.in_features, x.out_features
    return tuple(x.weight.shape) if type(x).__name__ == "Conv1D" else None


def is_embedding(x: nn.Module) -> bool:
    """It reads ids, so h0 can only be what it writes: nn.Embedding, or BERT's sum of several."""
    return isinstance(x, nn.Embedding) or any(isinstance(child, nn.Embedding) for child in x.children())


def caller(modules: dict[str, nn.Module], name: str) -> str:
    """The nearest module that calls what is in it, from `name` upward. nn.Sequential may be iterated over instead."""
    while name and (is_container(modules[name]) or isinstance(modules[name], nn.Sequential)):
        name = name.rpartition(".")[0]
    return name


def is_container(x: nn.Module) -> bool:
    """It has no forward pass of its own: nn.ModuleList, nn.ModuleDict."""
    return type(x).forward is nn.Module.forward


def called(modules: dict[str, nn.Module], name: str) -> str:
    """The first module that runs when a block does, where blocks are lists: for attention, mlp in self.layers."""
    while is_container(modules[name]) and any(True for _ in modules[name].children()):
        name = f"{name}.{next(modules[name].named_children())[0]}"
    return name


def stack_of(modules: dict[str, nn.Module], name: str) -> Stack | None:
    """The outermost list of blocks that a module stands in; a list of whole models, or of parts of blocks, is none."""
    parts = name.split(".")
    for i in (i for i, part in enumerate(parts) if part.isdigit()):
        parent = ".".join(parts[:i])
        blocks = [k for k, x in modules[parent].named_children() if not is_embedding(x)]
        first = modules[f"{parent}.{(blocks or parts[i:])[0]}".lstrip(".")]
        if not blocks or re.search("(Attention|FFN|MLP)$", type(first).__name__):
            return None
        d = next((w[0] for x in first.modules() if (w := widths(x))), None)
        if not any(isinstance(x, nn.Embedding) and x.embedding_dim == d for x in first.modules()) and not (
                len(blocks) > 1 and holds_stack(first)):
            sources = tuple(called(modules, f"{parent}.{block}".lstrip(".")) for block in blocks)
            return Stack(parent, caller(modules, parent), sources, d)
    return None


def holds_stack(x: nn.Module) -> bool:
    """Whether it has a list of blocks of its own: of several that hold attention and something else that is linear."""
    def is_block(y: nn.Module) -> bool:
        leaves = [n.rpartition(".")[2] for n, z in y.named_modules() if widths(z)]
        return any(map(QKV.fullmatch, leaves)) and any(FFN_IN.fullmatch(leaf) for leaf in leaves)

    lists = ([*y.children()] for y in x.modules() if isinstance(y, nn.ModuleList | nn.Sequential))
    return any(len(children) > 1 and all(map(is_block, children)) for children in lists)


def why_unfit(modules: dict[str, nn.Module], name: str) -> str:
    """Why a module of a stack cannot take h0, by its name or its block's class, or ""."""
    if not (stack := stack_of(modules, name)):
        return ""
    block, _, inner = name.removeprefix(f"{stack.name}.").partition(".")
    if EXPERT.search(inner):
        return "whose rows are not one sequence's tokens in order, as an expert's"
    if reads_another_stack(inner):
        return "which reads another stack's states, as a cross-attention's k and v do"
    kinds = " ".join({type(x).__name__ for x in modules[f"{stack.name}.{block}".lstrip(".")].modules()})
    return next((why for kind, (leaf, why) in UNFIT.items() if re.search(kind, kinds) and re.search(leaf, inner)), "")


def reads_another_stack(inner: str) -> bool:
    """Whether it is the k or v of a cross-attention."""
    outer, _, leaf = inner.rpartition(".")
    return bool(CROSS.search(outer) and QKV.fullmatch(leaf) and not re.match("(w|c_|to_|project_)?q(?!kv)", leaf, re.I))


def named_source(modules: dict[str, nn.Module], h0: str, getting: Sequence[str]) -> Stack:
    """h0 as the user names it: what that module reads, in a pass of whatever calls it and those that get h0."""
    if len(sources := find(modules, h0)) != 1:
        raise ValueError(f"h0 {quoted(h0)}: expected one module, whose input is h0, got {sources}")
    source, ins = modules[sources[0]], [w[0] for x in modules[sources[0]].modules() if (w := widths(x))]
    if is_embedding(source):
        d = list(source.parameters())[-1].shape[-1]
    else:
        d = ins[0] if ins else next((p.shape[-1] for p in source.parameters() if p.dim() == 1), None)  # of a norm
    common = os.path.commonprefix([name.split(".") for name in (*sources, *getting)])
    return Stack("", caller(modules, ".".join(common)), tuple(sources), d)


def own_stack(modules: dict[str, nn.Module], name: str) -> Stack:
    """The stack that a module stands in, or the only one beside it, in the module that runs both."""
    if stack := stack_of(modules, name):
        return stack
    stacks = {stack for n, x in modules.items() if widths(x) and (stack := stack_of(modules, n))}
    beside = [stack for stack in stacks if name.startswith(f"{stack.owner}." if stack.owner else "")]
    if len(beside) != 1:
        raise ValueError(f"{name}: expected a module in a stack of blocks, whose first one reads h0, got it beside "
                         f"{len(beside)}; pass h0=, the name of a module that reads h0, or leave it out of sibo_at")
    return beside[0]


def adaptable_widths(modules: dict[str, nn.Module], name: str, side: str, d: int | None) -> tuple[int, int]:
    """Of what an adapter or LoRA on a module reads and writes. ValueError where it would not run, or be passed by."""
    x, parents = modules[name], [modules[".".join(name.split(".")[:i])] for i in range(name.count(".") + 1)]
    if fused := next((type(p).__name__ for p in parents if isinstance(p, FUSED)), None):
        raise ValueError(f"{name}: expected a module that is called, got one of {fused}, which reads its weights in a "
                         "fused kernel; adapt a module around it")
    if "Mamba" in type(parents[-1]).__name__ and name.endswith(("out_proj", "x_proj", "dt_proj")):
        raise ValueError(f"{name}: expected a module that is called, got one of {type(parents[-1]).__name__}, whose "
                         "fast path reads the weight; adapt its in_proj")
    if linear := widths(x):
        d_in, d_out = linear
        return {"out": (d_out, d_out), "in": (d_in, d_in)}.get(side, linear)
    if d and side in ("out", "parallel") and type(x).forward is not nn.Module.forward:
        return d, d  # a sub-layer, as wide as h0 at both ends
    raise ValueError(f"{name}: expected a nn.Linear, or a sub-layer beside a known h0, got a {type(x).__name__}")


def find(names: Iterable[str] | nn.Module, target: str) -> list[str]:
    """Those names (of a model: its modules) whose last dotted segments match `target`'s; * is any one segment."""
    names, want = [n for n, _ in names.named_modules()] if isinstance(names, nn.Module) else names, target.split(".")
    return [name for name in names if name and len(tail := name.split(".")[-len(want):]) == len(want)
            and all(w in ("*", t) for w, t in zip(want, tail, strict=True))]


def find_all(m: nn.Module, targets: Sequence[str]) -> list[str]:
    """`find` for several, in the model's order. ValueError with near names if one matches nothing."""
    found = {target: find(m, target) for target in targets}
    if lost := [target for target in targets if not found[target]]:
        known = {".".join(n.split(".")[-k:]) for n, _ in m.named_modules() for k in (1, 2)} - {""}
        raise ValueError(f"{quoted(lost[0])}: expected a module of this {type(m).__name__}, got none of that name"
                         + near(lost[0], sorted(known)))
    return [name for name, _ in m.named_modules() if any(name in names for names in found.values())]


def patterns(modules: dict[str, nn.Module], *parts: Sequence[str]) -> tuple[str, ...]:
    """The shortest targets that find each part's modules, and no others."""
    templates, found = {}, []
    for name in modules:
        templates.setdefault(_template(name), set()).add(name)
    for part in parts:
        chosen = set(part)
        for template in dict.fromkeys(map(_template, part)):
            tails = [".".join(template.split(".")[-k:]) for k in range(1, template.count(".") + 2)]
            short = (t for t in tails if all(templates[x] <= chosen for x in find(templates, t)) and
                     chosen.issuperset(find(modules, t)))
            found += [t] if (t := next(short, None)) else sorted(templates[template] & chosen)
    return tuple(dict.fromkeys(found))


def _template(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)
