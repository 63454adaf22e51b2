"""The fast paths against the plain ones: PyTorch's own dropout, cross-entropy and linear layer are the oracles."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ids, inject, stir, tiny
from torch import nn
from torch.autograd import gradcheck

import model
from sibo_lab import fast
from sibo_lab.backbone.generate import generate


@given(n=st.integers(1, 40), d=st.integers(1, 9), V=st.integers(2, 30), chunk=st.integers(1, 50), bias=st.booleans(),
       seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_cross_entropy_in_chunks_is_the_plain_one_with_all_its_gradients(n, d, V, chunk, bias, seed):
    torch.manual_seed(seed)
    inputs = [x.double().requires_grad_() for x in (torch.randn(n, d), torch.randn(V, d), torch.randn(V))]
    h, W, b = inputs if bias else (*inputs[:2], None)
    labels, weight = torch.randint(V, (n,)), torch.randint(1, 5, (n,))
    ours = 3 * fast.cross_entropy(h, W, b, labels, weight, chunk)
    plain = 3 * (F.cross_entropy(F.linear(h, W, b), labels, reduction="none") * weight).sum() / weight.sum()
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)
    some = inputs[: 2 + bias]
    for x, y in zip(torch.autograd.grad(ours, some), torch.autograd.grad(plain, some), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


def test_cross_entropy_of_bfloat16_is_taken_in_float32():
    h, W = torch.randn(300, 16).bfloat16().requires_grad_(), torch.randn(50, 16).bfloat16()
    labels, weight = torch.randint(50, (300,)), torch.ones(300)
    ours, plain = fast.cross_entropy(h, W, None, labels, weight), F.cross_entropy(F.linear(h, W).float(), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, h)[0] for x in (ours, plain)), atol=1e-4, rtol=0.02)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_zeroes_each_element_with_probability_p_independently_of_its_place(p):
    torch.manual_seed(0)
    x = torch.ones(500, 400)
    y = fast.dropout(x, p, training=True)
    gone = (y == 0).double()
    assert y[y != 0].unique().tolist() == [pytest.approx(1 / (1 - p))]
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(gone.mean() - p) < 5 * sigma
    assert (gone.mean(1) - p).abs().max() < 5 * sigma * 500**0.5  # from the first row to the last
    neighbours = ((gone.flatten()[1:] - p) * (gone.flatten()[:-1] - p)).mean() / (p * (1 - p))
    assert abs(neighbours) < 5 / x.numel() ** 0.5


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), p=st.floats(0.01, 0.99), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_dropouts_gradient_passes_where_its_output_did(shape, p, seed):
    torch.manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64).add(1).requires_grad_()
    y = fast.dropout(x, p, training=True)
    g, = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g * x, y)


def test_dropout_is_off_outside_training_and_repeats_with_its_seed():
    x = torch.randn(1000)
    assert fast.dropout(x, 0.5, training=False) is x
    assert fast.dropout(x, 0.0, training=True) is x
    torch.manual_seed(3)
    first = fast.dropout(x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(first, fast.dropout(x, 0.5, training=True))


def test_dropout_compiles_into_one_graph_with_the_same_mask():
    x, f = torch.randn(64, 8), lambda x: fast.dropout(2 * x, 0.3, training=True).sin()
    torch.manual_seed(5)
    plain = f(x)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), plain)


@pytest.mark.parametrize("shared", [True, False])
def test_packing_and_unpacking_rows_are_each_others_backward_pass(shared):
    rows, packed = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 7, 4), (1, 17, 4)))
    shape = 3, 2, 5, shared
    assert gradcheck(lambda x: fast.pack(x, *shape), rows) and gradcheck(lambda x: fast.unpack(x, *shape), packed)
    for op, x in ((fast.pack, rows), (fast.unpack, packed)):
        torch.library.opcheck(op, (x, *shape))
    assert torch.equal(fast.pack(fast.unpack(packed, 3, 2, 5), 3, 2, 5), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_product_of_any_number_of_rows_and_leave_nothing_behind(dtype):
    """A CPU without AVX512 packs no bfloat16."""
    packed = fast.PackedLinear if fast.packs(dtype) else nn.Linear
    m = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 32, bias=False)).to(dtype)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.02, "rtol": 0.02}
    inputs = [torch.randn(rows, 3, 48, dtype=dtype) for rows in (1, 5, 6, 20, 43)]
    with torch.no_grad():
        plain = [m(x) for x in inputs]
        with fast.packed_weights(m):
            with fast.packed_weights(m):
                assert type(m[0]) is packed
            assert type(m[0]) is packed  # the inner one leaves the outer one's
            for x, y in zip(inputs, plain, strict=True):
                torch.testing.assert_close(m(x), y, **close)
        assert type(m[0]) is nn.Linear and not vars(m[0].weight)
        assert all(torch.equal(m(x), y) for x, y in zip(inputs, plain, strict=True))
        with fast.packed_weights(m, most=10):  # a big model gets no second copy
            assert type(m[0]) is nn.Linear


@pytest.mark.skipif(not fast.packs(torch.float32), reason="no oneDNN")
def test_the_packed_copy_is_what_multiplies_few_rows():
    m = nn.Sequential(nn.Linear(48, 96))
    few, many = torch.randn(8, 48), torch.randn(129, 48)
    with torch.no_grad(), fast.packed_weights(m):
        expected = F.linear(few, m[0].weight, m[0].bias)
        m[0].weight.data.zero_()
        torch.testing.assert_close(m(few), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(m(many), m[0].bias.expand(129, -1))


def test_the_formula_used_for_bfloat16_on_cpus_is_the_kernels():
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 17, 8).bfloat16().requires_grad_() for _ in range(3)]
    wide = [x.detach().float().requires_grad_() for x in qkv]
    weight = torch.randn(2, 3, 17, 8)
    ours = fast.attend(*qkv, None, True, 0.0)
    theirs = F.scaled_dot_product_attention(*wide, is_causal=True)
    torch.testing.assert_close(ours.float(), theirs, atol=0.03, rtol=0)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for x, y in zip(qkv, wide, strict=True):
        torch.testing.assert_close(x.grad.float(), y.grad, atol=0.06, rtol=0)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_blocks_learn_and_answer_the_same_and_are_compiled_once_for_each():
    def learned(m, rows, length):
        input_ids = torch.cat((ids(0, 1, 5).expand(rows, -1), ids(rows, rows, length)), 1)  # all begin alike
        labels = torch.where(torch.arange(5 + length) < 7, -100, input_ids)
        m.zero_grad()
        loss = model.loss(m.train(), input_ids, labels)
        loss.backward()
        return [loss.detach(), *(p.grad for p in m.parameters() if p.requires_grad)]

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (stir(inject(tiny(num_hidden_layers=3), "lora-sibo")) for _ in range(2))
    fast.compiled(compiled)
    for shape in ((4, 6), (3, 9)):
        for ours, theirs in zip(learned(compiled, *shape), learned(plain, *shape), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # rotary angles are float32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(*(generate(m.eval(), ids(1, 2, 4), max_new_tokens=5) for m in (compiled, plain)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()
    torch.compiler.set_stance("default")
