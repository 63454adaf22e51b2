"""The loop and the command line's promises, on models small enough to watch."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

import model
import sibo
import train
from sibo_lab import cli
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import compare
from sibo_lab.training import estimate, options, recipes, run_folder

LLAMA_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32}


def command(monkeypatch, capsys, *args):
    """Runs train.py in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    try:
        cli.run(train.main, options.parser())
        code = 0
    except SystemExit as e:
        code = e.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("given", "name"), [
    ("smollm2-135m", "smollm2-135m"), ("meta/llama-3.2-1b", "llama-3.2-1b"), ("/a/b.Q4_1.gguf", "b.Q4_1"),
    ("/data/mine.jsonl", "mine"), ("rte", "rte")])
def test_a_run_folder_is_named_after_the_last_part_of_backbone_and_task(given, name):
    assert compare.name_of(given) == name


@pytest.mark.parametrize(("family", "kind", "method", "lam"), [
    ("llama", "arithmetic", "lora-sibo", 0.1), ("llama", "commonsense", "adapter-sibo", 0.1),
    ("gptj", "arithmetic", "lora-sibo", 0.1), ("gptj", "arithmetic", "adapter-sibo", 0.3),
    ("gptj", "commonsense", "lora-sibo", 0.3), ("gptj", "commonsense", "adapter-sibo", 0.1),
])
def test_the_papers_lambda_is_the_recipes(family, kind, method, lam):
    r = recipes.recipe(family, kind, method)
    assert (r.lam, r.lr, r.batch_size, r.micro_batch_size, r.epochs, r.warmup, r.cutoff, r.train_on_inputs) == (
        lam, 3e-4, 16, 4, 3.0, 100, 256, True)
    assert (r.rank, r.alpha, r.dropout, r.bottleneck) == (32, 64.0, 0.05, 256)


def test_dry_run_of_llama7b_counts_what_pencil_and_paper_count(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(estimate, "memory", lambda *args: {})  # see small_estimate
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    d, ff, layers, r = 4096, 11008, 32, 32
    base = 2 * 32000 * d + layers * (4 * d * d + 3 * d * ff + 2 * d) + d
    lora = layers * (3 * (r * d + d * r) + (r * d + ff * r) + (r * ff + d * r))  # q, k, v; up; down
    adapters = layers * 2 * 256 * d
    for method, trained in (("lora-sibo", lora), ("adapter-sibo", adapters), ("full", base)):
        code, out, _ = command(monkeypatch, capsys, "--backbone", tmp_path, "--method", method, "--task", "math10k",
                               "--dry-run", "--out", tmp_path / "run")
        total = base + (0 if method == "full" else trained)
        assert code == 0 and f"trainable parameters {trained:,} of {total:,}" in out
    assert not (tmp_path / "run").exists()


def test_what_is_trained_whole_is_float32(monkeypatch, capsys, tmp_path, tiny_llama):
    monkeypatch.setattr(options, "fast_bfloat16", lambda: True)
    code, *_ = command(monkeypatch, capsys, "--backbone", tiny_llama, "--method", "full,lora", "--steps", 1, "--limit",
                       1, "--rank", 2, "--out", tmp_path)
    kept = [json.loads((tmp_path / f"{name}-lr0.0003-seed0" / "config.json").read_text())["dtype"]
            for name in ("full", "lora")]
    assert code == 0 and kept == ["float32", "bfloat16"]
    assert {t.dtype for t in load_file(tmp_path / "full-lr0.0003-seed0" / "adapter.safetensors").values()} == {
        torch.float32}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the highest of the process counts")
def test_the_peak_of_a_second_run_does_not_hold_the_first_ones():
    taken = torch.ones(100_000_000)
    after = estimate.peak_memory("cpu")
    del taken
    estimate.reset_peak("cpu")
    assert estimate.peak_memory("cpu") < after - 300_000_000


def test_dry_run_says_who_gets_h0(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(estimate, "memory", lambda *args: {"frozen": 1.5e9, "step": 2e9})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    _, out, _ = command(monkeypatch, capsys, "--backbone", tmp_path, "--method", "lora-sibo", "--dry-run")
    assert "memory, estimated: 3.50 GB (frozen 1.50, step 2.00), in " in out
    lines = {line.split("─ ")[1].split()[0]: line for line in out.splitlines() if "─ " in line}
    assert {n for n, line in lines.items() if "◄══ h0, λ = 0.1" in line} == {"up_proj"}
    assert {n for n, line in lines.items() if "Eq. (2)" in line} == {"q_proj", "k_proj", "v_proj", "down_proj"}


def test_blocks_are_drawn_as_one_only_where_they_are_alike(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    _, out, _ = command(monkeypatch, capsys, "--backbone", tmp_path, "--method", "lora", "--targets",
                        "blocks.3.attn.q_proj,blocks.4.attn.q_proj", "--explain")
    assert [line.split("─ ")[1].strip() for line in out.splitlines() if "─ blocks" in line] == [
        "blocks.0 … 2", "blocks.3 … 4", "blocks.5 … 31"]
    assert out.count("Eq. (2)") == 1


def test_explain_draws_who_is_adapted_and_where_h0_goes(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | {"tie_word_embeddings": True}))
    code, out, _ = command(monkeypatch, capsys, "--backbone", tmp_path, "--method", "lora-sibo", "--lam", "0.3",
                           "--explain")
    assert code == 0 and out == """\
Llama, 32 blocks, d = 4096
├─ embed                                  ══► h0
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
    code, out, _ = command(monkeypatch, capsys, "--backbone", tmp_path, *args, "--explain")
    assert code == 0 and any(x.endswith(" " + line) for x in out.splitlines())


SMALL = {"model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2}


def small_run(method, **changes):
    return recipes.Run(**{"method": method, "micro_batch_size": 2, "batch_size": 4, "cutoff": 16, "rank": 4,
                        "bottleneck": 8, "lam": 0.2 if "sibo" in method else 0.0, "dtype": "float32"} | changes)


def small_estimate(layers, run):
    return estimate.memory(SMALL | {"num_hidden_layers": layers}, run)


def kept_for_the_backward(layers, run):
    """Bytes of the distinct storages that autograd keeps of one real forward pass, weights left out."""
    m = model.build(SMALL | {"num_hidden_layers": layers}).to_empty(device="cpu")
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.02)
    m = m.to(getattr(torch, run.dtype))
    m = m.requires_grad_(True) if run.method == "full" else sibo.inject(m, **run.settings())
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


def test_earlier_micro_batches_leave_their_gradients():
    alone, after = (small_estimate(2, small_run("lora", batch_size=n)) for n in (2, 4))
    assert alone["step"] < after["step"] <= alone["step"] + after["trained"] // 3


@pytest.mark.parametrize(("args", "says"), [
    (["--method", "adapter-sib"], "did you mean adapter-sibo"),
    (["--backbone", "smolm2-135m"], "did you mean smollm2-135m"),
    (["--task", "gsm8"], "did you mean gsm8k"),
    (["--lam", "1"], "lam: found 1.0, expected in [0, 1)"),
    (["--lam", "-0.1"], "lam: found -0.1"),
    (["--lam", "nan"], "lam: found nan"),
    (["--lam", "0", "--learn-lam"], "lam: found 0.0, expected above 0"),
    (["--method", "lora", "--lam", "0.3"], "--lam: found with --method lora, which does not use it"),
    (["--method", "full", "--dtype", "bfloat16"], "--dtype bfloat16: found with --method full"),
    (["--rank", "8"], "--rank: found with --method adapter-sibo, which does not use it"),
    (["--method", "lora", "--rank", "0"], "--rank: found 0, expected a positive number"),
    (["--bottleneck", "-3"], "--bottleneck: found -3"),
    (["--batch-size", "0"], "--batch-size: found 0"),
    (["--steps", "0"], "--steps: found 0"),
    (["--steps", "5", "--epochs", "1"], "--steps, --epochs: found both"),
    (["--lr", "inf"], "--lr: found inf"),
    (["--lr", "abc"], "invalid float value: 'abc'"),
    (["--warmup", "nan"], "--warmup: found nan"),
    (["--limit", "0"], "--limit: found 0"),
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["--task", "gsm8k", "--data-dir", "nowhere"], "nowhere"),
    (["--task", "svamp"], "svamp has no training file"),
    (["--task", "missing.json"], "missing.json"),
    (["--device", "cuda:99"], "--device: found cuda:99"),
])
def test_bad_options_end_in_one_line_and_code_2_before_anything_is_fetched(monkeypatch, capsys, tmp_path, args, says):
    monkeypatch.setenv("SIBO_CACHE", str(tmp_path / "cache"))
    code, out, err = command(monkeypatch, capsys, "--out", tmp_path / "run", *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("args", "says"), [
    (["--task", "rte"], "expected a BERT, such as minilm"),
    (["--targets", "q_porj", "--method", "lora-sibo"], "did you mean: q_proj"),
    (["--targets", "down_proj", "--method", "lora-sibo"], "cannot take h0"),
    (["--sibo-at", "attn"], "sibo_at 'attn': found []"),
    (["--task", "rte", "--protocol", "paper"], "--protocol paper: found --task rte"),
])
def test_options_that_do_not_fit_the_model_are_named(monkeypatch, capsys, tiny_llama, tiny_bert, tmp_path, args, says):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "glue" / "RTE").mkdir(parents=True, exist_ok=True)
        (tmp_path / "glue" / "RTE" / name).write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    code, _, err = command(monkeypatch, capsys, "--backbone", tiny_llama, "--data-dir", tmp_path, "--steps", "1",
                           "--limit", "1", "--out", tmp_path / "run", *args)
    assert code == 2 and says in err.splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_folder_that_holds_another_run_is_left_alone(monkeypatch, capsys, tmp_path, tiny_llama):
    (tmp_path / "config.json").write_text('{"backbone": "another"}')
    code, _, err = command(monkeypatch, capsys, "--backbone", tiny_llama, "--out", tmp_path)
    assert code == 2 and "holds a run of other settings" in err
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_an_interrupted_run_begins_again_and_a_finished_one_is_only_read(tmp_path):
    run = recipes.Run(out=str(tmp_path))
    assert run_folder.claim(run) is None
    (tmp_path / "config.json").write_text(json.dumps(train.asdict(run)))
    assert run_folder.claim(run) is None
    (tmp_path / "result.json").write_text('{"score": 1.0}')
    assert run_folder.claim(run) == {"score": 1.0}


def test_a_full_disk_ends_in_one_line_and_leaves_no_draft(monkeypatch, capsys, tmp_path, tiny_llama):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = command(monkeypatch, capsys, "--backbone", tiny_llama, "--dtype", "float32", "--steps", "1",
                           "--limit", "2", "--out", tmp_path / "run")
    assert code == 2 and "No space left on device" in err.splitlines()[-1]
    assert [p.name for p in (tmp_path / "run").rglob("*")] == [".lock"]


def test_help_names_every_option_with_its_default(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "--help")
    assert code == 0 and all(f"--{f.name.replace('_', '-')} " in out for f in train.fields(recipes.Run))


def test_lists_of_options_make_every_combination_once_and_only_where_a_method_uses_them():
    args = options.parser().parse_args(["--method", "lora,lora-sibo", "--lam", "0.1,0.2", "--seeds", "0,1"])
    found = [(one.method, one.lam, one.seed) for one in options.grid(args)]
    assert found == [("lora", None, 0), ("lora", None, 1), ("lora-sibo", 0.1, 0), ("lora-sibo", 0.1, 1),
                     ("lora-sibo", 0.2, 0), ("lora-sibo", 0.2, 1)]
    with pytest.raises(ValueError, match="--lam: found with --method lora,adapter"):
        options.grid(options.parser().parse_args(["--method", "lora,adapter", "--lam", "0.1"]))


def test_a_grid_goes_on_where_it_stopped_and_ends_in_one_table(monkeypatch, capsys, tmp_path, tiny_llama):
    args = ("--backbone", tiny_llama, "--dtype", "float32", "--method", "lora,lora-sibo", "--steps", 1, "--batch-size",
            2, "--limit", 2, "--out", tmp_path)
    code, out, _ = command(monkeypatch, capsys, *args)
    assert code == 0 and len(list(tmp_path.iterdir())) == 2
    written = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}
    code, out, err = command(monkeypatch, capsys, *args, "--seeds", "0,1")
    assert code == 0 and "2 of 4 runs are finished already" in err and "against plain" in out
    assert len(list(tmp_path.iterdir())) == 4 and all(f.stat().st_mtime_ns == t for f, t in written.items())


def test_validation_is_minus_the_loss_of_a_labelled_token_over_all_examples(tiny_llama):
    m = model.from_pretrained(tiny_llama)
    rows = [batch.Row(list(range(3, 3 + n)), [-100] * 2 + list(range(5, 3 + n))) for n in (4, 9, 6)]
    run = recipes.Run(backbone=str(tiny_llama), micro_batch_size=2)
    losses = [float(model.loss(m, torch.tensor([r.ids]), torch.tensor([r.labels]))) for r in rows]
    counts = [2, 7, 4]
    expected = -sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    found = train.validation(m, None, train.Data(tasks.task("gsm8k"), [], [], []), rows, run)
    assert found == pytest.approx(expected, rel=1e-5)
