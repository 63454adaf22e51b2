"""quantized.py (--base-bits): the quantized backbone against one that holds the de-quantized weights in full."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import eval as evaluation
import model
import sibo
import train
from sibo_lab import cli
from sibo_lab.backbone import quantized
from sibo_lab.data import batch
from sibo_lab.training import estimate, loop, options, recipes

IDS = torch.arange(24).reshape(2, 12) * 7 % 256
FAMILIES = ["tiny_llama", "tiny_bert"]


def quantized_model(folder, bits, seed=0, **settings):
    m = model.from_pretrained(folder, base_bits=bits)
    torch.manual_seed(seed)
    return trembling(sibo.inject(m, **settings)) if settings else m


def trembling(m):
    """W_up starts at zero, where half of the gradients vanish: away from there."""
    for x in m.modules():
        if isinstance(x, sibo.SIBOLayer):
            torch.nn.init.normal_(x.up, std=0.05)
    return m


def restored(m):
    """A copy with plain nn.Linear that hold what the quantized ones stand for: the oracle."""
    m = copy.deepcopy(m)
    for name, x in [(n, x) for n, x in m.named_modules() if isinstance(x, quantized.QuantizedLinear)]:
        plain = torch.nn.Linear(x.in_features, x.out_features, x.bias is not None).requires_grad_(False)
        plain.weight.data, plain.bias = quantized.dequantize(*x.parts(), torch.float32), x.bias
        m.set_submodule(name, plain)
    return m


def gradients(m, ids=IDS):
    out = m(ids)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_linear_weights_and_no_others_are_quantized(request, family, bits):
    folder = request.getfixturevalue(family)
    plain, m = model.from_pretrained(folder), quantized_model(folder, bits)
    linears = {n for n, x in plain.named_modules() if n.startswith("blocks.") and isinstance(x, torch.nn.Linear)}
    assert {n for n, x in m.named_modules() if isinstance(x, quantized.QuantizedLinear)} == linears
    assert quantized.parameters(m) == sum(p.numel() for p in plain.parameters())
    for name, p in plain.named_parameters():
        if name.removesuffix(".weight") in linears:
            x = m.get_submodule(name.removesuffix(".weight"))
            assert x.weight.nbytes == p.numel() * bits // 8
            worst = (quantized.dequantize(*x.parts(), torch.float32) - p).abs().reshape(-1, 64).amax(1)
            largest = p.detach().abs().reshape(-1, 64).amax(1)  # half a step: 1/254 of it, NF4: the widest gap is 0.304
            assert bool((worst <= largest * (1.01 / 254 if bits == 8 else 0.153)).all())
        else:
            assert torch.equal(p, m.get_parameter(name))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_dequantized_weights(request, family, method, bits):
    m = quantized_model(request.getfixturevalue(family), bits, method=method, lam=0.3, learn_lam=True)
    (out, grads), (expected, expected_grads) = gradients(m), gradients(restored(m))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected_grads.keys() and any(n.endswith("logit") for n in grads)
    for name, g in grads.items():
        torch.testing.assert_close(g, expected_grads[name], rtol=1e-4, atol=1e-5)
        at_once = family == "tiny_bert" and name.startswith("blocks.0") and name.endswith("logit")
        assert g.abs().max() > 0 or at_once  # BERT's first attention sees h = h0 itself: there λ mixes equals


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_h0_reaches_the_modules_of_a_quantized_backbone(tiny_llama, method, bits):
    outs = {lam: quantized_model(tiny_llama, bits, method=method, lam=lam)(IDS) for lam in (0.0, 1e-7, 0.3)}
    assert (outs[0.3] - outs[0.0]).abs().max() > 1e-3
    torch.testing.assert_close(outs[1e-7], outs[0.0], rtol=0, atol=1e-5)
    m = quantized_model(tiny_llama, bits, method=method, lam=0.3)
    with pytest.raises(RuntimeError, match="expected h0 "):
        m.blocks[0].mlp(torch.zeros(1, 2, 32))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_backward_pass_keeps_no_restored_weight(tiny_llama, bits):
    m, kept = quantized_model(tiny_llama, bits, method="lora", lam=0.3, rank=5), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        m(IDS)
    shapes = {(x.out_features, x.in_features) for x in m.modules() if isinstance(x, quantized.QuantizedLinear)}
    assert not [t.shape for t in kept if t.dtype == torch.float32 and {tuple(t.shape), tuple(t.shape)[::-1]} & shapes]


@pytest.mark.parametrize("bits", [8, 4])
def test_checkpointed_and_bfloat16_passes_agree_with_the_plain_one(tiny_llama, bits):
    m = quantized_model(tiny_llama, bits, method="lora", lam=0.3).train()
    _, expected = gradients(m)
    again = copy.deepcopy(m)
    again.zero_grad()
    again.grad_checkpoint = True
    for name, g in gradients(again)[1].items():
        torch.testing.assert_close(g, expected[name], rtol=1e-5, atol=1e-6)
    half = model.from_pretrained(tiny_llama, torch.bfloat16, base_bits=bits)
    assert half(IDS).dtype == torch.bfloat16
    torch.testing.assert_close(half(IDS).float(), quantized_model(tiny_llama, bits)(IDS), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_into_quantized_weights_is_refused_and_changes_nothing(tiny_llama, tmp_path, bits):
    m = quantized_model(tiny_llama, bits, method="lora", lam=0.3)
    before = m(IDS)
    with pytest.raises(ValueError, match="q_proj: expected LoRA on a weight of 16 bits .* got a quanti[sz]ed"):
        sibo.merge(m)
    assert torch.equal(m(IDS), before)
    sibo.save(m, tmp_path)  # what the message says to do
    full = sibo.load(model.from_pretrained(tiny_llama), tmp_path)
    expected = full(IDS)
    torch.testing.assert_close(sibo.merge(full)(IDS), expected, rtol=1e-4, atol=1e-5)


def command(monkeypatch, capsys, main, parser, *args):
    monkeypatch.setattr(sys, "argv", [str(a) for a in args])
    try:
        cli.run(main, parser)
        code = 0
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_a_quantized_run_scores_the_same_again(monkeypatch, capsys, tiny_llama, tmp_path):
    task = tmp_path / "mine.json"
    task.write_text(json.dumps([{"instruction": f"{i}+1?", "output": str(i + 1), "answer": str(i + 1)}
                                for i in range(4)]))
    code, _, err = command(monkeypatch, capsys, train.main, options.parser(), "train.py", "--backbone", tiny_llama,
                           "--method", "lora-sibo", "--base-bits", "8", "--task", "word-problems", "--steps", "2",
                           "--limit", "3", "--dtype", "float32", "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["base_bits"] == 8
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    plain = sibo.inject(model.from_pretrained(tiny_llama), "lora", 0.1)
    assert result["total_parameters"] == sum(p.numel() for p in plain.parameters())
    loaded, load_weights = [], model.load_weights
    monkeypatch.setattr(model, "load_weights", lambda *a: loaded.append(load_weights(*a)) or loaded[-1])
    code, out, err = command(monkeypatch, capsys, evaluation.main, evaluation.parser(), "eval.py", tmp_path / "run")
    assert code == 0 and f"accuracy {result['score']:.4f} (n 3" in out, err
    assert any(isinstance(x, quantized.QuantizedLinear) for x in loaded[0].modules())


@pytest.mark.parametrize(("args", "says"), [
    (["--base-bits", "4", "--method", "full"], "--base-bits 4: expected an adapter or LoRA method, got --method full"),
    (["--base-bits", "2"], "--base-bits: invalid choice: 2"),
])
def test_what_cannot_be_quantized_is_one_line(monkeypatch, capsys, tmp_path, args, says):
    code, _, err = command(monkeypatch, capsys, train.main, options.parser(), "train.py", "--out", tmp_path / "r",
                           *args)
    assert code == 2 and says in err and err.count("\n") == 1


def test_a_missing_library_is_one_line_with_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, _, err = command(monkeypatch, capsys, train.main, options.parser(), "train.py", "--base-bits", "8",
                           "--out", tmp_path / "r")
    assert code == 2 and err == "error: --base-bits 8 needs bitsandbytes: pip install bitsandbytes==0.50.2\n"


def test_a_library_caller_is_told_which_bits_there_are(tiny_llama):
    with pytest.raises(ValueError, match="base_bits: expected 8, 4, or None .* got 3"):
        model.from_pretrained(tiny_llama, base_bits=3)


@pytest.mark.parametrize(("bits", "nbytes"), [(8, 1 + 4 / 64), (4, 0.5 + 4 / 64)])
def test_the_estimate_counts_quantized_weights_and_no_restored_one_stays(bits, nbytes):
    d, ff = 64, 128
    spec = {"model_type": "llama", "vocab_size": 50, "hidden_size": d, "intermediate_size": ff,
            "num_attention_heads": 4}
    run = recipes.run_of(method="lora-sibo", rank=4, micro_batch_size=2, cutoff=8, base_bits=bits)
    found = [estimate.memory(spec | {"num_hidden_layers": n}, r) for n in (2, 3) for r in (
        run, replace(run, base_bits=None))]
    linears, norms, table = 4 * d * d + 3 * d * ff, 2 * d * 2, 7 * 1024 if bits == 8 else 0
    assert found[2]["frozen"] - found[0]["frozen"] == linears * nbytes + norms + table
    assert found[3]["frozen"] - found[1]["frozen"] == linears * 2 + norms
    assert found[2]["step"] - found[0]["step"] == found[3]["step"] - found[1]["step"]


def test_training_a_quantized_backbone_lowers_the_loss(tiny_llama, tmp_path):
    run = recipes.run_of("lora-sibo", out=str(tmp_path), backbone=str(tiny_llama), steps=12, warmup=2, lr=1e-2,
                         batch_size=8, micro_batch_size=2, lam=0.2, rank=4, dropout=0.0)
    m = sibo.inject(quantized_model(tiny_llama, 4), **vars(run.settings))
    rows = [batch.Row(list(range(i, i + 9)), [-100] * 4 + list(range(i + 4, i + 9))) for i in range(8)]
    loop.fit(m, rows, 0, run)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
