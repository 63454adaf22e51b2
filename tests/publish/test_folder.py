"""What leaves for transformers computes there what it does here."""

import ast
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
import tokenizer_oracles
import torch
import transformers
from small_models import CASES, LORA_CASES, ids, inject, output, sibo_layers, stir, twins
from transformers import AutoModelForCausalLM
from twins import LLAMAS, assert_near, edit_config, edit_tensors, padded, pair

import eval as evaluation
import model
import sibo
import train
from sibo_lab import cli, export, files
from sibo_lab.backbone import generate, tokenizer
from sibo_lab.data import batch, tasks
from sibo_lab.publish import folder as publish
from sibo_lab.publish import to_gguf


@pytest.mark.parametrize(("family", "head"), [("llama", False), ("gptj", False), ("bert", False), ("bert", True)])
def test_a_folded_plain_lora_is_a_folder_that_transformers_loads(family, head, tmp_path):
    theirs, ours = twins(family, tmp_path / "base", head)
    expected = output(stir(inject(ours, "lora")), ids())
    publish.write(ours, tmp_path / "hf", tmp_path / "base")
    loaded = type(theirs).from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(output(loaded, ids()), expected, rtol=0, atol=2e-5)
    again = model.from_pretrained(tmp_path / "hf", num_labels=3 if head else None)
    torch.testing.assert_close(output(again, ids()), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_a_folded_lora_on_any_llama_is_a_folder_that_transformers_loads(family, tmp_path):
    theirs, ours = pair(family, tmp_path / "base")
    expected = stir(inject(ours, "lora"))(ids())
    edit_config(tmp_path / "base", torch_dtype="bfloat16")
    publish.write(ours, tmp_path / "hf", tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(loaded) is type(theirs) and "torch_dtype" not in (tmp_path / "hf" / "config.json").read_text()
    torch.testing.assert_close(loaded(ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_its_config_calls_tied_but_is_not_leaves_as_its_own(tmp_path):
    pair("qwen2", tmp_path / "base", tie_word_embeddings=True)
    edit_tensors(tmp_path / "base", lambda stored: stored.update(
        {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}))
    ours = model.from_pretrained(tmp_path / "base")
    expected = ours(ids())
    publish.write(ours, tmp_path / "hf", tmp_path / "base")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(loaded(ids()).logits, expected, rtol=1e-4, atol=1e-4)


def written(family, head, name, folder, merge=False, spoken=False):
    """(our model as it was exported, the folder); `spoken`: with a tokenizer."""
    _, ours = pair(family, folder / "base") if family in LLAMAS and family != "llama" else twins(
        family, folder / "base", head)
    if name != "frozen":
        stir(inject(ours, name))
    if merge:
        sibo.merge(ours)
    if spoken:
        write_tokenizer(folder / "base", family)
    publish.write(ours, folder / "hf", folder / "base")
    return ours, folder / "hf"


def opened(family, head, folder):
    auto = transformers.AutoModelForSequenceClassification if head else (
        transformers.AutoModel if family == "bert" else AutoModelForCausalLM)
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize(("family", "name", "merge"), [
    (*case, False) for case in CASES if case[0] != "bert" or "parallel" not in case[1]] + [  # refused, see below
    (*case, True) for case in LORA_CASES])
def test_every_method_computes_the_same_in_transformers_with_its_own_code_alone(family, name, merge, tmp_path):
    ours, folder = written(family, family == "bert", name, tmp_path, merge)
    loaded = opened(family, family == "bert", folder)
    torch.testing.assert_close(output(loaded, ids()), output(ours, ids()), rtol=0, atol=1e-5)
    assert (folder / "modeling_sibo.py").exists() == (name != "lora")


@pytest.mark.parametrize("name", ["lora-sibo", "adapter-sibo"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_so_does_every_llama(family, name, tmp_path):
    ours, folder = written(family, False, name, tmp_path)
    assert_near(opened(family, False, folder)(ids()).logits, ours(ids()), 1e-5)


@pytest.mark.parametrize("merge", [False, True], ids=["as it is", "folded"])
def test_a_bert_without_a_head_gives_the_same_hidden_states(merge, tmp_path):
    ours, folder = written("bert", False, "lora-sibo", tmp_path, merge)
    assert_near(opened("bert", False, folder)(ids()).last_hidden_state, ours(ids()), 1e-5)


def test_the_code_that_is_written_is_short_and_needs_torch_and_transformers_alone(tmp_path):
    _, folder = written("gptj", False, "adapter-sibo", tmp_path)
    text = (folder / "modeling_sibo.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in nodes}
    assert imported == {"threading", "torch", "transformers"} and text.count("\n") <= 120
    assert "Llama" not in text and "GPTJForCausalLM" in text


@pytest.mark.parametrize("open_it", [
    lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
    lambda folder: transformers.LlamaForCausalLM.from_pretrained(folder),
    lambda folder: transformers.AutoModel.from_pretrained(folder, trust_remote_code=True),
    lambda folder: model.from_pretrained(folder)], ids=["no trust", "LLaMA's class", "no head", "ours"])
def test_what_would_be_another_model_without_that_code_is_refused(open_it, tmp_path):
    _, folder = written("llama", False, "adapter-sibo", tmp_path)
    with pytest.raises((OSError, ValueError)):
        open_it(folder)


def test_modules_that_quantized_loading_replaces_are_missed_at_the_first_pass(tmp_path):
    ours, folder = written("llama", False, "lora-sibo", tmp_path)
    loaded = opened("llama", False, folder)
    old = loaded.model.layers[1].mlp.up_proj
    loaded.model.layers[1].mlp.up_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    with pytest.raises(RuntimeError, match="expected its SIBO modules in place, got some replaced"):
        loaded(ids())


def test_threads_that_share_an_opened_model_each_have_their_own_h0(tmp_path):
    ours, folder = written("llama", False, "lora-sibo", tmp_path)
    loaded, inside = opened("llama", False, folder), threading.Barrier(2)
    loaded.model.layers[1].register_forward_pre_hook(lambda *_: print(inside.wait(60)))  # both have begun
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        got = list(pool.map(torch.no_grad()(lambda i: loaded(ids(i)).logits), range(2)))
        assert all(torch.allclose(logits, ours(ids(i)), atol=1e-5) for i, logits in enumerate(got))


def test_a_module_called_by_itself_has_no_h0_left_over(tmp_path):
    _, folder = written("llama", False, "adapter-sibo", tmp_path)
    loaded = opened("llama", False, folder)
    h = loaded(ids(), output_hidden_states=True).hidden_states[1]
    with pytest.raises(RuntimeError, match=r"model.layers.1.mlp: expected h0 of shape \(2, 7, 16\), got None"):
        loaded.model.layers[1].mlp(h)


def test_nor_after_a_backward_pass_through_checkpointed_blocks(tmp_path):
    _, folder = written("llama", False, "adapter-sibo", tmp_path)
    loaded = opened("llama", False, folder).train()
    loaded.gradient_checkpointing_enable({"use_reentrant": False})
    out = loaded(ids())
    out.logits.sum().backward()
    with pytest.raises(RuntimeError, match="got None; call the whole model"):
        loaded.model.layers[1].mlp(torch.zeros(2, 7, 16))


def test_a_classifiers_classes_keep_their_names(tmp_path):
    _, ours = twins("bert", tmp_path / "base", True)
    names = ["entailment", "neutral", "contradiction"]
    publish.write(inject(ours, "adapter-sibo"), tmp_path / "hf", tmp_path / "base", names)
    assert opened("bert", True, tmp_path / "hf").config.id2label == dict(enumerate(names))


def test_reentrant_checkpointing_which_would_lose_h0s_gradient_is_an_error(tmp_path):
    _, folder = written("llama", False, "adapter-sibo", tmp_path)
    loaded = opened("llama", False, folder).train()
    loaded.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        loaded(ids())


@pytest.mark.parametrize(("settings", "says"), [
    ({"h0": "blocks.0.mlp", "sibo_at": "blocks.1.mlp"}, "expected an h0 that a block reads, got h0='blocks.0.mlp'"),
    ({"targets": "attn", "side": "parallel"}, "expected a module that transformers' BERT has too")])
def test_what_no_module_of_transformers_does_is_refused_before_anything_is_written(settings, says, tmp_path):
    family = "bert" if "side" in settings else "llama"
    _, ours = twins(family, tmp_path / "base")
    sibo.inject(ours, "adapter", 0.3, **settings)
    with pytest.raises(ValueError, match=says):
        publish.write(ours, tmp_path / "hf", tmp_path / "base")
    assert not (tmp_path / "hf").exists() and sibo_layers(ours)


def test_another_blocks_input_as_h0_is_so_there_too(tmp_path):
    _, ours = twins("llama", tmp_path / "base")
    stir(sibo.inject(ours, "lora", 0.3, h0="blocks.1", sibo_at="blocks.1.mlp.up_proj"))
    publish.write(ours, tmp_path / "hf", tmp_path / "base")
    assert_near(opened("llama", False, tmp_path / "hf")(ids()).logits, ours(ids()), 1e-5)


@pytest.mark.parametrize(("name", "write"), [
    ("adapter-sibo", lambda m, at: publish.write(m, at / "hf", at / "base")),
    ("lora", lambda m, at: publish.write(m, at / "hf", at / "base")),
    ("lora", lambda m, at: export.to_peft(m, at / "peft", "base")),
    ("lora", lambda m, at: to_gguf.write(m, at / "m.gguf", to_gguf.header(at / "base")))],
    ids=["hf, adapters", "hf", "peft", "gguf"])
def test_a_disabled_model_is_not_exported_as_if_it_were_on(name, write, tmp_path, monkeypatch):
    _, ours = twins("llama", tmp_path / "base")
    monkeypatch.setattr(to_gguf, "header", lambda source: None)
    with sibo.disabled(inject(ours, name)), pytest.raises(ValueError, match="on, got it disabled; export after"):
        write(ours, tmp_path)
    assert sibo_layers(ours)


@pytest.mark.parametrize("merge", [False, True], ids=["as it is", "folded"])
def test_an_adapted_head_that_is_tied_leaves_with_its_embedding(merge, tmp_path):
    _, ours = pair("llama", tmp_path / "base", tie_word_embeddings=True)
    stir(inject(ours, "lora-sibo", targets=("q_proj", "up_proj", "head"), sibo_at="ffn"))
    if merge:
        sibo.merge(ours)
    publish.write(ours, tmp_path / "hf", tmp_path / "base")
    loaded = opened("llama", False, tmp_path / "hf")
    assert_near(loaded(ids()).logits, ours(ids()), 1e-5)
    loaded.save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "hf" / "modeling_sibo.py", tmp_path / "again")
    assert_near(opened("llama", False, tmp_path / "again")(ids()).logits, ours(ids()), 1e-5)


def test_weights_that_cannot_be_written_leave_no_files(tmp_path, monkeypatch):
    _, ours = twins("llama", tmp_path / "base")
    write_tokenizer(tmp_path / "base", "llama")
    monkeypatch.setattr(files, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        publish.write(inject(ours, "adapter-sibo"), tmp_path / "hf", tmp_path / "base")
    assert not list((tmp_path / "hf").iterdir())


ELSEWHERE = [  # family, head, method, folded
    ("llama", False, "adapter-sibo", False), ("llama", False, "adapter", False), ("llama", False, "lora", False),
    ("llama", False, "lora-sibo", False), ("llama", False, "lora-sibo", True),
    ("llama", False, "lora, learned λ", False), ("llama", False, "lora, frozen too", True),
    ("llama", False, "adapter on the input", False), ("llama", False, "parallel adapter", False),
    ("gptj", False, "adapter-sibo", False), ("gptj", False, "lora-sibo", True), ("mistral", False, "lora-sibo", True),
    ("qwen2", False, "adapter-sibo", False), ("qwen3", False, "lora-sibo", False),
    ("smollm3", False, "adapter-sibo", False), ("bert", False, "adapter-sibo", False),
    ("bert", True, "adapter-sibo", False), ("bert", True, "lora-sibo", True), ("bert", True, "lora", False)]
LETTERS = ["[PAD]", "<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]


def write_cases(folder, cases=ELSEWHERE):
    """Exports, each with what tests/publish/elsewhere.py is to find there."""
    for number, (family, head, name, merge) in enumerate(cases):
        spoken = family == "llama" or head
        ours, out = written(family, head, name, folder / str(number), merge, spoken)
        rows, mask = padded([[5, 6, 7, 9], [8, 9, 10, 11, 12], [13]], "right" if family == "bert" else "left")
        answers = {beams: generate.generate(ours, rows, mask, 8, beams, [2]) for beams in (1, 3) if family != "bert"}
        kind = "SequenceClassification" if head else "CausalLM"
        torch.save({"auto": "AutoModel" if family == "bert" and not head else f"AutoModelFor{kind}", "ids": rows,
                    "mask": mask, "out": output(ours, rows, mask).detach(), "answers": answers, "plain": name == "lora",
                    "text": "ab c" if spoken else "", "text_ids": [8, 9, 7, 10] if family == "llama" else
                    [4, 3, 10, 5]}, out / "expected.pt")
        yield out


def write_tokenizer(folder, family):
    vocab = {token: i for i, token in enumerate(LETTERS)}
    if family == "bert":
        (folder / "vocab.txt").write_text("\n".join(LETTERS) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    t = Tokenizer(models.BPE(vocab, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "[PAD]"}))


@pytest.mark.parametrize("version", ["installed", "oldest"])
def test_a_stranger_opens_it_generates_trains_and_saves_it_again_without_this_project(version, tmp_path):
    old = os.environ.get("OLDEST_TRANSFORMERS", "") if version == "oldest" else ""
    if version == "oldest" and not old:
        pytest.skip("no OLDEST_TRANSFORMERS: see docs/export.md")
    folders, script = list(map(str, write_cases(tmp_path))), Path(__file__).with_name("elsewhere.py")
    done = subprocess.run([sys.executable, "-P", script, *folders], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": old})
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line for line in done.stdout.splitlines() if "largest difference" in line]
    assert len(found) == len(ELSEWHERE) and all(float(line.rsplit(" ", 1)[1]) < 1e-5 for line in found)
    assert not old or "transformers 4.53.3" in done.stdout


def test_templates_and_tokenizer_files_come_along_and_others_may_read_them(tmp_path):
    _, ours = twins("llama", tmp_path / "base")
    texts = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/rag.jinja": "rag", "vocab.json": "{}",
             "tokenizer_config.json": '{"legacy": true}', "notes.md": "no"}
    for name, text in texts.items():
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(text)
        (tmp_path / "base" / name).chmod(0o600)
    before = os.umask(0o022)
    try:
        publish.write(inject(ours, "lora"), tmp_path / "hf", tmp_path / "base")
    finally:
        os.umask(before)
    written = {str(f.relative_to(tmp_path / "hf")): f for f in (tmp_path / "hf").rglob("*") if f.is_file()}
    assert {n: f.read_text() for n, f in written.items() if n in texts} == {n: texts[n] for n in list(texts)[:-1]}
    assert {f.stat().st_mode & 0o777 for f in written.values()} == {0o644} and "model.safetensors" in written


def tokenizer_files(form):
    """The files of a small tokenizer by name: a form of tokenizer_oracles, with ".merges" as two files; "smollm2", with
    digits apart; "llama", SentencePiece's, as tokenizer.json or with ".model" as its own."""
    form, _, files = form.partition(".")
    if form == "llama":
        proto = tokenizer_oracles.train_sentencepiece()
        oracle = sentencepiece.SentencePieceProcessor(model_proto=proto)
        parts = [[of(i) for i in range(len(oracle))] for of in (oracle.id_to_piece, oracle.get_score)]
        spec = tokenizer_oracles.llama_spec(*parts, False, tokenizer_oracles.PREPEND)
        return {"tokenizer.model": proto} if files else {"tokenizer.json": json.dumps(spec).encode()}
    spec = json.loads(tokenizer_oracles.trained("gpt4o" if form == "smollm2" else form))
    if form == "smollm2":
        spec["pre_tokenizer"]["pretokenizers"] = [{"type": "Digits", "individual_digits": True},
                                                  spec["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": True}]
    if not files:
        return {"tokenizer.json": json.dumps(spec).encode()}
    return {"vocab.json": json.dumps(spec["model"]["vocab"]).encode(),
            "merges.txt": "\n".join(map(" ".join, spec["model"]["merges"])).encode()}


@pytest.mark.parametrize("name", ["adapter-sibo", "lora"])
@pytest.mark.parametrize(("family", "form", "named"), [
    *((family, form, named) for family, form in (("llama", "tekken"), ("qwen2", "qwen2"), ("gptj", "gpt4o"))
      for named in ("", "PreTrainedTokenizerFast")),
    ("llama", "smollm2", "GPT2Tokenizer"), ("llama", "llama", "LlamaTokenizer"), ("llama", "llama3", "LlamaTokenizer"),
    ("llama", "llama.model", "LlamaTokenizer"), ("mistral", "llama", "LlamaTokenizer"), ("mistral", "tekken", ""),
    ("qwen2", "qwen2", "Qwen2Tokenizer"), ("qwen2", "qwen2.merges", ""), ("qwen3", "qwen2.merges", ""),
    ("gptj", "gpt4o.merges", ""), ("smollm3", "llama3", "PreTrainedTokenizerFast")])
def test_its_tokenizer_gives_transformers_the_ids_that_the_model_was_tuned_with(family, form, named, name, tmp_path):
    _, ours = pair(family, tmp_path / "base", vocab_size=1000)
    for file, content in tokenizer_files(form).items():
        (tmp_path / "base" / file).write_bytes(content)
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
    publish.write(inject(ours, name), tmp_path / "hf", tmp_path / "base")
    t = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    texts = ["I'LL say  hello 12345\n\n  to naïve cafés", "<think> Wörd", *tokenizer_oracles.seeded(20, form, True)]
    mine = tokenizer.from_pretrained(tmp_path / "base")
    assert [t(text)["input_ids"] for text in texts] == list(map(mine.encode, texts))


@pytest.mark.parametrize("named", ["", "BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_a_pair_of_sentences_keeps_its_two_segments(file, named, tmp_path):
    _, ours = twins("bert", tmp_path / "base", True)
    write_tokenizer(tmp_path / "base", "bert")
    spoken = transformers.BertTokenizer(str(tmp_path / "base" / "vocab.txt"))
    if file == "tokenizer.json":
        (tmp_path / "base" / "vocab.txt").unlink()
        spoken.backend_tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
    publish.write(stir(inject(ours, "adapter-sibo")), tmp_path / "hf", tmp_path / "base")
    t = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    theirs = t("a b", "c a b", return_tensors="pt")
    assert theirs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    row = batch.encode_sentence(tasks.Sentence("a b", "c a b", 0), tokenizer.from_pretrained(tmp_path / "base"), 32)
    mine = batch.collate([row])
    mine.pop("labels")
    assert_near(opened("bert", True, tmp_path / "hf")(**theirs).logits, ours(**mine), 1e-5)


@pytest.mark.parametrize("said", [None, {"eos_token_id": 2, "pad_token_id": 3, "repetition_penalty": 1.5,
                                          "guidance_scale": 3.0},
                                  {"_from_model_config": True, "eos_token_id": 2}], ids=str)
def test_transformers_stops_where_the_model_was_taught_to_stop(said, tmp_path):
    _, ours = pair("llama", tmp_path / "base")
    write_tokenizer(tmp_path / "base", "llama")
    (file := tmp_path / "base" / "generation_config.json").write_text(json.dumps(said))
    if said is None:
        file.unlink()
    stir(inject(ours, "adapter-sibo"))
    end = generate.generate(ours, ids(B=1), max_new_tokens=8)[0, -4].item()
    publish.write(ours, tmp_path / "hf", tmp_path / "base", ends=[end, 2])
    loaded = opened("llama", False, tmp_path / "hf")
    got = loaded.generate(ids(B=1), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, generate.generate(ours, ids(B=1), max_new_tokens=8, eos_token_id=[end, 2]))
    assert got[0, -1] == end and got.shape[1] < ids().shape[1] + 8
    kept = loaded.generation_config.to_dict()
    dropped = {"_from_model_config", "repetition_penalty", "guidance_scale"}  # the last two: not in what was scored
    assert said is None or {key: kept[key] for key in said} == said | {"eos_token_id": [end, 2]} | dict.fromkeys(
        dropped & said.keys())
    assert said is not None or (kept["bos_token_id"], kept["pad_token_id"]) == (1, None)


def test_a_tokenizers_eos_that_generation_config_lacks_ends_a_text_there_too(tmp_path):
    _, ours = pair("llama", tmp_path / "base")
    write_tokenizer(tmp_path / "base", "llama")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[SEP]"}))
    publish.write(ours, tmp_path / "hf", tmp_path / "base", ends=tokenizer.from_pretrained(tmp_path / "base").eos_ids)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == [5, 2]


def test_a_run_on_a_gguf_file_is_a_folder_that_transformers_opens_whole(tmp_path):
    import fuzz
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields, tensors = fuzz.gguf_parts()
    file = tmp_path / "m.gguf"
    file.write_bytes(fuzz.a_gguf(fields | {"tokenizer.chat_template": "{{ messages[0]['content'] }}"}, tensors))
    ours = model.from_pretrained(file)
    for p in ours.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    expected = stir(inject(ours, "lora"))(ids())
    publish.write(ours, tmp_path / "hf", file)
    loaded, t = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    torch.testing.assert_close(loaded(ids()).logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert t("ab a")["input_ids"] == tokenizer.from_pretrained(file).encode("ab a")
    assert t.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (1, 2)
    assert torch.equal(model.from_pretrained(tmp_path / "hf")(ids()), ours(ids()))


def test_a_gguf_files_tokenizer_that_tokenizer_json_cannot_say_leaves_the_weights_to_write(tmp_path, capsys):
    import fuzz

    fields, tensors = fuzz.gguf_parts()
    fields["tokenizer.ggml.scores"][-3:] = [-9.0] * 3
    (tmp_path / "m.gguf").write_bytes(fuzz.a_gguf(fields, tensors))
    ours = model.from_pretrained(tmp_path / "m.gguf")
    publish.write(inject(ours, "lora"), tmp_path / "hf", tmp_path / "m.gguf")
    assert {f.name for f in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}
    line = capsys.readouterr().err
    assert "got pieces of one score; bring the tokenizer" in line and line.count("\n") == 1


@pytest.mark.parametrize("to", [lambda m, base: publish.write(m, base, base),
                                lambda m, base: export.to_peft(m, base, "base")], ids=["hf", "peft"])
def test_a_folder_with_files_such_as_the_backbones_own_is_left_as_it_is(to, tmp_path):
    _, ours = twins("llama", tmp_path / "base")
    before = {f: f.read_bytes() for f in (tmp_path / "base").iterdir()}
    with pytest.raises(ValueError, match="expected a new folder to export to, or an empty one, got one with files"):
        to(inject(ours, "lora"), tmp_path / "base")
    assert {f: f.read_bytes() for f in (tmp_path / "base").iterdir()} == before and sibo_layers(ours)


def test_the_commands_write_a_run_for_peft_and_transformers_and_read_pefts(tmp_path, tiny_llama, capsys):
    import peft

    def run(module, *args):
        cli.run(module.main, module.parser(), list(map(str, args)))
        return capsys.readouterr().out

    run(train, "--backbone", tiny_llama, "--method", "lora", "--rank", 4, "--steps", 2, "--batch-size", 2, "--lr", 0.1,
        "--limit", 2, "--dtype", "float32", "--out", tmp_path / "run")
    for kind in ("peft", "hf"):
        assert run(evaluation, tmp_path / "run", "--export", kind, tmp_path / kind) == f"{tmp_path / kind}/\n"
    ours = sibo.load(model.from_pretrained(tiny_llama), tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for other in (peft.PeftModel.from_pretrained(theirs, tmp_path / "peft"),
                  AutoModelForCausalLM.from_pretrained(tmp_path / "hf")):
        torch.testing.assert_close(output(other.eval(), ids()), ours(ids()), rtol=0, atol=2e-5)
    same = run(evaluation, tmp_path / "run", "--limit", 2)
    assert run(evaluation, "--backbone", tiny_llama, "--peft", tmp_path / "peft", "--limit", 2) == same
    assert run(evaluation, "--backbone", tmp_path / "hf", "--limit", 2) == same
