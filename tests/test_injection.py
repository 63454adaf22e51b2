"""sibo.inject on models of others: h0 of its own pass, stack and thread, or one clear error; never another one.

Kinds of failure that users of adapters have met, each on tiny models, against hooks written by hand (by_hand.py)."""

import collections
import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from by_hand import assert_near, assert_near_gradients, by_hand, draw, gradients, stir, trained_gradients, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

import sibo

S = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TWO = {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
       "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
       "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}
SMALL = {"rank": 3, "alpha": 3.0, "bottleneck": 3}
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def ids(seed=0, B=2, T=7):
    return torch.randint(3, 60, (B, T), generator=torch.Generator().manual_seed(seed))


A, B = ids(1), ids(2)
UP = {"model.layers.0": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]}
QUERY_VALUE = {"encoder.layer.0": [f"encoder.layer.{i}.attention.self.{x}" for i in (0, 1) for x in ("query", "value")]}
BARTS = {f"model.{side}.layers.0": [f"model.{side}.layers.{i}.fc1" for i in (0, 1)] for side in ("encoder", "decoder")}


def llama(kind=hf.LlamaForCausalLM, **more):
    torch.manual_seed(0)
    return draw(kind(hf.LlamaConfig(**S | {"num_labels": 3} | more))).eval()


def bert(kind=hf.BertModel, **more):
    torch.manual_seed(0)
    return draw(kind(hf.BertConfig(**S | NO_DROPOUT | {"num_labels": 3} | more))).eval()


def bart(**more):
    torch.manual_seed(0)
    return draw(hf.BartForConditionalGeneration(hf.BartConfig(**TWO | more))).eval()


def prefixed(at, prefix):
    return {f"{prefix}.{first}": [f"{prefix}.{n}" for n in names] for first, names in at.items()}


def pair(plain, at=UP, method="lora", lam=0.5, **more):
    """(the adapted model, the same by hand, what the latter trains)"""
    m = stir(sibo.inject(copy.deepcopy(plain), method, lam, **SMALL | more))
    trained = weights(m)
    same = {k: more[k] for k in ("side", "skip", "frozen_too") if k in more}
    return m, by_hand(copy.deepcopy(plain), trained, at, lam, method=method, **same), trained


def h0_is_gone(m):
    return all(getattr(x.residual.live, "h0", None) is None for x in m.modules()
               if isinstance(x, sibo.SIBOLayer) and x.residual)


# ------------------------------------------------------------------------------------------- which pass: past the root


class ValueHead(nn.Module):
    """As reward models are built: a language model's body, and one number per token."""

    def __init__(self, lm):
        super().__init__()
        self.pretrained_model, self.v_head = lm, nn.Linear(16, 1)

    def forward(self, x):
        return self.v_head(self.pretrained_model.model(x).last_hidden_state)


LLAMAS = {
    "m.model(x)": lambda m, x: m.model(x).last_hidden_state,
    "m.get_decoder()(x)": lambda m, x: m.get_decoder()(x).last_hidden_state,
    "m.base_model(x)": lambda m, x: m.base_model(input_ids=x)[0],
    "m.forward(x)": lambda m, x: m.forward(x).logits,
    "m(inputs_embeds=…)": lambda m, x: m(inputs_embeds=m.get_input_embeddings()(x)).logits,
    "m.model(inputs_embeds=…)": lambda m, x: m.model(inputs_embeds=m.get_input_embeddings()(x)).last_hidden_state,
    "hidden states": lambda m, x: m(x, output_hidden_states=True).hidden_states[1:],
    "two steps with a cache": lambda m, x: m(
        x[:, 4:], past_key_values=m(x[:, :4], use_cache=True).past_key_values).logits,
}


@pytest.mark.parametrize("way", LLAMAS)
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_every_way_into_the_stack_has_its_own_h0(way, method):
    at = UP if method == "lora" else {"model.layers.0": ["model.layers.0.mlp", "model.layers.1.mlp"]}
    m, right, _ = pair(llama(), at, method)
    with torch.no_grad():
        m(A)  # a whole pass before, of the same shape
        assert_near(LLAMAS[way](m, B), LLAMAS[way](right, B))
        m.model(A)
        assert_near(LLAMAS[way](m, B), LLAMAS[way](right, B))
    assert h0_is_gone(m)


def positions(m):
    return m.model.rotary_emb(torch.randn(2, 7, 16), torch.arange(7)[None])


PAST_THE_OWNER = {
    "m.model.forward(x)": lambda m: m.model.forward(B),
    "a block": lambda m: m.model.layers[1](torch.randn(2, 7, 16), position_embeddings=positions(m)),
    "the first block": lambda m: m.model.layers[0](torch.randn(2, 7, 16), position_embeddings=positions(m)),
    "a module": lambda m: m.model.layers[1].mlp.up_proj(torch.randn(2, 7, 16)),
}
BEFORE = {
    "nothing": lambda m: None,
    "a whole pass": lambda m: m(A),
    "a backward pass": lambda m: m(A).logits.sum().backward(),
    "a pass without gradients": lambda m: m.eval().generate(A, max_new_tokens=2),
}


@pytest.mark.parametrize("way", PAST_THE_OWNER)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_what_goes_past_the_stacks_owner_is_refused_whatever_came_before(way, before, checkpointed):
    m = pair(llama())[0].train()
    if checkpointed:
        m.gradient_checkpointing_enable({"use_reentrant": False})
    BEFORE[before](m)
    with pytest.raises(RuntimeError, match="up_proj: expected h0 .2, 7, 16., got None; call the whole model"):
        PAST_THE_OWNER[way](m)
    assert torch.isfinite(m(B).logits).all()  # and the next whole pass is right again


def test_a_value_head_on_the_body_is_right_after_the_language_models_own_pass():
    plain = ValueHead(llama())
    m, right, _ = pair(plain, prefixed(UP, "pretrained_model"))
    right.v_head.load_state_dict(m.v_head.state_dict())
    with torch.no_grad():
        m.pretrained_model(A)
        assert_near(m(B), right(B))
        m(A)
        assert_near(m.pretrained_model(B).logits, right.pretrained_model(B).logits)


def test_the_body_of_an_encoder_is_right_after_a_pass_of_the_classifier():
    m, right, _ = pair(bert(hf.BertForSequenceClassification), prefixed(QUERY_VALUE, "bert"))
    with torch.no_grad():
        m(A)
        assert_near(m.bert(B).last_hidden_state, right.bert(B).last_hidden_state)
        embedded = m.bert.embeddings(B)
        assert_near(m.bert.encoder(embedded)[0], right.bert.encoder(embedded)[0])  # the owner itself


def test_h0_is_what_the_first_block_reads_also_with_noise_on_the_embeddings():
    m, right, _ = pair(llama())
    for x in (m, right):  # NEFTune
        x.get_input_embeddings().register_forward_hook(lambda _, args, out: out + 0.3 * torch.sin(9 * out))
    with torch.no_grad():
        assert_near(m(B).logits, right(B).logits)


# ----------------------------------------------------------------------------------------------- two stacks in one model


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("before", ["a loss on others", "a generation of others", "the encoder alone on others"])
def test_an_encoder_decoder_writes_the_same_whatever_it_read_before(beams, before):
    m, right, _ = pair(bart(forced_eos_token_id=None), BARTS)
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    with torch.no_grad():
        if before == "a loss on others":
            m(A, labels=A)
        elif before == "a generation of others":
            m.generate(A, **how)
        else:
            m.get_encoder()(A)
        assert torch.equal(m.generate(B, **how), right.generate(B, **how))


def test_a_decoder_with_given_encoder_outputs_has_its_own_h0():
    m, right, _ = pair(bart(), BARTS)
    with torch.no_grad():
        states = m.get_encoder()(A)
        m(B, labels=B)
        got, expected = (x(encoder_outputs=states, decoder_input_ids=B).logits for x in (m, right))
        assert_near(got, expected)


def test_encoder_and_decoder_never_swap_h0_where_their_inputs_are_of_one_length():
    m, right, _ = pair(bart(), BARTS)
    with torch.no_grad():
        assert_near(m(A, decoder_input_ids=B).logits, right(A, decoder_input_ids=B).logits)
        assert_near(m(B, decoder_input_ids=A).logits, right(B, decoder_input_ids=A).logits)


@pytest.mark.parametrize("leaf", ["k_proj", "v_proj"])
@pytest.mark.parametrize("asked", [{"targets": "encoder_attn.{}"}, {"targets": "{}"},
                                   {"targets": ("fc1", "encoder_attn.{}"), "sibo_at": ("encoder_attn.{}",)}])
def test_h0_on_what_reads_the_source_in_the_decoder_is_refused(leaf, asked):
    asked = {k: v.format(leaf) if isinstance(v, str) else tuple(t.format(leaf) for t in v) for k, v in asked.items()}
    m = bart()
    with pytest.raises(ValueError, match=rf"encoder_attn\.{leaf}: expected a module that can take h0, .*cross"):
        sibo.inject(m, "lora", 0.5, **asked)
    assert not hasattr(m, "sibo") and all(p.requires_grad for p in m.parameters())


def test_the_query_of_a_cross_attention_gets_the_decoders_h0():
    names = [f"model.decoder.layers.{i}.encoder_attn.q_proj" for i in (0, 1)]
    m, right, _ = pair(bart(), {"model.decoder.layers.0": names}, targets="encoder_attn.q_proj")
    with torch.no_grad():
        assert_near(m(A, decoder_input_ids=B).logits, right(A, decoder_input_ids=B).logits)


class TwoTowers(nn.Module):
    """Two encoders of one shape, one after the other in each pass."""

    def __init__(self):
        super().__init__()
        self.left, self.right = bert(), draw(bert(), seed=5)

    def forward(self, a, b):
        return self.left(a).last_hidden_state + 2 * self.right(b).last_hidden_state


def test_two_towers_each_have_their_own_h0():
    m, right, trained = pair(TwoTowers(), prefixed(QUERY_VALUE, "left") | prefixed(QUERY_VALUE, "right"))
    got, expected = m(A, B), right(A, B)
    assert_near(got, expected)
    got.square().mean().backward()
    assert_near_gradients(trained_gradients(m), gradients(expected.square().mean(), trained))


# ------------------------------------------------------------------------------ several passes, and one backward pass


def switch_on(m, reentrant):
    m.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        m.enable_input_require_grads()
    return m


class Siamese(nn.Module):
    """One encoder, run twice in one forward."""

    def __init__(self):
        super().__init__()
        self.bert = bert()

    def forward(self, a, b):
        a, b = (self.bert(x).last_hidden_state.mean(1) for x in (a, b))
        return torch.cosine_similarity(a, b).sum() + a.square().mean()


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("how", ["", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)])
def test_an_encoder_run_twice_in_one_forward_has_the_gradients_of_both(how, method, lengths):
    at = QUERY_VALUE if method == "lora" else {
        "encoder.layer.0": [f"encoder.layer.{i}.attention.output.dropout" for i in (0, 1)]}
    m, right, trained = pair(Siamese(), prefixed(at, "bert"), method)
    if how:
        switch_on(m.train().bert, how == "reentrant")
    a, b = (x[:, :T] for x, T in zip((A, B), lengths, strict=True))
    m(a, b).backward()
    assert_near_gradients(trained_gradients(m), gradients(right(a, b), trained))


MODELS = {
    "llama": (llama, UP, lambda m, x: m(x, use_cache=False).logits),
    "bert": (bert, QUERY_VALUE, lambda m, x: m(x).last_hidden_state),
    "bart": (bart, BARTS, lambda m, x: m(x, decoder_input_ids=x.flip(1), use_cache=False).logits),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("how", ["", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("order", ["one backward", "first, then second", "second, then first", "no-grad pass between",
                                   "a third pass between"])
def test_two_passes_before_their_backward_passes_keep_their_own_h0(family, how, order):
    make, at, run = MODELS[family]
    m, right, trained = pair(make(), at)
    if how:
        switch_on(m, how == "reentrant")
    a, b = run(m, A).square().mean(), run(m, B).pow(3).mean()
    if order == "one backward":
        (a + b).backward()
    elif order == "no-grad pass between":
        with torch.no_grad():
            run(m, ids(3))
        (a + b).backward()
    else:
        if order == "a third pass between":
            run(m, ids(3, B=3, T=5))
        for loss in (b, a) if order.startswith("second") else (a, b):
            loss.backward()
    expected = run(right, A).square().mean() + run(right, B).pow(3).mean()
    assert_near_gradients(trained_gradients(m), gradients(expected, trained))
    assert h0_is_gone(m)


@REENTRANT
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("make,at", [(bert, QUERY_VALUE), (llama, UP)])
def test_reentrant_or_not_checkpointing_gives_the_same_gradients(make, at, lam, reentrant):
    m, right, trained = pair(make(), at if lam else {}, lam=lam)
    switch_on(m, reentrant)
    m(A)[0].square().mean().backward()
    assert_near_gradients(trained_gradients(m), gradients(right(A)[0].square().mean(), trained))


@REENTRANT
@pytest.mark.parametrize("learned", [False, True])
def test_a_trained_embedding_gets_the_gradient_through_h0_or_checkpointing_is_refused(reentrant, learned):
    m, right, trained = pair(llama(), learn_lam=learned)
    for x in (m, right):
        x.get_input_embeddings().weight.requires_grad_(True)
    switch_on(m, reentrant)
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            m(A, use_cache=False)
        return
    m(A, use_cache=False).logits.square().mean().backward()
    table = right.get_input_embeddings().weight
    expected = right(A).logits.square().mean()
    assert_near(m.get_input_embeddings().weight.grad, torch.autograd.grad(expected, table, retain_graph=True)[0])
    assert_near_gradients(trained_gradients(m), gradients(expected, trained))


def test_a_backward_pass_may_be_repeated_on_a_retained_graph():
    m, right, trained = pair(llama())
    switch_on(m, False)
    loss = m(A).logits.square().mean()
    loss.backward(retain_graph=True)
    m(B)
    loss.backward()
    expected = gradients(right(A).logits.square().mean() * 2, trained)
    assert_near_gradients(trained_gradients(m), expected)


def test_a_gradient_penalty_differentiates_twice():
    m, right, trained = pair(llama(attn_implementation="eager"))
    outs = []
    for x, tensors in ((m, [p for n, p in m.named_parameters() if n.endswith(".up")]),
                       (right, [trained[n] for n, _ in m.named_parameters() if n.endswith(".up")])):
        first = torch.autograd.grad(x(A).logits.square().mean(), tensors, create_graph=True)
        outs.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    assert_near(*outs)


# ------------------------------------------------------------------------- what a stack's owner returns, checkpointed


class Result:
    """An answer of no known type."""

    def __init__(self, hidden):
        self.hidden, self.note = hidden, "ours"


class Slots:
    __slots__ = ("hidden",)

    def __init__(self, hidden):
        self.hidden = hidden


@dataclasses.dataclass(frozen=True)
class Answer:
    hidden: torch.Tensor
    steps: int = 3


Named = collections.namedtuple("Named", "hidden steps")
RETURNS = {
    "tensor": (lambda h: h, lambda out: out),
    "tuple": (lambda h: (None, h), lambda out: out[1]),
    "list": (lambda h: [h, 3], lambda out: out[0]),
    "dict": (lambda h: {"hidden": h, "n": 3}, lambda out: out["hidden"]),
    "nested": (lambda h: {"a": [(h,)]}, lambda out: out["a"][0][0]),
    "OrderedDict": (lambda h: collections.OrderedDict(hidden=h), lambda out: out["hidden"]),
    "UserDict": (lambda h: collections.UserDict(hidden=h), lambda out: out["hidden"]),
    "namedtuple": (lambda h: Named(h, 3), lambda out: out.hidden),
    "dataclass": (lambda h: Answer(h), lambda out: out.hidden),
    "ModelOutput": (lambda h: hf.modeling_outputs.BaseModelOutput(h), lambda out: out.last_hidden_state),
    "object": (lambda h: Result(h), lambda out: out.hidden),
    "object in an object": (lambda h: Result(Result(h)), lambda out: out.hidden.hidden),
    "slots": (lambda h: Slots(h), lambda out: out.hidden),
    "function": (lambda h: lambda: h, lambda out: out()),
}


class Owner(nn.Module):
    """Embedding and blocks; its forward returns what `wrapped` makes of the last block's output."""

    def __init__(self, wrapped=RETURNS["tensor"][0], use_reentrant=None, block=None, inplace=False, T=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(block() if block else nn.Sequential(
            nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.wrapped, self.use_reentrant, self.inplace = wrapped, use_reentrant, inplace

    def forward(self, x):
        h = self.embed(x)
        h = h.clone().requires_grad_() if self.use_reentrant else h
        for block in self.blocks:
            out = block(h) if self.use_reentrant is None else checkpoint(block, h, use_reentrant=self.use_reentrant)
            if self.inplace:
                h += out
            else:
                h = h + out
        return self.wrapped(h)


LINEARS = {"blocks.0": [f"blocks.{i}.1" for i in range(3)]}


HIDDEN = ("object in an object", "slots", "function")  # no tensor of theirs can be found
KINDS = ("", "non-reentrant", "reentrant")


def failing(reason, *values):
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


@pytest.mark.parametrize("returned,how", [
    failing("put_back", r, how) if how == "reentrant" and r != "slots" and r not in HIDDEN else
    failing("vars()", r, how) if r == "slots" else (r, how) for r in RETURNS for how in KINDS])
def test_a_stacks_owner_may_return_anything(returned, how):
    wrap, unwrap = RETURNS[returned]
    _, right, trained = pair(Owner(), LINEARS, targets="blocks.*.1")
    m = stir(sibo.inject(Owner(wrap, how == "reentrant" if how else None), "lora", 0.5, targets="blocks.*.1", **SMALL))
    a, b = unwrap(m(A)), unwrap(m(B))
    assert_near(a, right(A))
    loss = a.square().mean() + b.pow(3).mean()
    if returned in HIDDEN and how == "reentrant":
        with pytest.raises(RuntimeError, match="expected h0 .*, got None"):
            loss.backward()
        return
    loss.backward()
    expected = gradients(right(A).square().mean() + right(B).pow(3).mean(), trained)
    assert_near_gradients(trained_gradients(m), expected)


@pytest.mark.parametrize("value", [None, torch.Size([2]), *(
    failing("vars()", x) for x in (3, 0.5, "text", range(3), object()))], ids=lambda x: type(x).__name__)
def test_a_stacks_owner_may_return_no_tensor_at_all(value):
    kept = []
    m = stir(sibo.inject(Owner(lambda h: kept.append(h) or value), "lora", 0.5, targets="blocks.*.1", **SMALL))
    right = pair(Owner(), LINEARS, targets="blocks.*.1")[1]
    assert m(A) is value
    assert_near(kept[0], right(A))


# --------------------------------------------------------------------------------------------- exceptions, and streams


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["blocks.0", "blocks.1", "blocks.2.2"])
def test_an_exception_half_way_leaves_no_h0_behind(where):
    m = stir(sibo.inject(Owner(), "lora", 0.5, targets="blocks.*.1", **SMALL))
    right = pair(Owner(), LINEARS, targets="blocks.*.1")[1]

    def stop(*_):
        raise Interrupted

    hook = m.get_submodule(where).register_forward_hook(stop)
    with pytest.raises(Interrupted):
        m(A)
    hook.remove()
    with pytest.raises(RuntimeError, match="expected h0 .*, got None"):
        m.blocks[1](torch.randn(2, 7, 16))
    assert_near(m(B), right(B))


def test_an_exception_in_the_backward_pass_leaves_no_h0_behind():
    m = stir(sibo.inject(Owner(use_reentrant=False), "lora", 0.5, targets="blocks.*.1", **SMALL))
    right = pair(Owner(), LINEARS, targets="blocks.*.1")[1]

    def stop(grad):
        raise Interrupted

    hook = m.blocks[0].register_forward_hook(lambda _, args, out: out.register_hook(stop) and None)
    with pytest.raises(Interrupted):
        m(A).sum().backward()
    hook.remove()
    with pytest.raises(RuntimeError, match="expected h0 .*, got None"):
        m.blocks[1](torch.randn(2, 7, 16))
    assert_near(m(B), right(B))


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_residual_stream_in_place_is_the_one_out_of_place(method):
    block = lambda: nn.Sequential(nn.Identity(), nn.Linear(16, 16), nn.Tanh())  # noqa: E731
    _, right, trained = pair(Owner(block=block), LINEARS, method, targets="blocks.*.1")
    m = stir(sibo.inject(Owner(block=block, inplace=True), method, 0.5, targets="blocks.*.1", **SMALL))
    got, expected = m(A), right(A)
    assert_near(got, expected)
    got.square().mean().backward()
    assert_near_gradients(trained_gradients(m), gradients(expected.square().mean(), trained))


class Turned(nn.Module):
    """A block that computes on (T, B, d), as older attention layers do."""

    def __init__(self, contiguous=False):
        super().__init__()
        self.inner, self.contiguous = nn.Linear(16, 16), contiguous

    def forward(self, h):
        h = h.transpose(0, 1)
        return self.inner(h.contiguous() if self.contiguous else h).transpose(0, 1)


@pytest.mark.parametrize("method,T,contiguous", [
    failing("strides", method, T, contiguous) if T == 4 and (contiguous or method == "adapter") else
    (method, T, contiguous) for method in ("lora", "adapter") for T in (5, 4) for contiguous in (False, True)])
def test_another_layout_inside_a_block_is_refused_also_where_b_is_t(method, T, contiguous):
    m = sibo.inject(Owner(block=lambda: Turned(contiguous)), method, 0.5, targets="inner", **SMALL)
    with pytest.raises(RuntimeError, match="inner: expected h0"):
        m(ids(B=4, T=T))


class TokenMixer(nn.Module):
    """As in MLP-Mixer: a linear module over the tokens, as many as the model is wide."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(16, 16)

    def forward(self, h):
        return self.tokens(h.transpose(1, 2)).transpose(1, 2)


@pytest.mark.xfail(strict=True, reason="strides of other dimensions")
def test_mixing_over_tokens_is_refused_also_where_they_are_as_many_as_the_model_is_wide():
    m = sibo.inject(Owner(block=TokenMixer), "lora", 0.5, targets="tokens", **SMALL)
    with pytest.raises(RuntimeError, match="tokens: expected h0"):
        m(ids(T=16))


class TimeFirst(Owner):
    """The whole stack on (T, B, d), as fairseq and nn.Transformer have it."""

    def forward(self, x):
        h = self.embed(x).transpose(0, 1)
        for block in self.blocks:
            h = h + block(h)
        return h.transpose(0, 1)


@pytest.mark.parametrize("T", [5, 4], ids=["B is not T", "B = T"])
def test_a_stack_in_a_layout_of_its_own_is_right(T):
    m, right, _ = pair(TimeFirst(), LINEARS, targets="blocks.*.1")
    assert_near(m(ids(B=4, T=T)), right(ids(B=4, T=T)))


# ------------------------------------------------------------------------------------------------------------- threads


def meeting(m, name, parties=2):
    """Lets the threads that run `m` wait for each other in the middle of a pass."""
    barrier = threading.Barrier(parties, timeout=20)

    def wait(*_):
        barrier.wait()

    return m.get_submodule(name).register_forward_hook(wait)


@pytest.mark.parametrize("shapes", [((2, 7), (2, 7)), ((2, 7), (3, 4))], ids=["one shape", "two shapes"])
def test_threads_in_one_model_at_once_each_have_their_own_h0(shapes):
    rows = [ids(seed, *shape) for seed, shape in enumerate(shapes)]
    m, right, _ = pair(llama())
    with torch.no_grad():
        expected = [right(x).logits for x in rows]
    hook = meeting(m, "model.layers.0")

    def ask(x):
        with torch.no_grad():
            return m(x).logits

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(ask, rows))
    hook.remove()
    assert_near(got, expected)
    assert h0_is_gone(m)


@pytest.mark.parametrize("how", ["", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("other_forward", [False, True], ids=["", "a forward between"])
def test_backward_in_another_thread_than_forward(how, other_forward):
    m, right, trained = pair(llama())
    if how:
        switch_on(m, how == "reentrant")
    loss = m(A, use_cache=False).logits.square().mean()
    with ThreadPoolExecutor(1) as pool:
        if other_forward:
            pool.submit(m, B).result()
        pool.submit(loss.backward).result()
        with pytest.raises(RuntimeError, match="expected h0 .*, got None"):
            pool.submit(m.model.layers[0].mlp, torch.randn(2, 7, 16)).result()
    expected = right(A).logits.square().mean()
    assert_near_gradients(trained_gradients(m), gradients(expected, trained))
    with pytest.raises(RuntimeError, match="expected h0 .*, got None"):
        m.model.layers[0].mlp(torch.randn(2, 7, 16))


@REENTRANT
def test_two_backward_passes_at_once_in_two_threads(reentrant):
    m, right, trained = pair(llama())
    switch_on(m, reentrant)
    losses = [m(x, use_cache=False).logits.square().mean() for x in (A, B)]
    hook = meeting(m, "model.layers.1")  # the recomputation of both

    def gradient(loss):
        tensors = [p for n, p in m.named_parameters() if n in trained]
        if reentrant:
            return loss.backward()
        return torch.autograd.grad(loss, tensors)

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(gradient, losses))
    hook.remove()
    expected = [gradients(right(x).logits.square().mean(), trained) for x in (A, B)]
    if reentrant:
        assert_near_gradients(trained_gradients(m), {n: sum(g[n] for g in expected) for n in trained})
    else:
        for a, b in zip(got, expected, strict=True):
            assert_near(a, tuple(b.values()))


def test_a_thread_that_never_ran_a_pass_finds_no_h0():
    m = pair(llama())[0]
    found = []
    hook = m.model.layers[1].register_forward_pre_hook(lambda *_: found.append(
        pool.submit(lambda: m.model.layers[0].mlp.up_proj(torch.randn(2, 7, 16))).exception()))
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        m(A)  # while this thread is inside
    hook.remove()
    assert len(found) == 1 and "expected h0 (2, 7, 16), got None" in str(found[0])


def test_a_copy_made_in_the_middle_of_a_pass_starts_without_h0_and_works():
    m, right, _ = pair(llama())
    copies = []
    hook = m.model.layers[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(m)))
    with torch.no_grad():
        m(A)
    hook.remove()
    twin = copies[0]
    for x in twin.modules():
        x._forward_pre_hooks = {k: h for k, h in x._forward_pre_hooks.items() if "lambda" not in repr(h)}
    assert h0_is_gone(twin)
    with torch.no_grad():
        assert_near(twin(B).logits, right(B).logits)
        draw(twin, seed=9)
        assert_near(m(B).logits, right(B).logits)
