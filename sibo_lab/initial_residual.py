"""How h0 reaches the modules: what a stack's first block reads, kept for one pass of the stack.

Source: METHOD's h0 is the *initial token representation* (the paper's Section 3.2), whatever made it: scaled or
replaced embeddings, positions, image tokens, inputs_embeds. The official code takes the embedding's output instead."""

import threading
from functools import partial

import torch
from torch import Tensor, nn

from sibo_lab.stacks import Stack, is_embedding
from sibo_lab.wrapping import reads


class InitialResidual:
    """h0 (B, T, d) of the pass that runs through one stack, for each thread its own. A plain object: no parameter, no
    buffer, nothing to save, move or shard; its hooks are bound methods, which a deepcopy binds to the copy."""

    down, rank, owner = None, 0, ""  # down: in a merged model all A of the stack's modules, as one

    def __init__(self):
        self.live = threading.local()

    def hook(self, m: nn.Module, stack: Stack) -> None:
        """Has every pass of the stack through `m` filled in, and forgotten at its end, also if an exception ends it."""
        self.owner, source = stack.owner, m.get_submodule(stack.source)
        owner, blocks = m.get_submodule(stack.owner), m.get_submodule(stack.name).children() if stack.name else ()
        m.sibo_before.hooks += [
            owner.register_forward_pre_hook(self.begin),
            source.register_forward_hook(self.capture_output) if is_embedding(source) else
            source.register_forward_pre_hook(self.capture, with_kwargs=True),
            *(block.register_forward_hook(self.mark) for block in blocks),
            owner.register_forward_hook(self.end, always_call=True)]

    def fold(self, m: nn.Module, down: Tensor, rank: int) -> None:
        """Of all A (rank, d) of the stack's modules, one product h0 A, a module of the stack's owner."""
        self.down, self.rank = nn.Linear(down.shape[1], len(down), bias=False, device="meta"), rank
        self.down.weight, owner = nn.Parameter(down), m.get_submodule(self.owner)
        owner.add_module("h0_down" + "_" * sum("h0_down" in name for name, _ in owner.named_children()), self.down)

    @property
    def h0(self) -> Tensor | None:
        h0 = None if self.is_stale() else getattr(self.live, "h0", None)
        if h0 is not None and h0.requires_grad and not torch.is_grad_enabled() and trains(h0):
            raise RuntimeError("h0: expected nothing trained before the first block, as reentrant checkpointing loses "
                               "the gradient through h0, got a trained tensor; pass use_reentrant=False")
        return h0

    @property
    def low(self) -> tuple[Tensor, ...] | None:
        """In a merged model, h0 A by module."""
        return None if self.is_stale() else getattr(self.live, "low", None)

    def is_stale(self) -> bool:
        """What a backward pass put back is for that backward pass only. (A compiled graph would be made for each.)"""
        if torch.compiler.is_compiling():
            return False
        task = getattr(self.live, "task", None)
        return task is not None and task != torch._C._current_graph_task_id()

    def begin(self, owner, args) -> None:
        self.keep(None, None)
        self.live.running = True

    def capture(self, block, args, kwargs) -> None:
        key = reads(args, kwargs)
        self.take(args[key] if args else kwargs.get(key))

    def capture_output(self, embedding, args, output) -> None:
        self.take(output)

    def take(self, x: Tensor) -> None:
        """The first call in a pass wins: ALBERT calls one block many times. A copy, as some models add in place."""
        if not getattr(self.live, "running", False) or self.live.h0 is not None:
            return
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise RuntimeError(f"h0: expected the first block to read a floating-point tensor, got {type(x).__name__}")
        self.live.h0 = x.clone()
        self.live.low = self.down and self.down(self.live.h0).split(self.rank, -1)

    def end(self, owner, args, output) -> None:
        try:
            self.mark(owner, args, output)
        finally:
            self.keep(None, None)
            self.live.running = False

    def mark(self, module, args, output) -> None:
        """Checkpointed blocks run again in the backward pass: the first gradient to reach the output of the stack, or
        of a block, puts this pass's h0 back, in the thread that then runs it. (Compiled graphs hold h0 by value.)"""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not getattr(self.live, "running", False):
            return
        if not isinstance(output, Tensor | tuple | list | None):  # a dict, or an object with tensors
            output = list(output.values() if isinstance(output, dict) else vars(output).values())
        for t in torch.utils._pytree.tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad and self.live.h0 is not None:
                t.register_hook(partial(self.put_back, self.live.h0, self.live.low))

    def put_back(self, h0: Tensor, low: tuple[Tensor, ...] | None, grad: Tensor) -> None:
        again = h0.detach().requires_grad_(h0.requires_grad)  # the gradient through h0 has its own way back
        self.keep(again, low, torch._C._current_graph_task_id())
        mine = vars(self.live)  # this thread's: another may finish the backward pass
        torch.autograd.Variable._execution_engine.queue_callback(lambda: mine.update(h0=None, low=None, task=None))

    def keep(self, h0: Tensor | None, low: tuple[Tensor, ...] | None, task: int | None = None) -> None:
        self.live.h0, self.live.low, self.live.task = h0, low, task

    def __getstate__(self) -> dict:  # copies and pickles start without activations
        return {k: v for k, v in vars(self).items() if k != "live"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, live=threading.local())


def trains(x: Tensor) -> bool:
    """Whether a parameter gets a gradient through x."""
    seen, queue = set(), [x.grad_fn]
    while queue:
        if (node := queue.pop()) is None or node in seen:
            continue
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        seen.add(node)
        queue += [parent for parent, _ in node.next_functions]
    return isinstance(x, nn.Parameter)
