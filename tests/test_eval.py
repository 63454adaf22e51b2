"""eval.py: Eq. (3) against pencil and paper and against a double loop; the commands on runs of a tiny model."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import model
import sibo
import train
from sibo_lab import cli, export, fast
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import examples, metrics, scoring

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------------------ Eq. (3)


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
    with pytest.raises(ValueError, match="expected a sentence of two or more tokens, got none"):
        evaluation.similarity(torch.ones(2, 5, 3), torch.tensor([[1, 0, 0, 0, 0]] * 2))


# -------------------------------------------------------------------------------------------------------- the commands


def run(command, *args):
    cli.run(command.main, command.parser(), list(map(str, args)))


def test_a_run_in_the_papers_protocol_is_trained_saved_and_scored_in_it(monkeypatch, tmp_path, tiny_llama):
    asked, protocols, prompt = [], set(), batch.prompt

    def answers(m, t, prompts, most, batch_size, num_beams, name):
        asked.append((prompts[0], num_beams))
        return ["7"] * len(prompts)

    monkeypatch.setattr(scoring, "responses", answers)
    monkeypatch.setattr(batch, "prompt", lambda text, how="clean": protocols.add(how) or prompt(text, how))
    run(train, "--backbone", tiny_llama, "--protocol", "paper", "--steps", 1, "--limit", 3, "--train-on-inputs",
        "--dtype", "float32", "--out", tmp_path / "run")
    examples = readers.load(tasks.task("word-problems"), "test", None, 3)
    in_it = (batch.prompt(examples[0].instruction, "paper"), 4)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["protocol"] == "paper"
    assert asked == [in_it, in_it] and protocols == {"paper"}  # before and after; training and similarity
    for more, expected in (((), in_it), (("--num-beams", 2), (in_it[0], 2)),
                              (("--protocol", "clean"), (batch.prompt(examples[0].instruction), 1))):
        asked.clear()
        run(evaluation, tmp_path / "run", *more)
        assert asked == [expected]


def test_a_runs_answers_and_how_far_to_trust_its_score_are_saved(tmp_path, tiny_llama):
    run(train, "--backbone", tiny_llama, "--steps", 1, "--limit", 3, "--dtype", "float32", "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    examples = readers.load(tasks.task("word-problems"), "test", None, 3)
    assert [a["gold"] for a in answers] == [e.answer for e in examples]
    assert all(a.keys() == {"task", "gold", "response", "answer", "right", "loss", "tokens"} for a in answers)
    assert result["loss"] == pytest.approx(np.mean([a["loss"] for a in answers]))
    assert result["score"] == np.mean([a["right"] for a in answers])
    assert result["empty"] == np.mean([a["answer"] is None for a in answers])
    assert result["interval"] == list(metrics.wilson(result["score"], 3))
    assert result["answers_given"] == scoring.shares([a["answer"] for a in answers])


def test_a_run_scored_on_validation_is_scored_on_it_again(tmp_path, tiny_llama, capsys):
    rows = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(40)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    run(train, "--backbone", tiny_llama, "--task", tmp_path / "mine.json", "--score-on", "validation", "--validate", 15,
        "--score-by", "loss", "--steps", 1, "--batch-size", 2, "--dtype", "float32", "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["metric"], result["n"], result["score"]) == ("loss", 15, result["loss"])
    capsys.readouterr()
    run(evaluation, tmp_path / "run")
    out, err = capsys.readouterr()
    assert out.startswith(f"loss {result['loss']:.4f} (n 15;") and "training set" not in err
    run(evaluation, tmp_path / "run", "--score-by", "answers", "--limit", 4)
    out = capsys.readouterr().out
    assert out.startswith("accuracy ") and "(n 4;" in out and "loss per answer" in out
    run(evaluation, tmp_path / "run", "--task", tmp_path / "mine.json")  # its test set
    assert "(n 4;" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["score_by"], result["sha256"]  # an older run, which held out a tenth at most
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    run(evaluation, tmp_path / "run")
    assert "(n 3;" in capsys.readouterr().out


@pytest.mark.parametrize(("score_on", "protocol"), [("test", "clean"), ("validation", "clean"), ("validation", "chat")])
def test_what_a_run_learned_from_is_not_scored_as_if_it_had_been_left_out(tmp_path, tiny_llama, capsys, score_on,
                                                                          protocol):
    rows = [{"instruction": f"Say {i}.", "input": "please", "output": str(i)} for i in range(40)]
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    for path in (mine, other):
        path.write_text(json.dumps(rows))
    backbone = shutil.copytree(tiny_llama, tmp_path / "backbone")
    (backbone / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}")
    run(train, "--backbone", backbone, "--task", mine, "--score-on", score_on, "--validate", 5, "--score-by", "loss",
        "--protocol", protocol, "--steps", 1, "--batch-size", 2, "--limit", 2, "--dtype", "float32", "--out",
        tmp_path / "run")

    def refused(*more):
        with pytest.raises(SystemExit):
            run(evaluation, tmp_path / "run", *more)
        return capsys.readouterr().err.splitlines()[-1]

    for limit in (1, 2, 3):
        run(evaluation, tmp_path / "run", "--limit", limit)
    for more in (("--ignore-columns", "input"), ("--ignore-columns", "input", "--limit", 1), (
            "--ignore-columns", "input", "--task", mine)):
        assert "to score the " in (said := refused(*more)) and "that it left out of training" in said
    run(evaluation, tmp_path / "run", "--ignore-columns", "input", "--task", other, "--limit", 1)
    mine.write_text(json.dumps([row | {"input": "now"} for row in rows]))
    assert f"{tmp_path / 'run'}: expected " in refused()


@pytest.fixture
def learned_mine(tmp_path, tiny_llama, capsys):
    """The file that a run learned from, another with the same questions, and what eval.py says of the training set."""
    rows = [{"instruction": f"Say {i}.", "output": str(i), "id": i} for i in range(20)]
    mine, copy = tmp_path / "mine.json", tmp_path / "copy.json"
    mine.write_text(json.dumps(rows))
    copy.write_text(json.dumps([{"instruction": row["instruction"].upper(), "output": "x", "n": 1} for row in rows]))
    run(train, "--backbone", tiny_llama, "--task", mine, "--ignore-columns", "id", "--score-by", "loss", "--steps", 1,
        "--batch-size", 2, "--dtype", "float32", "--out", tmp_path / "run")

    def said(*more):
        capsys.readouterr()
        run(evaluation, tmp_path / "run", *more)
        return [line for line in capsys.readouterr().err.splitlines() if "training set" in line]

    return mine, copy, said


def test_test_questions_that_a_run_learned_from_are_counted(learned_mine):
    _, copy, said = learned_mine
    (line,) = said("--task", copy, "--ignore-columns", "n")
    assert line.startswith(f"warning: 18 of {copy}'s 20 test questions are in the training set too")
    assert said() == []  # of its own file what was left out


def test_a_training_file_that_is_lost_or_spoiled_is_no_obstacle_to_a_score(learned_mine):
    mine, copy, said = learned_mine
    mine.write_text("[{")
    (line,) = said("--task", copy, "--ignore-columns", "n")
    assert line.startswith(f"{copy}: not compared with the training set: {mine}, line 1: not valid JSON")
    mine.unlink()
    assert said("--task", copy, "--ignore-columns", "n") == []


@pytest.mark.parametrize("score_on", ["test", "validation"])
def test_the_similarity_of_a_run_is_drawn_on_the_texts_that_training_measured_it_on(tmp_path, tiny_llama, capsys,
                                                                                    score_on):
    rows = [{"instruction": "Say " + "0123456789"[i % 10] * i, "output": "x"} for i in range(40)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    run(train, "--backbone", tiny_llama, "--task", tmp_path / "mine.json", "--score-on", score_on, "--validate", 5,
        "--limit", 3, "--score-by", "loss", "--steps", 1, "--dtype", "float32", "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    capsys.readouterr()
    run(evaluation, tmp_path / "run", "--similarity")
    drawn = [line.split()[1:4] for line in capsys.readouterr().out.splitlines()[:2]]
    assert drawn == [[f"{x:.3f}" for x in result[f"{which}similarity_per_layer"]] for which in ("baseline_", "")]


def test_of_word_problems_in_a_mix_those_are_held_out_that_training_read(tmp_path):
    (tmp_path / tasks.MAWPS).parent.mkdir(parents=True)
    (tmp_path / tasks.MAWPS).write_text(json.dumps([{"original_text": f"q {i}", "equation": "x=1", "ans": 1}
                                                    for i in range(4000)]))
    mix = tasks.parse("word-problems+mawps")
    rows = [row for t in mix for row in readers.load(t, "train", tmp_path)]
    args = Namespace(config={"steps": 1, "batch_size": 2, "seed": 3, "score_by": "loss"}, trained=mix,
                     data_dir=tmp_path, limit=None, sha256={})
    found = examples.held_out(args, 9)
    assert [task.name for task, _ in found] == ["word-problems", "mawps"]
    assert {e.instruction for _, some in found for e in some} == {e.instruction for e in readers.hold_out(rows, 9)[1]}


def test_compiled_steps_give_the_same_answers(monkeypatch, tmp_path, tiny_llama, capsys):
    def compiled(m):
        for block in m.blocks:
            block.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr(fast, "compiled", compiled)
    scores, graphs = [], []
    for more in ((), ("--compile",)):
        assert not graphs
        run(evaluation, "--backbone", tiny_llama, "--limit", 3, *more)
        scores.append(capsys.readouterr().out)
    torch.compiler.set_stance("default")
    assert graphs and scores[0] == scores[1]


def test_the_similarity_of_a_peft_lora_is_drawn_beside_its_backbones(tmp_path, tiny_llama, capsys):
    m = sibo.inject(model.from_pretrained(tiny_llama), "lora", 0.0, rank=4)
    for p in m.parameters():
        if p.requires_grad:
            p.data.normal_()
    export.to_peft(m, tmp_path / "peft", str(tiny_llama))
    run(evaluation, "--backbone", tiny_llama, "--peft", tmp_path / "peft", "--similarity", "--limit", 3, "--out",
        tmp_path / "s.png")
    backbone, lora, out = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (backbone[0], lora[0], out) == (str(tiny_llama), "lora", [str(tmp_path / "s.png")])
    assert backbone[1] == lora[1] and backbone[2] != lora[2]  # the same h0, then another model
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_help_does_not_wait_for_libraries_that_only_pictures_or_the_hub_need():
    code = "import sys, eval; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"matplotlib", "huggingface_hub", "gguf", "transformers"} & set(done.stdout.split())
