"""model.py against transformers: the same files, opened by both, give the same numbers and the same texts.

Real weights (SmolLM2, MiniLM) on real sentences, and tiny random models over a spread of configurations. The random
ones have large weights everywhere, biases and norms included, so that nothing that is mixed up can hide."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, GenerationConfig, GPTJConfig, LlamaConfig

import model
from sibo_lab import fast
from sibo_lab.backbone import generate, locate, tokenizer

SENTENCES = [
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Tom has 3 boxes of 12 pens and gives 7 pens away. How many pens does he have left?",
    "Once upon a time",
    "Gradient descent takes a step against the gradient; momentum remembers where the earlier steps went.",
]
LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
GPTJ = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128}
BERT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64}
FAMILIES = {"llama": (LlamaConfig, LLAMA), "gptj": (GPTJConfig, GPTJ), "bert": (BertConfig, BERT)}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def theirs_of(family: str, seed: int = 0, kind: str | None = None, **changes) -> torch.nn.Module:
    """A tiny random model of transformers', in eval mode."""
    Config, base = FAMILIES[family]
    kind = kind or {"llama": "LlamaForCausalLM", "gptj": "GPTJForCausalLM", "bert": "BertModel"}[family]
    torch.manual_seed(seed)
    m = getattr(transformers, kind)(Config(**{**base, **changes})).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else p + 0.2 * torch.randn_like(p))
    return m


def pair(family: str, folder: Path, seed: int = 0, kind: str | None = None, num_labels: int | None = None, **changes):
    """(transformers' model, ours from the files it wrote)."""
    theirs = theirs_of(family, seed, kind, **changes, **({"num_labels": num_labels} if num_labels else {}))
    theirs.save_pretrained(folder)
    return theirs, model.from_pretrained(folder, num_labels=num_labels)


def edit_config(folder: Path, **changes) -> None:
    """Changes config.json; a value of None takes the key away."""
    file = folder / "config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def words(B: int, T: int, V: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[list[int]], side: str, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention_mask of rows of different lengths, padded with id 1 by `extra` more than needed."""
    T = max(map(len, rows)) + extra
    gaps = [[0] * (T - len(r)) for r in rows]
    ids = [[1] * len(g) + r if side == "left" else r + [1] * len(g) for r, g in zip(rows, gaps, strict=True)]
    mask = [g + [1] * len(r) if side == "left" else [1] * len(r) + g for r, g in zip(rows, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= tolerance


@torch.no_grad()
def assert_same_model(ours: torch.nn.Module, theirs: torch.nn.Module, ids: torch.Tensor, **inputs) -> None:
    """Outputs, and all hidden states one by one: to 1e-4, or 1e-6 of the largest where they reach thousands."""
    said = theirs(ids, output_hidden_states=True, **inputs)
    assert_near(ours(ids, **inputs), said.logits if "logits" in said else said.last_hidden_state)
    hidden = ours.hidden_states(ids, **inputs)
    assert len(hidden) == len(said.hidden_states) == ours.config.num_hidden_layers + 1
    for mine, other in zip(hidden, said.hidden_states, strict=True):
        assert_near(mine, other, max(1e-4, 1e-6 * float(other.abs().max())))


def generated(theirs, ids, mask=None, **how) -> torch.Tensor:
    """What transformers' generate gives for our arguments, with nothing from the model's own generation settings."""
    how = {"pad_token_id": 2, "eos_token_id": None, "num_beams": 1, **how}
    theirs.generation_config = GenerationConfig(bos_token_id=0, do_sample=False, **how)
    mask = torch.ones_like(ids) if mask is None else mask
    return theirs.generate(ids, attention_mask=mask, generation_config=theirs.generation_config)


@torch.no_grad()
def greedy_without_cache(m: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, n: int) -> torch.Tensor:
    """Runs the whole prefix again for every new token."""
    for _ in range(n):
        ids = torch.cat((ids, m(ids, mask)[:, -1].argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return ids


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


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({
    "num_key_value_heads": st.sampled_from([1, 2, 4]), "head_dim": st.sampled_from([None, 4, 12]),
    "tie_word_embeddings": st.booleans(), "attention_bias": st.booleans(), "mlp_bias": st.booleans(),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
    "rope_parameters": st.builds(
        lambda theta, scaling: {"rope_theta": theta, **scaling}, st.sampled_from([100.0, 10000.0, 500000.0]),
        st.sampled_from([{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, LLAMA3]))}),
    st.integers(0, 5))
def test_llamas_of_every_kind_have_transformers_numbers(tmp_path_factory, changes, seed):
    theirs, ours = pair("llama", tmp_path_factory.mktemp("llama"), seed, **changes)
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


@pytest.mark.parametrize("old, new", [
    ({"rope_theta": 500.0}, {"rope_type": "default"}),
    ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}, {"rope_type": "linear", "factor": 3.0}),
    ({"rope_theta": 500.0, "rope_scaling": LLAMA3}, LLAMA3)])
def test_rope_settings_in_the_old_spelling_mean_the_same(tmp_path, old, new):
    theirs, _ = pair("llama", tmp_path, rope_parameters={"rope_theta": 500.0, **new})
    edit_config(tmp_path, rope_parameters=None, **old)
    assert_same_model(model.from_pretrained(tmp_path), theirs, words(2, 40))


def test_a_config_without_key_value_heads_has_as_many_as_heads(tmp_path):
    theirs, _ = pair("llama", tmp_path, num_key_value_heads=4)
    edit_config(tmp_path, num_key_value_heads=None)
    assert_same_model(model.from_pretrained(tmp_path), theirs, words(2, 8))


def test_rotary_angles_are_positions_times_falling_frequencies():
    angles = model.rotary_angles(torch.tensor([[0, 1, 5]]), 4, 100.0)
    assert_near(angles, torch.tensor([[[0.0, 0.0], [1.0, 0.1], [5.0, 0.5]]]), 1e-7)


def test_the_formula_used_for_bfloat16_on_cpus_is_the_kernels():
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 17, 8).bfloat16().requires_grad_() for _ in range(3)]
    wide = [x.detach().float().requires_grad_() for x in qkv]
    weight = torch.randn(2, 3, 17, 8)
    ours = fast.attend(*qkv, None, True, 0.0)
    theirs = F.scaled_dot_product_attention(*wide, is_causal=True)
    assert_near(ours.float(), theirs, 0.03)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for x, y in zip(qkv, wide, strict=True):
        assert_near(x.grad.float(), y.grad, 0.06)


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


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("T", [1, 2])
def test_texts_of_one_and_two_tokens_have_transformers_numbers(tmp_path, family, T):
    theirs, ours = pair(family, tmp_path)
    assert_same_model(ours, theirs, words(3, T))


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("seed", range(3))
def test_64_greedy_tokens_are_transformers(tmp_path, family, seed):
    theirs, ours = pair(family, tmp_path, seed)
    ids, mask = padded(ROWS, "left")
    assert torch.equal(generate.generate(ours, ids, mask, max_new_tokens=64),
                       generated(theirs, ids, mask, max_new_tokens=64))


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("extra", [0, 3])
def test_cached_decoding_equals_running_the_whole_prefix_again(tmp_path, family, extra):
    _, m = pair(family, tmp_path)
    ids, mask = padded(ROWS, "left", extra)
    assert torch.equal(generate.generate(m, ids, mask, max_new_tokens=30), greedy_without_cache(m, ids, mask, 30))


@torch.no_grad()
def test_a_prefix_fed_in_pieces_has_the_logits_of_the_whole(tmp_path):
    _, m = pair("llama", tmp_path)
    ids, mask = padded(ROWS, "left")
    cache = m.new_cache(len(ROWS), 12)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        out = m(ids[:, start:end], mask[:, :end], cache=cache)
    assert_near(out, m(ids, mask)[:, -1:], 1e-5)


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_beams_are_transformers_beams(tmp_path, family, num_beams, stop):
    ids, mask = padded([[t % 17 for t in row] for row in ROWS], "left")
    stopped = 0
    for seed in range(4):
        theirs, ours = pair(family, tmp_path / str(seed), seed, vocab_size=17)
        how = {"max_new_tokens": 16, "num_beams": num_beams, "pad_token_id": 2}
        if stop:  # at a token that the first row writes when nothing stops it
            how["eos_token_id"] = int(generate.generate(ours, ids, mask, **how)[0, ids.shape[1] + 3 + seed])
        written = generate.generate(ours, ids, mask, **how)
        assert torch.equal(written, generated(theirs, ids, mask, **how))
        stopped += int((written[:, ids.shape[1]:] == how.get("eos_token_id", -1)).any(1).sum())
    assert not stop or 0 < stopped < 4 * len(ROWS), "some rows stop early and some do not"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_row_of_a_batch_ends_as_it_does_alone_whichever_others_are_dropped(tmp_path, num_beams):
    _, m = pair("llama", tmp_path, vocab_size=17)
    rows = [words(1, n, 17, seed=n)[0].tolist() for n in range(1, 13)]
    ids, mask = padded(rows, "left")
    how = {"max_new_tokens": 40, "eos_token_id": 7, "pad_token_id": 2, "num_beams": num_beams}
    batches = []
    hook = m.head.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    together = generate.generate(m, ids, mask, **how)[:, ids.shape[1]:]
    hook.remove()
    assert num_beams > 1 or batches[-1] <= 6, "half of the rows were done, and dropped"
    lengths = set()
    for row, new in zip(rows, together, strict=True):
        alone = generate.generate(m, torch.tensor([row]), **how)[0, len(row):]
        assert new[: len(alone)].tolist() == alone.tolist() and set(new[len(alone):].tolist()) <= {2}
        lengths.add(len(alone))
    assert len(lengths) > 2, "the rows end at different times"


def test_behind_an_eos_stands_padding_and_without_a_pad_token_the_eos_again(tmp_path):
    theirs, ours = pair("llama", tmp_path, vocab_size=17)
    ids, mask = padded([[t % 17 for t in row] for row in ROWS], "left")
    free = generate.generate(ours, ids, mask, max_new_tokens=20)[:, ids.shape[1]:]
    eos = int(free[0, 3])  # a token that the first row does write
    for pad in (2, eos):
        how = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": pad}
        written = generate.generate(ours, ids, mask, **how)
        assert torch.equal(written, generated(theirs, ids, mask, **how))
        new = written[0, ids.shape[1]:].tolist()
        assert new[new.index(eos) + 1:] == [pad] * (len(new) - new.index(eos) - 1) and new.index(eos) < len(new) - 1
    assert torch.equal(generate.generate(ours, ids, mask, max_new_tokens=20, eos_token_id=eos), written)


# ----------------------------------------------------------------------------------------------- loss and gradients


def labelled(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and labels: nothing asked on padding and on the first third of each text."""
    ids, mask = padded(ROWS, side)
    return ids, mask, torch.where((mask.bool()) & (ids % 3 > 0), ids, -100)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_the_loss_is_transformers_loss(tmp_path, family):
    theirs, ours = pair(family, tmp_path)
    ids, mask, labels = labelled("right")
    assert_near(model.loss(ours, ids, labels, mask), theirs(ids, attention_mask=mask, labels=labels).loss, 1e-5)


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
    _, m = pair("gptj", tmp_path)
    ids = torch.arange(2 * 400).view(2, 400) % m.config.vocab_size
    labels = torch.where(torch.arange(400) < 60, -100, ids)  # 680 tokens are asked
    with Rows(m.config.vocab_size) as rows:
        model.loss(m, ids, labels)
    assert set(rows.seen) - {m.config.hidden_size} == {256, 680 - 2 * 256}  # but for the head's transposed weight


@pytest.mark.parametrize("family", ["llama", "gptj"])
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


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_that_begin_alike_are_read_once_and_answered_alike(tmp_path, beams):
    _, m = pair("llama", tmp_path)
    m.double()
    rows = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11], [5, 6, 7, 12, 13]]
    ids, mask = padded(rows, "left")
    widths = []
    handle = m.embed.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))
    out = generate.generate(m, ids, mask, max_new_tokens=6, num_beams=beams)
    handle.remove()
    assert widths[:2] == [(1, 3), (3, 3)]
    for i, row in enumerate(rows):
        alone = generate.generate(m, torch.tensor([row]), max_new_tokens=6, num_beams=beams)
        assert out[i, -6:].tolist() == alone[0, -6:].tolist()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient_dropout_included(tmp_path, family):
    dropout = {"llama": {"attention_dropout": 0.1}, "gptj": {"resid_pdrop": 0.1, "attn_pdrop": 0.1}, "bert": {}}
    _, m = pair(family, tmp_path, **dropout[family])
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


@pytest.mark.parametrize("family, changes, named", [
    ("llama", {"model_type": "mamba"}, "model_type 'mamba', expected one of bert, gptj, llama"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
    ("bert", {"hidden_act": "swish2"}, "hidden_act 'swish2', expected gelu, gelu_new, relu"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder True"),
    ("gptj", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, "rope scaling 'yarn', expected one of"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope scaling 'linear' without factor"),
    ("llama", {"hidden_size": None}, "hidden_size None, expected a positive number"),
    ("llama", {"vocab_size": "many"}, "vocab_size 'many', expected a positive number"),
    ("bert", {"num_attention_heads": 5}, "hidden_size 32, 5 heads"),
    ("llama", {"num_key_value_heads": 3}, "4 heads in 3 groups"),
])
def test_a_setting_that_is_not_implemented_is_refused_by_name(tmp_path, family, changes, named):
    theirs_of(family).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(named)) as refused:
        model.from_pretrained(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_classifier_is_for_bert_only(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels 2: found a Llama, expected a BERT"):
        model.from_pretrained(tmp_path, num_labels=2)


def test_bert_refuses_more_tokens_than_it_has_positions(tmp_path):
    _, m = pair("bert", tmp_path)
    m(words(1, 64))
    with pytest.raises(ValueError, match="found 65 tokens, expected at most 64"):
        m(words(1, 65))


def test_generate_refuses_a_model_in_training_mode(tmp_path):
    _, m = pair("llama", tmp_path)
    with pytest.raises(ValueError, match="training mode"):
        generate.generate(m.train(), words(1, 3))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_refuses_prompts_padded_on_the_right(tmp_path, num_beams):
    _, m = pair("llama", tmp_path)
    with pytest.raises(ValueError, match="padding at the end of a prompt, expected it on the left"):
        generate.generate(m, *padded(ROWS, "right"), num_beams=num_beams)


def test_several_tokens_behind_a_cache_need_their_mask(tmp_path):
    _, m = pair("llama", tmp_path)
    cache = m.new_cache(1, 8)
    m(words(1, 3), cache=cache)
    with pytest.raises(ValueError, match="2 tokens at once behind a cache of 3"):
        m(words(1, 2), cache=cache)
