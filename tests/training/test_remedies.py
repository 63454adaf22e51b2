"""The other remedies against over-smoothing, each against a computation written out."""

import pytest
import torch
import torch.nn.functional as F
from small_models import inject, stir, tiny

import eval as evaluation
import model
from sibo_lab.training import remedies
from sibo_lab.training.optimizer import adamw

IDS = torch.arange(24).reshape(3, 8) * 7 % 40


def context(m):
    angles = m.rotary(torch.arange(8)[None])[:, None]
    return model.Context(None, None, angles.cos().double(), angles.sin().double())


def blocks_by_hand(m, keep):
    """The logits, block l's output kept for the sequences that keep[l] names, which the others pass by."""
    states = m.embed(IDS)
    ctx = context(m)
    for block, kept in zip(m.blocks, keep, strict=True):
        states = torch.stack([block(states, ctx, None)[i] if k else states[i] for i, k in enumerate(kept)])
    return m.head(m.norm(states))


def test_in_training_a_sequence_passes_a_block_by_as_often_as_its_depth_says():
    m = tiny(num_hidden_layers=4)
    drawn = torch.Generator().manual_seed(5)
    keep = [(torch.rand(3, 1, 1, generator=drawn) >= 0.8 * l / 4).flatten().tolist() for l in (1, 2, 3, 4)]  # noqa: E741
    assert not all(map(all, keep)) and any(map(any, keep))
    expected = blocks_by_hand(m, keep)
    remedies.stochastic_depth(m.train(), 0.8)
    torch.manual_seed(5)
    assert torch.allclose(m(IDS), expected, atol=1e-12)


def test_rows_that_begin_alike_draw_each_for_itself():
    m = tiny(num_hidden_layers=2)
    alike = torch.cat((IDS[:1, :4].expand(3, -1), IDS[:, 4:]), 1)
    remedies.stochastic_depth(m.train(), 0.9)
    torch.manual_seed(0)
    found = model.loss(m, alike, alike)
    torch.manual_seed(0)
    logits = m(alike)[:, :-1]
    assert torch.allclose(found, F.cross_entropy(logits.flatten(0, 1), alike[:, 1:].flatten()), atol=1e-9)


def test_when_scored_no_block_is_passed_by():
    m = tiny()
    expected = m(IDS)
    remedies.stochastic_depth(m, 0.9)
    assert torch.equal(m(IDS), expected)


@pytest.mark.parametrize("method", ["adapter", "adapter-sibo"])
def test_with_sibo_a_passed_block_gives_a_zero_gradient_and_the_checkpointed_pass_the_same_one(method):
    gradients = []
    for checkpoint in (False, True):
        m = stir(inject(tiny(), method)).train()
        m.grad_checkpoint = checkpoint
        remedies.stochastic_depth(m, 0.99)
        torch.manual_seed(1)
        model.loss(m, IDS, IDS).backward()
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.requires_grad})
    assert all(g is not None for g in gradients[0].values())
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


def test_the_similarity_loss_is_the_loss_and_equation_3_of_each_block_without_padding():
    m = tiny("bert", num_labels=2)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
    labels = torch.tensor([0, 1, 1])
    m.requires_grad_(False)
    hidden = m.hidden_states(IDS, mask)[1:]
    expected = F.cross_entropy(m(IDS, mask), labels) + 0.3 * sum(evaluation.similarity(h, mask) for h in hidden) / 2
    remedies.SimilarityLoss(m, 0.3, evaluation.similarities)
    assert model.loss(m, IDS, labels, mask) == pytest.approx(float(F.cross_entropy(m(IDS, mask), labels)))
    assert float(model.loss(m.train(), IDS, labels, mask)) == pytest.approx(float(expected), abs=1e-9)
    assert float(model.loss(m, IDS, labels, mask)) == pytest.approx(float(expected), abs=1e-9)  # counts no pass twice


def test_of_a_pass_that_failed_the_similarity_loss_keeps_nothing():
    m, labels = tiny("bert", num_labels=2).train(), torch.tensor([0, 1, 1])
    remedies.SimilarityLoss(m, 0.3, evaluation.similarities)
    expected = model.loss(m, IDS, labels).item()
    hook = m.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.loss(m, IDS.flip(1), labels)
    hook.remove()
    assert model.loss(m, IDS, labels).item() == expected


def test_the_similarity_loss_makes_tokens_less_alike():
    m = tiny("bert", num_labels=2).train()
    remedies.SimilarityLoss(m, 100.0, evaluation.similarities)
    before = evaluation.similarity(m.hidden_states(IDS)[-1], torch.ones_like(IDS))
    m.requires_grad_(True)
    sgd = torch.optim.SGD(m.parameters(), 1e-4)
    for _ in range(3):
        sgd.zero_grad()
        model.loss(m, IDS, torch.tensor([0, 1, 1])).backward()
        sgd.step()
    assert evaluation.similarity(m.hidden_states(IDS)[-1], torch.ones_like(IDS)) < before


def test_the_similarity_loss_refuses_rows_that_begin_alike_or_end_in_padding():
    m = tiny().train()
    remedies.SimilarityLoss(m, 0.1, evaluation.similarities)
    alike = IDS.clone()
    alike[:, :3] = 1
    for ids, mask in ((alike, None), (IDS, torch.tensor([[1] * 8] * 2 + [[1] * 6 + [0] * 2]))):
        with pytest.raises(RuntimeError, match="expected rows without padding or a common beginning"):
            model.loss(m, ids, ids, mask)


@pytest.mark.parametrize("learned", [False, True])
def test_initial_tokens_are_mixed_into_what_each_block_but_the_first_reads(learned):
    m = tiny(num_hidden_layers=3)
    h0 = states = m.embed(IDS)
    ctx = context(m)
    for i, block in enumerate(m.blocks):
        states = block(0.9 * states + 0.1 * h0 if i else states, ctx, None)
    expected = m.head(m.norm(states))
    remedies.InitialTokens(m, 0.1, learned)
    assert torch.allclose(m(IDS), expected, atol=1e-6)
    assert [n for n, p in m.named_parameters() if "initial" in n and p.requires_grad] == [
        "initial_tokens.lam_logit"] * learned
    paces = [[n for n, p in m.named_parameters() if any(p is q for q in group["params"])]
             for group in adamw(m, 1e-3).param_groups]
    assert ["initial_tokens.lam_logit"] in paces if learned else "initial_tokens.lam_logit" not in sum(paces, [])
