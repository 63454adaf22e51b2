"""model.py against transformers: the same files, opened by both, give the same numbers.

Real weights (SmolLM2, MiniLM) on real sentences, and tiny random models over a spread of configurations."""

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from twins import (
    CAUSAL,
    FAMILIES,
    LLAMA3,
    LLAMAS,
    assert_near,
    assert_same_model,
    generated,
    padded,
    pair,
    refused,
    theirs_of,
    words,
)

import model
from sibo_lab import export, placement
from sibo_lab.backbone import generate, locate, tokenizer
from sibo_lab.settings import Settings

SENTENCES = [
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Tom has 3 boxes of 12 pens and gives 7 pens away. How many pens does he have left?",
    "Once upon a time",
    "Gradient descent takes a step against the gradient; momentum remembers where the earlier steps went.",
]

# ---------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def smollm2():
    path = locate.locate("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return theirs.eval(), model.from_pretrained("smollm2-135m"), tokenizer.from_pretrained("smollm2-135m")


def test_smollm2_has_transformers_logits_and_hidden_states_on_real_sentences(smollm2):
    theirs, ours, t = smollm2
    for text in [*SENTENCES, " ".join(SENTENCES)]:
        assert_same_model(ours, theirs, torch.tensor([t.encode(text)]))


def test_smollm2_writes_transformers_64_tokens_from_prompts_of_different_lengths(smollm2):
    theirs, ours, t = smollm2
    ids, mask = padded([t.encode(s) for s in SENTENCES[:3]], "left")
    written = generate.generate(ours, ids, mask, max_new_tokens=64)
    assert written.shape[1] == ids.shape[1] + 64
    assert torch.equal(written, generated(theirs, ids, mask, max_new_tokens=64))


def test_smollm2_beams_are_transformers_beams(smollm2):
    theirs, ours, t = smollm2
    ids, mask = padded([t.encode(s) for s in SENTENCES[1:3]], "left")
    how = {"max_new_tokens": 12, "num_beams": 4, "eos_token_id": t.encode(".")[-1], "pad_token_id": 2}
    assert torch.equal(generate.generate(ours, ids, mask, **how), generated(theirs, ids, mask, **how))


def test_minilm_has_transformers_hidden_states_on_real_sentences():
    theirs = transformers.AutoModel.from_pretrained(locate.locate("minilm"), dtype=torch.float32).eval()
    ours, t = model.from_pretrained("minilm"), tokenizer.from_pretrained("minilm")
    ids, mask = padded([t.encode(s) for s in SENTENCES], "right")
    assert_near(ours(ids, mask)[mask.bool()], theirs(ids, mask).last_hidden_state[mask.bool()])
    one, two = t.encode(SENTENCES[0])[:-1], t.encode(SENTENCES[1])[1:]
    types = torch.tensor([[0] * len(one) + [1] * len(two)])
    assert_same_model(ours, theirs, torch.tensor([one + two]), token_type_ids=types)


# -------------------------------------------------------------------------------------------- the spread of configs


BIASES = {"attention_bias": st.booleans()}
SLIDES = st.sampled_from([{}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
                          {"use_sliding_window": True, "sliding_window": 16, "layer_types": [
                              "sliding_attention", "full_attention"]}])
OWN = {  # settings that a family has and others have not
    "llama": st.fixed_dictionaries(BIASES | {"mlp_bias": st.booleans()}),
    "mistral": st.fixed_dictionaries({"sliding_window": st.sampled_from([None, 1, 7, 4096])}),
    "qwen2": SLIDES,
    "qwen3": st.builds(dict.__or__, SLIDES, st.fixed_dictionaries(BIASES)),
    "smollm3": st.builds(dict.__or__, st.sampled_from([
        {}, {"no_rope_layers": [0, 1]}, {"no_rope_layer_interval": 1}, {
            "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9}]),
        st.fixed_dictionaries(BIASES | {"mlp_bias": st.booleans()})),
}
SHARED = st.fixed_dictionaries({
    "num_key_value_heads": st.sampled_from([1, 2, 4]), "head_dim": st.sampled_from([8, 4, 12]),
    "tie_word_embeddings": st.booleans(), "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
    "rope_parameters": st.builds(
        lambda theta, scaling: {"rope_theta": theta, **scaling}, st.sampled_from([100.0, 10000.0, 500000.0]),
        st.sampled_from([{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, LLAMA3]))})


@pytest.mark.parametrize("family", OWN)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 5))
def test_llamas_of_every_kind_have_transformers_numbers(tmp_path_factory, family, data, seed):
    changes = data.draw(SHARED) | data.draw(OWN[family])
    theirs, ours = pair(family, tmp_path_factory.mktemp(family), seed, **changes)
    assert_same_model(ours, theirs, words(2, 40, seed=seed))


@settings(max_examples=16, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({
    "rotary_dim": st.sampled_from([4, 8, 2]), "n_inner": st.sampled_from([None, 20]),
    "tie_word_embeddings": st.booleans(), "activation_function": st.sampled_from(["gelu_new", "gelu", "relu"]),
    "layer_norm_epsilon": st.sampled_from([1e-5, 1e-2])}), st.integers(0, 5))
def test_gptjs_of_every_kind_have_transformers_numbers(tmp_path_factory, changes, seed):
    theirs, ours = pair("gptj", tmp_path_factory.mktemp("gptj"), seed, **changes)
    assert_same_model(ours, theirs, words(2, 40, seed=seed))


def test_a_gptj_without_rotary_dim_turns_the_whole_head(tmp_path):
    theirs = theirs_of("gptj", rotary_dim=8)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rotary_dim": None}))
    assert_same_model(model.from_pretrained(tmp_path), theirs, words(2, 40))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("changes", [{}, {"type_vocab_size": 3, "layer_norm_eps": 1e-2}])
def test_berts_of_every_kind_have_transformers_numbers(tmp_path, act, changes):
    theirs, ours = pair("bert", tmp_path, hidden_act=act, **changes)
    ids = words(2, 40)
    assert_same_model(ours, theirs, ids, token_type_ids=ids % 2)


def test_rotary_angles_are_positions_times_falling_frequencies():
    angles = model.rotary_angles(torch.tensor([[0, 1, 5]]), 4, 100.0)
    assert_near(angles, torch.tensor([[[0.0, 0.0], [1.0, 0.1], [5.0, 0.5]]]), 1e-7)


# ------------------------------------------------------------------------------- padding, batches, single sentences

ROWS = [words(1, n, seed=n)[0].tolist() for n in (7, 2, 12, 1, 9)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 5])
@torch.no_grad()
def test_padding_on_either_side_changes_no_real_token(tmp_path, family, side, extra):
    _, m = pair(family, tmp_path)
    ids, mask = padded(ROWS, side, extra)
    for row, out, real in zip(ROWS, m(ids, mask), mask.bool(), strict=True):
        assert_near(out[real], m(torch.tensor([row]))[0], 1e-5)
    assert m(ids, mask).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_order_of_a_batch_changes_nothing(tmp_path, family):
    _, m = pair(family, tmp_path)
    ids, mask = padded(ROWS, "left")
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_near(m(ids[order], mask[order]), m(ids, mask)[order], 1e-5)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("T", [1, 2])
def test_texts_of_one_and_two_tokens_have_transformers_numbers(tmp_path, family, T):
    theirs, ours = pair(family, tmp_path)
    assert_same_model(ours, theirs, words(3, T))


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("T, masks", [(5, [None] * 2), (6, ["near"] * 2)])
def test_a_window_that_no_text_reaches_costs_no_mask(tmp_path, monkeypatch, T, masks):
    _, m = pair("mistral", tmp_path, sliding_window=5)
    seen = []
    monkeypatch.setattr(model.fast, "attend", lambda q, k, v, mask, *how: seen.append(mask) or v)
    m(words(1, T))
    assert [mask is None for mask in seen] == [mask is None for mask in masks]


def test_a_window_shows_a_token_itself_and_those_just_before_it(tmp_path):
    _, m = pair("mistral", tmp_path, sliding_window=3, num_hidden_layers=1)
    ids = words(1, 8)
    for changed in range(8):
        other = ids.clone()
        other[0, changed] += 1 - 2 * (other[0, changed] > 30)
        moved = ((m(ids) - m(other)).abs().amax(-1)[0] > 1e-6).nonzero()[:, 0].tolist()
        assert moved == list(range(changed, min(changed + 3, 8)))


@pytest.mark.parametrize("family, changes, slides, rotates", [
    ("mistral", {}, [True] * 4, [True] * 4), ("mistral", {"sliding_window": None}, [False] * 4, [True] * 4),
    ("qwen2", {"max_window_layers": 3}, [False, False, False, True], [True] * 4),
    ("qwen3", {"use_sliding_window": False, "max_window_layers": 0, "sliding_window": 9}, [False] * 4, [True] * 4),
    ("smollm3", {"no_rope_layer_interval": 3}, [False] * 4, [True, True, False, True]),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 9},
     [True, False, False, True], [False, True, True, False])])
def test_the_config_says_which_layers_have_a_window_and_which_positions(family, changes, slides, rotates):
    spec = theirs_of(family, num_hidden_layers=4, **changes).config.to_dict()
    blocks = model.build(spec | {"layer_types": None}).blocks
    assert [b.attn.slides for b in blocks] == slides and [b.attn.rotate is not None for b in blocks] == rotates


@pytest.mark.parametrize("settings", [{}, {"method": "adapter"}, {"method": "adapter", "side": "in"}], ids=str)
@pytest.mark.parametrize("family", LLAMAS)
def test_h0_enters_every_llama_where_it_enters_llama(family, settings):
    llama, other = (placement.place(model.build(theirs_of(f).config.to_dict()), Settings(**settings))
                    for f in ("llama", family))
    assert [*other.widths] == [*llama.widths] and [*other.mixed] == [*llama.mixed]


# ----------------------------------------------------------------------------------------------- loss and gradients


def labelled(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and labels: nothing asked on padding and on the first third of each text."""
    ids, mask = padded(ROWS, side)
    return ids, mask, torch.where((mask.bool()) & (ids % 3 > 0), ids, -100)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_loss_is_transformers_loss(tmp_path, family):
    theirs, ours = pair(family, tmp_path)
    ids, mask, labels = labelled("right")
    assert_near(model.loss(ours, ids, labels, mask), theirs(ids, attention_mask=mask, labels=labels).loss, 1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_gradients_are_transformers_gradients(tmp_path, family):
    theirs, ours = pair(family, tmp_path)
    ids, mask, labels = labelled("right")
    theirs(ids, attention_mask=mask, labels=labels).loss.backward()
    model.loss(ours, ids, labels, mask).backward()
    names = {export.their_name(ours, n): p for n, p in ours.named_parameters()}
    assert names.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        assert_near(names[name].grad, p.grad, 1e-4 * max(1, float(p.grad.abs().max())))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_loss_is_the_mean_surprise_of_the_labelled_tokens(tmp_path, side):
    _, m = pair("llama", tmp_path)
    ids, mask, labels = labelled(side)
    p = m(ids, mask).softmax(-1)
    surprises = [-p[b, t - 1, labels[b, t]].log() for b in range(len(ids)) for t in range(1, ids.shape[1])
                 if labels[b, t] != -100]
    assert_near(model.loss(m, ids, labels, mask), torch.stack(surprises).mean(), 1e-5)


class Rows(TorchDispatchMode):
    """How many rows of logits each operation makes."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.seen = vocabulary, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.vocabulary:
            self.seen.append(len(out))
        return out


def test_logits_exist_at_labelled_positions_only_and_never_all_at_once(tmp_path):
    _, m = pair("gptj", tmp_path, n_positions=400)
    ids = torch.arange(2 * 400).view(2, 400) % m.config.vocab_size
    labels = torch.where(torch.arange(400) < 60, -100, ids)  # 680 tokens are asked
    with Rows(m.config.vocab_size) as rows:
        model.loss(m, ids, labels)
    assert set(rows.seen) - {m.config.hidden_size} == {256, 680 - 2 * 256}  # but for the head's transposed weight


@pytest.mark.parametrize("family", CAUSAL)
def test_rows_that_begin_alike_share_that_part_and_lose_nothing(tmp_path, family):
    """A frame common to all rows is computed once; the loss and all gradients are those of rows computed one by one."""
    _, m = pair(family, tmp_path)
    m.double().requires_grad_(True)
    ids = torch.randint(3, m.config.vocab_size, (4, 11), generator=torch.Generator().manual_seed(0))
    ids[:, :5] = ids[0, :5]
    for first_asked in (0, 2, 5, 7):
        labels = torch.where(torch.arange(11) < first_asked, -100, ids)
        labels[1, 9:] = -100
        asked = [(row[1:] != -100).sum() for row in labels]
        widths = []
        handle = m.blocks[0].register_forward_pre_hook(lambda _, args, widths=widths: widths.append(args[0].shape))
        loss = model.loss(m, ids, labels)
        handle.remove()
        assert widths == [(1, 4 + 4 * 7, m.config.hidden_size)]  # the last common token is followed by each row's own
        each = [n * model.loss(m, i[None], y[None]) for n, i, y in zip(asked, ids, labels, strict=True)]
        alone = sum(each) / sum(asked)
        torch.testing.assert_close(loss, alone, atol=1e-12, rtol=0)
        p = list(m.parameters())
        for ours, theirs in zip(torch.autograd.grad(loss, p), torch.autograd.grad(alone, p), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_labels_that_differ_within_the_common_beginning_are_kept_apart(tmp_path):
    _, m = pair("llama", tmp_path)
    ids = torch.arange(3, 13).repeat(3, 1)
    labels = torch.where(torch.arange(10) < torch.tensor([[2], [5], [7]]), -100, ids)
    want = torch.nn.functional.cross_entropy(m(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model.loss(m, ids, labels), want)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_berts_classifier_has_transformers_logits_and_loss(tmp_path, num_labels):
    theirs, ours = pair("bert", tmp_path, kind="BertForSequenceClassification", num_labels=num_labels)
    ids, mask = padded(ROWS, "right")
    types = ids % 2
    labels = torch.tensor([0.5, 2.0, -1.0, 3.5, 0.0]) if num_labels == 1 else torch.arange(5) % num_labels
    said = theirs(ids, mask, token_type_ids=types, labels=labels)
    assert ours(ids, mask, types).shape == (5, num_labels)
    assert_near(ours(ids, mask, types), said.logits)
    assert_near(model.loss(ours, ids, labels, mask, token_type_ids=types), said.loss, 1e-4)


def test_the_logits_of_a_bert_in_16_bits_are_transformers_head_in_float32_on_its_hidden_states(tmp_path):
    theirs = pair("bert", tmp_path, kind="BertForSequenceClassification", num_labels=3)[0]
    ours = model.from_pretrained(tmp_path, torch.bfloat16, num_labels=3)
    ids, mask = padded(ROWS, "right")
    h = ours.hidden_states(ids, mask)[-1]
    assert h.dtype == torch.bfloat16
    assert_near(ours(ids, mask), theirs.classifier(theirs.bert.pooler(h.float())), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient_dropout_included(tmp_path, family):
    dropout = {"gptj": {"resid_pdrop": 0.1, "attn_pdrop": 0.1}, "bert": {}}.get(family, {"attention_dropout": 0.1})
    _, m = pair(family, tmp_path, **dropout)
    ids, mask, labels = labelled("right")

    def gradients(on: bool) -> list[torch.Tensor]:
        m.train().zero_grad()
        m.grad_checkpoint = on
        torch.manual_seed(0)
        (m(ids, mask).square().mean() if family == "bert" else model.loss(m, ids, labels, mask)).backward()
        return [p.grad for p in m.parameters()]

    runs = []
    for block in m.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    kept, again = gradients(False), gradients(True)
    assert len(runs) == 3 * len(m.blocks), "with checkpointing each block runs once more, in the backward pass"
    assert all(float(g.abs().max()) > 0 for g in kept)
    for a, b in zip(kept, again, strict=True):
        assert_near(a, b, 1e-6)


# --------------------------------------------------------------------------------------------------- what it refuses


def test_a_classifier_is_for_bert_only(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels 2: expected a BERT, only it has a classifier, got a Llama"):
        model.from_pretrained(tmp_path, num_labels=2)


def test_bert_refuses_more_tokens_than_it_has_positions(tmp_path):
    _, m = pair("bert", tmp_path)
    m(words(1, 64))
    with pytest.raises(ValueError, match="expected at most 64 tokens, .* got 65"):
        m(words(1, 65))


def test_pairs_in_a_bert_of_one_segment_are_refused_and_single_sentences_are_not(tmp_path):
    theirs, ours = pair("bert", tmp_path, type_vocab_size=1)
    ids = words(2, 8)
    assert_same_model(ours, theirs, ids, token_type_ids=torch.zeros_like(ids))
    with refused("token_type_ids: expected 0 throughout", "type_vocab_size 1"):
        ours(ids, token_type_ids=ids % 2)


def test_several_tokens_behind_a_cache_need_their_mask(tmp_path):
    _, m = pair("llama", tmp_path)
    cache = m.new_cache(1, 8)
    m(words(1, 3), cache=cache)
    with pytest.raises(ValueError, match="2 tokens at once after a cache of 3"):
        m(words(1, 2), cache=cache)


def test_the_model_generates_by_its_public_name():
    assert model.generate is generate.generate


# ----------------------------------------------------------------------------------------- more tokens than positions


def test_what_is_longer_than_the_positions_that_a_llama_was_trained_on_is_said_once(tmp_path, capfd):
    model.say_beyond.cache_clear()
    theirs, ours = pair("llama", tmp_path, max_position_embeddings=8)
    assert_same_model(ours, theirs, words(2, 8))
    assert "positions" not in capfd.readouterr().err
    for T in (7, 9):  # the first grows past them as it writes
        assert torch.equal(generate.generate(ours, words(1, T), max_new_tokens=4),
                           generated(theirs, words(1, T), max_new_tokens=4))
    assert_same_model(ours, theirs, words(2, 20))  # as transformers, which goes on too
    assert [line for line in capfd.readouterr().err.splitlines() if "positions" in line] == [
        "a text has more tokens than this model has positions, 8 (max_position_embeddings in config.json): it goes on "
        "beyond what it was trained on"]


@torch.no_grad()
def test_more_tokens_than_a_gptj_has_positions_are_refused_and_padding_is_none(tmp_path):
    theirs, ours = pair("gptj", tmp_path, n_positions=8)
    ids, mask = padded([words(1, n, seed=n)[0].tolist() for n in (8, 3)], "left", extra=4)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    there = mask.bool()
    assert_near(ours(ids, mask)[there], theirs(ids, attention_mask=mask, position_ids=positions).logits[there], 1e-4)
    with pytest.raises(RuntimeError):
        theirs(words(1, 9))
    with pytest.raises(ValueError, match="^expected at most 8 tokens, the positions of this GPT-J, got 9; shorten"):
        ours(words(1, 9))
    with pytest.raises(ValueError, match="got 9; shorten the text"):
        generate.generate(ours, words(1, 7), max_new_tokens=4)
