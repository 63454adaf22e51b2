"""switching.py, wrapping.py and adapter_file.py where several things meet: overlapping switches, statistics, new heads,
weights that are read past an adapter, attributes that are set from outside."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from small_models import Toy, hugging_face, ids, inject, output, stir, tiny
from torch import nn

import sibo


class Normed(nn.Module):
    """A head, with statistics of what it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.score = nn.BatchNorm1d(4)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.score(h.mean(1))


X = torch.arange(10).view(5, 2) % 5


def trained(m):
    """After ten steps, in eval mode."""
    optimizer = torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (m.train()(X) - 1).square().sum().backward()
        optimizer.step()
    return m.eval()


def test_statistics_of_a_batch_norm_are_saved_loaded_and_put_back(tmp_path):
    m, before = sibo.inject(Normed(), "lora", 0.3, targets="blocks.*.0", rank=2), Normed().eval()
    assert m.sibo.modules_to_save == ("score",)
    trained(m)
    sibo.save(m, tmp_path)
    loaded = sibo.load(Normed(), tmp_path).eval()
    assert torch.equal(loaded(X), m(X)) and not torch.allclose(m(X), before(X), atol=0.1)
    with sibo.disabled(m):
        assert torch.equal(m(X), before(X))
    removed = sibo.remove(m)
    pairs = zip(removed.state_dict().values(), before.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_two_threads_that_overlap_in_disabled_leave_the_method_on():
    m, frozen = trained(sibo.inject(Normed(), "lora", 0.3, targets="blocks.*.0", rank=2)), Normed().eval()
    on, first_in, first_out = m(X), threading.Event(), threading.Event()

    def first():
        with sibo.disabled(m):
            first_in.set()
            assert torch.equal(m(X), frozen(X))
        first_out.set()

    with sibo.disabled(m):
        thread = threading.Thread(target=first)
        thread.start()
        assert first_in.wait(60) and first_out.wait(60)
        assert torch.equal(m(X), frozen(X))  # the other one left, this one did not
    thread.join()
    assert torch.equal(m(X), on)


def test_a_model_is_saved_as_it_is_with_the_method_on(tmp_path):
    m = stir(inject(tiny(), "lora-sibo"))
    with sibo.disabled(m), pytest.raises(ValueError, match="expected the method to be on, got it disabled"):
        sibo.save(m, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_loaded_into_a_disabled_model_which_would_lose_its_head(tmp_path):
    m = trained(sibo.inject(Normed(), "lora", 0.3, targets="blocks.*.0", rank=2))
    sibo.save(m, tmp_path)
    fresh = sibo.inject(Normed(), "lora", 0.3, targets="blocks.*.0", rank=2).eval()
    with sibo.disabled(fresh), pytest.raises(ValueError, match="expected the method to be on, .*; load after sibo.dis"):
        sibo.load(fresh, tmp_path)
    assert torch.equal(sibo.load(fresh, tmp_path)(X), m(X))


@pytest.mark.parametrize("method,target", [("lora", "mlp.up_proj"), ("adapter", "mlp")])
def test_weights_of_8_bit_floats_are_refused_before_anything_is_changed(method, target):
    m = tiny(dtype=torch.float32)
    x = m.blocks[1].mlp.up_proj
    x.weight = nn.Parameter(x.weight.data.to(torch.float8_e4m3fn))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Llama: expected .*, got torch.float8_e4m3fn at 'blocks.1.mlp.up_proj'"):
            sibo.inject(m, method, 0.3, targets=target)
    assert not hasattr(m, "sibo") and all(p.requires_grad for p in m.parameters())


class Reads(Toy):
    """Computes with the weight of `sub` instead of calling it, as fused attention does."""

    def forward(self, x):
        return F.linear(self.first(self.embed(x)), self.sub.weight)


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("use", [lambda W: W, lambda W: W.T.T, lambda W: W.data, lambda W: W.to(torch.float64)])
@pytest.mark.parametrize("normed", [False, True])  # then the weight is no parameter
def test_a_weight_that_is_computed_with_past_its_adapter_is_an_error(method, use, normed):
    m = Reads().double()
    m.sub = nn.utils.parametrizations.weight_norm(m.sub) if normed else m.sub
    m.forward = lambda x: F.linear(m.first(m.embed(x)), use(m.sub.weight))
    m(torch.tensor([[1]]))
    sibo.inject(m, method, 0.0, targets="sub", rank=2, bottleneck=2)
    with pytest.raises(RuntimeError, match="sub: expected to be called, got its weight in"):
        m(torch.tensor([[1]]))


def test_a_wrapped_weight_may_be_looked_at():
    m, plain = sibo.inject(Toy(), "lora", 0.0, targets="sub", rank=2), Toy()
    W, expected = m.sub.weight, plain.sub.weight
    assert (W.shape, W.dtype, W.device, W.size(0), W.numel(), W.is_floating_point()) == (
        expected.shape, expected.dtype, expected.device, expected.size(0), expected.numel(), True)
    assert isinstance(W, torch.Tensor) and m.sub.in_features == plain.sub.in_features


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), 1.0

    def forward(self, h):
        return self.scale * self.linear(h)


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(Scaled() for _ in range(2))

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return h


def test_what_is_set_on_a_wrapped_module_reaches_it():
    m, plain = sibo.inject(Steps(), "adapter", 0.0, targets="blocks.*", bottleneck=2), Steps()
    for x in (m, plain):
        x.blocks[0].scale = 3.0
    assert torch.equal(m(X), plain(X)) and not torch.equal(m(X), Steps()(X))


def test_a_hook_put_on_the_first_block_after_inject_is_in_h0():
    x, noise = X, torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    ms = [sibo.inject(Steps(), "lora", 0.5, targets="linear", rank=2), Steps()]
    for m in ms:
        m.blocks[0].register_forward_pre_hook(lambda _, args: (args[0] + noise,))
    late = ms[0]
    early = ms[1]
    sibo.inject(early, "lora", 0.5, targets="linear", rank=2)
    for a, b in zip(late.sibo_before.layers, early.sibo_before.layers, strict=True):
        nn.init.normal_(a.up)
        b.load_state_dict(a.state_dict())
    assert torch.equal(late(x), early(x))


def test_a_part_drawn_anew_for_a_task_is_not_taken_for_the_one_trained_with(tmp_path):
    """Frozen, of no known name, and random: not BERT's own head, but the pooler of a model that lacked one."""
    m = hugging_face("bert")
    sibo.save(inject(m, "lora-sibo"), tmp_path)
    other = hugging_face("bert")
    with torch.no_grad():
        other.pooler.dense.weight.normal_()
    with pytest.raises(ValueError, match=r"another backbone: expected other values in pooler\.dense\.weight"):
        sibo.load(other, tmp_path)


def test_an_adapter_of_a_compiled_model_is_that_of_the_model(tmp_path):
    m = stir(sibo.inject(torch.compile(tiny(), backend="eager"), "lora", 0.3, rank=3))
    sibo.save(m, tmp_path)
    torch.testing.assert_close(sibo.load(tiny(), tmp_path)(ids()), m(ids()), rtol=0, atol=1e-9)


def test_compiled_and_checkpointed_blocks_stay_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    m = stir(inject(tiny(), "lora-sibo")).train()
    m.grad_checkpoint = True
    twin = copy.deepcopy(m)
    for block in m.blocks[1:]:
        block.compile(dynamic=True, backend="aot_eager")
    for T in (7, 9, 12):
        for x in (m, twin):
            x.zero_grad()
            x(ids(T=T)).square().mean().backward()
        for a, b in zip(m.parameters(), twin.parameters(), strict=True):
            assert a.grad is None and b.grad is None or torch.equal(a.grad, b.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_second_backward_pass_finds_its_own_h0_within_a_gradient_hook():
    m = stir(inject(hugging_face("llama"), "lora-sibo")).train()
    expected = torch.autograd.grad(output(m, ids()).square().mean(), [p for p in m.parameters() if p.requires_grad])
    m.gradient_checkpointing_enable({"use_reentrant": False})
    m.config.use_cache = False
    ran = []

    def elsewhere(grad):
        with torch.no_grad():
            ran.append(output(m, ids(2)))

    def listen(_, args, out):
        if torch.is_grad_enabled():
            (out if isinstance(out, torch.Tensor) else out[0]).register_hook(elsewhere)

    handle = m.model.layers[1].register_forward_hook(listen)
    found = torch.autograd.grad(output(m, ids()).square().mean(), [p for p in m.parameters() if p.requires_grad])
    handle.remove()
    assert ran and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_torch_compile_wraps_is_switched_and_removed_by_its_own_names():
    plain = Normed().eval()
    m = sibo.inject(copy.deepcopy(plain), "lora", 0.3, targets="blocks.*.0", rank=2)
    told, wrapped = sibo.summary(m), torch.compile(m, backend="eager")
    assert sibo.summary(wrapped) == told
    trained(m.train()).eval()
    with sibo.disabled(wrapped):
        assert torch.equal(m(X), plain(X))
    sibo.remove(wrapped)
    assert not hasattr(m, "sibo") and torch.equal(m(X), plain(X))


def test_a_merged_model_is_not_to_be_removed_but_loaded_again():
    m = sibo.merge(sibo.inject(Normed(), "lora", 0.3, targets="blocks.*.0", rank=2))
    with pytest.raises(ValueError, match="Normed: expected a model not injected yet, got a merged one; load it again"):
        sibo.inject(m)


CALLS = {"save": sibo.save, "load": sibo.load, "merge": lambda m, _: sibo.merge(m),
         "disabled": lambda m, _: sibo.disabled(m).__enter__(), "set_lam": lambda m, _: sibo.set_lam(m, 0.1),
         "remove": lambda m, _: sibo.remove(m), "summary": lambda m, _: sibo.summary(m)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("other,says", [(nn.DataParallel, "one around it; pass its 'module'"),
                                        (lambda m: m.blocks, "a part of it; pass the whole")], ids=["around", "part"])
def test_only_the_module_that_was_injected_is_saved_folded_or_switched(call, other, says, tmp_path):
    m = stir(inject(tiny(), "lora-sibo"))
    expected = m(ids())
    sibo.save(m, tmp_path / "saved")
    folder = tmp_path / ("saved" if call == "load" else "new")
    with pytest.raises(ValueError, match=f"expected the module that was injected, got {says}"):
        CALLS[call](other(m), folder)
    assert not (tmp_path / "new").exists() and torch.equal(m(ids()), expected)
    with sibo.disabled(m):
        assert torch.equal(m(ids()), tiny()(ids()))


def as_written(m):
    return m


def compiled(m):
    return torch.compile(m, backend="eager")


def head_compiled(m):
    m.score = compiled(m.score)
    return m


WAYS = [as_written, compiled, head_compiled]


@pytest.mark.parametrize("before,after", [(way, as_written) for way in WAYS] + [(as_written, way) for way in WAYS[1:]])
def test_before_or_after_torch_compile_a_model_is_saved_loaded_switched_and_removed_whole(before, after, tmp_path):
    torch._dynamo.reset()
    plain = Normed().eval()
    m = after(trained(sibo.inject(before(Normed()), "lora", 0.3, targets="blocks.*.0", h0="embed", rank=2)))
    expected, twin = m(X), sibo.inject(Normed(), "lora", 0.3, targets="blocks.*.0", h0="embed", rank=2)
    assert sibo.summary(m) == sibo.summary(twin)
    sibo.save(m, tmp_path)
    for way in WAYS:
        fresh = way(Normed())
        assert sibo.load(fresh, tmp_path) is fresh and torch.equal(fresh.eval()(X), expected)
        assert torch.equal(sibo.load(way(copy.deepcopy(twin)), tmp_path).eval()(X), expected)
    with sibo.disabled(m):
        assert torch.equal(m(X), plain(X))
    sibo.remove(m)
    assert torch.equal(m(X), plain(X)) and all(p.requires_grad for p in m.parameters())


class NormedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(2)

    def forward(self, h):
        return self.norm(self.linear(h))


def test_statistics_within_an_adapted_sub_layer_are_those_trained_with(tmp_path):
    def normed():
        m = Steps()
        m.blocks = nn.ModuleList(NormedBlock() for _ in range(2))
        return m

    plain = normed().eval()
    m = trained(sibo.inject(copy.deepcopy(plain), "adapter", 0.3, targets="blocks.*", bottleneck=2))
    sibo.save(m, tmp_path)
    assert torch.equal(sibo.load(copy.deepcopy(plain), tmp_path)(X), m(X))
    with sibo.disabled(m):
        assert torch.equal(m(X), plain(X))
    assert torch.equal(sibo.remove(m)(X), plain(X))
