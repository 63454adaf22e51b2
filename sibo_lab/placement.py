"""Where SIBO's modules go and what they are told: which modules are adapted, which of those get h0, found by name.

Source: the paper's Section 4.2 (targets of each backbone) and 4.4 (placement of h0). A name that matches nothing, or a
module that cannot take h0, is an error, where the official code skips it and trains less than it was asked to."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import nn

from sibo_lab import files


@dataclass(frozen=True)
class Settings:
    """What `inject` is told; None: the paper's choice, see placement.py. Stored with the trained weights."""

    method: str = "lora"  # or "adapter"
    lam: float = 0.2  # λ in [0, 1); 0: the plain method, h0 is neither captured nor needed
    targets: str | tuple[str, ...] | None = None  # by the last dotted segments of their names, * for any one segment
    sibo_at: str | tuple[str, ...] | None = None  # which of them get h0: "attn", "ffn", "both" or names
    h0: str | None = None  # the module whose output is h0, named likewise
    rank: int = 32
    alpha: float = 64.0  # s = alpha / rank
    dropout: float = 0.0  # on the input of the low-rank path
    bottleneck: int = 256
    side: str = "out"  # an adapter on the module's output; "in": on its input; "parallel": beside it (He et al. 2022)
    skip: str = "mixed"  # h̃ + …, Eq. (4), or "plain": h + …
    learn_lam: bool = False  # λ = sigmoid of a number a module, starting at lam (Section 7)
    frozen_too: bool = False  # the frozen weight sees h̃ as well (Table 6)

    def __post_init__(self):
        for f in fields(self):  # they may come out of a file
            value, (kind, *others) = getattr(self, f.name), f.type.split(" | ")
            types = {"str": str, "float": (int, float), "int": int, "bool": bool}[kind]
            fits = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
            names = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
            if not (fits or value is None and "None" in others or names and "tuple[str, ...]" in others):
                raise ValueError(f"{f.name}: found {files.quoted(value)}, expected {f.type}")
        for name, ok, expected in (
            ("method", self.method in ("adapter", "lora"), "adapter or lora"), ("lam", 0 <= self.lam < 1, "in [0, 1)"),
            ("lam", self.lam or not self.learn_lam, "above 0 when λ is learned (a sigmoid never starts at 0)"),
            ("rank", self.rank > 0, "positive"), ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("dropout", not 0 < self.dropout < 1e-6, "0, or at least 1e-6 (below, 1 − p is 1)"),
            ("bottleneck", self.bottleneck > 0, "positive"),
            ("side", self.side in ("out", "in", "parallel"), "out, in or parallel"),
            ("alpha", abs(self.alpha) < 1e9, "finite"), ("skip", self.skip in ("mixed", "plain"), "mixed or plain"),
        ):
            if not ok:
                raise ValueError(f"{name}: found {files.quoted(getattr(self, name))}, expected {expected}")


QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Layout:
    """The paper's choice for one family: modules by place; "wide" ones are adapted, but h0 does not fit their input."""

    h0: tuple[str, ...]  # the source of h0, by any of these names
    lora: dict[str, tuple[str, ...]]
    adapter: dict[str, dict[str, tuple[str, ...]]]  # by side
    sibo_at: str


LAYOUTS = (  # LLaMA, GPT-J and BERT, by model.py's and Hugging Face's names
    Layout(("embed", "embed_tokens"), {"attn": QKV, "ffn": ("up_proj",), "wide": ("down_proj",)}, {
        "out": {"ffn": ("mlp",)}, "in": {"ffn": ("gate_proj", "up_proj")}, "parallel": {"ffn": ("mlp",)}}, "ffn"),
    Layout(("embed", "wte"), {"attn": QKV, "ffn": ("fc_in",), "wide": ("fc_out",)}, {
        "out": {"ffn": ("mlp",)}, "in": {"ffn": ("fc_in",)}, "parallel": {"ffn": ("mlp",)}}, "ffn"),
    Layout(("embeddings",), {"attn": ("q_proj", "v_proj")}, {
        "out": {"attn": ("attn",), "ffn": ("mlp",)}, "parallel": {"attn": ("attn",), "ffn": ("mlp",)}}, "attn"),
    Layout(("embeddings",), {"attn": ("query", "value")}, {
        "out": {"attn": ("attention.output.dropout",), "ffn": ("layer.*.output.dropout",)}}, "attn"),
)


@dataclass(frozen=True)
class Placement:
    """What `place` found: the settings with nothing left open, what each adapted module's adapter or LoRA
    reads, and who gets h0."""

    settings: Settings
    widths: dict[str, int]
    mixed: frozenset[str]


def find(m: nn.Module, target: str) -> list[str]:
    """Names of the modules whose last dotted segments are those of `target`; * stands for any one segment."""
    want = target.split(".")
    return [name for name, _ in m.named_modules() if name and len(tail := name.split(".")[-len(want):]) == len(want)
            and all(w in ("*", t) for w, t in zip(want, tail, strict=True))]


def find_all(m: nn.Module, targets: Sequence[str]) -> list[str]:
    """`find` for several targets, in the model's order. ValueError with the near names if one matches nothing."""
    found = set()
    for target in targets:
        if not (names := find(m, target)):
            known = {".".join(n.split(".")[-k:]) for n, _ in m.named_modules() for k in (1, 2)} - {""}
            near = ", ".join(difflib.get_close_matches(target, sorted(known), 4, 0.4)) or "no name is near"
            raise ValueError(f"target {files.quoted(target)} matches no module of {type(m).__name__}; did you mean: {near}?")
        found.update(names)
    return [name for name, _ in m.named_modules() if name in found]


def place(m: nn.Module, s: Settings) -> Placement:
    """Resolves the settings against the model `m`. Raises ValueError naming whatever does not fit."""
    layout = next((y for y in LAYOUTS if all(find(m, t) for ts in y.lora.values() for t in ts)
                   and any(find(m, name) for name in y.h0)), Layout((), {}, {}, "both"))
    places = layout.lora if s.method == "lora" else layout.adapter.get(s.side, {})
    own = (s.targets,) if isinstance(s.targets, str) else s.targets
    targets = tuple(own or (t for ts in places.values() for t in ts))
    if not targets:
        raise ValueError(f"{type(m).__name__}: no known place for method {s.method!r}, side {s.side!r}; name targets=")
    names = find_all(m, targets)

    sibo_at = s.sibo_at or own or layout.sibo_at  # targets of one's own all get h0
    if sibo_at in ("attn", "ffn", "both"):
        sibo_at = [t for p in ("attn", "ffn") if sibo_at in (p, "both") for t in places.get(p, ()) if t in targets]
    sibo_at = ((sibo_at,) if isinstance(sibo_at, str) else tuple(sibo_at)) if s.lam else ()
    mixed = frozenset(find_all(m, sibo_at))
    if s.lam and not (mixed and mixed <= set(names)):
        raise ValueError(f"sibo_at {files.quoted(s.sibo_at)}: found {files.quoted(list(sibo_at))}, expected some of the adapted "
                         f"{files.quoted(list(targets))}; name the modules that get h0, or use lam=0 for the plain method")

    sources = sorted({n for name in ((s.h0,) if s.h0 else layout.h0) for n in find(m, name)})
    if len(sources) != 1 and (s.lam or s.h0):
        raise ValueError(f"h0 {files.quoted(s.h0)}: found {sources}, expected the one module whose output enters the first "
                         "block; name it with h0=")
    d = _width_of_h0(m.get_submodule(sources[0]), sources[0]) if len(sources) == 1 else None
    widths = {name: _width(m.get_submodule(name), name, s, d) for name in names}
    for name in names:  # not over the set: the first one named is then always the same
        if name in mixed and widths[name] != d:
            raise ValueError(f"{name}: its input is {widths[name]} wide and h0 {d}, so it cannot take h0; "
                             "adapt it plainly: name the others in sibo_at, or attn, ffn or both of the paper's")
    found = replace(s, targets=targets, sibo_at=sibo_at, h0=sources[0] if len(sources) == 1 else None)
    return Placement(found, widths, mixed)


def _width_of_h0(source: nn.Module, name: str) -> int:
    """Read off the last weight in the source: an embedding's, a norm's, a patch projection's."""
    owners = [x for x in source.modules() if any(True for _ in x.parameters(recurse=False))]
    if not owners:
        raise ValueError(f"h0 {name!r}: found no weight in this {type(source).__name__}, expected a module whose "
                         "weights tell how wide its output is, such as an embedding")
    *_, last = owners[-1].parameters(recurse=False)
    return last.shape[0 if isinstance(owners[-1], nn.Linear) else -1]


def _width(base: nn.Module, name: str, s: Settings, d: int | None) -> int:
    on_output = s.method == "adapter" and s.side == "out"
    if isinstance(base, nn.Linear):
        return base.out_features if on_output else base.in_features
    whole = on_output or s.method == "adapter" and s.side == "parallel"  # a sub-layer, as wide as h0 at both ends
    if not whole or d is None:
        raise ValueError(f"{name}: found {type(base).__name__}, expected a nn.Linear"
                         + (", or h0= to tell how wide its output is" if whole else ""))
    return d
