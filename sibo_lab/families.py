"""Where the paper's modules stand in a model that it did not know, by what their names say.

Source: the paper's Sections 4.2 (which modules) and 4.4 (which of them get h0). Its three families follow from the
same rule as all others: attention and feed-forward are told by name, an encoder by a module called `embeddings`."""

import re
from collections import defaultdict

from torch import nn

from sibo_lab.stacks import (
    CROSS,
    EXPERT,
    FFN_IN,
    QKV,
    Anatomy,
    is_container,
    reads_another_stack,
    why_unfit,
    widths,
)

KEY = re.compile(r"(w|c_|to_|project_)?k(ey)?(_proj|_lin)?", re.I)
FFN = re.compile(r"mlp|ffn|ff|feed_?forward|(block_sparse_)?moe|DenseReluDense", re.I)
FFN_OUT = re.compile(r"down_proj|fc_?2|fc_out|c_proj|dense_4h_to_h|w2|wo|lin(ear)?_?2|layer_2|w_out|weights_out|"
                     r"ffn_output|ffn\.2|(.*\.)?output(\.dense)?", re.I)
ATTENTION_OUT = re.compile(r"o|out|wo|output|dense|(o|out|c|post)_proj|out_lin|attention_out", re.I)
GATE = re.compile(r"gate_proj|w1|wi_0|w_0", re.I)
ATTENTION = re.compile(r"att|mixer", re.I)
ADDS_RESIDUAL = re.compile("BloomMLP|MptMLP|XLNetFeedForward|TimesFmMLP|CpmAntFFNBlock|LwDetrMLP|RfDetrMLP|"
                           "DabDetrDecoderLayerFFN")  # feed-forwards that do what in others their block does
BERTS_OUTPUTS = {"attention.output.dropout": "attn", "output.dropout": "ffn"}


def role(inner: str, d_in: int, d_out: int, d: int) -> str | None:
    """What a linear module does, by its name within its block. A `plain` one can be adapted, but not take h0: its input
    is not d wide, or comes from another stack, or its rows are not one sequence's tokens in order."""
    outer, _, leaf = inner.rpartition(".")
    parents = outer.split(".")
    if d_in == d and QKV.fullmatch(leaf) and not EXPERT.search(outer) and not any(map(FFN.fullmatch, parents)):
        if leaf != "in_proj" or ATTENTION.search(outer):
            return "plain" if reads_another_stack(inner) else "key" if KEY.fullmatch(leaf) else "attn"
    if ATTENTION.search(outer):
        return "attn_out" if d_out == d and ATTENTION_OUT.fullmatch(leaf) and not CROSS.search(outer) else None
    if d_in == d and any(FFN_IN.fullmatch(x) for x in (leaf, inner)):
        return "plain" if EXPERT.search(outer) else "ffn"
    if d_in == d and GATE.fullmatch(leaf):
        return None if EXPERT.search(outer) else "gate"
    return "ffn_out" if d_out == d and any(FFN_OUT.fullmatch(x) for x in (leaf, inner)) else None


def places(a: Anatomy, method: str, side: str) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the modules to adapt, as `attn`, `ffn` and `plain`, and of those that get h0 by default."""
    parts, at = {"attn": [], "ffn": [], "plain": []}, []
    for stack in dict.fromkeys(a.stacks.values()):
        inside = {n: n.removeprefix(f"{stack.name}.").partition(".")[2] for n, own in a.stacks.items() if own == stack}
        roles = defaultdict(list)
        for name, inner in inside.items():
            if w := widths(a.modules[name]):
                roles[role(inner, *w, stack.d)].append(name)
        encoder = is_encoder(a.modules, stack.name)
        here = (lora(roles, encoder) if method == "lora" else inputs(roles, encoder) if side == "in" else
                outputs(a.modules, inside, roles, encoder, side))
        unfit = {name for part in ("attn", "ffn") for name in here[part] if why_unfit(a, name)}
        if method != "lora" or len(unfit) < len(here["attn"] + here["ffn"]):  # else all are refused, with the reason
            here = {part: [n for n in names if n not in unfit] for part, names in here.items()}
            here["plain"] += unfit if method == "lora" else ()
        for part, names in here.items():
            parts[part] += names
        experts = method == "lora" and any(EXPERT.search(inner) for inner in inside.values())
        at += here["attn" if here["attn"] and (encoder or experts) or not here["ffn"] else "ffn"]
    return parts, at


def is_encoder(modules: dict[str, nn.Module], stack: str) -> bool:
    """Whether a module `embeddings`, of several parts, stands beside the stack or beside what holds it."""
    parents = [stack.rsplit(".", i)[0] + "." for i in range(1, stack.count(".") + 1)] + [""]
    return any(any(modules[f"{p}embeddings"].children()) for p in parents if f"{p}embeddings" in modules)


def lora(roles: dict[str, list[str]], encoder: bool) -> dict[str, list[str]]:
    """BERT: W_q and W_v. LLaMA, GPT-J: q, k, v, and both sides of the feed-forward."""
    if encoder:
        return {"attn": roles["attn"], "ffn": [], "plain": []}
    attn = sorted(roles["attn"] + roles["key"], key=lambda n: "qkv".find(re.sub(".*[.]|[^qkv]", "", n.lower())[:1]))
    return {"attn": attn, "ffn": roles["ffn"], "plain": roles["plain"] + roles["ffn_out"]}


def inputs(roles: dict[str, list[str]], encoder: bool) -> dict[str, list[str]]:
    """As in the authors' code for LLaMA: before the feed-forward's linear modules."""
    return {"attn": [], "ffn": [] if encoder else roles["gate"] + roles["ffn"], "plain": []}


def outputs(modules: dict[str, nn.Module], inside: dict[str, str], roles: dict[str, list[str]], encoder: bool,
            side: str) -> dict[str, list[str]]:
    """The feed-forward sub-layers, and an encoder's attention: as modules, or by the linear module that they end in."""
    whole = {"attn": [n for n, inner in inside.items() if inner == "attn"],
             "ffn": [n for n, inner in inside.items() if FFN.fullmatch(inner) and not (
                 widths(modules[n]) or is_container(modules[n]) or
                 side == "out" and ADDS_RESIDUAL.fullmatch(type(modules[n]).__name__))]}
    bert = {part: [n for n, inner in inside.items() if BERTS_OUTPUTS.get(inner) == part] for part in ("attn", "ffn")}
    found = {}
    for part in ("attn", "ffn"):
        found[part] = (bert if all(bert.values()) and side == "out" else whole)[part]
        if not found[part] and side == "out":
            found[part] = roles[f"{part}_out"]
    return found | {"plain": []} | ({} if encoder else {"attn": []})
