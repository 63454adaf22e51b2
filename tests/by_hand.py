"""SIBO by hand: hooks on an untouched copy of a model, none of the project's code. h0 is what the first block reads."""

import torch
from torch import nn


def draw(m: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Random values for all parameters, norms and biases too, so that everything moves the output."""
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * std)
    return m


def stir(m: nn.Module, seed: int = 1) -> nn.Module:
    """As if trained: W_up, and what else starts at a fixed value, moves."""
    g = torch.Generator().manual_seed(seed)
    for n, p in m.named_parameters():
        if n.endswith((".down", ".up")):
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return m


def weights(m: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what `m` trains, by NAME.down and NAME.up, NAME being the module's name in the untouched model."""
    return {n.replace(".base.", "."): p.detach().clone().requires_grad_() for n, p in m.named_parameters()
            if n.endswith((".down", ".up", ".lam_logit"))}


def by_hand(plain: nn.Module, trained: dict[str, torch.Tensor], at: dict[str, list[str]], lam: float = 0.5,
            scale: float = 1.0, method: str = "lora", side: str = "out", skip: str = "mixed",
            frozen_too: bool = False) -> nn.Module:
    """`plain`, hooked: it computes Eq. (4) or (5) with the tensors of `weights`, which get its gradients.

    `at` names, by first block, the modules that get h0: what that block reads in its first call in a pass of the module
    that holds its list. All others are plain adapters or LoRA."""
    seen = {}
    for first in at:
        def forget(*_, first=first):
            seen.pop(first, None)

        def capture(block, args, kwargs, first=first):
            seen.setdefault(first, (args[0] if args else kwargs["hidden_states"]).clone())

        plain.get_submodule(first.rpartition(".")[0].rpartition(".")[0]).register_forward_pre_hook(forget)
        plain.get_submodule(first).register_forward_pre_hook(capture, with_kwargs=True)
    sources = {name: first for first, names in at.items() for name in names}
    for name in dict.fromkeys(n.rpartition(".")[0] for n in trained):
        down, up, logit = (trained.get(f"{name}.{x}") for x in ("down", "up", "lam_logit"))

        def mix(h, name=name, logit=logit):
            share = 0 if name not in sources else lam if logit is None else logit.sigmoid()
            return (1 - share) * h + share * seen[sources[name]] if name in sources else h

        def bend(h, down=down, up=up, mix=mix):  # Eq. (4)
            return (mix(h) if skip == "mixed" else h) + torch.tanh(mix(h) @ down.T.to(h.dtype)) @ up.T.to(h.dtype)

        def before(module, args, kwargs, mix=mix, bend=bend):
            change = mix if method == "lora" else bend
            return ((change(args[0]), *args[1:]), kwargs) if args else (args, kwargs | {
                "hidden_states": change(kwargs["hidden_states"])})

        def after(module, args, kwargs, out, down=down, up=up, mix=mix, bend=bend):
            y, h = out[0] if isinstance(out, tuple) else out, args[0] if args else kwargs["hidden_states"]
            if method == "lora":
                low = (h if frozen_too else mix(h)) @ down.T.to(h.dtype)
                y = y + scale * low @ up.T.to(h.dtype)  # Eq. (5)
            else:
                y = y + torch.tanh(mix(h) @ down.T) @ up.T if side == "parallel" else bend(y)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        if frozen_too or side == "in":
            plain.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
        if side != "in":
            plain.get_submodule(name).register_forward_hook(after, with_kwargs=True)
    return plain


def gradients(loss: torch.Tensor, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the oracle."""
    return dict(zip(trained, torch.autograd.grad(loss, trained.values(), allow_unused=True), strict=True))


def trained_gradients(m: nn.Module) -> dict[str, torch.Tensor]:
    """Of an adapted model, under the names of `weights`."""
    return {n.replace(".base.", "."): p.grad for n, p in m.named_parameters()
            if n.endswith((".down", ".up", ".lam_logit"))}


def assert_near(got, right, tolerance: float = 1e-4) -> None:
    """Equal but for rounding, in relation to the largest value. Dicts and tuples: each tensor."""
    if isinstance(right, dict):
        assert got.keys() == right.keys()
        right, got = list(right.values()), [got[k] for k in right]
    if isinstance(right, list | tuple):
        for a, b in zip(got, right, strict=True):
            assert_near(a, b, tolerance)
        return
    assert got.shape == right.shape
    assert (got - right).abs().max() <= tolerance * right.abs().max(), f"off by {(got - right).abs().max()}"
    assert right.abs().max() > 0


def assert_near_gradients(got: dict, right: dict, tolerance: float = 1e-4) -> None:
    """In relation to the largest of all; where no output depends on a tensor, both may have none."""
    assert got.keys() == right.keys()
    largest = max(g.abs().max() for g in right.values() if g is not None)
    for n, expected in right.items():
        found, expected = (torch.zeros(()) if g is None else g for g in (got[n], expected))
        assert (found - expected).abs().max() <= tolerance * largest, f"{n}: off by {(found - expected).abs().max()}"
    assert largest > 0
