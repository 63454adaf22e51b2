"""Eq. (3) and GLUE's metrics against scikit-learn, scipy and pencil and paper."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import metrics, pictures, scoring


def naive_similarity(hidden, mask):
    """Eq. (3) as it is printed: a double loop over the tokens of each sentence."""
    sentences = []
    for h, keep in zip(hidden.double(), mask.bool(), strict=True):
        h = h[keep]
        m = len(h)
        if m > 1:
            sentences.append(sum(float(torch.dot(h[i], h[j]) / (h[i].norm() * h[j].norm()))
                                 for i in range(m) for j in range(m) if i != j) / (m * (m - 1)))
    return sum(sentences) / len(sentences)


def test_similarity_of_three_tokens_by_hand():
    # (1, 0), (0, 2), (3, 3): the cosines of the three pairs are 0, 1/√2, 1/√2, whatever the lengths
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    assert evaluation.similarity(hidden, torch.ones(1, 3)) == pytest.approx(2 / 2**0.5 / 3, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(1, 9), st.integers(0, 2**31))
def test_similarity_is_equation_3_with_padding_and_single_tokens_left_out(sentences, tokens, d, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sentences, tokens, d, generator=g)
    lengths = torch.randint(1, tokens + 1, (sentences,), generator=g)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    assert evaluation.similarity(hidden, mask) == pytest.approx(naive_similarity(hidden, mask), abs=1e-9)
    spoiled = torch.where(mask.bool()[..., None], hidden, torch.tensor(1e6))
    assert evaluation.similarity(spoiled, mask) == pytest.approx(evaluation.similarity(hidden, mask), abs=1e-12)


def test_similarity_of_equal_tokens_is_one_and_of_no_pair_an_error():
    assert evaluation.similarity(torch.ones(2, 5, 3), torch.ones(2, 5)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no sentence of two tokens"):
        evaluation.similarity(torch.ones(2, 5, 3), torch.tensor([[1, 0, 0, 0, 0]] * 2))


labels = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)
numbers = st.lists(st.tuples(st.integers(-5, 5), st.floats(-5, 5)), min_size=3, max_size=60)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_matthews_and_f1_are_scikit_learns(pairs):
    predicted, gold = map(np.array, zip(*pairs, strict=True))
    assert metrics.matthews(predicted, gold) == pytest.approx(sklearn.metrics.matthews_corrcoef(gold, predicted))
    assert metrics.f1(predicted, gold) == pytest.approx(sklearn.metrics.f1_score(gold, predicted, zero_division=0))


@settings(max_examples=60, deadline=None)
@given(numbers)
def test_pearson_and_spearman_are_scipys(pairs):
    a, b = (np.array(x, dtype=float) for x in zip(*pairs, strict=True))
    if np.ptp(a) < 1e-3 or np.ptp(b) < 1e-3:
        assert abs(metrics.pearson(a, np.zeros_like(b))) == 0  # constant: no correlation, not a NaN
        return
    assert metrics.pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-6)
    assert metrics.ranks(b) == pytest.approx(scipy.stats.rankdata(b))
    assert metrics.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-6)


def test_before_training_a_classifier_scores_as_the_commonest_class_and_a_regressor_as_the_mean():
    row = lambda label: batch.Row([1, 2], label)  # noqa: E731
    rte = scoring.majority(tasks.task("rte"), [tasks.Sentence("", "", x) for x in (1, 1, 0)], [row(1), row(0), row(0)])
    assert (rte.metric, rte.score, rte.n) == ("accuracy", pytest.approx(1 / 3), 3)
    stsb = scoring.majority(tasks.task("stsb"), [tasks.Sentence("", "", x) for x in (1.0, 4.0)], [row(2.0), row(3.0)])
    assert (stsb.metric, stsb.score) == ("pearson", 0.0)


def test_last_five_is_the_mean_of_the_last_five_entries():
    assert metrics.last_five([9, 9, 1, 2, 3, 4, 5]) == 3.0


def test_every_curve_is_drawn_plain_ones_dashed_and_in_the_colour_of_their_sibo(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(evaluation.checkpoint, "write", lambda path, savefig: kept.append(savefig.__self__))
    names = ["frozen", "adapter", "adapter-sibo, λ 0.1", "adapter-sibo, λ 0.3", "lora", "lora-sibo", "full"]
    pictures.draw_similarity({name: [0.1, 0.2, 0.3] for name in names}, tmp_path / "s.png", "title")
    lines = {line.get_label().split(" (")[0]: line for line in kept[0].axes[0].get_lines()}
    assert list(lines) == names
    assert lines["adapter"].get_color() == lines["adapter-sibo, λ 0.3"].get_color() != lines["lora"].get_color()
    assert [lines[n].get_linestyle() for n in ("frozen", "lora", "lora-sibo")] == [":", "--", "-"]


def test_a_picture_is_written_whole_and_alone(tmp_path):
    pictures.draw_similarity({"frozen": [0.1, 0.5, 0.6], "lora-sibo": [0.1, 0.4, 0.5]}, tmp_path / "s.png", "title")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
