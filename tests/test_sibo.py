"""sibo.py against the paper's equations, against peft and transformers, and against everything that could lose h0.

In this order: the equations with a pencil, then with numpy; λ → 0; the start; other libraries; the fold; gradients; the
four rules of h0; one compiled graph. All models are tiny and random, float64 where equality is the claim."""

import copy
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    CASES,
    FAMILIES,
    LORA_CASES,
    LORAS,
    METHODS,
    Toy,
    hooks,
    hugging_face,
    ids,
    inject,
    output,
    sibo_layers,
    stir,
    tiny,
    twins,
)
from torch import nn

import model
import sibo
from sibo_lab import fast, switching
from sibo_lab.backbone import generate

HYPOTHESIS = settings(max_examples=25, deadline=None)


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------------------ the equations, with a pencil (d 2, r 1)
#
# h0 = [1, 2]; `first` makes h = [4, 2] of it; λ = 1/4, so h̃ = 3/4 [4, 2] + 1/4 [1, 2] = [3.25, 2]
# W = [[1, 1], [0, 1]], so hW = [4, 6];  W_down = [1, −1]ᵀ;  W_up = [2, 1];  s = alpha / r = 3 / 1


def pencil(**settings):
    m = Toy(1).double()
    m.embed.weight.data = matrix([1, 2])
    m.first.weight.data = matrix([4, 0], [0, 1])
    m.sub.weight.data = matrix([1, 1], [0, 1]).T  # nn.Linear stores Wᵀ
    sibo.inject(m, targets="sub", h0="embed", rank=1, alpha=3.0, bottleneck=1, **settings)
    m.sub.down.data, m.sub.up.data = matrix([1, -1]), matrix([2], [1])
    return m


def answer(m):
    return m(torch.tensor([[0]]))[0, 0].tolist()


def test_eq_1_serial_adapter():
    t = np.tanh(4 - 6)  # the sub-layer's output is [4, 6]
    assert answer(pencil(method="adapter", lam=0)) == [4 + 2 * t, 6 + t]


def test_eq_2_lora():
    assert answer(pencil(method="lora", lam=0)) == [4 + 3 * 2 * 2, 6 + 3 * 2 * 1]  # h W_down = 4 − 2


def test_eq_4_adapter_sibo_mixes_the_skip_too():
    x, y = 0.75 * 4 + 0.25 * 1, 0.75 * 6 + 0.25 * 2  # h̃ of the sub-layer's output [4, 6]
    t = np.tanh(x - y)
    assert answer(pencil(method="adapter", lam=0.25)) == [x + 2 * t, y + t]


def test_the_official_codes_adapter_keeps_the_skip_plain():
    t = np.tanh(3.25 - 5)
    assert answer(pencil(method="adapter", lam=0.25, skip="plain")) == [4 + 2 * t, 6 + t]


def test_an_adapter_on_the_input_comes_before_the_weight():
    t = np.tanh(3.25 - 2)
    x, y = 3.25 + 2 * t, 2 + t
    assert answer(pencil(method="adapter", lam=0.25, side="in")) == [x, x + y]


def test_eq_5_lora_sibo_lets_only_the_low_rank_path_see_h0():
    assert answer(pencil(method="lora", lam=0.25)) == [4 + 3 * 1.25 * 2, 6 + 3 * 1.25 * 1]  # h̃ W_down = 3.25 − 2


def test_table_6_lets_the_frozen_weight_see_h0_as_well():
    assert answer(pencil(method="lora", lam=0.25, frozen_too=True)) == [3.25 + 3 * 1.25 * 2, 5.25 + 3 * 1.25]


def test_a_learned_lambda_is_a_sigmoid_and_has_the_gradient_of_one():
    m = pencil(method="lora", lam=0.5, learn_lam=True)  # h̃ = [2.5, 2], so h̃ W_down = 0.5
    assert m.sub.lam_logit.shape == (1,) and m.sub.lam_logit.dtype == torch.float32 and m.sub.lam_logit.item() == 0
    out = m(torch.tensor([[0]]))
    assert out[0, 0].tolist() == [4 + 3 * 0.5 * 2, 6 + 3 * 0.5]
    out.sum().backward()  # d/dλ = s (h0 − h) W_down (2 + 1) = 3 · (−3) · 3, and dλ/dlogit = λ(1 − λ) = 1/4
    assert m.sub.lam_logit.grad.item() == 3 * (-3) * 3 / 4


# -------------------------------------------------------------------------------------------- the equations, with numpy

lams = st.floats(0.01, 0.99)
sizes = {"d": st.integers(1, 9), "out": st.integers(1, 9), "r": st.integers(1, 6), "T": st.integers(1, 6),
         "seed": st.integers(0, 2**32)}


def drawn(seed, *shapes):
    g = np.random.default_rng(seed)
    return [g.standard_normal(s) for s in shapes]


def with_weights(m, first, W, A, B):
    """Puts numpy's matrices, written as on paper (in × out), where the toy keeps them."""
    for p, value in ((m.first.weight, first), (m.sub.base.weight, W), (m.sub.down, A), (m.sub.up, B)):
        p.data = torch.from_numpy(value.T.copy()).to(p.dtype)
    return m


@HYPOTHESIS
@given(lam=lams, learned=st.booleans(), frozen_too=st.booleans(), **sizes)
def test_lora_sibo_is_eq_5_for_all_shapes(d, out, r, T, seed, lam, learned, frozen_too):
    first, W, A, B = drawn(seed, (d, d), (d, out), (d, r), (r, out))
    m = sibo.inject(Toy(d=d, out=out).double(), "lora", lam, targets="sub", h0="embed", rank=r, alpha=5.0,
                    learn_lam=learned, frozen_too=frozen_too)
    x = torch.arange(T)[None] % 5
    h0 = m.embed(x).detach().numpy()
    h = h0 @ first
    mixed = (1 - lam) * h + lam * h0
    expected = (mixed if frozen_too else h) @ W + 5 / r * mixed @ A @ B
    found = with_weights(m, first, W, A, B)(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if learned else 1e-11)  # a learned λ is float32


@HYPOTHESIS
@given(lam=lams, learned=st.booleans(), skip=st.sampled_from(["mixed", "plain"]), side=st.sampled_from(["out", "in"]),
       **sizes)
def test_adapter_sibo_is_eq_4_for_all_shapes(d, out, r, T, seed, lam, learned, skip, side):
    out = d if side == "out" else out
    first, W, A, B = drawn(seed, (d, d), (d, out), (d, r), (r, d))
    m = sibo.inject(Toy(d=d, out=out).double(), "adapter", lam, targets="sub", h0="embed", bottleneck=r, skip=skip,
                    side=side, learn_lam=learned)
    x = torch.arange(T)[None] % 5
    h0 = m.embed(x).detach().numpy()
    h = h0 @ first @ W if side == "out" else h0 @ first
    mixed = (1 - lam) * h + lam * h0
    expected = (mixed if skip == "mixed" else h) + np.tanh(mixed @ A) @ B
    expected = expected if side == "out" else expected @ W
    found = with_weights(m, first, W, A, B)(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if learned else 1e-11)


@HYPOTHESIS
@given(lam=st.one_of(st.just(0.0), lams), learned=st.booleans(), **sizes)
def test_a_parallel_adapter_reads_what_its_sub_layer_reads_and_adds_to_its_output(d, out, r, T, seed, lam, learned):
    first, W, A, B = drawn(seed, (d, d), (d, out), (d, r), (r, out))
    m = sibo.inject(Toy(d=d, out=out).double(), "adapter", lam, targets="sub", h0="embed", bottleneck=r,
                    side="parallel", learn_lam=learned and lam > 0)
    x = torch.arange(T)[None] % 5
    h0 = m.embed(x).detach().numpy()
    h = h0 @ first
    expected = h @ W + np.tanh(((1 - lam) * h + lam * h0) @ A) @ B  # He et al. 2022; with h0 as in Eq. (4)
    found = with_weights(m, first, W, A, B)(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if learned else 1e-11)


class InPlace(nn.Linear):
    def forward(self, h):
        return super().forward(h.relu_())


class OutOfPlace(nn.Linear):
    def forward(self, h):
        return super().forward(h.relu())


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_a_parallel_adapter_reads_what_its_sub_layer_reads_also_where_that_begins_in_place(lam):
    out = []
    for kind in (InPlace, OutOfPlace):
        torch.manual_seed(0)
        m = Toy()
        m.sub.__class__ = kind
        sibo.inject(m, "adapter", lam, targets="sub", h0="first", side="parallel", bottleneck=3)
        nn.init.normal_(m.sub.up)
        with torch.no_grad():
            out.append(m(torch.arange(4)[None]))
    torch.testing.assert_close(*out)


def test_a_learned_lambda_is_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        m = sibo.inject(Toy(), "lora", 0.2, targets="sub", h0="embed", learn_lam=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert m.sub.lam_logit.dtype == torch.float32 and float(m.sub.lam()) == pytest.approx(0.2, rel=1e-6)


# --------------------------------------------------------------------------------------------------- λ = 0, and λ → 0


@HYPOTHESIS
@given(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), frozen_too=st.booleans(), **sizes)
def test_lora_sibo_at_lambda_0_is_lora_bit_for_bit_and_needs_no_h0(d, out, r, T, seed, dtype, frozen_too):
    h, W, A, B = (torch.from_numpy(x).to(dtype) for x in drawn(seed, (2, T, d), (out, d), (r, d), (out, r)))
    m = nn.Sequential(nn.Linear(d, out, bias=False, dtype=dtype))  # nothing here could be h0
    m[0].weight.data = W
    sibo.inject(m, "lora", 0.0, targets="0", rank=r, alpha=3.0, frozen_too=frozen_too)
    m[0].down.data.copy_(A), m[0].up.data.copy_(B)
    assert torch.equal(m(h), F.linear(h, W) + 3 / r * F.linear(F.linear(h, A), B))
    assert hooks(m) == 0


@HYPOTHESIS
@given(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), side=st.sampled_from(["out", "in"]),
       skip=st.sampled_from(["mixed", "plain"]), **sizes)
def test_adapter_sibo_at_lambda_0_is_the_adapter_bit_for_bit_and_needs_no_h0(d, out, r, T, seed, dtype, side, skip):
    width = out if side == "out" else d
    h, W, A, B = (torch.from_numpy(x).to(dtype) for x in drawn(seed, (2, T, d), (out, d), (r, width), (width, r)))
    m = nn.Sequential(nn.Linear(d, out, bias=False, dtype=dtype))
    m[0].weight.data = W
    sibo.inject(m, "adapter", 0.0, targets="0", bottleneck=r, side=side, skip=skip)
    m[0].down.data.copy_(A), m[0].up.data.copy_(B)

    def adapter(x):
        return x + F.linear(torch.tanh(F.linear(x, A)), B)

    assert torch.equal(m(h), adapter(F.linear(h, W)) if side == "out" else F.linear(adapter(h), W))
    assert hooks(m) == 0


@pytest.mark.parametrize("family,name", [c for c in CASES if "learned" not in c[1]])
def test_at_lambda_0_every_variant_on_every_family_is_its_plain_method_and_hooks_nothing(family, name):
    m = stir(inject(tiny(family), name, lam=0.0))
    method, side = METHODS[name]["method"], METHODS[name].get("side", "out")
    assert torch.equal(m(ids()), stir(inject(tiny(family), method, side=side))(ids()))
    assert hooks(m) == 0


@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from([c for c in CASES if METHODS[c[1]]["lam"]]), lam=st.floats(1e-6, 1e-4),
       seed=st.integers(0, 999))
def test_as_lambda_goes_to_0_the_plain_method_is_met_at_least_linearly(case, lam, seed):
    family, name = case
    method, side = METHODS[name]["method"], METHODS[name].get("side", "out")
    plain = stir(inject(tiny(family), method, side=side), seed)(ids())
    error, half = ((stir(inject(tiny(family), name, lam=x), seed, move_lam=False)(ids()) - plain).abs().max().item()
                   for x in (lam, lam / 2))
    assert 0 < error < 1e3 * lam
    assert half < 0.6 * error


# ----------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("family,name", CASES)
def test_only_a_mixed_skip_and_a_mixed_frozen_weight_move_the_model_before_it_is_trained(family, name):
    s = METHODS[name]
    mixed_skip = s["method"] == "adapter" and s.get("skip") != "plain" and s.get("side") != "parallel"
    moved_at_once = s["lam"] and (mixed_skip or s.get("frozen_too", False))
    assert torch.equal(inject(tiny(family), name)(ids()), tiny(family)(ids())) == (not moved_at_once)


def test_adapter_sibo_starts_as_the_mix_alone():
    m = Toy(d=4).double()
    x = torch.arange(5)[None]
    h, h0 = m(x), m.embed(x)
    sibo.inject(m, "adapter", 0.25, targets="sub", h0="embed", bottleneck=3)
    torch.testing.assert_close(m(x), 0.75 * h + 0.25 * h0, rtol=0, atol=1e-15)


def test_weights_start_as_the_paper_says():
    torch.manual_seed(0)
    lora = inject(tiny(hidden_size=64), "lora-sibo", rank=64)
    for _, x in sibo_layers(lora):  # Kaiming-uniform with a = √5 is U(−1/√d, 1/√d), of standard deviation 1/√(3d)
        d = x.down.shape[1]
        assert x.up.count_nonzero() == 0 and x.down.abs().max() <= d**-0.5
        assert x.down.std().item() == pytest.approx((3 * d) ** -0.5, rel=0.05)
    adapter = inject(tiny(hidden_size=64), "adapter-sibo", bottleneck=256)
    for _, x in sibo_layers(adapter):
        assert x.up.count_nonzero() == 0
        assert x.down.std().item() == pytest.approx(0.02, rel=0.05) and abs(x.down.mean().item()) < 0.001


@pytest.mark.parametrize("lam", [0.05, 0.3, 0.9])
def test_a_learned_lambda_starts_where_it_is_told(lam):
    for _, x in sibo_layers(inject(tiny(), "adapter, learned λ", lam=lam)):
        assert x.lam().item() == pytest.approx(lam, abs=1e-6)


@pytest.mark.parametrize("dtype,stored", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                          (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_trained_weights_are_float32_at_least_and_outputs_keep_the_models_dtype(dtype, stored):
    for name in ("adapter, learned λ", "lora, learned λ"):
        m = inject(tiny(dtype=dtype), name)
        assert {p.dtype for _, x in sibo_layers(m) for p in (x.down, x.up)} == {stored}
        assert m(ids()).dtype == dtype


# ------------------------------------------------------------------------------------------------ peft and transformers


def test_plain_lora_is_pefts_in_outputs_and_gradients():
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(hugging_face("llama"), peft.LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.0, target_modules=targets, bias="none"))
    ours = stir(inject(hugging_face("llama"), "lora"))
    pairs = []
    for name, x in sibo_layers(ours):
        peer = theirs.base_model.model.get_submodule(name)
        pairs += [(x.down, peer.lora_A["default"].weight), (x.up, peer.lora_B["default"].weight)]
    for a, b in pairs:
        b.data.copy_(a)
    assert len(pairs) == 2 * sum(".lora_A" in n for n, _ in theirs.named_parameters()) == 2 * 2 * 5
    a, b = output(ours, ids()), output(theirs, ids())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    a.square().mean().backward(), b.square().mean().backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        assert a.grad.abs().max() > 0


@pytest.mark.parametrize("family,name,head", [
    (f, name, False) for f, name in CASES if f != "bert" or "parallel" not in name] + [
    ("bert", name, True) for name in ("adapter-sibo", "lora-sibo")])
def test_on_transformers_models_it_computes_what_it_does_on_ours(family, name, head, tmp_path):
    theirs, ours = twins(family, tmp_path, head)
    before = output(ours, ids())
    stir(inject(theirs, name)), stir(inject(ours, name))
    assert [x.lam_start for _, x in sibo_layers(theirs)] == [x.lam_start for _, x in sibo_layers(ours)]
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0 if family != "bert" else 1
    mask[0, 5:] = 0 if family == "bert" else 1
    # transformers counts a padded prompt's positions only in generate
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family != "bert" else {}
    a, b = output(theirs, ids(), attention_mask=mask, **more), output(ours, ids(), mask)
    real = mask.bool() if a.dim() == 3 else slice(None)
    torch.testing.assert_close(a[real], b[real], rtol=0, atol=2e-5)
    assert not torch.allclose(output(ours, ids()), before, atol=1e-2)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*list(METHODS)[:4], "lora, frozen too"])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_transformers_generate_and_ours_write_the_same_with_a_cache(family, name, beams, tmp_path):
    theirs, ours = twins(family, tmp_path)
    stir(inject(theirs, name)), stir(inject(ours, name))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    expected = theirs.generate(ids(), attention_mask=mask, max_new_tokens=8, num_beams=beams, do_sample=False,
                               pad_token_id=0)
    assert torch.equal(generate.generate(ours, ids(), mask, 8, beams), expected)


# ------------------------------------------------------------------------------------------------------------- the fold


@pytest.mark.parametrize("sibo_at", [None, "both"])
@pytest.mark.parametrize("family,name", LORA_CASES)
def test_the_fold_is_the_unfolded_model(family, name, sibo_at):
    if sibo_at and family != "bert":  # everywhere but on the modules whose input is wide
        sibo_at = ("q_proj", "k_proj", "v_proj", "up_proj" if family == "llama" else "fc_in")
    m = stir(inject(tiny(family), name, sibo_at=sibo_at))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    before = m(ids()), m(ids(), mask)
    sibo.merge(m)
    assert not any(p.requires_grad for p in m.parameters())
    for a, b in zip(before, (m(ids()), m(ids(), mask)), strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("family,name", LORA_CASES)
def test_the_fold_holds_on_transformers_models(family, name):
    m = stir(inject(hugging_face(family).double(), name))
    before = output(m, ids())
    error = (output(sibo.merge(m), ids()) - before).abs().max()
    assert error <= (1e-9 if family == "bert" else 1e-5)  # their LLaMA and GPT-J hold some steps in float32


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_the_fold_holds_in_cached_decoding_token_by_token_and_in_beams(family, name):
    m = stir(inject(tiny(family), name))
    x = ids(T=9)
    expected, greedy, beams = m(x), generate.generate(m, x, max_new_tokens=6), generate.generate(m, x, None, 6, 3)
    sibo.merge(m)
    cache = m.new_cache(2, 9)
    steps = [m(x[:, :4], cache=cache)] + [m(x[:, i:i + 1], cache=cache) for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 3:], rtol=0, atol=1e-9)
    assert torch.equal(generate.generate(m, x, max_new_tokens=6), greedy)
    assert torch.equal(generate.generate(m, x, None, 6, 3), beams)


def test_the_usual_merge_of_sAB_without_h0_is_wrong_where_the_fold_is_right():
    m, naive = stir(inject(tiny(), "lora-sibo")), tiny()
    for name, x in sibo_layers(m):
        naive.get_submodule(name).weight.data += x.settings.alpha / x.settings.rank * x.up.data @ x.down.data
    before = m(ids())
    assert (naive(ids()) - before).abs().max() > 0.1
    assert (sibo.merge(m)(ids()) - before).abs().max() <= 1e-9


@HYPOTHESIS
@given(lam=lams, learned=st.booleans(), frozen_too=st.booleans(), bias=st.booleans(), **sizes)
def test_the_fold_is_exact_for_all_shapes(d, out, r, T, seed, lam, learned, frozen_too, bias):
    m = Toy(d=d, out=out).double()
    m.sub = nn.Linear(d, out, bias).double()
    x = torch.arange(T)[None] % 5
    stir(sibo.inject(m, "lora", lam, targets=["first", "sub"], h0="embed", rank=r, alpha=5.0, learn_lam=learned,
                     frozen_too=frozen_too), seed % 2**31)
    before = m(x)
    torch.testing.assert_close(sibo.merge(m)(x), before, rtol=1e-11, atol=1e-11)


def test_all_modules_share_one_product_with_h0():
    m = sibo.merge(stir(inject(tiny(), "lora-sibo", sibo_at=("q_proj", "v_proj", "up_proj"))))
    products = [p for n, p in m.named_parameters() if n.endswith("h0_down.weight")]
    assert [p.shape for p in products] == [(2 * 3 * 3, 16)]  # layers · modules · rank


def test_a_folded_linear_says_how_wide_its_weight_is():
    m = sibo.merge(stir(inject(tiny(), "lora-sibo")))
    assert all(x.weight.shape == (x.out_features, x.in_features) for x in m.modules() if isinstance(x, nn.Linear))


@pytest.mark.parametrize("name", LORAS)
def test_folding_twice_changes_nothing(name):
    m = sibo.merge(stir(inject(tiny(), name)))
    once, state = m(ids()), {k: v.clone() for k, v in m.state_dict().items()}
    again = sibo.merge(m).state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())
    assert torch.equal(m(ids()), once)


def test_a_folded_plain_lora_is_a_plain_model_again():
    m = sibo.merge(stir(inject(tiny(), "lora")))
    assert hooks(m) == 0 and {type(x) for x in m.modules()} == {type(x) for x in tiny().modules()}
    assert m.state_dict().keys() == tiny().state_dict().keys()


def test_modules_without_h0_fold_into_plain_linears_in_a_sibo_model_too():
    m = sibo.merge(inject(tiny(), "lora-sibo"))
    assert type(m.blocks[0].attn.q_proj) is type(m.blocks[0].mlp.down_proj) is nn.Linear
    assert type(m.blocks[0].mlp.up_proj) is not nn.Linear


@pytest.mark.parametrize("name", ["adapter", "adapter-sibo"])
def test_adapters_do_not_fold_and_it_is_said_why(name):
    m = stir(inject(tiny(), name))
    before = m(ids())
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: expected LoRA .*, got an adapter, whose tanh is not linear"):
        sibo.merge(m)
    assert torch.equal(m(ids()), before)


class RoundsInputs(nn.Linear):
    def forward(self, x):
        return super().forward(x.round(decimals=1))


def bitnets(x):
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(x.in_features, x.out_features, bias=False, online_quant=True, dtype=x.weight.dtype)


def falcons(x):
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(x.in_features, x.out_features, bias=False, dtype=x.weight.dtype)


def with_linear(make, dtype=torch.float32):
    """A tiny model whose last block has another class of linear module, with LoRA-SIBO on all, as if trained."""
    m = tiny(dtype=dtype)
    mlp = m.blocks[1].mlp
    new = make(mlp.up_proj)
    new.weight.data.copy_(mlp.up_proj.weight)
    mlp.up_proj = new
    return stir(inject(m, "lora-sibo"))


@pytest.mark.parametrize("make", [bitnets, lambda x: RoundsInputs(16, 24, bias=False)], ids=["BitNet's", "own"])
@torch.no_grad()
def test_a_linear_module_that_rounds_as_it_runs_does_not_fold_and_nothing_is_changed(make):
    m = with_linear(make)
    before = m(ids())
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up_proj: expected .*, got a quantised or computed one"):
        sibo.merge(m)
    assert torch.equal(m(ids()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_linear_module_of_another_class_that_computes_the_same_folds(dtype):
    m = with_linear(falcons, dtype)
    before = m(ids())
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(sibo.merge(m)(ids()), before, rtol=tolerance, atol=tolerance * float(before.abs().max()))


def test_lora_sibo_on_two_devices_does_not_fold_and_nothing_is_changed():
    m = stir(inject(tiny(), "lora-sibo"))
    last = m.blocks[1].mlp.up_proj
    here = last.down, last.up
    state = {n: p.clone() for n, p in m.state_dict().items()}
    last.down, last.up = (nn.Parameter(p.to("meta")) for p in here)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up_proj: expected .* on cpu, .*, got it on meta"):
        sibo.merge(m)
    inside = {x.name: x for x in switching.layers(m)}
    sibo.set_lam(m, 0.0)
    switching.require_foldable(inside)  # without h0 each folds where it is
    sibo.set_lam(m, 0.2)
    last.down, last.up = here
    assert m.state_dict().keys() == state.keys() and all(torch.equal(p, state[n]) for n, p in m.state_dict().items())


def test_folding_a_tied_head_leaves_the_embedding_alone():
    m = tiny()
    m.head.weight = m.embed.weight
    stir(sibo.inject(m, "lora", 0.3, targets=["head", "up_proj"], rank=3))
    embedding, before = m.embed.weight.clone(), m(ids())
    sibo.merge(m)
    assert torch.equal(m.embed.weight, embedding) and not torch.equal(m.head.base.weight, embedding)
    assert (m(ids()) - before).abs().max() <= 1e-9


@pytest.mark.parametrize("name,share", [("lora", 1), ("lora-sibo", 0.7), ("lora, frozen too", 1)])
def test_the_fold_of_a_bfloat16_model_is_made_in_float32_and_rounded_once(name, share):
    m = stir(inject(tiny(dtype=torch.bfloat16), name, targets="up_proj"))
    x = m.blocks[1].mlp.up_proj
    W, delta = x.base.weight.float(), 6 / 3 * share * x.up.data @ x.down.data
    sibo.merge(m)
    folded = m.blocks[1].mlp.up_proj
    folded = (folded.weight if name == "lora" else folded.base.weight)[:, :16]  # behind it stands λsB
    assert folded.dtype == torch.bfloat16
    exact, units = W + delta, torch.finfo(torch.bfloat16).eps * (W + delta).abs()
    assert ((folded.float() - exact).abs() <= units / 2 + 1e-6).all()  # half a unit in the last place: one rounding
    twice = (W + delta.bfloat16().float()).bfloat16()
    assert not torch.equal(folded, twice)


def test_a_folded_model_moves_and_copies_as_any_other():
    m = sibo.merge(stir(inject(tiny(), "lora-sibo")))
    expected = m(ids())
    torch.testing.assert_close(copy.deepcopy(m)(ids()), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(m).float()(ids()), expected.float(), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ what learns, and how


@pytest.mark.parametrize("family,name", CASES)
def test_only_adapters_lambdas_and_the_classifier_learn_and_all_of_them_do(family, name):
    m = inject(tiny(family, num_labels=3 if family == "bert" else None), name)
    ours = {id(p) for _, x in sibo_layers(m) for p in (x.down, x.up, x.lam_logit) if p is not None}
    ours |= {id(p) for p in m.classifier.parameters()} if family == "bert" else set()
    frozen = {n: p.clone() for n, p in m.named_parameters() if id(p) not in ours}
    start = {n: p.detach().clone() for n, p in m.named_parameters() if id(p) in ours}
    labels = torch.tensor([0, 2]) if family == "bert" else ids()
    optimizer = torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):  # W_up starts at 0, so W_down and λ get their first gradient in the second step
        optimizer.zero_grad()
        model.loss(m, ids(), labels).backward()
        optimizer.step()
    now = dict(m.named_parameters())
    assert {n for n, p in now.items() if p.requires_grad} == start.keys()
    assert {n for n, p in now.items() if p.grad is not None} == start.keys()
    # the first block of BERT gets h0 itself as h: a λ on what its attention reads has nothing to choose: gradient 0
    reads = METHODS[name]["method"] == "lora" or METHODS[name].get("side") == "parallel"
    bare = re.compile(r"blocks\.0\.attn\.(._proj\.)?lam_logit")
    idle = {n for n in start if family == "bert" and reads and bare.fullmatch(n)}
    assert {n for n in start if not now[n].grad.count_nonzero()} == idle
    assert not any(torch.equal(now[n], p) for n, p in start.items() if n not in idle)
    assert all(torch.equal(now[n], p) for n, p in frozen.items())


def test_dropout_falls_on_the_low_rank_path_alone_and_only_in_training():
    m = stir(inject(tiny(), "lora-sibo", dropout=0.5))
    assert torch.equal(m(ids()), stir(inject(tiny(), "lora-sibo"))(ids()))
    m.train()
    assert not torch.equal(m(ids()), m(ids()))
    for _, x in sibo_layers(m):
        x.up.data.zero_()
    assert torch.equal(m(ids()), tiny()(ids()))


def test_a_model_may_bring_faster_kernels_of_its_own():
    class Fast(Toy):
        kernels = {"linear": lambda x, W: F.linear(x, W) + 1}

    found = {}
    for kind in (Toy, Fast):
        torch.manual_seed(0)
        m = sibo.inject(kind().double(), "lora", 0.0, targets="sub", rank=2, alpha=2.0)
        x = m.first(m.embed(torch.tensor([[1]])))
        found[kind] = m.sub(x), m.sub.base(x)
    assert torch.equal(*found[Toy])  # W_up = 0
    torch.testing.assert_close(found[Fast][0], found[Fast][1] + 1, rtol=0, atol=0)
    assert {x.linear for _, x in sibo_layers(inject(tiny(), "lora"))} == {fast.mixed_linear}


def test_a_submodule_that_happens_to_be_called_kernels_is_none_of_our_business():
    m = Toy()
    m.kernels = nn.ModuleList([nn.Linear(2, 2)])
    sibo.inject(m, "lora", 0.0, targets="sub", rank=2)(torch.tensor([[1]]))


@pytest.mark.parametrize("name", METHODS)
def test_a_settings_object_is_the_keywords_of_inject(name):
    s = METHODS[name] | {"rank": 3, "bottleneck": 2}
    m = sibo.inject(tiny(), **vars(sibo.Settings(**s)))
    assert m.sibo == sibo.inject(tiny(), **s).sibo
    assert torch.equal(stir(m)(ids()), stir(sibo.inject(tiny(), **s))(ids()))


def test_a_model_is_injected_once():
    m = inject(tiny(), "lora")
    with pytest.raises(ValueError, match="Llama: expected a model not injected yet, got one with lora; sibo.remove it"):
        inject(m, "lora")


@pytest.mark.parametrize("wrong,says", [
    ({"method": "prefix"}, "method: expected lora or adapter, got 'prefix'"),
    ({"lam": 1.0}, r"lam: expected in \[0, 1\), got 1.0"), ({"lam": -0.1}, r"lam: expected .*, got -0.1"),
    ({"lam": float("nan")}, "lam: expected .*, got nan"),
    ({"lam": 0.0, "learn_lam": True}, "lam: expected above 0 where it is learned"),
    ({"rank": 0}, "rank: expected at least 1, got 0"), ({"bottleneck": -1}, "bottleneck: expected at least 1, got -1"),
    ({"alpha": float("inf")}, "alpha: expected .*, got inf"),
    ({"dropout": 1.0}, r"dropout: expected in \[0, 1\), got 1.0"), ({"side": "up"}, "side: expected .*, got 'up'"),
    ({"skip": "none"}, "skip: expected mixed or plain, got 'none'"),
    ({"targets": "up_porj"}, "'up_porj': expected a module of this Llama, got none of that name; did you mean up_proj"),
    ({"sibo_at": "k_prjo"}, "did you mean k_proj"), ({"h0": "emebd"}, "h0 'emebd'"),
    ({"sibo_at": "head"}, "sibo_at 'head'")])
def test_a_wrong_setting_is_one_line_that_names_it_and_leaves_the_model_as_it_was(wrong, says):
    m = tiny()
    before, state = m(ids()), m.state_dict().keys()
    with pytest.raises(ValueError, match=says) as error:
        sibo.inject(m, **wrong)
    assert "\n" not in str(error.value)
    assert m.state_dict().keys() == state and hooks(m) == 0 and not hasattr(m, "sibo")
    assert all(p.requires_grad for p in m.parameters()) and torch.equal(m(ids()), before)


# ------------------------------------------------------------------------------------------------ the four rules of h0
#
# 1: what carries h0 is neither a module nor a buffer


def test_rule_1_h0_is_in_no_state_dict_and_among_no_modules_or_buffers():
    plain = tiny()
    m = inject(tiny(), "adapter-sibo")
    seen = []
    m.blocks[1].register_forward_hook(lambda *_: seen.append(sibo_layers(m)[0][1].residual.h0))
    m(ids())
    adapters = {f"blocks.{i}.mlp.{p}" for i in (0, 1) for p in ("down", "up")}
    inside = {k.replace(".mlp.", ".mlp.base.") for k in plain.state_dict()}
    assert m.state_dict().keys() == inside | adapters == {n for n, _ in m.named_parameters()}
    assert not list(m.buffers())
    assert len(list(m.modules())) == len(list(plain.modules())) + 2  # the adapters, and nothing else
    residual = sibo_layers(m)[0][1].residual
    assert seen[0] is not None and not any(isinstance(x, nn.Module) for x in vars(residual).values())


# 2: hooks are bound methods: deepcopy binds them to the copy's own h0


@pytest.mark.parametrize("merged", [False, True])
def test_rule_2_a_deepcopy_and_its_original_each_have_an_h0_of_their_own(merged):
    m = stir(inject(tiny(), "lora-sibo"))
    expected = [m(ids(1)), m(ids(2))]
    m = sibo.merge(m) if merged else m
    m(ids(1))
    twin, within = copy.deepcopy(m), []  # made after a pass with gradients, as a training loop does
    m.blocks[0].register_forward_pre_hook(lambda *_: within.append(twin(ids(2))))  # a pass within a pass
    torch.testing.assert_close(m(ids(1)), expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(within[0], expected[1], rtol=0, atol=1e-9)


def test_rule_2_a_deepcopy_starts_without_the_originals_h0_and_shares_no_holder():
    m = inject(tiny(), "adapter-sibo")
    m(ids())
    twin = copy.deepcopy(m)
    holders = [{id(x.residual) for _, x in sibo_layers(y)} for y in (m, twin)]
    assert len(holders[0]) == len(holders[1]) == 1 and holders[0] != holders[1]
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp: expected h0 \(2, 7, 16\), got None"):
        twin.blocks[0].mlp(torch.zeros(2, 7, 16, dtype=torch.float64))


# 3: h0 lives for one pass of its stack, and mixing without it, or with one of another shape, is an error


@pytest.mark.parametrize("merged", [False, True])
def test_rule_3_a_block_called_on_its_own_says_that_h0_is_missing(merged):
    m = inject(tiny(), "lora-sibo")
    m = sibo.merge(m) if merged else m
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.up_proj: expected h0 \(2, 7, .*, got None"):
        m.blocks[1].mlp(torch.zeros(2, 7, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", ["adapter-sibo", "lora-sibo", "lora-sibo, merged"])
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 16, 16), (16, 16), (2, 16)])
def test_rule_3_an_h0_of_another_shape_is_never_broadcast(name, shape):
    m = inject(tiny(), name.removesuffix(", merged"))
    m = sibo.merge(m) if "merged" in name else m
    m.blocks[1].register_forward_pre_hook(lambda *_: m.blocks[0].mlp(torch.zeros(shape, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp.*: expected h0 \(.*, got \(2, 16, "):
        m(ids(T=16))  # as many tokens as h is wide, so that torch itself would take some of these


@pytest.mark.parametrize("name", ["adapter-sibo", "lora-sibo", "lora-sibo, merged"])
def test_rule_3_a_call_past_the_root_has_the_h0_of_its_own_pass(name):
    m = stir(inject(hugging_face("llama"), name.removesuffix(", merged")))
    m = sibo.merge(m) if "merged" in name else m
    expected = m(ids(1), output_hidden_states=True).hidden_states[-1]
    m(ids())  # another one of the same shape
    assert torch.equal(m.model(ids(1))[0], expected)


@pytest.mark.parametrize("name", ["adapter-sibo", "lora-sibo", "lora-sibo, merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rule_3_inputs_embeds_are_an_h0_like_any_other(family, name):
    m = stir(inject(hugging_face(family), name.removesuffix(", merged")))
    m = sibo.merge(m) if "merged" in name else m
    expected = output(m, ids(1))
    m(ids())  # another one of the same shape
    assert torch.equal(output(m, inputs_embeds=m.get_input_embeddings()(ids(1))), expected)


def test_rule_3_the_plain_method_needs_no_h0_and_says_nothing():
    m = inject(hugging_face("llama"), "lora")
    torch.testing.assert_close(output(m, inputs_embeds=m.get_input_embeddings()(ids())), output(m, ids()))


# 4: checkpointed blocks run again in the backward, each with the h0 of its own pass


def gradients(m, passes, backward):
    """Gradients after forward passes over several batches, and only then `backward(outputs)`."""
    m.zero_grad()
    backward([output(m, x) for x in passes])
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}


def together(outputs):
    sum((i + 1) * out.square().mean() for i, out in enumerate(outputs)).backward()


def first_in_first_out(outputs):
    for i, out in enumerate(outputs):
        ((i + 1) * out.square().mean()).backward()


def last_in_first_out(outputs):
    for i, out in reversed(list(enumerate(outputs))):
        ((i + 1) * out.square().mean()).backward()


@pytest.mark.parametrize("backward", [together, first_in_first_out, last_in_first_out])
@pytest.mark.parametrize("name", ["adapter-sibo", "lora-sibo", "lora, frozen too, learned λ"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_rule_4_two_passes_before_one_backward_have_exact_gradients_under_checkpointing(whose, family, name, backward):
    m = stir(inject(tiny(family) if whose == "ours" else hugging_face(family), name)).train()
    passes = ids(1), ids(2)
    expected = gradients(m, passes, backward)
    if whose == "ours":
        m.grad_checkpoint = True
    else:
        m.gradient_checkpointing_enable({"use_reentrant": False})
        m.config.use_cache = False
    runs = []
    sibo_layers(m)[0][1].register_forward_pre_hook(lambda *_: runs.append(1))
    found = gradients(m, passes, backward)
    assert len(runs) == 2 * len(passes)  # each block did run a second time
    assert all(torch.equal(found[n], g) for n, g in expected.items())


def test_rule_4_a_pass_without_gradients_in_between_does_not_disturb():
    m = stir(inject(tiny(), "lora-sibo")).train()
    expected = gradients(m, [ids(1)], together)
    m.grad_checkpoint = True

    def score_then_backward(outputs):
        with torch.no_grad():
            m(ids(2))
        together(outputs)

    found = gradients(m, [ids(1)], score_then_backward)
    assert all(torch.equal(found[n], g) for n, g in expected.items())


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("name,backend", [
    ("adapter-sibo", "aot_eager"), ("lora, learned λ", "aot_eager"),
    pytest.param("lora-sibo", "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"))])
def test_a_compiled_model_is_one_graph_and_computes_the_same_forward_and_backward(name, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    m = stir(inject(tiny(), name))
    expected = gradients(m, [ids(1)], together), gradients(m, [ids(2)], together)
    compiled = torch.compile(m, fullgraph=True, backend=backend)
    for seed in (1, 2):
        m.zero_grad()
        out = compiled(ids(seed))
        torch.testing.assert_close(out, m(ids(seed)), rtol=0, atol=1e-7)  # rotary angles are float32
        together([out])
        for n, g in expected[seed - 1].items():
            torch.testing.assert_close(m.get_parameter(n).grad, g, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
