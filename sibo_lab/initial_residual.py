"""How h0 reaches the modules: what a stack's first block reads, kept for one pass of the stack.

Source: the *initial token representation* of the paper's Section 3.2, whatever made it: scaled or replaced embeddings,
positions, image tokens, inputs_embeds. The official code takes the embedding's output instead."""

import inspect
import sys
import threading
from contextlib import suppress
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sibo_lab.stacks import Stack, is_embedding
from sibo_lab.wrapping import reads

CHECKPOINT = torch.autograd.function.BackwardCFunction  # what it trains does not show in the graph
KEPT = getattr(torch.utils.checkpoint, "_CheckpointFrame", ())  # what torch keeps of a checkpoint that is not reentrant


class InitialResidual:
    """h0 (B, T, d) of the pass that runs through one stack, for each thread its own. A plain object: no parameter, no
    buffer, nothing to save, move or shard; its hooks are bound methods, which a deepcopy binds to the copy."""

    down, rank = None, 0  # down: in a merged model all A of the stack's modules, as one

    def __init__(self):
        self.live, self.checkpoints, self.order, self.repeats = threading.local(), WeakKeyDictionary(), [], 1
        self.told = False  # whether a pass that could tell (B, T, …) from (T, B, …) ended well

    def hook(self, m: nn.Module, stack: Stack) -> None:
        """Has every pass of the stack through `m` filled in, and forgotten at its end, also if an exception ends it."""
        owner, sources = m.get_submodule(stack.owner), [m.get_submodule(name) for name in stack.sources]
        first, self.repeats = sources[0]._forward_pre_hooks, stack.repeats
        m.sibo_before.hooks += [
            owner.register_forward_pre_hook(self.begin, with_kwargs=True),
            *(x.register_forward_hook(self.capture_output) if is_embedding(x) else
              x.register_forward_pre_hook(self.capture, with_kwargs=True) for x in sources),
            *(x.register_forward_hook(self.mark) for x in sources),
            owner.register_forward_hook(self.end, always_call=True)]
        self.order += [(hooks, key) for hooks in (first, sources[0]._forward_hooks) for key, hook in hooks.items()
                       if hook in (self.capture, self.capture_output)]

    def fold(self, down: Tensor, rank: int) -> nn.Module:
        """Of all A (rank, d) of the stack's modules, one product h0 A."""
        self.down, self.rank = nn.Linear(down.shape[1], len(down), bias=False, device="meta"), rank
        self.down.weight = nn.Parameter(down)
        return self.down

    @property
    def h0(self) -> Tensor | None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.recall()
        stale = self.is_stale()
        h0 = None if stale else getattr(self.live, "h0", None)
        if not torch.compiler.is_compiling():
            self.live.read = True
            if not stale and getattr(self.live, "twice", False):
                when = "before it is mixed in" if getattr(self.live, "running", False) else "in a checkpointed pass"
                raise RuntimeError(f"h0: expected one output of the embedding {when}, got two; run it and the blocks "
                                   "in a module of their own, once for each")
        cut = h0 is not None and h0.requires_grad and not torch.is_grad_enabled()
        if cut and trains(h0, getattr(self.live, "given", ())):
            raise lost_gradient()
        return h0

    def recall(self) -> None:
        """A checkpoint that runs again finds its own pass's h0, wherever inside it the gradient came from."""
        if (checkpoint := running_checkpoint()) is None:
            return
        if getattr(self.live, "running", False):
            if self.live.h0 is not None:
                self.checkpoints[checkpoint] = alone(self.live.h0), self.live.more
        elif checkpoint in self.checkpoints:
            self.put_back(*self.checkpoints[checkpoint])

    @property
    def low(self) -> Tensor | None:
        """In a merged model, h0 A (B, T, modules, rank)."""
        return None if self.h0 is None else self.live.low

    @property
    def turned(self) -> bool:
        """Whether, in a pass of as many sequences as tokens, something turned (B, T, …) to (T, B, …)."""
        watch = None if torch.compiler.is_compiling() else getattr(self.live, "watch", None)
        return watch is not None and watch.turned

    def is_stale(self) -> bool:
        """What a backward pass put back is for that backward pass only. (A compiled graph would be made for each.)"""
        if torch.compiler.is_compiling():
            return False
        task = getattr(self.live, "task", None)
        return task is not None and task != torch._C._current_graph_task_id()

    def is_block_alone(self) -> bool:
        """Whether a block is being compiled by itself, in a pass that is not."""
        return torch.compiler.is_compiling() and not getattr(self.live, "traced", False)

    def is_over(self) -> bool:
        """Whether Ctrl-C ended the pass: torch then calls no hook, but what began the pass is running no more."""
        frame = None if torch.compiler.is_compiling() else getattr(self.live, "frame", None)
        now = frame and sys._getframe()
        while now and now is not frame:
            now = now.f_back
        return frame is not now

    def begin(self, owner, args, kwargs) -> None:
        while self.is_over():
            self.leave()
        busy = getattr(self.live, "running", False) or getattr(self.live, "task", None) is not None
        outer = dict(vars(self.live)) if busy else None  # an owner that calls itself, a pass within a backward pass
        self.keep(None, None)
        for hooks, key in self.order if not torch.compiler.is_compiling() else ():
            hooks.move_to_end(key)  # after the hooks that others put on the first block, or the embedding, since
        self.live.running, self.live.last, self.live.outer = True, None, outer
        self.live.watch, self.live.ran, self.live.more = None, {}, []
        self.live.lost, self.live.frame = False, None if torch.compiler.is_compiling() else sys._getframe(1)
        self.live.traced = torch.compiler.is_compiling()  # the whole pass, not a block of it alone
        self.live.given = [] if self.live.traced else [
            x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]

    def capture(self, block, args, kwargs) -> None:
        if self.is_block_alone() and getattr(self.live, "h0", None) is not None:
            return  # so that a block, compiled alone, is one graph, in the backward pass too
        if not getattr(self.live, "running", False):
            if self.down and getattr(self.live, "task", None) is not None:
                self.fold_h0()  # the first block, run again, does what it did
            return
        key = reads(args, kwargs)
        x = args[key] if args else kwargs.get(key)
        runs = self.live.ran[block] = self.live.ran.get(block, 0) + 1
        if runs > self.repeats and x is not self.live.last:
            raise RuntimeError("h0: expected a block to run once in a pass, or (as ALBERT's) on what the last one "
                               "wrote, got another input; pass h0=, the name of an embedding, whose output is h0")
        if self.live.h0 is None:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise RuntimeError(f"h0: expected the first block to read a floating-point tensor, got a {type(x)}")
            self.take(x)

    def capture_output(self, embedding, args, output) -> None:
        if getattr(self.live, "running", False):
            if self.live.h0 is not None:
                self.live.twice |= not self.live.read
                self.live.more.append(True)  # which h0 a block, run again, had is then not known
            self.take(output)

    def take(self, x: Tensor) -> None:
        self.live.h0, self.live.read = x.clone(), False  # a copy, as some models go on to add to it in place
        if not torch.compiler.is_compiling():  # in a reentrant checkpoint: the copy hangs on nothing
            self.live.lost = x.requires_grad and not self.live.h0.requires_grad and trains(x, self.live.given)
        self.fold_h0()
        if x.dim() > 2 and len(x) == x.shape[1] > 1 and not self.live.watch:
            if not torch.compiler.is_compiling():
                self.live.watch = Turning(x.shape)
                self.live.watch.__enter__()
            elif not self.told:
                raise RuntimeError("h0: expected more or fewer sequences than tokens in a first compiled pass, as no "
                                   f"shape tells them apart, got {len(x)} of both; run one outside of torch.compile")

    def fold_h0(self) -> None:
        self.live.low = self.down and self.product(self.live.h0)

    def product(self, h0: Tensor) -> Tensor:
        return self.down(h0).unflatten(-1, (-1, self.rank))

    def end(self, owner, args, output) -> None:
        try:
            self.mark(owner, args, output)
        finally:
            if not torch.compiler.is_compiling():  # if it was not read, nothing was compared with it
                self.told |= output is not None and self.live.h0 is not None and self.live.read
            self.leave()

    def leave(self) -> None:
        """Back to the pass around this one, if there is one."""
        if self.live.watch:
            self.live.watch.__exit__(None, None, None)
        outer = self.live.outer
        self.keep(None, None)
        self.live.running, self.live.last, self.live.watch, self.live.traced = False, None, None, False
        self.live.frame, self.live.given = None, []
        vars(self.live).update(outer or {})

    def mark(self, module, args, output) -> None:
        """Checkpointed blocks run again in the backward pass: the first gradient to reach the output of the stack, or
        of a block, puts this pass's h0 back, in the thread that then runs it. (Compiled graphs hold h0 by value.)"""
        if self.is_block_alone() or not getattr(self.live, "running", False):
            return
        self.live.last = output[0] if isinstance(output, tuple | list) and output else output
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.live.h0 is None:
            return
        if self.live.lost:
            raise lost_gradient()
        if not isinstance(output, Tensor | tuple | list):  # a dict, or an object with tensors
            output = list(output.values() if isinstance(output, dict) else getattr(output, "__dict__", {}).values())
        for t in torch.utils._pytree.tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(partial(self.put_back, self.live.h0, self.live.more))

    def put_back(self, h0: Tensor, more: list[bool], grad: Tensor | None = None) -> None:
        task, mine = torch._C._current_graph_task_id(), vars(self.live)  # this thread's: another may finish the pass
        if task != mine.get("task"):
            before = {name: mine.get(name) for name in ("h0", "low", "task", "twice")}
            torch.autograd.Variable._execution_engine.queue_callback(lambda: mine.update(before))
        again = alone(h0)
        self.keep(again, self.down and self.product(again), task, bool(more))

    def keep(self, h0: Tensor | None, low: Tensor | None, task: int | None = None, twice: bool = False) -> None:
        self.live.h0, self.live.low, self.live.task, self.live.twice = h0, low, task, twice

    def __getstate__(self) -> dict:  # copies and pickles start without activations
        return {k: v for k, v in vars(self).items() if k not in ("live", "checkpoints")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, live=threading.local(), checkpoints=WeakKeyDictionary())


class Turning(TorchDispatchMode):
    """Notes that a tensor of h0's shape, of as many sequences as tokens, had the two exchanged: no shape tells that."""

    turned = False

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.transpose.int, aten.permute.default) and args[0].shape == self.shape:
            order = list(range(args[0].dim()))
            if func is aten.transpose.int:
                order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
            else:
                order = args[1]
            self.turned |= order[0] % args[0].dim() == 1
        return func(*args, **kwargs or {})


def is_turned(x: Tensor) -> bool:
    """Whether two of its dimensions, of one size by chance, stand in another order than in memory: (T, B, d), B = T."""
    return any(x.shape[i] == x.shape[i + 1] > 1 and x.stride(i) < x.stride(i + 1) for i in range(x.dim() - 1))


def alone(h0: Tensor) -> Tensor:
    """h0 for a block that runs again: the gradient through h0 has its own way back."""
    again = h0.detach()
    with suppress(RuntimeError):  # within torch.func
        again.requires_grad_(h0.requires_grad)
    return again


def running_checkpoint() -> object | None:
    """The innermost checkpoint that is not a reentrant one, running for the first time or again. None before torch 2.8,
    where only a gradient that reaches the output of a block, or of the stack, tells its pass."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)(True)
    cells = getattr(inspect.unwrap(top[0]), "__closure__", None) if top else None
    held = [cell.cell_contents for cell in cells or ()]
    return next((x for x in (h() if isinstance(h, ref) else h for h in held) if isinstance(x, KEPT)), None)


def lost_gradient() -> RuntimeError:
    return RuntimeError("h0: expected nothing trained before the first block, as reentrant checkpointing loses the "
                        "gradient through h0, got a trained tensor; pass use_reentrant=False")


def trains(x: Tensor, given: list[Tensor]) -> bool:
    """Whether a parameter, or one of the tensors that a pass was given, gets a gradient through x."""
    seen, queue = set(), [x.grad_fn]
    while queue:
        if (node := queue.pop()) is None or node in seen:
            continue
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) or any(leaf is y for y in given) or isinstance(node, CHECKPOINT):
            return True
        seen.add(node)
        queue += [parent for parent, _ in node.next_functions]
    return isinstance(x, nn.Parameter) or any(x is y for y in given)
