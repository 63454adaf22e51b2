"""Scores: what they depend on and what not, their intervals, the answers beside them, and likelihoods.

Tiny random models whose large weights make every word count; a prompt and its choices stay short."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import model
import sibo
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import metrics, scoring

SMALL = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SAID = {"llama": SMALL | {"model_type": "llama", "intermediate_size": 24, "num_key_value_heads": 1},
        "gptj": SMALL | {"model_type": "gptj", "rotary_dim": 4},
        "bert": SMALL | {"model_type": "bert", "intermediate_size": 24, "max_position_embeddings": 64}}


class Bytes:
    """ASCII characters, but two line feeds are one token: it merges across the border of prompt and choice."""

    eos_id, pad_id = 256, None

    def encode(self, text, pair=None):
        return [257 if piece == "\n\n" else ord(piece) for piece in re.findall("\n\n|.", text, re.S)]

    def decode(self, ids):
        return "".join("\n\n" if i == 257 else chr(i) for i in ids)


def tiny(family, method=None, num_labels=None):
    """A random float32 model; `method`: with SIBO modules, random too, which see h0 also behind a cache."""
    m = model.build(SAID[family], num_labels=num_labels).to_empty(device="cpu").eval()
    if method:
        m = sibo.inject(m, method=method, lam=0.3).eval()
    g = torch.Generator().manual_seed(0)
    for name, p in m.named_parameters():
        torch.nn.init.normal_(p.data, float(name.endswith("norm.weight")), 0.5 if p.ndim > 1 else 0.1, generator=g)
    return m


LLMS = [("llama", None), ("gptj", None), ("llama", "adapter"), ("gptj", "lora")]
llms = pytest.mark.parametrize(("family", "method"), LLMS)
SENTENCES = [batch.Row([1, *range(2, 3 + 3 * i), 2], i % 2, types=[0] * (3 + 3 * i)) for i in range(7)]
QUESTIONS = ["Is it so?", "Say a word.\n", "Which of these is the longest of all?", "x", "Is it not so?\n"]
CHOICES = [["true", "false"], ["\n\nyes", "\nno", "\n\nyes and no"], ["the one answer"],
           ["b", "the whole of it", "c", "the half"], ["answer1", "answer2", "answer10", "answer"]]


# -------------------------------------------------------------------------------------------------------------- losses


LEARNED = [tasks.Example(q, "yes " * i + "it is 7.", "7") for i, q in enumerate(QUESTIONS)]


@llms
@torch.no_grad()
def test_the_loss_of_an_answer_is_that_of_a_training_step_on_it_alone(family, method):
    m = tiny(family, method)
    found = scoring.losses(m, Bytes(), LEARNED)
    for e, one in zip(LEARNED, found, strict=True):
        row = batch.encode(e, Bytes(), 10_000)
        assert one["tokens"] == len(e.output) + 1  # and the end
        alone = model.loss(m, torch.tensor([row.ids]), torch.tensor([row.labels]))
        assert one["loss"] == pytest.approx(one["tokens"] * float(alone), rel=1e-5)


def test_the_loss_of_an_answer_is_transformers(tiny_llama):
    from transformers import LlamaForCausalLM

    from sibo_lab.backbone import tokenizer

    t, theirs = tokenizer.from_pretrained(tiny_llama), LlamaForCausalLM.from_pretrained(tiny_llama)
    for e, one in zip(LEARNED, scoring.losses(model.from_pretrained(tiny_llama), t, LEARNED), strict=True):
        row = batch.encode(e, t, 10_000)
        alone = theirs(torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss
        assert one["loss"] == pytest.approx(one["tokens"] * float(alone), rel=1e-4)


@pytest.mark.parametrize("by", ["answers", "loss"])
def test_a_score_has_the_mean_loss_per_answer_and_per_token(by, monkeypatch):
    monkeypatch.setattr(tasks.Task, "max_new_tokens", 3)
    m, task = tiny("llama"), tasks.task("word-problems")
    found, lost = scoring.score_examples(m, Bytes(), task, LEARNED, by=by), scoring.losses(m, Bytes(), LEARNED)
    total = sum(one["loss"] for one in lost)
    assert (found.loss, found.loss_per_token) == pytest.approx((total / 5, total / sum(x["tokens"] for x in lost)))
    assert [(r["loss"], r["tokens"]) for r in found.records] == [(one["loss"], one["tokens"]) for one in lost]
    assert (found.metric, found.score) == (("accuracy", 0.0) if by == "answers" else ("loss", found.loss))


def test_a_loss_that_is_not_finite_is_no_score():
    with pytest.raises(ValueError, match="mawps: expected a finite loss of each answer, got 1 of 2 that are not"):
        scoring.score_losses([{"task": "mawps", "loss": x, "tokens": 3} for x in (2.5, None)], ["", ""])


def test_one_loss_alone_has_no_interval_to_write_or_print():
    found = scoring.score_losses([{"task": "mawps", "loss": 2.5, "tokens": 3}], [""])
    assert found.interval is None and str(found).startswith("loss 2.5000 (n 1; loss per answer")


def test_a_test_without_answers_to_learn_has_no_loss():
    examples = [*LEARNED, tasks.Example("How many?", "", "3")]
    assert scoring.losses(None, Bytes(), examples) == []
    with pytest.raises(ValueError, match="score-by loss: expected test examples with an answer to learn, got svamp's"):
        scoring.require_answers([(tasks.task("svamp"), examples)], "loss")


@pytest.mark.parametrize(("name", "labels"), [("rte", 2), ("stsb", 1)])
@torch.no_grad()
def test_the_loss_of_a_sentence_is_that_of_a_training_step_on_it_alone(name, labels):
    m, t = tiny("bert", num_labels=labels), Bytes()
    found = scoring.score_sentences(m, t, tasks.task(name), SENTENCES, 3)
    alone = [float(model.loss(m, torch.tensor([row.ids]), torch.tensor([row.labels]))) for row in SENTENCES]
    assert [r["loss"] for r in found.records] == pytest.approx(alone, rel=1e-4)
    assert found.loss == pytest.approx(sum(alone) / len(alone), rel=1e-4) and found.loss_per_token is None


# --------------------------------------------------------------------------------------------------------- likelihoods


@torch.no_grad()
def naive_likelihood(m, prompt, choice):
    """A forward pass of its own over prompt and choice: no cache, no batch, no padding."""
    given, written = batch.continuation(prompt, choice, Bytes())
    logp = m(torch.tensor([given + written])).log_softmax(-1)[0]
    return logp[torch.arange(len(given) - 1, len(given) + len(written) - 1), written].tolist()


@llms
@settings(max_examples=4, deadline=None)
@given(order=st.permutations(range(len(QUESTIONS))), batch_size=st.integers(1, 6))
def test_likelihoods_are_those_of_a_pass_for_each_choice_whatever_the_batch_and_the_order(family, method, order,
                                                                                          batch_size):
    m = tiny(family, method).double()
    found = scoring.likelihoods(m, Bytes(), [QUESTIONS[i] for i in order], [CHOICES[i] for i in order], batch_size)
    for i, row in zip(order, found, strict=True):
        for choice, logps in zip(CHOICES[i], row, strict=True):
            assert logps == pytest.approx(naive_likelihood(m, QUESTIONS[i], choice), abs=1e-9)


def test_prompts_that_begin_alike_are_read_once_up_to_what_is_asked_of_them():
    m, read, choices = tiny("llama").double(), [], ["the answer", "the end"]
    expected = [naive_likelihood(m, "question", choice) for choice in choices]
    m.embed.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape))
    found = scoring.likelihoods(m, Bytes(), ["question"] * 2, [choices] * 2)
    assert read[:2] == [(1, len("questio")), (2, len("n" "the "))]
    for row in found:
        for logps, wanted in zip(row, expected, strict=True):
            assert logps == pytest.approx(wanted, abs=1e-9)


def test_a_prompt_is_read_once_for_all_its_choices_with_what_these_begin_with():
    m, read = tiny("llama"), []
    m.embed.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    scoring.likelihoods(m, Bytes(), ["question"], [["the answer is a", "the answer is b", "the answer is c"]])
    assert read == [len("question" "the answer is ")]
    read.clear()
    scoring.likelihoods(m, Bytes(), ["question"], [["the answer is a1", "the answer is b1", "the answer is c1"]])
    assert read == [len("question" "the answer is "), 1, 1, 1]


# ------------------------------------------------------------------------- what a score does not depend on, in float32


@pytest.fixture
def obqa(monkeypatch):
    """Multiple choice whose responses are as short as the test wants them."""
    monkeypatch.setattr(tasks.Task, "max_new_tokens", 6)
    examples = [tasks.Example(q, "", f"answer{1 + i % 4}", choices=tuple(f"answer{1 + c}" for c in range(3 + i % 3)))
                for i, q in enumerate(QUESTIONS)]
    return tasks.task("obqa"), examples


def test_a_tokenizer_that_ends_each_text_is_not_asked():
    t = Bytes()
    t.encode = lambda text: [*Bytes.encode(t, text), t.eos_id]
    with pytest.raises(ValueError, match="expected a prompt that goes on, got a tokenizer that .* id 256"):
        scoring.responses(tiny("llama"), t, QUESTIONS, 4)


@llms
@pytest.mark.parametrize("beams", [1, 3])
def test_neither_batch_size_nor_padding_nor_order_changes_an_answer_or_a_choice(family, method, beams, obqa):
    m, (task, examples) = tiny(family, method), obqa
    alone = scoring.score_examples(m, Bytes(), task, examples, 1, beams)
    assert len({r["response"] for r in alone.records}) > 1
    for batch_size, order in ((2, [0, 1, 2, 3, 4]), (5, [4, 2, 0, 1, 3]), (64, [3, 0, 1, 4, 2])):
        found = scoring.score_examples(m, Bytes(), task, [examples[i] for i in order], batch_size, beams)
        for i, record in zip(order, found.records, strict=True):
            assert record == alone.records[i] | {"choices": pytest.approx(alone.records[i]["choices"], abs=1e-4)}
        assert (found.score, found.interval, found.more) == (alone.score, alone.interval, alone.more)


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(len(SENTENCES))), st.integers(1, 9))
def test_neither_batch_size_nor_padding_nor_order_changes_a_berts_predictions(order, batch_size):
    for name, labels in (("rte", 2), ("stsb", 1)):
        m, task, t = tiny("bert", num_labels=labels), tasks.task(name), Bytes()
        t.pad_id = 0
        alone = scoring.score_sentences(m, t, task, SENTENCES, 1)
        found = scoring.score_sentences(m, t, task, [SENTENCES[i] for i in order], batch_size)
        predicted = [r["predicted"] for r in found.records]
        expected = [alone.records[i]["predicted"] for i in order]
        assert len(set(expected)) > 1
        assert predicted == (expected if labels == 2 else pytest.approx(expected, abs=1e-5))
        assert found.score == pytest.approx(alone.score, abs=1e-5) and found.more == pytest.approx(alone.more, abs=1e-5)
        if labels == 2:  # the other class's probability is what is left
            odds = [m(torch.tensor([SENTENCES[i].ids]))[0].diff().abs().item() for i in order]
            assert [r["confidence"] for r in found.records] == pytest.approx([1 / (1 + math.exp(-x)) for x in odds],
                                                                             abs=1e-4)


def test_a_model_gone_wrong_is_scored_as_sure_of_nothing():
    m, t = tiny("bert", num_labels=2), Bytes()
    t.pad_id = 0
    m.classifier.out.weight.data.fill_(math.nan)
    found = scoring.score_sentences(m, t, tasks.task("rte"), SENTENCES)
    assert {r["loss"] for r in found.records} == {None} and found.loss is None
    assert found.more["confidence"] == 0 and found.more["calibration error"] == pytest.approx(found.score) != 0


def test_the_mean_of_several_tasks_counts_all_examples_and_narrows_the_interval():
    a = scoring.Score("accuracy", 0.5, 100, (0.4, 0.6), more={"likelihood": 0.3}, empty=0.1, answers_given={"A": 0.9},
                         records=[{"task": "a"}])
    b = scoring.Score("accuracy", 0.7, 300, (0.6, 0.75), answers_given={"B": 1.0}, records=[{"task": "b"}])
    both = scoring.mean({"a": a, "b": b})
    assert (both.score, both.n, both.parts, both.empty) == (pytest.approx(0.6), 400, {"a": 0.5, "b": 0.7}, 0.025)
    assert both.interval == pytest.approx((0.6 - 0.02**0.5 / 2, 0.6 + 0.0125**0.5 / 2))
    assert both.answers_given == {"a A": 0.9, "b B": 1.0} and both.more == {"a likelihood": 0.3}
    assert [r["task"] for r in both.records] == ["a", "b"] and scoring.mean({"a": a}) is a


def test_the_loss_of_several_tasks_is_that_of_all_their_answers():
    of = {name: scoring.score_losses([{"task": name, "loss": x, "tokens": 2} for x in lost], [""] * len(lost))
          for name, lost in {"a": [1.0], "b": [2.0, 3.0, 6.0]}.items()}
    both = scoring.mean(of)
    assert both.score == both.loss == 3.0 and both.loss_per_token == 1.5 and both.n == 4
    assert both.parts == {"a": 1.0, "b": pytest.approx(11 / 3)} and len(both.records) == 4


# --------------------------------------------------------------------------------------------------- the answers given


@given(st.lists(st.none() | st.sampled_from("ABCDEFGHIJ"), min_size=1, max_size=60))
@example([*"ABCDEFGHIJ", *"BBC", None])
def test_the_shares_of_the_answers_and_of_no_answer_make_one_and_the_six_commonest_are_named(answers):
    found = scoring.shares(answers)
    assert sum(found.values()) + answers.count(None) / len(answers) == pytest.approx(1)
    named = [a for a in found if a != "other"]
    assert len(named) == min(6, len(set(answers) - {None}))
    assert all(found[a] == answers.count(a) / len(answers) for a in named)
    rest = [answers.count(a) for a in set(answers) - {None, *named}]
    assert max(rest, default=0) <= min((answers.count(a) for a in named), default=0)


def test_of_a_long_answer_the_end_is_shown_without_its_full_stop():
    assert scoring.shares(["x " * 100 + "\nThe answer is 7.", "7"]) == {"The answer is 7": 0.5, "7": 0.5}


def scored(monkeypatch, task, responses, golds, **of_example):
    """By a tokenizer of words."""
    monkeypatch.setattr(scoring, "responses", lambda *args: responses)
    t, task = SimpleNamespace(encode=str.split), tasks.task(task)
    return scoring.score_examples(None, t, task, [tasks.Example("q", "", g, **of_example) for g in golds])


def test_a_score_says_what_was_answered_how_often_and_what_was_not(monkeypatch):
    found = scored(monkeypatch, "gsm8k", ["It is 7", "no idea", "7", "8, no: 9"], ["7.0", "7", "8", "9"])
    assert (found.score, found.n, found.empty) == (0.5, 4, 0.25) and found.answers_given == {"7": 0.5, "9": 0.25}
    assert found.records[1] == {"task": "gsm8k", "gold": "7", "response": "no idea", "answer": None, "right": False}
    assert [r["right"] for r in found.records] == [True, False, False, True]
    assert str(found) == ("accuracy 0.5000 (n 4; 95 % 0.1500 to 0.8500; no answer 25.0%)\n"
                          "  answers: 7 50.0%, 9 25.0%")


def test_aqua_is_scored_officially_and_by_the_last_letter_that_stands_alone(monkeypatch):
    found = scored(monkeypatch, "aqua", ["Clearly (B)", "It is A.", "By Bayes, D", "none"], ["B", "A", "B", "A"])
    assert found.score == 0.5 and found.more == {"last letter": 0.5}  # official: C, A, B, no answer
    assert [r["last letter"] for r in found.records] == ["B", "A", "D", None]


def test_the_likeliest_choice_is_scored_in_all_per_token_and_without_what_all_begin_with_per_character(monkeypatch):
    asked, lead = [], [-1.0] * 4
    monkeypatch.setattr(scoring, "likelihoods", lambda m, t, prompts, choices, size: asked.extend(choices) or [
        [[*lead, -4.0], [*lead, -1.2, -1.2, -1.2, -1.2]], [[*lead, -1.0], [*lead, -1.2]]])
    found = scored(monkeypatch, "boolq", ["true", ""], ["true", "false"], choices=("true", "false"))
    assert asked == [["the correct answer is true", "the correct answer is false"]] * 2
    assert found.score == 0.5 and found.more == {
        "likelihood": 0.5, "likelihood, per token": 0.0, "likelihood, per character": 0.5}
    assert [r["likelihood"] for r in found.records] == ["true", "true"]
    assert [r["likelihood, per token"] for r in found.records] == ["false", "true"]
    assert [r["likelihood, per character"] for r in found.records] == ["false", "false"]
    assert [r["choices"] for r in found.records] == [{"true": -4.0, "false": -4.8}, {"true": -1.0, "false": -1.2}]


def test_where_any_answer_may_be_given_none_is_likeliest(monkeypatch):
    assert scored(monkeypatch, "commonsense170k", ["true"], ["true"]).more == {}


def test_mnli_is_reported_matched_and_mismatched_and_by_the_names_of_its_classes():
    rows = [batch.encode_sentence(tasks.Sentence("a", "b", label, part), Cased(), 9) for label, part in (
        (0, "matched"), (1, "matched"), (2, "mismatched"))]
    found = scoring.score_predictions(tasks.task("mnli"), [0, 2, 2], rows)
    assert found.parts == {"matched": 0.5, "mismatched": 1.0} and found.more == {}  # no F1 of three classes
    assert found.answers_given == pytest.approx({"contradiction": 2 / 3, "entailment": 1 / 3})
    assert found.records[1] == {"task": "mnli", "gold": 1, "predicted": 2}
    assert found.interval == metrics.wilson(2 / 3, 3)


def test_calibration_error_is_the_gap_in_each_bin_weighed_by_what_it_holds():
    rows = [batch.encode_sentence(tasks.Sentence("a", "b", label), Cased(), 9) for label in (0, 0, 1, 1)]
    found = scoring.score_predictions(tasks.task("rte"), [0, 1, 1, 1], rows, [0.95, 0.94, 0.6, 0.61])
    # 0.94 and 0.95, of which one is right: 0.89 too much; 0.6 and 0.61, both right: 0.79 too little
    assert found.more["calibration error"] == pytest.approx((0.89 + 0.79) / 4)
    assert found.more["confidence"] == pytest.approx(0.775) and found.more.keys() >= {"matthews", "f1"}
    assert found.records[1] == {"task": "rte", "gold": 0, "predicted": 1, "confidence": 0.94}


def test_sentences_that_the_cutoff_shortens_are_counted_beside_the_score():
    rows = [batch.encode_sentence(tasks.Sentence(text, "b", 0), Cased(), 5) for text in ("a", "long", "longer")]
    found = scoring.score_predictions(tasks.task("rte"), [0, 0, 0], rows)
    assert found.cut == 2 and "cut off 2" in str(found)
    assert scoring.mean({"a": found, "b": found}).cut == 4


class Cased:
    """As much of a BERT's tokenizer as a pair of one-word sentences asks for."""

    def encode(self, text):
        return [101, *map(ord, text), 102]


def test_before_training_a_classifier_scores_as_the_commonest_class_and_a_regressor_as_the_mean():
    row = lambda label: batch.Row([1, 2], label)  # noqa: E731
    rte = scoring.majority(tasks.task("rte"), [tasks.Sentence("", "", x) for x in (1, 1, 0)], [row(1), row(0), row(0)])
    assert (rte.metric, rte.score, rte.n) == ("accuracy", pytest.approx(1 / 3), 3)
    stsb = scoring.majority(tasks.task("stsb"), [tasks.Sentence("", "", x) for x in (1.0, 4.0)], [row(2.0), row(3.0)])
    assert (stsb.metric, stsb.score) == ("pearson", 0.0)
