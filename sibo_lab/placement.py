"""Which modules are adapted, which of them get h0, and from where: found by name, or by the rule of families.py.

A name that matches nothing and a module that cannot take h0 are errors; the official code skips both in silence."""

from dataclasses import replace
from typing import NamedTuple

from torch import nn

from sibo_lab.families import places
from sibo_lab.files import quoted
from sibo_lab.settings import Settings
from sibo_lab.stacks import (
    Anatomy,
    Stack,
    adaptable_widths,
    block_places,
    find,
    find_all,
    named_source,
    own_stack,
    patterns,
    why_unfit,
    widths,
)

HEADS = ("score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "logits_proj",
         "sequence_summary", "regression_head", "multiple_choice_head", "reward_head", "value_head", "v_head",
         "rm_head")  # what is new for a task, by the names of transformers and trl
NEW_POOLER = "ContextPooler"  # by its class: DeBERTa's classifiers have one that no checkpoint has


class Placement(NamedTuple):
    settings: Settings  # with nothing left open but h0
    widths: dict[str, tuple[int, int]]  # of what each adapted module's adapter or LoRA reads, and writes
    mixed: dict[str, Stack]  # the modules that get h0, and whose
    shares: dict[str, float]  # their λ, as a multiple of the settings'


def place(m: nn.Module, s: Settings) -> Placement:
    """Resolves the settings against the model `m`. Raises ValueError naming whatever does not fit."""
    a, kind = Anatomy.of(m), type(m).__name__
    parts, default = places(a, s.method, s.side)
    own = (s.targets,) if isinstance(s.targets, str) else s.targets
    targets = tuple(own or patterns(a.modules, *parts.values()))
    if not targets:
        fit = patterns(a.modules, [n for n, stack in a.stacks.items() if (w := widths(a.modules[n])) and w[0] == stack.d
                                   and not why_unfit(a, n)])
        raise ValueError(f"{kind}: no known place for {s.method}, side {s.side}; expected targets=, such as "
                         f"{' or '.join(fit) or 'linear modules in a list of blocks, which h0 fits; it has none'}")
    at, names = s.sibo_at or own or patterns(a.modules, default), find_all(m, targets)  # one's own all get h0
    if at in ("attn", "ffn", "both"):
        at = patterns(a.modules, *([n for n in parts[p] if n in names] for p in ("attn", "ffn") if at in (p, "both")))
    at = ((at,) if isinstance(at, str) else tuple(at)) if s.lam else ()
    getting = find_all(m, at)
    if s.lam and not (getting and set(getting) <= set(names)):
        raise ValueError(f"sibo_at {quoted(s.sibo_at)}: expected some of the adapted {quoted(list(targets))}, got "
                         f"{quoted(list(at))}; lam=0 is the plain method")
    shares = {name: share for name, place in block_places(a, getting).items() if (share := s.share(*place))}
    named = named_source(a, s.h0, getting) if s.h0 else None
    mixed, found = {name: named or own_stack(a, name) for name in shares}, {}
    for name in names:
        stack, d = mixed.get(name), [x.d for x in (a.stacks.get(name), mixed.get(name)) if x and x.d]
        found[name] = adaptable_widths(a, name, s.side if s.method == "adapter" else "lora", d[0] if d else None)
        wrong = stack and (why_unfit(a, name, named is not None) or stack.d and found[name][0] != stack.d and
                           f"that reads inputs {found[name][0]} wide, where h0 is {stack.d}")
        if wrong:
            raise ValueError(f"{name}: expected a module that can take h0, got one {wrong}; name others as "
                             "targets= or sibo_at=")
    whole, holding = s.modules_to_save, {".".join(t.split(".")[:i]) for t in names for i in range(1, t.count(".") + 2)}
    if whole is None:
        whole = [t for t in HEADS if any(n not in a.stacks and n not in holding for n in find(a.modules, t))]
        whole += [n for n, x in a.modules.items() if type(x).__name__ == NEW_POOLER or n == "projector"]  # of the root
    whole = (whole,) if isinstance(whole, str) else tuple(whole)
    if adapted := [n for n in find_all(m, whole) if n in holding]:
        raise ValueError(f"modules_to_save: expected modules without adapters, got {adapted[0]}")
    h0 = s.h0 and find(a.modules, s.h0)[0]
    return Placement(replace(s, targets=targets, sibo_at=at, h0=h0, modules_to_save=whole), found, mixed, shares)
