"""Conversations through the commands: train.py, eval.py and `data show` speak one template, the backbone's own."""

import json
import shutil

import pytest
import transformers
from run_train import run_train

import eval as evaluation
from sibo_lab import cli
from sibo_lab.backbone import chat_template, tokenizer
from sibo_lab.data import batch, commands, readers, tasks
from sibo_lab.evaluation import scoring
from sibo_lab.training import recipes

TEMPLATE = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")


@pytest.fixture(scope="module")
def backbone(tiny_llama, tmp_path_factory):
    """tiny_llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of conversations."""
    file = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "one"},
                          {"role": "user", "content": "And?"}, {"role": "assistant", "content": f"So {i}."}]}
            for i in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(monkeypatch, capsys, backbone, task, out, *args):
    return run_train(monkeypatch, capsys, "--backbone", backbone, "--task", task, "--steps", 1, "--batch-size", 2,
                     "--dtype", "float32", "--validate", 0, "--limit", 2, "--out", out, *args)


def command(module, *args):
    cli.run(module.main, module.parser(), list(map(str, args)))


def test_a_run_on_conversations_is_trained_saved_scored_and_asked_in_the_backbones_template(
        monkeypatch, capsys, tmp_path, backbone, chats):
    asked, learned, scored, encode = [], [], [], batch.encode

    def encoded(e, t, cutoff, *args, **more):
        found = scored if cutoff > 10_000 else learned  # no cutoff where an answer's loss is scored
        found.append(encode(e, t, cutoff, *args, **more))
        return found[-1]

    def answers(m, t, prompts, *_):
        asked.append((t.eos_id, *prompts))
        return ["1"] * len(prompts)

    monkeypatch.setattr(scoring, "responses", answers)
    monkeypatch.setattr(batch, "encode", encoded)
    code, _, err = run(monkeypatch, capsys, backbone, chats, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (code, config["protocol"], config["train_on_inputs"]) == (0, "chat", False)
    t = tokenizer.from_pretrained(backbone)
    assert len(learned) == 27 and {t.decode([i for i in row.labels if i != -100])[:6] for row in learned} == {"oneSo "}
    assert len(scored) == 4 and {t.decode([i for i in row.labels if i != -100])[:6] for row in scored} == {"oneSo "}
    test = readers.load(tasks.task(str(chats)), "test", tmp_path, 2)
    prompts = [f"[user]{x.given[0][1]}<|endoftext|>[assistant]one<|endoftext|>[user]And?<|endoftext|>[assistant]"
               for x in test]
    assert asked == [(t.eos_id, *prompts)] * 2
    command(evaluation, tmp_path / "run")
    command(evaluation, tmp_path / "run", "--ask", "Why?")
    assert asked[2:] == [(t.eos_id, *prompts), (t.eos_id, "[user]Why?<|endoftext|>[assistant]")]


def test_an_export_of_a_run_on_conversations_stops_at_the_end_of_a_turn(monkeypatch, capsys, tmp_path, backbone, chats):
    shutil.copytree(backbone, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE.replace("eos_token", "'~'"))
    (tmp_path / "base" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "extra_special_tokens": ["~"]}))
    run(monkeypatch, capsys, tmp_path / "base", chats, tmp_path / "run")
    command(evaluation, tmp_path / "run", "--export", "hf", tmp_path / "hf")
    t = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    said = transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert said[:2] == t.convert_tokens_to_ids(["~", "<|endoftext|>"])


@pytest.mark.parametrize(("option", "expected"), [((), False), (("--train-on-inputs",), True)])
def test_the_loss_counts_the_prompt_only_if_asked_to(monkeypatch, capsys, tmp_path, backbone, chats, option, expected):
    run(monkeypatch, capsys, backbone, chats, tmp_path / "run", *option, "--score-on", "validation", "--validate", 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train_on_inputs"] is expected


def test_a_plain_task_is_one_users_turn_in_the_chat_protocol(monkeypatch, capsys, tmp_path, backbone):
    asked = []
    monkeypatch.setattr(scoring, "responses", lambda m, t, prompts, *_: asked.extend(prompts) or ["1"] * len(prompts))
    command(evaluation, "--backbone", backbone, "--limit", 1, "--protocol", "chat")
    question = readers.load(tasks.task("word-problems"), "test", tmp_path, 1)[0].instruction
    assert asked == [f"[user]{question}<|endoftext|>[assistant]"]


def test_choices_and_similarity_are_read_after_the_templates_prompt(tiny_llama, backbone):
    import model

    m, t = model.from_pretrained(tiny_llama), chat_template.Chat(backbone, tokenizer.from_pretrained(backbone))
    examples = [tasks.Example("q", answer="a", choices=("a", "b"))]
    (row,) = evaluation.similarity_rows(m, t, examples, protocol="chat")
    assert row.ids == t.encode("[user]q<|endoftext|>[assistant]")
    found = scoring.score_examples(m, t, tasks.task("boolq"), examples, protocol="chat").records[0]
    written = scoring.likelihoods(m, t, ["[user]q<|endoftext|>[assistant]"],
                                  [["the correct answer is a", "the correct answer is b"]])[0]
    assert found["likelihood"] == "ab"[max((0, 1), key=lambda i: sum(written[i]))]


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_a_protocol_without_a_place_for_turns_is_refused(monkeypatch, capsys, tmp_path, backbone, chats, protocol):
    code, _, err = run(monkeypatch, capsys, backbone, chats, tmp_path / "run", "--protocol", protocol)
    assert code == 2 and not (tmp_path / "run").exists()
    assert err.splitlines()[-1].startswith(f"error: --protocol {protocol}: expected rows of a question and its answer")
    with pytest.raises(SystemExit):
        command(evaluation, "--backbone", backbone, "--task", chats, "--protocol", protocol)
    assert f"--protocol {protocol}: expected rows" in capsys.readouterr().err


def test_conversations_need_a_template_and_a_model_that_writes(
        monkeypatch, capsys, tmp_path, tiny_llama, tiny_bert, chats):
    for where, says in ((tiny_llama, "expected a chat template"), (tiny_bert, "expected an LLM, such as smollm2-135m")):
        code, _, err = run(monkeypatch, capsys, where, chats, tmp_path / "run")
        assert code == 2 and says in err.splitlines()[-1] and not (tmp_path / "run").exists()
    code, _, err = run(monkeypatch, capsys, tiny_bert, "cola", tmp_path / "run", "--protocol", "chat")
    assert code == 2 and "--protocol chat: expected a text-to-text task" in err


def test_columns_are_refused_by_name_until_they_are_ignored_and_the_run_keeps_that(
        monkeypatch, capsys, tmp_path, backbone):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"instruction": f"{i}?", "context": "c", "output": "a"} for i in range(20)]))
    code, _, err = run(monkeypatch, capsys, backbone, file, tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1) and "nothing would use context" in err
    assert err.endswith("--ignore-columns context\n")
    assert not (tmp_path / "run").exists()
    assert run(monkeypatch, capsys, backbone, file, tmp_path / "run", "--ignore-columns", "context")[0] == 0
    command(evaluation, tmp_path / "run")
    assert "accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(evaluation, "--backbone", backbone, "--task", file)
    assert "nothing would use context" in capsys.readouterr().err
    command(evaluation, "--backbone", backbone, "--task", file, "--ignore-columns", "context", "--limit", 1)


def test_what_the_cutoff_takes_from_conversations_is_counted(monkeypatch, capsys, tmp_path, backbone, chats):
    _, _, err = run(monkeypatch, capsys, backbone, chats, tmp_path / "run", "--cutoff", 50)
    assert "27 of 27 training examples are cut off at 50 tokens" in err


# ------------------------------------------------------------------------------------------------------------ data show
def test_show_prints_a_files_first_rows_with_what_the_loss_does_not_count(capsys, backbone, chats):
    command(commands, "show", chats, "--backbone", backbone, "--rows", 2, "--cutoff", 90)
    first, second, last = capsys.readouterr().out.replace("<|endoftext|>", "/").split("--- ")[1:]
    assert first == "1: 52 tokens, the loss counts 10\n⟦[user]0?/[assistant]⟧one/⟦[user]And?/[assistant]⟧So 0./\n"
    assert second.startswith("2: ") and "1?" in second
    assert last.endswith(f"for {backbone}, protocol chat; no loss on what is in ⟦ ⟧\n")
    command(commands, "show", chats, "--backbone", backbone, "--rows", 1, "--cutoff", 40, "--train-on-inputs")
    out = capsys.readouterr().out
    assert out.startswith("--- 1: 40 tokens, the loss counts 39, cut off at 40\n[user]0?") and out.count("⟦") == 1


def test_show_writes_special_tokens_and_tasks_of_every_kind(tmp_path, capsys, tiny_bert, backbone):
    command(commands, "show", "word-problems", "--backbone", backbone, "--rows", 1, "--cutoff", 999)
    out = capsys.readouterr().out
    assert "\n⟦Below is an instruction" in out and "### Response:\n⟧" in out and "<|endoftext|>\n--- word-pro" in out
    (tmp_path / "glue/RTE").mkdir(parents=True)
    (tmp_path / "glue/RTE/train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    command(commands, "show", "rte", "--backbone", tiny_bert, "--data-dir", tmp_path)
    assert "--- 1: 5 tokens, label 0\n[CLS]a[SEP] b[SEP]\n" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "kind", "family"), [("rte", "glue", "bert"), ("mine.jsonl", "own", "llama")])
def test_show_cuts_where_training_cuts(tmp_path, capsys, tiny_bert, backbone, task, kind, family):
    (tmp_path / "glue/RTE").mkdir(parents=True)
    long = "a " * 600
    (tmp_path / "glue/RTE/train.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n0\t{long}\tb\tentailment\n")
    (tmp_path / "mine.jsonl").write_text(json.dumps({"question": "q", "answer": long}))
    of_run = recipes.run_of(**recipes.recipe(family, kind, "lora-sibo")).cutoff
    name = tmp_path / task if kind == "own" else task
    command(commands, "show", name, "--backbone", tiny_bert if kind == "glue" else backbone, "--data-dir", tmp_path)
    assert f"--- 1: {of_run} tokens, " in (out := capsys.readouterr().out) and f"cut off at {of_run}\n" in out


@pytest.mark.parametrize(("args", "says"), [
    (("rte", "--protocol", "chat"), "--protocol: expected a text-to-text task, got rte"),
    (("word-problems", "--rows", "0"), "expected at least 1 example"),
    (("missing.csv",), "missing.csv: no such file"),
    (("word-problems", "--protocol", "chat"), "expected a chat template"),
])
def test_show_refuses_in_one_line(capsys, tiny_llama, args, says):
    with pytest.raises(SystemExit) as e:
        command(commands, "show", *args, "--backbone", tiny_llama)
    out, err = capsys.readouterr()
    assert (e.value.code, out, err.count("\n")) == (2, "", 1) and says in err
