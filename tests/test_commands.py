"""The README's commands as a user types them, on real weights and few steps: each script once in a process of its own,
then in this one, which has imported all it needs."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from safetensors import safe_open

from sibo_lab.data import download

ROOT = Path(__file__).parent.parent
DATA, TABLE = ("-m", "sibo_lab", "data"), ("-m", "sibo_lab", "table")
SHARED = ROOT.parent / "shared" / "data"
WRITTEN = {"config.json", "metrics.jsonl", "adapter.safetensors", "result.json", "answers.jsonl", "curves.png",
           "similarity.png"}
PROMISED = {"backbone", "method", "lambda", "task", "metric", "score", "baseline_score", "n", "trainable_parameters",
            "train_seconds", "tokens_per_second", "peak_memory_bytes", "similarity"}


def python(*args, cwd=ROOT):
    """Runs one of the project's commands in its own process; (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout, done.stderr


def here(*args, cwd=ROOT):
    """As `python`, in this process."""
    (script, *rest), code = map(str, args), 0
    run, argv = (runpy.run_module, rest) if script == "-m" else (runpy.run_path, [script, *rest])
    with (mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ), contextlib.chdir(cwd),
          contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err):
        try:
            run(argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def succeeds(*args, run=here, **kwargs):
    code, out, err = run(*args, **kwargs)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def llm_run(tmp_path_factory):
    """A short LoRA-SIBO run on SmolLM2 in float32, with its plain counterpart."""
    folder = tmp_path_factory.mktemp("runs") / "llm"
    out = succeeds("train.py", "--method", "lora-sibo", "--compare", "--steps", 3, "--batch-size", 2, "--limit", 4,
                   "--dtype", "float32", "--out", folder, run=python)
    return folder, out


@pytest.fixture(scope="module")
def bert_run(tmp_path_factory):
    """LoRA-SIBO on MiniLM for a made-up RTE: a pair is an entailment when its sentences share their colour."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "data" / "glue" / "RTE").mkdir(parents=True)
    colours = ["red", "green", "blue", "yellow"]
    rows = [f"{i}\tThe {a} house is {'old' * (i % 2) or 'new'}.\tIt is a {b} house.\t"
            f"{'entailment' if a == b else 'not_entailment'}"
            for i, (a, b) in enumerate([(a, b) for a in colours for b in [a, a, *colours]] * 4)]
    for name in ("train.tsv", "dev.tsv"):
        (folder / "data" / "glue" / "RTE" / name).write_text(
            "\n".join(["index\tsentence1\tsentence2\tlabel", *rows[:: 1 if name == "train.tsv" else 3]]) + "\n")
    code, _, err = here("train.py", "--backbone", "minilm", "--method", "lora-sibo", "--task", "rte", "--data-dir",
                        folder / "data", "--steps", 40, "--lr", "3e-3", "--out", folder / "run")
    assert code == 0, err
    return folder, err


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_and_its_plain_counterpart_leave_what_the_readme_promises(llm_run):
    folder, out = llm_run
    plain = folder.with_name("llm-plain")
    for run in (folder, plain):
        assert {p.name for p in run.iterdir() if p.name[0] != "."} == WRITTEN and set(result(run)) >= PROMISED
    assert (result(folder)["lambda"], result(plain)["lambda"], result(folder)["n"]) == (0.1, 0.0, 4)
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (folder, plain)]
    assert first[0]["loss"] == first[1]["loss"]  # B = 0: both start as the frozen model, on the same data
    head = out.splitlines()[0].split()
    assert head == ["before", "lora-sibo", "lora"]
    for line in ("accuracy", "scored on", "similarity, last five layers", "trainable parameters", "peak memory, GB"):
        assert any(row.startswith(line) for row in out.splitlines())
    with safe_open(folder / "adapter.safetensors", "pt") as f:
        assert json.loads(f.metadata()["sibo"])["lam"] == 0.1


def test_a_saved_run_scores_the_same_again_and_merged(llm_run):
    folder, _ = llm_run
    line = f"accuracy {result(folder)['score']:.4f} (n 4"
    assert succeeds("eval.py", folder, run=python).startswith(line)
    assert succeeds("eval.py", folder, "--merge").startswith(line)


def test_a_saved_run_answers_a_question_merged_or_not(llm_run):
    ask = ("--ask", "Tom has 3 boxes of 12 pens and loses 5 pens. How many pens does Tom have left?")
    answer = succeeds("eval.py", llm_run[0], *ask)
    assert answer.strip() and succeeds("eval.py", llm_run[0], *ask, "--merge") == answer


def test_bert_learns_a_small_task_and_scores_the_same_again_and_merged(bert_run):
    folder, _ = bert_run
    r = result(folder / "run")
    assert r["metric"] == "accuracy" and r["score"] > r["baseline_score"] + 0.2
    for args in ((), ("--merge",)):
        assert succeeds("eval.py", folder / "run", *args).startswith(f"accuracy {r['score']:.4f} (n {r['n']};")


def test_training_warns_of_test_questions_that_are_in_the_training_set_too(bert_run):
    folder, err = bert_run
    n = result(folder / "run")["n"]
    assert f"warning: {n} of rte's {n} test questions are in the training set too" in err


def test_the_data_command_lists_the_files_of_all_tasks(tmp_path):
    assert "glue/MNLI/dev_mismatched.tsv" in succeeds(*DATA, "list", "--data-dir", tmp_path)


def test_a_table_of_runs_is_the_same_by_either_command(llm_run, tmp_path):
    runs = llm_run[0].parent
    tables = [succeeds(*args, runs, "--out", tmp_path / "table.png") for args in (TABLE, ("eval.py", "--table"))]
    assert tables[0] == tables[1] and "lora-sibo" in tables[0] and (tmp_path / "table.png").is_file()


def test_a_run_is_exported_by_either_command(llm_run, tmp_path):
    folder = llm_run[0].with_name("llm-plain")  # its λ is 0: peft can load it
    succeeds("-m", "sibo_lab", "export", folder, "peft", tmp_path / "a" / "peft")
    succeeds("eval.py", folder, "--export", "peft", tmp_path / "b" / "peft")
    files = [{f.name: f.read_bytes() for f in (tmp_path / x / "peft").iterdir()} for x in "ab"]
    assert files[0] == files[1] and "adapter_config.json" in files[0]


def test_a_backbone_is_scored_without_a_run(tmp_path):
    assert "(n 3" in succeeds("eval.py", "--backbone", "smollm2-135m", "--task", "word-problems", "--limit", 3)


def test_similarity_of_a_backbone_is_drawn(tmp_path):
    out = succeeds(ROOT / "eval.py", "--backbone", "minilm", "--similarity", "--limit", 20, cwd=tmp_path)
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert len(out.split("last five")[0].split()) == 1 + 7  # its name and L+1 numbers


def test_a_users_own_jsonl_trains_and_scores(tmp_path, tiny_llama):
    words = "one two three four five six seven eight nine ten".split()
    rows = [{"instruction": f"Say {w}.", "output": w} for w in words]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = here("train.py", "--backbone", tiny_llama, "--task", tmp_path / "mine.jsonl", "--steps", 2,
                        "--bottleneck", 8, "--dtype", "float32", "--out", tmp_path / "run")
    assert code == 0 and result(tmp_path / "run")["n"] == 1
    assert "1 of its examples are left out of training and scored" in err
    mine = tmp_path / "mine.jsonl"
    assert "(n 10;" in succeeds("eval.py", "--backbone", tiny_llama, "--task", mine)
    both = succeeds("eval.py", "--backbone", tiny_llama, "--task", f"{mine},word-problems", "--limit", 2)
    assert f"{mine}: " in both and "\nword-problems: " in both and both.count("(n 2;") == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data files are not beside the project")
def test_real_rte_trains_and_scores(tmp_path):
    succeeds("train.py", "--backbone", "minilm", "--method", "lora-sibo", "--task", "rte", "--data-dir", SHARED,
             "--steps", 2, "--limit", 32, "--out", tmp_path / "run")
    assert result(tmp_path / "run")["n"] == 32


def test_a_reader_that_closes_the_pipe_early_is_no_error():
    p = subprocess.Popen([sys.executable, *DATA, "list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert (p.stderr.read(), p.wait()) == (b"", 128 + signal.SIGPIPE)
    p.stderr.close()


@pytest.mark.parametrize(("args", "says"), [
    (["train.py", "--lam", "2"], "--lam: expected in [0, 1), got 2.0"),
    (["eval.py"], "one of the arguments run --backbone --table is required; see python eval.py --help"),
    (["eval.py", "no-such-run"], "no-such-run: expected a run folder that train.py wrote, got no such folder"),
    (["eval.py", "--backbone", "minilm", "--ask", "How many?"], "minilm: expected a trained classifier head, got none"),
    (["eval.py", "--backbone", "minilm", "--similarity", "--task", "word-problems,word-problems"], "expected one task"),
    (["-m", "sibo_lab"], "expected python -m sibo_lab data|study|bench|export|table, got "),
    (["-m", "sibo_lab", "export", "runs/a", "hf"], "expected python -m sibo_lab export RUN hf|peft|gguf PLACE"),
    (["-m", "sibo_lab", "date"], "expected python -m sibo_lab data|study|bench|export|table, got date"),
    ([*DATA, "fetch", "gsm9k"], "unknown task 'gsm9k'; did you mean gsm8k"),
])
def test_bad_input_ends_in_one_line_and_exit_code_2(args, says):
    code, out, err = here(*args)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and says in err


def test_without_network_each_address_has_a_line_and_the_place_of_a_copy(tmp_path):
    code, out, err = here(*DATA, "fetch", "cola", "mrpc", "svamp", "--data-dir", tmp_path, "--offline")
    *lines, last = err.splitlines()
    expected = {"glue/CoLA.zip": "dl.fbaipublicfiles.com/glue/data/CoLA.zip",
                "glue/MRPC/msr_paraphrase_train.txt": download.address("glue/MRPC/train.tsv"),
                "llm_adapters/SVAMP/test.json": download.address("llm_adapters/SVAMP/test.json"),
                download.MRPC_IDS: download.address(download.MRPC_IDS)}
    assert expected["llm_adapters/SVAMP/test.json"].endswith("/dataset/SVAMP/test.json")
    assert (code, out) == (2, "") and lines == [f"missing: {tmp_path / place}, a copy of https://{there}"
                                                for place, there in expected.items()]
    assert "--offline" in last and not list(tmp_path.iterdir())
    (tmp_path / "glue" / "MRPC").mkdir(parents=True)
    (tmp_path / "glue" / "MRPC" / "msr_paraphrase_train.txt").write_text("brought by hand")
    again = here(*DATA, "fetch", "cola", "mrpc", "svamp", "--data-dir", tmp_path, "--offline")[2].splitlines()
    assert again == [line for line in (*lines, last) if "msr_paraphrase" not in line]


def test_a_command_runs_without_an_output():
    command = ["sh", "-c", 'exec "$0" -m sibo_lab data list >&-', sys.executable]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).returncode == 0
