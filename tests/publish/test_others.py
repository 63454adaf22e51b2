"""An exported model, scored by lm-evaluation-harness and asked through transformers: as eval.py does, one by one."""

import json
import re
import shutil
from itertools import takewhile
from types import SimpleNamespace

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small_models import inject, stir
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import model
from sibo_lab import cli
from sibo_lab.backbone import chat_template, generate, tokenizer
from sibo_lab.data import batch, commands, readers, tasks
from sibo_lab.evaluation import scoring
from sibo_lab.publish import folder

ENDS = {"boolq": ["true", "false"], "obqa": ["answer1", "answer2", "answer3", "answer4"]}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" \
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(form, at):
    """Its tokenizer.json in small: SmolLM2's form, Llama 3's, with ":" and a line feed in one token, and LLaMA's."""
    t = Tokenizer(models.BPE(byte_fallback=form == "llama", unk_token="<unk>" if form == "llama" else None))
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    if form == "llama":
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
        t.pre_tokenizer = pre_tokenizers.Sequence([  # no piece holds more than a word
            pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")])
        special, alphabet = [*special, *(f"<0x{i:02X}>" for i in range(256))], []
    else:
        split = [pre_tokenizers.Split(Regex(LLAMA3), "isolated")] if form == "llama3" else []
        t.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=not split)])
        t.decoder = decoders.ByteLevel()
    if form != "smollm2":
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    text = batch.prompt("is it so? so so: answer1, answer2, true or false") + tasks.LEAD
    t.train_from_iterator([text] * 3, trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if form == "llama":
        t.pre_tokenizer = None
    theirs = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")
    theirs.save_pretrained(at)
    return theirs


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    at = tmp_path_factory.mktemp("backbone")
    size = len(write_tokenizer("llama3", at))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(at)
    return at


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve questions of two tasks in the benchmarks' layout."""
    folder = tmp_path_factory.mktemp("data")
    for name, choices in ENDS.items():
        entries = [{"instruction": f"Is 'é' {word}? {'so ' * i}\n\nAnswer format: {'/'.join(choices)}", "input": "",
                    "output": f"{tasks.LEAD} {choices[0]}", "answer": choices[i % len(choices)]}
                   for i, word in enumerate("abcdefghijkl")]
        file = folder / tasks.TASKS[name].test[0]
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(entries))
    return folder


def write(*args):
    cli.run(commands.main, commands.parser(), ["harness", *map(str, args)])


@pytest.mark.parametrize("form", ["smollm2", "llama3", "llama"])
def test_the_harness_cuts_a_prompt_and_a_choice_into_our_tokens(form, data, tmp_path):
    write_tokenizer(form, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (":Ċ" in theirs.get_vocab()) == (form == "llama3")
    harness = SimpleNamespace(backend="causal", tok_encode=theirs.encode)
    write(tmp_path, "--task", "obqa", "--data-dir", data)
    documents = map(json.loads, (tmp_path / "sibo_obqa.jsonl").read_text().splitlines())
    for e, d in zip(readers.load(tasks.task("obqa"), "test", data), documents, strict=True):
        for choice in d["choices"]:
            context, answer = TemplateLM._encode_pair(harness, d["prompt"], " " + choice)
            given, written = batch.continuation(batch.prompt_of(e, ours), f"{tasks.LEAD} {choice}", ours)
            assert context + answer == given + written and len(answer) < len(written) < len(context)


def test_in_a_chat_template_the_harness_sees_our_tokens_and_one_bos(backbone, data, tmp_path):
    shutil.copytree(backbone, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}")
    ours = chat_template.Chat(tmp_path / "chat", tokenizer.from_pretrained(backbone))
    write(tmp_path, "--task", "boolq", "--data-dir", data, "--protocol", "chat", "--backbone", tmp_path / "chat")
    lm = HFLM(pretrained=str(backbone), dtype="float32", device="cpu")
    documents = map(json.loads, (tmp_path / "sibo_boolq.jsonl").read_text().splitlines())
    for e, d in zip(readers.load(tasks.task("boolq"), "test", data), documents, strict=True):
        context, answer = lm._encode_pair(d["prompt"], " true")
        given, written = batch.continuation(batch.prompt_of(e, ours, "chat"), f"{tasks.LEAD} true", ours)
        assert context + answer == given + written and context.count(1) == 1


@pytest.mark.parametrize(("options", "says"), [
    (["--task", "mawps"], "--task: expected multiple choice, any of boolq,piqa,.*, got 'mawps'"),
    (["--task", "boolq,rte"], "--task: expected multiple choice, any of boolq,piqa,.*, got 'rte'"),
    (["--task", "boolq", "--protocol", "paper"], "--protocol paper: expected a prompt without a space at its end"),
    (["--task", "boolq", "--protocol", "chat"], "--backbone: expected with --protocol chat, .*, got none with chat"),
    (["--task", "boolq", "--backbone", "x"], "--backbone: expected with --protocol chat, .*, got x with clean"),
    (["--task", "boolq,arc-e"], "ARC-Easy/test.json: no such file"),
    (["--task", "boolq", "--limit", "0"], "boolq: expected at least 1 example to load, got 0")], ids=str)
def test_what_the_harness_would_ask_otherwise_is_refused_in_a_line_and_nothing_written(options, says, data, tmp_path,
                                                                                       capsys):
    with pytest.raises(SystemExit) as stopped:
        write(tmp_path / "tasks", "--data-dir", data, *options)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(says, err.splitlines()[-1]) and not (tmp_path / "tasks").exists()


METHODS = [None, "lora", "lora-sibo", "adapter-sibo"]


@pytest.mark.parametrize("method", METHODS)
def test_the_harness_finds_our_log_probabilities_and_right_answers(method, data, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tasks.Task, "max_new_tokens", 1)
    ours, t = model.from_pretrained(backbone), tokenizer.from_pretrained(backbone)
    if method:
        stir(inject(ours, method))
    write(tmp_path / "tasks", "--task", ",".join(ENDS), "--limit", 10, "--data-dir", data)
    found = {name: scoring.score_examples(ours, t, task, readers.load(task, "test", data, 10))
             for name, task in ((name, tasks.task(name)) for name in ENDS)}
    folder.write(ours, tmp_path / "hf", backbone)
    lm = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=4, trust_remote_code=True)
    theirs = simple_evaluate(lm, tasks=[f"sibo_{name}" for name in ENDS], bootstrap_iters=0,
                             task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False))
    for name, score in found.items():
        samples = sorted(theirs["samples"][f"sibo_{name}"], key=lambda s: s["doc_id"])
        for sample, record in zip(samples, score.records, strict=True):
            logps = [logp for (logp, _), in sample["resps"]]
            assert logps == pytest.approx(list(record["choices"].values()), abs=1e-4)
            assert sample["acc"] == (record["likelihood"] == record["gold"])
            assert sample["acc_norm"] == (record["likelihood, per character"] == record["gold"])
        by = theirs["results"][f"sibo_{name}"]
        assert (by["acc,none"], by["acc_norm,none"]) == pytest.approx(
            (score.more["likelihood"], score.more["likelihood, per character"]))
    assert method or any(r["likelihood"] != r["likelihood, per character"] for r in found["boolq"].records)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_transformers_writes_our_answers_to_a_padded_batch(method, beams, backbone, tmp_path):
    shutil.copytree(backbone, tmp_path / "base")
    ours, t = model.from_pretrained(backbone), tokenizer.from_pretrained(backbone)
    if method:
        stir(inject(ours, method))
    prompts = [batch.prompt(text) for text in ("is it so?", "so " * 9, "answer1, answer2", "true", "", "false or so")]
    given = list(map(t.encode, prompts))
    free = generate.generate(ours, torch.tensor(given[:1]), max_new_tokens=8)[0, len(given[0]):].tolist()
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[5]]}))
    t = tokenizer.from_pretrained(tmp_path / "base")
    expected = scoring.responses(ours, t, prompts, 16, batch_size=3, num_beams=beams)
    folder.write(ours, tmp_path / "hf", tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    speller = AutoTokenizer.from_pretrained(tmp_path / "hf", padding_side="left", pad_token="</s>")
    b = speller(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    out = theirs.generate(**b, max_new_tokens=16, num_beams=beams, do_sample=False)[:, b["input_ids"].shape[1]:]
    ends = {2, free[5]}
    written = [speller.decode(list(takewhile(lambda i: i not in ends, row)), skip_special_tokens=True)
               for row in out.tolist()]
    assert written == expected and len(set(expected)) > 1
    assert beams > 1 or len({len(t.encode(text)) for text in expected}) > 1, "the answers end at different times"
