"""estimate.py: what a dry run counts, and what --explain draws."""

import json
import sys

import pytest
import torch
from run_train import run_train

import model
import sibo
from sibo_lab.training import estimate, recipes

LLAMA_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32}


def test_dry_run_of_llama7b_counts_what_pencil_and_paper_count(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(estimate, "memory", lambda *args: {})  # see small_estimate
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    d, ff, layers, r = 4096, 11008, 32, 32
    base = 2 * 32000 * d + layers * (4 * d * d + 3 * d * ff + 2 * d) + d
    lora = layers * (3 * (r * d + d * r) + (r * d + ff * r) + (r * ff + d * r))  # q, k, v; up; down
    adapters = layers * 2 * 256 * d
    for method, trained in (("lora-sibo", lora), ("adapter-sibo", adapters), ("full", base)):
        code, out, _ = run_train(monkeypatch, capsys, "--backbone", tmp_path, "--method", method, "--task", "math10k",
                               "--dry-run", "--out", tmp_path / "run")
        total = base + (0 if method == "full" else trained)
        assert code == 0 and f"trainable parameters {trained:,} of {total:,}" in out
        assert f"FLOPs per token, estimated: {(4 * total + 2 * trained) / 1e9:.2f} G to train" in out
    _, out, _ = run_train(monkeypatch, capsys, "--backbone", tmp_path, "--task", "math10k", "--dry-run",
                          "--grad-checkpoint", "--out", tmp_path / "run")
    total = base + adapters  # of the default; here the forward pass runs twice
    assert f"FLOPs per token, estimated: {(6 * total + 2 * adapters) / 1e9:.2f} G to train" in out
    assert not (tmp_path / "run").exists()


def test_dry_run_says_who_gets_h0(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(estimate, "memory", lambda *args: {"frozen": 1.5e9, "step": 2e9})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    _, out, _ = run_train(monkeypatch, capsys, "--backbone", tmp_path, "--method", "lora-sibo", "--dry-run")
    assert "memory, estimated: 3.50 GB (frozen 1.50, step 2.00), in " in out
    lines = {line.split("─ ")[1].split()[0]: line for line in out.splitlines() if "─ " in line}
    assert {n for n, line in lines.items() if "◄══ h0, λ = 0.1" in line} == {"up_proj"}
    assert {n for n, line in lines.items() if "Eq. (2)" in line} == {"q_proj", "k_proj", "v_proj", "down_proj"}


def test_blocks_are_drawn_as_one_only_where_they_are_alike(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    _, out, _ = run_train(monkeypatch, capsys, "--backbone", tmp_path, "--method", "lora", "--targets",
                        "blocks.3.attn.q_proj,blocks.4.attn.q_proj", "--explain")
    assert [line.split("─ ")[1].strip() for line in out.splitlines() if "─ blocks" in line] == [
        "blocks.0 … 2", "blocks.3 … 4", "blocks.5 … 31"]
    assert out.count("Eq. (2)") == 1


def test_explain_draws_who_is_adapted_and_where_h0_goes(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | {"tie_word_embeddings": True}))
    code, out, _ = run_train(monkeypatch, capsys, "--backbone", tmp_path, "--method", "lora-sibo", "--lam", "0.3",
                           "--explain")
    assert code == 0 and out == """\
Llama, 32 blocks, d = 4096, h0 = what blocks.0 reads
├─ embed
├─ blocks.0 … 31
│  ├─ attn_norm
│  ├─ attn
│  │  ├─ q_proj            4096 → 4096    hW + s·hAB, rank 32, Eq. (2)
│  │  ├─ k_proj            4096 → 4096    hW + s·hAB, rank 32, Eq. (2)
│  │  ├─ v_proj            4096 → 4096    hW + s·hAB, rank 32, Eq. (2)
│  │  └─ o_proj            4096 → 4096
│  ├─ mlp_norm
│  └─ mlp
│     ├─ gate_proj         4096 → 11008
│     ├─ up_proj           4096 → 11008   hW + s·h̃AB, rank 32, Eq. (5)   ◄══ h0, λ = 0.3
│     └─ down_proj         11008 → 4096   hW + s·hAB, rank 32, Eq. (2)
├─ norm
└─ head                    4096 → 32000
"""


@pytest.mark.parametrize(("args", "line"), [
    (["--method", "adapter-sibo", "--learn-lam"],
     "output: h̃ + f(h̃A)B, bottleneck 256, Eq. (4)   ◄══ h0, λ = 0.1, learned"),
    (["--method", "adapter"], "output: h + f(hA)B, bottleneck 256, Eq. (1)"),
    (["--method", "adapter-sibo", "--skip", "plain"],
     "output: h + f(h̃A)B, bottleneck 256, Eq. (4)   ◄══ h0, λ = 0.1"),
    (["--method", "adapter", "--side", "parallel"], "beside it: sub-layer + f(hA)B, bottleneck 256, Eq. (1)"),
    (["--method", "lora-sibo", "--frozen-too"], "h̃W + s·h̃AB, rank 32, Eq. (5)   ◄══ h0, λ = 0.1"),
])
def test_explain_writes_each_modules_formula(monkeypatch, capsys, tmp_path, args, line):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    code, out, _ = run_train(monkeypatch, capsys, "--backbone", tmp_path, *args, "--explain")
    assert code == 0 and any(x.endswith(" " + line) for x in out.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the highest of the process counts")
def test_the_peak_of_a_second_run_does_not_hold_the_first_ones():
    taken = torch.ones(100_000_000)
    after = estimate.peak_memory("cpu")
    del taken
    estimate.reset_peak("cpu")
    assert estimate.peak_memory("cpu") < after - 300_000_000


SMALL = {"model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2}


def small_run(method, **changes):
    return recipes.run_of(**{"method": method, "micro_batch_size": 2, "batch_size": 4, "cutoff": 16, "rank": 4,
                        "bottleneck": 8, "lam": 0.2 if "sibo" in method else 0.0, "dtype": "float32"} | changes)


def small_estimate(layers, run):
    return estimate.memory(SMALL | {"num_hidden_layers": layers}, run)


def kept_for_the_backward(layers, run):
    """Bytes of the distinct storages that autograd keeps of one real forward pass, weights left out."""
    m = model.build(SMALL | {"num_hidden_layers": layers}).to_empty(device="cpu")
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.02)
    m = m.to(getattr(torch, run.dtype))
    m = m.requires_grad_(True) if run.method == "full" else sibo.inject(m, **vars(run.settings))
    m.train().grad_checkpoint = run.grad_checkpoint
    weights, kept = {p.untyped_storage().data_ptr() for p in m.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        h = m(torch.zeros(run.micro_batch_size, run.cutoff, dtype=torch.long), return_hidden=True)
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*kept, h[-1]]}
    return sum(n for storage, n in found.items() if storage not in weights)


@pytest.mark.parametrize(("method", "dtype"), [(x, "float32") for x in recipes.METHODS] + [("lora-sibo", "bfloat16")])
def test_a_further_layer_costs_what_autograd_keeps_of_it(method, dtype):
    run = small_run(method, dtype=dtype)
    a, b = (small_estimate(n, run) for n in (2, 3))
    grads = (b["trained"] - a["trained"]) // 3
    assert b["step"] - a["step"] - grads == kept_for_the_backward(3, run) - kept_for_the_backward(2, run)


def test_with_gradient_checkpointing_a_further_layer_costs_its_input():
    run = small_run("adapter-sibo", grad_checkpoint=True, dtype="bfloat16")
    a, b = (small_estimate(n, run) for n in (2, 3))
    adapters = 2 * 8 * 64
    assert b["step"] - a["step"] == 2 * 16 * 64 * 2 + adapters * 4
    assert b["trained"] - a["trained"] == adapters * 4 * 3  # the weights and AdamW's two moments, float32


def test_lora_on_the_head_makes_its_logits_whole():
    spec = SMALL | {"num_hidden_layers": 1, "vocab_size": 5000}
    step = estimate.memory(spec, small_run("lora", targets=("head",)))["step"]
    assert 2 < step / (2 * 16 * 5000 * 4) < 4  # logits, their logarithms and a gradient, float32


def test_earlier_micro_batches_leave_their_gradients():
    alone, after = (small_estimate(2, small_run("lora", batch_size=n)) for n in (2, 4))
    assert alone["step"] < after["step"] <= alone["step"] + after["trained"] // 3


GPTJ = {"model_type": "gptj", "vocab_size": 50, "n_embd": 64, "n_head": 4, "rotary_dim": 8}
BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def test_a_berts_head_is_trained_in_float32_whatever_holds_the_frozen_weights():
    spec, run = BERT | {"num_hidden_layers": 2}, small_run("lora", dtype="bfloat16", targets=("mlp.fc_in",))
    head, loras = 64 * 64 + 64 + 64 * 3 + 3, 2 * 4 * (64 + 128)  # rank 4 in two layers
    assert estimate.memory(spec, run, 3)["trained"] == 3 * 4 * (head + loras)


@pytest.mark.parametrize(("spec", "method", "changes"), [
    (SMALL, "adapter-sibo", {"dtype": "bfloat16"}), (SMALL, "full", {"micro_batch_size": 1, "cutoff": 2}),
    (GPTJ, "lora-sibo", {"grad_checkpoint": True, "batch_size": 2}), (BERT, "lora", {"batch_size": 2}),
    (BERT, "full", {"batch_size": 2}),
], ids=lambda x: x.get("model_type") if isinstance(x, dict) else x)
def test_what_two_and_three_blocks_tell_of_many_is_what_many_take(monkeypatch, spec, method, changes):
    run, labels = small_run(method, **changes), 2 * (spec is BERT)
    spec = spec | {"n_layer" if spec is GPTJ else "num_hidden_layers": 6}
    told = estimate.memory(spec, run, labels)
    monkeypatch.setattr(estimate, "kind", id)  # no two blocks are alike
    assert told == estimate.memory(spec, run, labels)


@pytest.mark.parametrize("changes", [
    {"model_type": "smollm3"}, {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
                                "max_window_layers": 4}], ids=lambda x: x["model_type"])
def test_blocks_that_differ_are_all_counted(monkeypatch, changes):
    run, steps = small_run("lora"), []
    monkeypatch.setattr(estimate, "one_step", lambda m, *_: steps.append(len(m.blocks)) or (0, 0, 0))
    estimate.memory(SMALL | changes | {"num_hidden_layers": 8}, run)
    estimate.memory(SMALL | {"num_hidden_layers": 8}, small_run("lora", targets=("blocks.3.attn.q_proj",)))
    assert steps == [8, 8]
