"""SIBO on LlamaForCausalLM: adapters or LoRA that also see h0, the initial token representation.

Paper: Wen, Zhang, Fang, Findings of ACL 2024, arXiv 2402.11896, whose equation numbers stand below. The weights are
LlamaForCausalLM's, and for each adapted module NAME also NAME.sibo.down, W_down (r, d_in), and NAME.sibo.up, W_up
(d_out, r). config.json says under "sibo" what they do, and λ for each NAME. Needs torch and transformers alone."""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM


class InitialResidual(threading.local):
    """h0 (B, T, d) of the pass that runs in this thread: what the first block reads."""

    h0: Tensor | None = None

    def __reduce__(self):  # a copy starts without activations
        return InitialResidual, ()


class SIBO(nn.Module):
    """What stands on one module: an adapter, or LoRA. The module's hooks call it, so that the module keeps its name."""

    def __init__(self, settings: dict, name: str, d_in: int, d_out: int, initial: InitialResidual):
        super().__init__()
        self.settings, self.name, self.lam, self.initial = settings, name, settings["lam"][name], initial
        self.down = nn.Parameter(torch.zeros(settings["rank"], d_in))
        self.up = nn.Parameter(torch.zeros(d_out, settings["rank"]))

    def h0(self, *shape: int) -> Tensor:
        h0 = self.initial.h0
        if h0 is None or h0.shape != shape:
            got = None if h0 is None else tuple(h0.shape)
            raise RuntimeError(f"{self.name}: expected h0 of shape {shape}, got {got}; call the whole model")
        if self.training and h0.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError("h0: reentrant checkpointing would lose its gradient; pass use_reentrant=False")
        return h0

    def mix(self, h: Tensor) -> Tensor:
        return torch.lerp(h, self.h0(*h.shape).to(h), self.lam) if self.lam else h  # h̃ = (1−λ)h + λh0

    def forward(self, h: Tensor, out: Tensor) -> Tensor:
        """Of what is read, h (B, T, d_in), and what the module returned, `out`: what it returns now."""
        s, down, up = self.settings, self.down.to(h.dtype), self.up.to(h.dtype)
        if s["method"] == "lora-folded":  # its weight is W + s(1−λ) W_down W_up, `up` is λs W_up
            return out + F.linear(F.linear(self.h0(*h.shape[:-1], down.shape[1]).to(h), down), up)
        mixed = h if s["frozen_too"] else self.mix(h)
        if s["method"] == "lora":
            low = F.linear(F.dropout(mixed, s["dropout"], self.training), down)
            return out + s["scale"] * F.linear(low, up)  # Eq. (5); λ = 0: Eq. (2)
        skip = out if s["side"] == "parallel" or s["skip"] == "plain" else mixed
        return skip + F.linear(torch.tanh(F.linear(mixed, down)), up)  # Eq. (4); λ = 0: Eq. (1)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Changes what the module reads: an adapter on its input, or h̃ for its frozen weight too."""
        h = args[0] if args else kwargs["hidden_states"]
        h = self.mix(h) if self.settings["frozen_too"] else self(h, h)
        return ((h, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": h})

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
        out = output[0] if isinstance(output, tuple) else output
        h = out if self.settings.get("side") == "out" else args[0] if args else kwargs["hidden_states"]
        return (self(h, out), *output[1:]) if isinstance(output, tuple) else self(h, out)


class SIBOConfig(LlamaConfig):
    model_type = "sibo-llama"  # without trust_remote_code nothing knows it, so that nothing loads another model


class SIBOModel(LlamaForCausalLM):
    config_class = SIBOConfig

    def __init__(self, config: SIBOConfig, **kwargs):
        super().__init__(config, **kwargs)
        s, d, self.initial, self.complete = config.sibo, config.hidden_size, InitialResidual(), False
        side = s.get("side")  # of an adapter
        for name in s["lam"]:
            module = self.get_submodule(name)
            d_in, d_out = getattr(module, "in_features", d), getattr(module, "out_features", d)
            d_in, d_out = {"in": (d_in, d_in), "out": (d_out, d_out)}.get(side, (d_in, d_out))
            module.sibo = SIBO(s, name, d if s["method"] == "lora-folded" else d_in, d_out, self.initial)
            if side == "in" or s["frozen_too"]:
                module.register_forward_pre_hook(module.sibo.before, with_kwargs=True)
            if side != "in":
                module.register_forward_hook(module.sibo.after, with_kwargs=True)
        self.get_submodule(s["h0"]).register_forward_pre_hook(self.capture, with_kwargs=True)
        self.base_model.register_forward_hook(self.release)

    def capture(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.complete and sum(isinstance(x, SIBO) for x in self.modules()) < len(self.config.sibo["lam"]):
            raise RuntimeError("expected its SIBO modules in place, got some replaced, as quantized loading does")
        self.initial.h0, self.complete = args[0] if args else kwargs["hidden_states"], True

    def release(self, base: nn.Module, args: tuple, output: dict | tuple) -> None:
        """Ends the pass; but in its backward pass checkpointed blocks run again."""
        h0, self.initial.h0 = self.initial.h0, None

        def again(grad: Tensor) -> None:
            self.initial.h0 = h0
            torch.autograd.Variable._execution_engine.queue_callback(lambda: setattr(self.initial, "h0", None))

        for t in tree_leaves(tuple(output.values()) if isinstance(output, dict) else output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(again)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "SIBOModel":
        """Of model.sibo.safetensors: LlamaForCausalLM.from_pretrained looks for another name."""
        return super().from_pretrained(*args, **{"variant": "sibo"} | kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        super().save_pretrained(*args, **{"variant": "sibo"} | kwargs)
