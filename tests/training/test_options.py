"""options.py: what is wrong with an option is one line, before anything is fetched; lists make a grid."""

from dataclasses import fields
from itertools import islice

import pytest
from run_train import run_train

from sibo_lab.data import batch, tasks
from sibo_lab.settings import Settings
from sibo_lab.training import options, recipes


@pytest.mark.parametrize(("args", "says"), [
    (["--method", "adapter-sib"], "did you mean adapter-sibo"),
    (["--backbone", "smolm2-135m"], "did you mean smollm2-135m"),
    (["--task", "gsm8"], "did you mean gsm8k"),
    (["--lam", "1"], "--lam: expected in [0, 1), got 1.0"),
    (["--lam", "-0.1"], "--lam: expected in [0, 1), got -0.1"),
    (["--lam", "nan"], "--lam: expected in [0, 1), got nan"),
    (["--lam", "0", "--learn-lam"], "--lam: expected above 0 with --learn-lam"),
    (["--method", "lora", "--lam", "0.3"], "--lam: expected a method that uses it, got --method lora"),
    (["--method", "full", "--dtype", "bfloat16"], "--dtype bfloat16: expected float32 with --method full"),
    (["--rank", "8"], "--rank: expected a method that uses it, got --method adapter-sibo"),
    (["--method", "lora", "--rank", "0"], "--rank: expected at least 1, got 0"),
    (["--method", "lora", "--dropout", "1e-7"], "--dropout: expected 0 or at least 1e-6"),
    (["--bottleneck", "-3"], "--bottleneck: expected at least 1, got -3"),
    (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
    (["--steps", "0"], "--steps: expected at least 1, got 0"),
    (["--steps", "5", "--epochs", "1"], "--steps, --epochs: expected one of them, got both"),
    (["--lr", "inf"], "--lr: expected above 0, got inf"),
    (["--lr", "abc"], "invalid float value: 'abc'"),
    (["--warmup", "nan"], "--warmup: expected at least 0, got nan"),
    (["--limit", "0"], "--limit: expected at least 1, got 0"),
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["--task", "gsm8k", "--data-dir", "nowhere"], "nowhere"),
    (["--task", "svamp"], "svamp has no training file"),
    (["--task", "missing.json"], "missing.json"),
    (["--device", "cuda:99"], "got cuda:99"),
    (["--stochastic-depth", "1"], "--stochastic-depth: expected below 1, got 1.0"),
    (["--similarity-loss", "0.1"], "--similarity-loss: expected a GLUE task, with a BERT, got word-problems"),
    (["--similarity-loss", "0.1", "--grad-checkpoint"], "--similarity-loss: expected no --grad-checkpoint"),
    (["--task", "cola", "--score-by", "loss"], "--score-by loss: expected a text-to-text task, got cola"),
    (["--epochs", "3"], "--epochs: expected --steps with word-problems, which are made as they are needed, got 3.0"),
    (["--task", "mawps", "--test", "svamp", "--score-on", "validation"],
     "--test: expected none with --score-on validation, which scores what is held out of --task's training set, got"),
    (["--lam", "0.6", "--lam-by-depth", "rising"], "--lam: expected below 0.5 to go up to twice that, rising, got 0.6"),
])
def test_bad_options_end_in_one_line_and_code_2_before_anything_is_fetched(monkeypatch, capsys, tmp_path, args, says):
    monkeypatch.setenv("SIBO_CACHE", str(tmp_path / "cache"))
    code, out, err = run_train(monkeypatch, capsys, "--out", tmp_path / "run", *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("args", "says"), [
    (["--task", "rte"], "expected a BERT, such as minilm"),
    (["--targets", "q_porj", "--method", "lora-sibo"], "did you mean q_proj"),
    (["--targets", "down_proj", "--method", "lora-sibo"], "reads inputs 64 wide, where h0 is 32"),
    (["--sibo-at", "attn"], "sibo_at 'attn': expected some of the adapted ['mlp'], got []"),
    (["--task", "rte", "--protocol", "paper"], "--protocol paper: expected a text-to-text task"),
])
def test_options_that_do_not_fit_the_model_are_named(monkeypatch, capsys, tiny_llama, tiny_bert, tmp_path, args, says):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "glue" / "RTE").mkdir(parents=True, exist_ok=True)
        (tmp_path / "glue" / "RTE" / name).write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    code, _, err = run_train(monkeypatch, capsys, "--backbone", tiny_llama, "--data-dir", tmp_path, "--steps", "1",
                           "--limit", "1", "--out", tmp_path / "run", *args)
    assert code == 2 and says in err.splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_help_names_every_option_with_its_default(monkeypatch, capsys):
    code, out, _ = run_train(monkeypatch, capsys, "--help")
    names = {f.name for f in (*fields(recipes.Run), *fields(Settings))} - {"settings", "h0", "modules_to_save"}
    assert code == 0 and all(f"--{name.replace('_', '-')} " in out for name in names)
    text = " ".join(out.split())
    assert "LoRA's rank (default: 32; bert glue 8)" in text
    assert "examples per step (default: 16; word-problems 4; bert glue 32)" in text


def test_lists_of_options_make_every_combination_once_and_only_where_a_method_uses_them():
    args = options.parser().parse_args(["--method", "lora,lora-sibo", "--lam", "0.1,0.2", "--seeds", "0,1"])
    found = [(one.method, one.lam, one.seed) for one in options.grid(args)]
    assert found == [("lora", None, 0), ("lora", None, 1), ("lora-sibo", 0.1, 0), ("lora-sibo", 0.1, 1),
                     ("lora-sibo", 0.2, 0), ("lora-sibo", 0.2, 1)]
    with pytest.raises(ValueError, match="--lam: expected a method that uses it, got --method lora,adapter"):
        options.grid(options.parser().parse_args(["--method", "lora,adapter", "--lam", "0.1"]))


def test_a_run_names_its_files_so_that_they_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args, = options.grid(options.parser().parse_args(["--task", "a.json", "--test", "b.csv,gsm8k+mawps"]))
    args.protocol = "clean"
    run = options.resolve(args, "llama", tasks.task("a.json"), [])
    assert (run.task, run.test) == (str(tmp_path / "a.json"), (str(tmp_path / "b.csv"), "gsm8k+mawps"))


def resolved(*given, questions, times=1, task="gsm8k"):
    args = options.parser().parse_args(["--task", task, *given])
    one, = options.grid(args)
    one.protocol = "clean"
    train = [tasks.Example(f"Question {i}?", "Yes.") for i in range(questions)] * times
    return options.resolve(one, "llama", tasks.task(task), train)


@pytest.mark.parametrize("times", [1, 3])
def test_by_default_at_most_a_tenth_of_the_questions_is_held_out_and_what_is_asked_for_otherwise(times):
    found = [resolved(questions=n, times=times).validate for n in (5, 300, 1199, 1473)]
    assert found == [1, 30, 119, 120]
    for n in (0, 30, 120, 299):
        assert resolved("--validate", str(n), questions=300, times=times).validate == n
    assert resolved(questions=300, task="word-problems").validate == 0  # as its recipe says


def test_an_epoch_is_what_is_not_held_out():
    run = resolved("--epochs", "2", "--batch-size", "4", "--validate", "40", questions=100, times=3)
    assert run.steps == 2 * 60 * 3 / 4


@pytest.mark.parametrize("rows", [17, 20, 32])
def test_epochs_are_whole_passes_when_the_last_batch_is_smaller_too(rows):
    run = resolved("--epochs", "3", "--batch-size", "16", "--validate", "0", questions=rows)
    drawn = islice(batch.batches([1] * rows, 16, 0), run.steps)
    assert sorted(i for picked in drawn for i in picked) == sorted([*range(rows)] * 3)


@pytest.mark.parametrize(("given", "warmup"), [
    (("--steps", "2000"), 100), (("--steps", "999"), 0.1), (("--epochs", "3"), 0.1),
    (("--steps", "50", "--warmup", "90"), 90)])
def test_a_recipes_warmup_takes_at_most_a_tenth_of_the_steps(given, warmup):
    assert resolved(*given, questions=300).warmup == warmup
