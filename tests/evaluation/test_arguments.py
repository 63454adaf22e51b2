"""sibo_lab/evaluation/arguments.py: what a run fills in, and options that do not fit, refused in one line each."""

import json

import pytest

from sibo_lab.data import tasks
from sibo_lab.evaluation import arguments


@pytest.fixture
def complete(tmp_path, tiny_llama, tiny_bert):
    """Options, completed from a run on a tiny model; RUN stands for its folder."""
    def completed(*args, task="word-problems", **config):
        backbone = tiny_bert if tasks.parse(task)[0].num_labels else tiny_llama
        config = {"task": task, "backbone": str(backbone), "method": "lora", "data_dir": str(tmp_path)} | config
        (tmp_path / "config.json").write_text(json.dumps(config))
        args = arguments.parser().parse_args([str(tmp_path) if a == "RUN" else str(a) for a in args])
        arguments.complete(args)
        return args

    return completed


def test_a_run_says_what_the_options_leave_open(complete, tiny_llama):
    args = complete("RUN", task="mawps", test=["gsm8k", "svamp"], protocol="paper", limit=5, dtype="bfloat16")
    assert [t.name for t in args.tests] == ["gsm8k", "svamp"]
    assert (args.backbone, args.path, args.head) == (str(tiny_llama), tiny_llama, 0)
    assert (args.protocol, args.limit, str(args.dtype)) == ("paper", 5, "torch.bfloat16")
    args = complete("RUN", "--task", "mawps,aqua", "--protocol", "clean", "--dtype", "float32", protocol="paper",
                    limit=5)
    assert [t.name for t in args.tests] == ["mawps", "aqua"] and args.limit is None  # the run's limit is its own tasks'
    assert (args.protocol, str(args.dtype)) == ("clean", "torch.float32")
    assert complete("RUN", "--limit", 3, limit=5).limit == 3
    assert complete("RUN", task="rte").head == 2


@pytest.mark.parametrize("option", [("--protocol", "paper"), ("--num-beams", 4)])
def test_a_classifier_has_neither_prompt_nor_beams(complete, option):
    with pytest.raises(ValueError, match="--protocol, --num-beams: expected a text-to-text task, got rte"):
        complete("RUN", *option, task="rte")


@pytest.mark.parametrize(("args", "says"), [
    ((), "one of the arguments run --backbone --table is required"),
    (("RUN", "--backbone", "minilm"), "argument --backbone: not allowed with argument run"),
    (("no-such-run",), "no-such-run: expected a run folder that train.py wrote, got no such folder"),
    (("RUN", "--limit", 0), "argument --limit: expected at least 1, got 0"),
    (("RUN", "--batch-size", -1), "argument --batch-size: expected at least 1, got -1"),
    (("RUN", "--num-beams", "x"), "argument --num-beams: invalid .* value: 'x'"),
    (("RUN", "--save", "FILE"), "--save FILE: expected --table DIR, got none"),
    (("RUN", "--markdown"), "--markdown: expected --table DIR, got none"),
    (("RUN", "--peft", "DIR"), "--peft DIR: expected --backbone, got a run"),
    (("RUN", "--similarity", "--task", "mawps,aqua"), "--similarity: expected one task, got --task mawps,aqua"),
    (("RUN", "--similarity", "--compile"), "--compile: expected an LLM that answers questions, got --similarity"),
    (("RUN", "--task", "rte"), "expected a run that can answer rte, got one on word-problems"),
    (("RUN", "--export", "onnx", "DIR"), "--export onnx: expected hf, peft or gguf, got onnx"),
    (("RUN", "--export", "peft", "DIR", "--merge"), "--export peft: expected --merge with hf only, got peft"),
    (("--backbone", "minilm", "--export", "hf", "DIR"), "--export hf: expected a run, got minilm alone"),
    (("RUN", "--ignore-columns", "id"), "--ignore-columns id: expected a file of your own, got word-problems"),
    (("--backbone", "minilm"), "minilm: expected a trained classifier head, got none; name a run"),
    (("--backbone", "minilm", "--ask", "How many?"), "minilm: expected a trained classifier head, got none"),
    (("--backbone", "smollm2-135m", "--task", "rte"), "smollm2-135m: expected a trained classifier head, got none"),
])
def test_options_that_do_not_fit_are_refused(complete, args, says):
    with pytest.raises((ValueError, OSError), match=says):
        complete(*args)


def test_a_classifier_cannot_be_asked_nor_scored_on_another_kind_of_task(complete):
    with pytest.raises(ValueError, match="--ask: expected an LLM's run, got .*, a BERT on rte"):
        complete("RUN", "--ask", "How many?", task="rte")
    with pytest.raises(ValueError, match="expected a run that can answer stsb, got one on rte"):
        complete("RUN", "--task", "stsb", task="rte")
    with pytest.raises(ValueError, match="expected a run that can answer mawps, got one on rte"):
        complete("RUN", "--task", "mawps", task="rte")


def test_what_cannot_be_exported_is_refused_before_weights_are_read(complete):
    for changes, options, got in (
            ({"base_bits": 8}, ("hf",), "weights of 16 bits or wider, got 8; train without --base-bits"),
            ({"method": "adapter"}, ("peft",), "a plain LoRA, got adapters, which peft has no place for; use hf"),
            ({"method": "adapter-sibo"}, ("gguf",), "a plain LoRA, got adapters, which llama.cpp has no place for"),
            ({"method": "lora-sibo", "lam": 0.3}, ("gguf", "--merge"), "λ = 0, got λ = 0.3, and llama.cpp has no h0"),
            ({"method": "adapter"}, ("hf", "--merge"), "--merge with LoRA, got adapters, whose tanh does not fold")):
        with pytest.raises(ValueError, match=f"--export {options[0]}: expected {got}"):
            complete("RUN", "--export", options[0], "DIR", *options[1:], **changes)
