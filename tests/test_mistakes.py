"""Mistakes that would silently change a result are errors: another backbone or tokenizer, nothing to learn."""

import itertools
import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import model
import sibo
import train
from sibo_lab import cli
from sibo_lab.backbone import generate, tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import scoring
from sibo_lab.training import options, recipes


def refused(monkeypatch, capsys, *args, command=train):
    """The one line of a command that must fail."""
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, args)])
    with pytest.raises(SystemExit) as e:
        cli.run(command.main, command.parser())
    assert e.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------- another backbone


@pytest.fixture
def saved(tmp_path, tiny_llama):
    sibo.save(sibo.inject(model.from_pretrained(tiny_llama), "lora", 0.2, rank=4), tmp_path / "run")
    return tmp_path / "run"


def copied(tiny_llama, folder, change_config=None, change=None):
    """tiny_llama with another setting, or with another tensor."""
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (change_config or {})))
    tensors = load_file(folder / "model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_adapter_for_other_weights_is_refused(saved, tiny_llama, tmp_path):
    def elsewhere(tensors):
        tensors["model.embed_tokens.weight"] += 0.01

    other = copied(tiny_llama, tmp_path / "other", change=elsewhere)
    with pytest.raises(ValueError, match="another backbone: expected other values in embed.weight"):
        sibo.load(model.from_pretrained(other), saved)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-4}, {"rope_theta": 5e5, "rope_parameters": None}])
def test_an_adapter_for_other_settings_is_refused(saved, tiny_llama, tmp_path, change):
    other = copied(tiny_llama, tmp_path / "other", change)
    with pytest.raises(ValueError, match=f"another backbone: expected {next(iter(change))} .*, got "):
        sibo.load(model.from_pretrained(other), saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_backbone_in_another_precision_is_the_same(saved, tiny_llama, dtype):
    m = sibo.load(model.from_pretrained(tiny_llama, dtype), saved)
    assert m.sibo.rank == 4


def test_the_same_backbone_in_4_bits_is_the_same(saved, tiny_llama):
    assert sibo.load(model.from_pretrained(tiny_llama, base_bits=4), saved).sibo.rank == 4


def test_an_adapter_on_transformers_own_model_knows_it_too(tmp_path, tiny_llama):
    from transformers import LlamaForCausalLM

    sibo.save(sibo.inject(LlamaForCausalLM.from_pretrained(tiny_llama), "lora", 0.2, rank=4), tmp_path)
    sibo.load(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path)
    other = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.001)
    with pytest.raises(ValueError, match="another backbone"):
        sibo.load(other, tmp_path)
    assert not hasattr(other, "sibo") and all(p.requires_grad for p in other.parameters())  # refused, untouched


def test_an_adapter_of_another_rank_than_its_settings_say_is_refused(saved, tiny_llama):
    file = saved / "adapter.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    settings = json.loads(metadata["sibo"]) | {"rank": 2}
    save_file(load_file(file), file, metadata | {"sibo": json.dumps(settings)})
    with pytest.raises(ValueError, match=r"adapter.safetensors: tensor .*: expected \(2, 32\), got \(4, 32\)"):
        sibo.load(model.from_pretrained(tiny_llama), saved)


# ---------------------------------------------------------------------------------------------------- another tokenizer


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tiny_llama, monkeypatch, capsys, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "larger")
    vocab = json.loads((tmp_path / "larger" / "vocab.json").read_text())
    (tmp_path / "larger" / "vocab.json").write_text(json.dumps(vocab | {"extra": 257}))
    line = refused(monkeypatch, capsys, "--backbone", tmp_path / "larger", "--steps", 1, "--out", tmp_path / "run")
    assert "expected a tokenizer of at most 257 ids, as there are embeddings, got 258" in line
    with pytest.raises(ValueError, match="got 258"):
        tokenizer.for_model(tmp_path / "larger", 257)
    assert tokenizer.for_model(tmp_path / "larger", 320).vocab_size == 258  # embeddings are often padded


def test_a_tokenizer_without_the_token_that_ends_an_answer_is_refused(tiny_bert):
    with pytest.raises(ValueError, match="expected the tokenizer to have a token for eos, got none; name it in"):
        tokenizer.for_model(tiny_bert, 30522, "pad", "eos")


# ----------------------------------------------------------------------------------------------------- nothing to learn


def own(tmp_path, words):
    rows = [{"instruction": f"{i}. " + "Say it. " * n, "output": "yes"} for i, n in enumerate(words)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    return tmp_path / "mine.json"


def test_a_cutoff_that_leaves_no_answer_is_an_error(monkeypatch, capsys, tmp_path, tiny_llama):
    line = refused(monkeypatch, capsys, "--backbone", tiny_llama, "--task", own(tmp_path, [9] * 10), "--validate", 0,
                   "--no-train-on-inputs", "--cutoff", 32, "--steps", 1, "--out", tmp_path / "run")
    assert "--cutoff 32: expected labelled tokens in the 9 training examples, got none" in line


def test_a_cutoff_that_leaves_no_answer_to_validate_on_is_an_error(monkeypatch, capsys, tmp_path, tiny_llama):
    for i in itertools.count():  # until the long question, the last, is the one held out
        task = own(tmp_path, [1] * (20 + i) + [60])
        rows = readers.load(tasks.task(str(task)), "train", tmp_path)
        if [len(row.instruction) > 400 for row in readers.hold_out(rows, 1)[1]] == [True]:
            break
    line = refused(monkeypatch, capsys, "--backbone", tiny_llama, "--task", task, "--validate", 1,
                   "--no-train-on-inputs", "--cutoff", 250, "--steps", 1, "--out", tmp_path / "run")
    assert "--cutoff 250: expected labelled tokens in the 1 validation examples, got none" in line


def test_examples_that_lose_their_whole_answer_are_counted_and_reported(monkeypatch, capsys, tmp_path, tiny_llama):
    task = own(tmp_path, [1] * 10 + [60] * 10)
    monkeypatch.setattr(sys, "argv", ["train.py", "--backbone", str(tiny_llama), "--task", str(task), "--validate", "0",
                                      "--no-train-on-inputs", "--cutoff", "250", "--steps", "2", "--batch-size", "18",
                                      "--limit", "1", "--dtype", "float32", "--out", str(tmp_path / "run")])
    cli.run(train.main, options.parser())
    counted = json.loads((tmp_path / "run" / "result.json").read_text())["examples_without_label"]
    assert counted in (8, 9, 10)  # two of the twenty are held out
    assert f"{counted} of 18 training examples are left without a label" in capsys.readouterr().err


def test_nothing_is_measured_with_dropout_on(tiny_llama, tiny_bert):
    llama, bert = model.from_pretrained(tiny_llama).train(), model.from_pretrained(tiny_bert, num_labels=2).train()
    t, ids = tokenizer.from_pretrained(tiny_llama), torch.tensor([[1, 2, 3]])
    rows = [batch.Row([1, 2, 3], 0, types=[0, 0, 0])]
    for work in (lambda: generate.generate(llama, ids), lambda: scoring.likelihoods(llama, t, ["a"], [["b"]]),
                 lambda: scoring.score_sentences(bert, tokenizer.from_pretrained(tiny_bert), tasks.task("rte"), rows),
                 lambda: evaluation.layer_similarities(llama, [batch.Row([1, 2, 3])], 0)):
        with pytest.raises(ValueError, match=r"expected eval mode, got training mode \(.*\); call m.eval\(\)"):
            work()


# ----------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("method", recipes.METHODS)
def test_the_same_command_gives_the_same_adapter_and_the_same_answers(method, tmp_path, monkeypatch, tiny_llama):
    found = []
    for name in ("a", "b"):
        sizes = {"lora": ["--rank", "4"], "adapter": ["--bottleneck", "4"], "full": []}[method.removesuffix("-sibo")]
        learned = ["--learn-lam"] if "sibo" in method else []
        monkeypatch.setattr(sys, "argv", ["train.py", "--backbone", str(tiny_llama), "--method", method, "--steps", "3",
                                          "--batch-size", "4", "--limit", "2", "--seed", "3", "--out",
                                          str(tmp_path / name), *sizes, *learned])
        torch.manual_seed(len(found))  # whatever was drawn before
        cli.run(train.main, options.parser())
        found.append([(tmp_path / name / f).read_bytes() for f in ("adapter.safetensors", "answers.jsonl")])
        result = json.loads((tmp_path / name / "result.json").read_text())
        found[-1] += [result["score"], result["similarity_per_layer"], result["sha256"]]
    assert found[0] == found[1]
    assert {"command", "date", "versions", "git"} <= result.keys() and len(result["sha256"]["train"]) == 64
