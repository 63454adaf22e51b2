"""Which modules are adapted, and which of them get h0, found by name.

A name that matches nothing and a module that cannot take h0 are errors; the official code skips both in silence."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from sibo_lab.files import near, quoted
from sibo_lab.settings import LAYOUTS, Settings


class Placement(NamedTuple):
    settings: Settings  # with nothing left open
    widths: dict[str, tuple[int, int]]  # of what each adapted module's adapter or LoRA reads, and writes
    mixed: frozenset[str]  # the modules that get h0


def find(m: nn.Module, target: str) -> list[str]:
    """Names of the modules whose last dotted segments match those of `target`; * is any one segment."""
    want = target.split(".")
    return [name for name, _ in m.named_modules() if name and len(tail := name.split(".")[-len(want):]) == len(want)
            and all(w in ("*", t) for w, t in zip(want, tail, strict=True))]


def find_all(m: nn.Module, targets: Sequence[str]) -> list[str]:
    """`find` for several, in the model's order. ValueError with near names if one matches nothing."""
    found = {target: find(m, target) for target in targets}
    if lost := [target for target in targets if not found[target]]:
        known = {".".join(n.split(".")[-k:]) for n, _ in m.named_modules() for k in (1, 2)} - {""}
        raise ValueError(f"{quoted(lost[0])}: expected a module of this {type(m).__name__}, got none of that name"
                         + near(lost[0], sorted(known)))
    return [name for name, _ in m.named_modules() if any(name in names for names in found.values())]


def place(m: nn.Module, s: Settings) -> Placement:
    """Resolves the settings against the model `m`. Raises ValueError naming whatever does not fit."""
    h0, lora, adapter, at = next((y for y in LAYOUTS if any(find(m, name) for name in y[0]) and all(
        find(m, t) for ts in y[1].values() for t in ts)), ((), {}, {}, "both"))
    places = lora if s.method == "lora" else adapter.get(s.side, {})
    own = (s.targets,) if isinstance(s.targets, str) else s.targets
    targets = tuple(own or (t for ts in places.values() for t in ts))
    if not targets:
        raise ValueError(f"{type(m).__name__}: no known place for {s.method}, side {s.side}; expected targets=")
    at = s.sibo_at or own or at  # targets of one's own all get h0
    if at in ("attn", "ffn", "both"):
        at = [t for p in ("attn", "ffn") if at in (p, "both") for t in places.get(p, ()) if t in targets]
    at = ((at,) if isinstance(at, str) else tuple(at)) if s.lam else ()
    names, mixed = find_all(m, targets), frozenset(find_all(m, at))
    if s.lam and not (mixed and mixed <= set(names)):
        raise ValueError(f"sibo_at {quoted(s.sibo_at)}: expected some of the adapted {quoted(list(targets))}, got "
                         f"{quoted(list(at))}; lam=0 is the plain method")
    sources = sorted({n for name in ((s.h0,) if s.h0 else h0) for n in find(m, name)})
    if len(sources) != 1 and (s.lam or s.h0):
        raise ValueError(f"h0 {quoted(s.h0)}: expected one module, whose output enters block one, got {sources}")
    source = sources[0] if len(sources) == 1 else None
    d = _width_of_h0(m.get_submodule(source)) if source else None
    widths = {name: _widths(name, m.get_submodule(name), s, d) for name in names}
    for name in names:
        if name in mixed and widths[name][0] != d:
            raise ValueError(f"{name}: expected inputs {d} wide, as h0, got {widths[name][0]}; leave it out of sibo_at")
    return Placement(replace(s, targets=targets, sibo_at=at, h0=source), widths, mixed)


def _width_of_h0(source: nn.Module) -> int:  # of its last weight
    owners = [x for x in source.modules() if any(True for _ in x.parameters(recurse=False))]
    if not owners:
        raise ValueError(f"h0: expected a module with weights, got a {type(source).__name__}")
    *_, last = owners[-1].parameters(recurse=False)
    return last.shape[0 if isinstance(owners[-1], nn.Linear) else -1]


def _widths(name: str, base: nn.Module, s: Settings, d: int | None) -> tuple[int, int]:
    side = s.side if s.method == "adapter" else "lora"
    if isinstance(base, nn.Linear):
        d_in, d_out = base.in_features, base.out_features
        return {"out": (d_out, d_out), "in": (d_in, d_in)}.get(side, (d_in, d_out))
    if d and side in ("out", "parallel"):
        return d, d  # a sub-layer, as wide as h0 at both ends
    raise ValueError(f"{name}: expected a nn.Linear, or a sub-layer beside a known h0, got a {type(base).__name__}")
