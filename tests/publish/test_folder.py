"""What leaves for transformers computes there what it does here."""

import json
import os

import pytest
import torch
from small_models import hugging_face, ids, inject, output, sibo_layers, stir, twins
from transformers import AutoModelForCausalLM
from twins import edit_config, edit_tensors, pair

import eval as evaluation
import model
import sibo
import train
from sibo_lab import cli, export
from sibo_lab.backbone import tokenizer
from sibo_lab.publish import folder


@pytest.mark.parametrize(("family", "head"), [("llama", False), ("gptj", False), ("bert", False), ("bert", True)])
def test_a_folded_plain_lora_is_a_folder_that_transformers_loads(family, head, tmp_path):
    theirs, ours = twins(family, tmp_path / "base", head)
    expected = output(stir(inject(ours, "lora")), ids())
    folder.write(ours, tmp_path / "hf", tmp_path / "base")
    loaded = type(theirs).from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(output(loaded, ids()), expected, rtol=0, atol=2e-5)
    again = model.from_pretrained(tmp_path / "hf", num_labels=3 if head else None)
    torch.testing.assert_close(output(again, ids()), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_a_folded_lora_on_any_llama_is_a_folder_that_transformers_loads(family, tmp_path):
    theirs, ours = pair(family, tmp_path / "base")
    expected = stir(inject(ours, "lora"))(ids())
    edit_config(tmp_path / "base", torch_dtype="bfloat16")
    folder.write(ours, tmp_path / "hf", tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(loaded) is type(theirs) and "torch_dtype" not in (tmp_path / "hf" / "config.json").read_text()
    torch.testing.assert_close(loaded(ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_its_config_calls_tied_but_is_not_leaves_as_its_own(tmp_path):
    pair("qwen2", tmp_path / "base", tie_word_embeddings=True)
    edit_tensors(tmp_path / "base", lambda stored: stored.update(
        {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}))
    ours = model.from_pretrained(tmp_path / "base")
    expected = ours(ids())
    folder.write(ours, tmp_path / "hf", tmp_path / "base")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(loaded(ids()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lora-sibo", "lora, learned λ"])
@pytest.mark.parametrize(("family", "head"), [("llama", False), ("gptj", False), ("bert", False), ("bert", True)])
def test_a_folded_lora_sibo_computes_the_same_in_transformers_own_model_once_its_branch_is_attached(family, head, name,
                                                                                                 tmp_path):
    theirs, ours = twins(family, tmp_path / "base", head)
    expected = output(stir(inject(ours, name)), ids())
    folder.write(ours, tmp_path / "hf", tmp_path / "base")
    with pytest.raises(OSError):  # and not another model, in silence
        type(theirs).from_pretrained(tmp_path / "hf")
    attached = folder.attach(hugging_face(family, head), tmp_path / "hf").eval()
    torch.testing.assert_close(output(attached, ids()), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "says"), [
    ("adapter", "expected LoRA .*, got an adapter"), ("lora, frozen too", "expected a W that reads h, got frozen_too")])
def test_what_no_weight_holds_is_refused_with_the_reason(name, says, tmp_path):
    _, ours = twins("llama", tmp_path / "base")
    with pytest.raises(ValueError, match=says):
        folder.write(inject(ours, name), tmp_path / "hf", tmp_path / "base")
    assert not (tmp_path / "hf").exists() and hasattr(sibo, "merge")


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
        folder.write(inject(ours, "lora"), tmp_path / "hf", tmp_path / "base")
    finally:
        os.umask(before)
    written = {str(f.relative_to(tmp_path / "hf")): f for f in (tmp_path / "hf").rglob("*") if f.is_file()}
    assert {n: f.read_text() for n, f in written.items() if n in texts} == {n: texts[n] for n in list(texts)[:-1]}
    assert {f.stat().st_mode & 0o777 for f in written.values()} == {0o644} and "model.safetensors" in written


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
    folder.write(ours, tmp_path / "hf", file)
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
    folder.write(inject(ours, "lora"), tmp_path / "hf", tmp_path / "m.gguf")
    assert {f.name for f in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}
    line = capsys.readouterr().err
    assert "got pieces of one score; bring the tokenizer" in line and line.count("\n") == 1


@pytest.mark.parametrize("to", [lambda m, base: folder.write(m, base, base),
                                lambda m, base: export.to_peft(m, base, "base")], ids=["hf", "peft"])
def test_a_folder_with_files_such_as_the_backbones_own_is_left_as_it_is(to, tmp_path):
    _, ours = twins("llama", tmp_path / "base")
    before = {f: f.read_bytes() for f in (tmp_path / "base").iterdir()}
    with pytest.raises(ValueError, match="expected a new folder to export to, or an empty one, got one with files"):
        to(inject(ours, "lora"), tmp_path / "base")
    assert {f: f.read_bytes() for f in (tmp_path / "base").iterdir()} == before and sibo_layers(ours)


def test_an_h0_that_the_first_block_does_not_read_is_refused_before_anything_is_folded(tmp_path):
    _, ours = twins("llama", tmp_path / "base")
    sibo.inject(ours, "lora", 0.3, h0="blocks.1", sibo_at="blocks.1.mlp.up_proj")
    with pytest.raises(ValueError, match="expected an h0 that the first block reads, got h0='blocks.1'"):
        folder.write(ours, tmp_path / "hf", tmp_path / "base")
    assert not (tmp_path / "hf").exists() and sibo_layers(ours)


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
