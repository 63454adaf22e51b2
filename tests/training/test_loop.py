"""loop.py, on models small enough to watch: what a step is, and what remains when something goes wrong."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import sibo
from sibo_lab import fast, files
from sibo_lab.data import batch
from sibo_lab.training import loop, recipes, resume


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_learning_rate_rises_linearly_then_falls_linearly_to_zero():
    run = recipes.run_of(steps=10, warmup=4, lr=1.0)
    rates = [loop.learning_rate(run, step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    share = recipes.run_of(steps=10, warmup=0.4, lr=1.0)
    assert [loop.learning_rate(share, step) for step in range(10)] == rates


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 99))
def test_micro_batches_change_neither_loss_nor_gradient(lengths, micro, seed):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    m = model.build({"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
                     "num_hidden_layers": 2, "num_attention_heads": 2}).to_empty(device="cpu").double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    rows = []
    for n in lengths:  # of many lengths: a mean of means would be wrong
        ids = torch.randint(0, 50, (n + 3,), generator=g).tolist()
        rows.append(batch.Row(ids, [-100] * 3 + ids[3:]))
    found = {}
    for size in (micro, len(rows)):
        m.zero_grad()
        found[size] = loop.train_step(m, rows, size, 0), [p.grad.clone() for p in m.parameters()]
    (loss, grads), (loss_whole, grads_whole) = found[micro], found[len(rows)]
    assert loss == pytest.approx(loss_whole, abs=1e-12)
    assert max((a - b).abs().max() for a, b in zip(grads, grads_whole, strict=True)) < 1e-12
    logp = [m(torch.tensor([r.ids]))[0].log_softmax(-1) for r in rows]
    tokens = [-logp[i][t - 1, r.ids[t]] for i, r in enumerate(rows) for t in range(3, len(r.ids))]
    assert loss == pytest.approx(float(sum(tokens).detach()) / len(tokens), abs=1e-9)


def test_compiled_blocks_train_as_eager_ones_and_share_one_graph():
    """Five layers, three lengths."""
    grads = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        m = model.build({"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
                         "num_hidden_layers": 5, "num_attention_heads": 2}).to_empty(device="cpu")
        for p in m.parameters():
            torch.nn.init.normal_(p, std=0.3)
        sibo.inject(m, "lora", 0.2, rank=4).train()
        for x in m.modules():
            if isinstance(x, sibo.LoRA):
                torch.nn.init.normal_(x.up, std=0.1)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.compiler.set_stance("default")
            fast.compiled(m)
        for length in (70, 90, 110):
            rows = [batch.Row(ids, ids) for ids in torch.randint(0, 50, (3, length)).tolist()]
            loop.train_step(m, rows, 3, 0)
        grads[compiled] = [p.grad for p in m.parameters() if p.requires_grad]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for ours, plain in zip(grads[True], grads[False], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_a_batch_without_a_labelled_token_is_an_error():
    with pytest.raises(ValueError, match="expected a labelled token in each batch, got 1 examples without one; raise"):
        loop.train_step(torch.nn.Linear(1, 1), [batch.Row([1, 2], [-100, -100])], 1, 0)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_every_method_trains_only_what_it_should_and_the_loss_falls(method, tmp_path, tiny_llama):
    run = recipes.run_of(out=str(tmp_path), backbone=str(tiny_llama), method=method, steps=12, warmup=2, lr=1e-2,
                         batch_size=8, micro_batch_size=2, lam=0.2, rank=4, bottleneck=8, dropout=0.0)
    torch.manual_seed(0)
    m = model.from_pretrained(tiny_llama)
    m = sibo.inject(m, **vars(run.settings)) if run.settings else m.requires_grad_(True)
    frozen = {n: p.clone() for n, p in m.named_parameters() if not p.requires_grad}
    rows = [batch.Row(list(range(i, i + 9)), [-100] * 4 + list(range(i + 4, i + 9))) for i in range(8)]
    loop.fit(m, rows, 0, run)
    assert not m.training
    lines = log_of(tmp_path)
    assert [x["step"] for x in lines] == list(range(1, 13)) and lines[-1]["loss"] < lines[0]["loss"]
    assert all(torch.equal(p, dict(m.named_parameters())[n]) for n, p in frozen.items())
    assert bool(frozen) == (method != "full")


def test_the_same_seed_gives_the_same_numbers(tmp_path, tiny_llama):
    losses = []
    for name in ("a", "b"):
        run = recipes.run_of(out=str(tmp_path / name), backbone=str(tiny_llama), method="lora-sibo", steps=3,
                             batch_size=2, micro_batch_size=1, lam=0.3, rank=4, dropout=0.1, seed=5)
        torch.manual_seed(run.seed)
        m = sibo.inject(model.from_pretrained(tiny_llama), **vars(run.settings))
        rows = [batch.Row(list(range(i, i + 9)), list(range(i, i + 9))) for i in range(4)]
        loop.fit(m, rows, 0, run)
        losses.append([line["loss"] for line in log_of(tmp_path / name)])
    assert losses[0] == losses[1] and all(map(math.isfinite, losses[0]))


@pytest.mark.parametrize("compile", [True, False])
def test_after_compiled_training_nothing_more_is_compiled(compile, monkeypatch, tmp_path, tiny_llama):
    monkeypatch.setattr(fast, "compiled", lambda m: m)
    run = recipes.run_of(out=str(tmp_path), backbone=str(tiny_llama), steps=1, batch_size=1, compile=compile)
    m, made = sibo.inject(model.from_pretrained(tiny_llama), "lora", 0.0), []
    loop.fit(m, [batch.Row([1, 2, 3], [1, 2, 3])], 0, run)
    torch.compile(torch.sin, backend=lambda graph, _: made.append(1) or graph.forward)(torch.ones(2))
    torch.compiler.set_stance("default")
    assert bool(made) != compile


def test_the_model_is_left_as_it_was_when_it_validated_best(tmp_path, tiny_llama):
    run = recipes.run_of(out=str(tmp_path), backbone=str(tiny_llama), method="lora", lam=0.0, steps=6, warmup=0,
                         lr=1e-2, batch_size=2, micro_batch_size=2, rank=4, dropout=0.0, validate_every=2)
    torch.manual_seed(0)
    m = sibo.inject(model.from_pretrained(tiny_llama), **vars(run.settings))
    seen, marks = [], iter([1.0, 3.0, 2.0])  # the second of three validations is the best

    def validate(m):
        assert not m.training
        seen.append({n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad})
        return next(marks)

    rows = [batch.Row(list(range(i, i + 9)), list(range(i, i + 9))) for i in range(4)]
    result = loop.fit(m, rows, 0, run, validate)
    assert result["best"] == {"step": 4, "validation": 3.0} and len(seen) == 3
    assert all(torch.equal(p, seen[1][n]) for n, p in m.named_parameters() if p.requires_grad)
    assert not all(torch.equal(seen[1][n], seen[2][n]) for n in seen[1])


# ------------------------------------------------------------------------------------------------ numbers that go wrong


def faulty(monkeypatch, wrong):
    """Multiplies model.loss by `wrong(number of the call)`."""
    real, calls = model.loss, []

    def loss(m, *args, **kwargs):
        calls.append(1)
        return real(m, *args, **kwargs) * wrong(len(calls))

    monkeypatch.setattr(model, "loss", loss)


def adapted(folder, tiny_llama, **changes):
    run = recipes.run_of(**{"out": str(folder), "backbone": str(tiny_llama), "method": "lora-sibo", "lam": 0.2,
                            "steps": 6, "warmup": 0, "lr": 1e-2, "batch_size": 2, "micro_batch_size": 2, "rank": 4,
                            "dropout": 0.0} | changes)
    torch.manual_seed(0)
    m = sibo.inject(model.from_pretrained(tiny_llama), **vars(run.settings))
    return m, [batch.Row(list(range(i, i + 9)), list(range(i, i + 9))) for i in range(4)], run


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_is_skipped_counted_and_its_examples_named(wrong, monkeypatch, tmp_path,
                                                                                tiny_llama):
    faulty(monkeypatch, lambda call: wrong if call == 3 else 1.0)
    m, rows, run = adapted(tmp_path, tiny_llama)
    seen = []
    result = loop.fit(m, rows, 0, replace(run, validate_every=1), lambda m: seen.append(
        torch.cat([p.detach().flatten() for p in m.parameters() if p.requires_grad])) or 0.0)
    lines = log_of(tmp_path)
    assert result["steps_skipped"] == 1 and [i for i, x in enumerate(lines) if "skipped" in x] == [2]
    assert lines[2]["loss"] is None and set(lines[2]["skipped"]) <= set(range(4)) and len(lines[2]["skipped"]) == 2
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3]) and seen[-1].isfinite().all()


def test_a_gradient_that_is_not_finite_is_not_taken_either(monkeypatch, tmp_path, tiny_llama):
    m, rows, run = adapted(tmp_path, tiny_llama)
    first = next(p for p in m.parameters() if p.requires_grad)
    calls = []
    first.register_hook(lambda g: g * math.nan if calls.append(1) or len(calls) == 2 else g)
    assert loop.fit(m, rows, 0, run)["steps_skipped"] == 1
    assert [math.isfinite(x["loss"] or math.nan) for x in log_of(tmp_path)] == [True, False, True, True, True, True]


def test_after_ten_such_steps_in_a_row_the_run_stops_with_the_last_good_state_saved(monkeypatch, tmp_path, tiny_llama):
    faulty(monkeypatch, lambda call: math.nan if call > 4 else 1.0)
    m, rows, run = adapted(tmp_path, tiny_llama, steps=30)
    with pytest.raises(ValueError, match="step 14: expected a finite loss and gradient, got none for 10 steps") as e:
        loop.fit(m, rows, 0, run)
    assert f"examples {log_of(tmp_path)[-1]['skipped']}" in str(e.value) and "--lr" in str(e.value)
    state, _ = resume.newest(tmp_path)
    tensors, _ = files.read_tensors(state / "state.safetensors")
    assert all(torch.equal(p, tensors[f"weight.{n}"]) for n, p in m.named_parameters() if p.requires_grad)
    assert all(t.isfinite().all() for t in tensors.values()) and float(tensors[next(
        n for n in tensors if n.startswith("step."))]) == 4


def test_a_spike_of_the_loss_is_marked_in_the_log(monkeypatch, tmp_path, tiny_llama):
    faulty(monkeypatch, lambda call: 50.0 if call == 25 else 1.0)
    m, rows, run = adapted(tmp_path, tiny_llama, steps=30, lr=1e-5)
    assert loop.fit(m, rows, 0, run)["loss_spikes"] == 1
    assert [x["step"] for x in log_of(tmp_path) if x.get("spike")] == [25]


def test_gradients_are_clipped_to_norm_one_and_their_norm_is_logged(monkeypatch, tmp_path, tiny_llama):
    faulty(monkeypatch, lambda call: 1000.0)
    m, rows, run = adapted(tmp_path, tiny_llama, steps=1)

    def norm():
        return math.sqrt(sum(float(p.grad.double().square().sum()) for p in m.parameters() if p.requires_grad))

    loop.train_step(m.train(), rows[:2], 2, 0)
    whole, taken = norm(), []
    m.zero_grad()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: taken.append(norm()))
    loop.fit(m, rows[:2], 0, run)
    assert log_of(tmp_path)[0]["grad_norm"] == pytest.approx(whole, rel=1e-5) and whole > 10
    assert taken == [pytest.approx(1.0, rel=1e-4)]


def test_a_learned_lams_log_odds_take_steps_50_times_a_weights(tmp_path, tiny_llama):
    """AdamW's first step is the rate itself for each number that has a gradient, whatever its size."""
    m, rows, run = adapted(tmp_path, tiny_llama, method="adapter-sibo", learn_lam=True, steps=1, lr=1e-3)
    before = {n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad}
    loop.fit(m, rows, 0, run)
    moved = {n: (m.get_parameter(n).detach() - p).abs() for n, p in before.items()}
    assert {n.rpartition(".")[2] for n in moved} == {"down", "up", "lam_logit"}
    for name, by in moved.items():
        if not name.endswith(".down"):  # up is 0 yet, so that down has no gradient
            assert by.max().item() == pytest.approx(0.05 if name.endswith(".lam_logit") else 0.001, rel=1e-3)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(monkeypatch, capsys, tmp_path, tiny_llama):
    real = model.loss

    def small_memory(m, input_ids, *args, **kwargs):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(m, input_ids, *args, **kwargs)

    m, rows, run = adapted(tmp_path / "small", tiny_llama, batch_size=4, micro_batch_size=4)
    monkeypatch.setattr(model, "loss", small_memory)
    result = loop.fit(m, rows, 0, run)
    printed = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert result["micro_batch_size"] == 1 and len(printed) == 2
    assert printed[0].endswith("step 1: out of memory with 4 examples at a time; continuing with 2, still 4 per step")
    monkeypatch.setattr(model, "loss", real)
    m, rows, run = adapted(tmp_path / "large", tiny_llama, batch_size=4, micro_batch_size=4)
    loop.fit(m, rows, 0, run)
    small, large = ([x["loss"] for x in log_of(tmp_path / name)] for name in ("small", "large"))
    assert small == pytest.approx(large, rel=1e-4)


def test_gradients_from_before_memory_ran_out_are_dropped(monkeypatch, tmp_path, tiny_llama):
    m, rows, run = adapted(tmp_path, tiny_llama)
    real, calls = model.loss, []

    def late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "loss", late)
    progress = resume.Progress("", 2)
    loss = loop.step_halving_on_oom(m.train(), rows, 0, progress)
    found = [p.grad.clone() for p in m.parameters() if p.requires_grad]
    m.zero_grad()
    assert progress.micro_batch_size == 1 and loss == pytest.approx(loop.train_step(m, rows, 1, 0))
    assert all(map(torch.equal, found, (p.grad for p in m.parameters() if p.requires_grad)))


def test_out_of_memory_with_one_example_says_what_to_change(monkeypatch, tmp_path, tiny_llama):
    m, rows, run = adapted(tmp_path, tiny_llama, micro_batch_size=1)

    def no_memory(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(model, "loss", no_memory)
    with pytest.raises(ValueError, match="step 1: out of memory with 1 examples at a time; lower .*--grad-checkpoint"):
        loop.fit(m, rows, 0, run)


def test_other_errors_of_a_step_are_raised_unchanged(monkeypatch, tmp_path, tiny_llama):
    m, rows, run = adapted(tmp_path, tiny_llama)

    def broken(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(model, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        loop.fit(m, rows, 0, run)


def test_a_trained_tensor_that_gets_no_gradient_is_an_error(tmp_path, tiny_llama):
    m, rows, run = adapted(tmp_path, tiny_llama)
    m.forgotten = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="forgotten: expected a gradient, got none in 1 of "):
        loop.fit(m, rows, 0, run)


FAMILIES = {
    "llama": {"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 2},
    "gptj": {"model_type": "gptj", "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8,
             "n_positions": 64},
    "bert": {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 2},
}


def half(family, scale):
    """A random model in float16 whose feed-forward products grow with `scale`."""
    torch.manual_seed(0)
    m = model.build(FAMILIES[family], num_labels=2 if family == "bert" else None).to_empty(device="cpu")
    for n, p in m.named_parameters():
        torch.nn.init.normal_(p, std=scale if "mlp" in n and p.dim() > 1 else 0.1)
    rows = [batch.Row([1 + i, 2, 3, 4][:2 + i], i % 2, types=[0] * (2 + i)) if family == "bert" else
            batch.Row([1 + i, 2, 3, 4][:2 + i], [1 + i, 2, 3, 4][:2 + i]) for i in range(3)]
    return m.half(), rows


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_that_overflows_stops_the_run_and_spoils_no_weight(family, tmp_path):
    run = recipes.run_of(method="lora-sibo", lam=0.2, steps=20, batch_size=3, micro_batch_size=2, rank=4, warmup=0,
                         dtype="float16", out=str(tmp_path))
    m, rows = half(family, 1e4)
    sibo.inject(m, **vars(run.settings))
    with pytest.raises(ValueError, match="expected a finite loss and gradient, got none for 10 steps"):
        loop.fit(m, rows, 0, run)
    assert all(p.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_in_half_precision_makes_no_nan(family, tmp_path):
    run = recipes.run_of(method="lora-sibo", lam=0.2, steps=3, batch_size=3, micro_batch_size=3, rank=4, warmup=0,
                         dtype="float16", out=str(tmp_path))
    m, rows = half(family, 0.1)
    assert loop.fit(sibo.inject(m, **vars(run.settings)), rows, 0, run)["steps_skipped"] == 0
