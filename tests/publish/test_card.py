"""card.py: what a hub, PyYAML and a CommonMark parser read in a card is what the run's files say; its code loads it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from small_models import ids, inject, output, stir, twins

import eval as evaluation
import model
import sibo
import train
from sibo_lab import cli, export
from sibo_lab.publish import card, folder
from sibo_lab.settings import Settings
from sibo_lab.training import recipes

APACHE = "\n   Apache License\n  Version 2.0, January 2004\n  http://…\n\n 1. … limitations under the License.\n"
MIT = ("MIT License\n\nCopyright (c) 2024 Someone\n\nPermission is hereby granted, free of charge, to any person …\n"
       "… THE USE OR OTHER DEALINGS IN THE\nSOFTWARE.\n")
RESULT = {
    "metric": "accuracy", "score": 0.615, "n": 200, "interval": [0.5461, 0.6796], "lambda": 0.2, "scored_on": "test",
    "parts": {"the rest": 0.725, "new templates": 0.175}, "more": {}, "baseline_score": 0.06, "baseline_n": 50,
    "trainable_parameters": 8847360, "total_parameters": 143362368, "command": "python train.py --lr 0.1",
    "sha256": {"backbone": "ef" * 32, "train": "ab" * 32,
               "validation": card.NOTHING, "/home/me/mine.jsonl": "cd" * 32}, "git": "abc-dirty",
    "date": "2026-11-28", "versions": {"python": "3.11", "torch": "2.13.0"}}
CONFIG = recipes.run_of("lora-sibo", backbone="meta/llama", task="word-problems", lam=0.2, steps=9).config()
SETTINGS = Settings("lora", 0.2, targets=("q_proj", "up_proj"), sibo_at=("up_proj",))


def cells(text):
    """The tables of a page, as a CommonMark parser with GitHub's tables sees them: rows of cells, as they are shown."""
    def shown(token):
        return "".join(t.content for t in token.children if t.type in ("text", "text_special", "code_inline"))

    tokens, rows = MarkdownIt("commonmark").enable("table").parse(text), []
    for token, after in zip(tokens, tokens[1:], strict=False):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            rows[-1].append(shown(after))
    return rows


def headings(text):
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]


def page(tmp_path, kind="peft", name="run", config=CONFIG, result=RESULT, s=SETTINGS, source=None, num_labels=0):
    """(front matter, text) of a card."""
    if not source:
        (source := tmp_path / "source").mkdir(exist_ok=True)
    card.write(tmp_path, kind, name, config, result, s, source, num_labels)
    front, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (tmp_path / "README.md").read_text("utf-8"), re.S).groups()
    assert ModelCard.load(tmp_path / "README.md").data.to_dict()
    return yaml.safe_load(front), text


def run(command, *args):
    cli.run(command.main, command.parser(), list(map(str, args)))


# ---------------------------------------------------------------------------------------------------- what a card says


def test_the_front_matter_is_what_a_hub_looks_for(tmp_path):
    front, _ = page(tmp_path, config=CONFIG | {"task": "boolq+arc-e", "test": ["boolq"]})
    assert front == {
        "base_model": "meta/llama", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["sibo", "lora", "lora-sibo"],
        "model-index": [{"name": "run", "results": [{
            "task": {"type": "text-generation"}, "dataset": {"name": "boolq", "type": "boolq"},
            "metrics": [{"type": "accuracy", "value": 0.615}]}]}]}
    front, _ = page(tmp_path, config=CONFIG | {"method": "lora", "task": "rte"}, num_labels=2)
    assert (front["tags"], front["pipeline_tag"]) == (["lora"], "text-classification")


def test_a_score_on_held_out_training_examples_does_not_stand_as_the_tasks(tmp_path):
    front, _ = page(tmp_path, config=CONFIG | {"task": "boolq"}, result=RESULT | {"scored_on": "validation"})
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "boolq (validation)", "type": "boolq", "split": "validation"}


@pytest.mark.parametrize(("num_labels", "baseline"), [
    (0, "the backbone, frozen"), (1, "always the mean"), (3, "always the commonest class")])
def test_the_baseline_is_called_what_train_measured(num_labels, baseline, tmp_path):
    assert [baseline, "0.0600", "", "50"] in cells(page(tmp_path, num_labels=num_labels)[1])


def test_the_tables_say_what_was_done_to_what_and_how_well(tmp_path):
    rows = cells(page(tmp_path)[1])
    for row in (["backbone", "meta/llama"], ["λ", "0.2"], ["adapted", "q_proj, up_proj"], ["get h0", "up_proj"],
                ["rank", "32"], ["steps", "9"], ["trained parameters", "8,847,360"], ["train", "ab" * 32],
                ["mine", "cd" * 32], ["this model", "0.6150", "0.5461 to 0.6796", "200"],
                ["new templates", "0.1750", "", ""], ["the backbone, frozen", "0.0600", "", "50"],
                ["git", "abc-dirty"], ["torch", "2.13.0"]):
        assert row in rows
    assert "bottleneck" not in dict(filter(lambda r: len(r) == 2, rows)) and ["validation", card.NOTHING] not in rows


def test_a_learned_lambda_is_shown_module_by_module_and_an_adapter_by_its_width(tmp_path):
    rows = cells(page(tmp_path, result=RESULT | {"lambda": [0.1, 0.25]},
                      s=replace(SETTINGS, method="adapter", learn_lam=True))[1])
    assert ["λ, learned, of 2 modules in their order", "0.1, 0.25"] in rows and ["bottleneck", "256"] in rows


def test_where_a_learned_lambda_went_is_not_guessed(tmp_path):
    rows = cells(page(tmp_path, result={}, s=replace(SETTINGS, learn_lam=True))[1])
    assert ["get h0", "up_proj"] in rows and not [row for row in rows if row[0].startswith("λ")]


@settings(max_examples=40, deadline=None)
@given(gone=st.sets(st.sampled_from(sorted(RESULT))),
       older=st.sets(st.sampled_from(sorted(CONFIG.keys() - {"backbone"}))))
def test_what_an_older_run_lacks_is_left_out(gone, older, tmp_path_factory):
    result = {k: v for k, v in RESULT.items() if k not in gone}
    front, text = page(tmp_path_factory.mktemp("card"), config={k: v for k, v in CONFIG.items() if k not in older},
                       result=result)
    assert ("model-index" in front) == ("score" in result) and "None" not in text
    assert ("Data" in headings(text)) == ("sha256" in result) and ("python train.py" in text) == ("command" in result)


# ------------------------------------------------------------------------------------------- nothing in it can break it

TRICKY = st.one_of(
    st.text(st.sampled_from("|`\\*_[]<>~$&#!:@-=\n\r\t '\"{}%aλ\x00\x85\u2028\ufeff🙂"), min_size=1, max_size=12),
    st.text(min_size=1, max_size=12),
    st.sampled_from(["---", "a\n---\nb", "yes", "null", "1e5", "- a", "a: b # c", "<script>", "&amp;", "![x](y)", "|",
                     "\\|", "```\n# x", "\ud800", "http://x.y", "a  b", "{{x}}", "!!python/object:os.system"]))


@settings(max_examples=150, deadline=None)
@given(label=TRICKY, part=TRICKY, method=TRICKY, metric=TRICKY, command=TRICKY)
def test_no_name_breaks_the_front_matter_a_table_or_a_heading(label, part, method, metric, command, tmp_path_factory):
    plain = page(tmp_path_factory.mktemp("card"))
    front, text = page(
        tmp_path_factory.mktemp("card"), name=f"x{label}",
        config=CONFIG | {"method": method, "task": f"t{label}", "backbone": f"/x/{label}"},
        result=RESULT | {"metric": metric, "parts": {part: 0.5}, "command": command, "git": label})
    assert front.keys() <= plain[0].keys() and front["library_name"] == "peft"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": card._line(metric), "value": 0.615}]
    rows = cells(text)
    assert [card._line(part), "0.5000", "", ""] in rows or not card._line(part)
    assert {len(row) for row in rows} == {2, 4}
    titles = headings(text)[1:]
    assert titles == [t for t in headings(plain[1])[1:] if t in titles] and "Citation" in titles
    assert ["git", card._line(label)] in rows or not card._line(label)


@settings(max_examples=60, deadline=None)
@given(TRICKY)
def test_the_code_of_a_card_stays_code(name):
    fenced = card._fenced(f"a {name}", "python")
    token, = MarkdownIt("commonmark").parse(fenced)
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in f"a {name}")
    assert (token.type, token.info) == ("fence", "python") and token.content == shown + "\n"


# -------------------------------------------------------------------------------------------------------- the licence


@pytest.mark.parametrize(("texts", "licence", "says"), [
    ({}, None, "do not say what its licence is"),
    ({"README.md": "---\nlicense: apache-2.0\ntags: [a]\n---\n# x"}, "apache-2.0", "README.md says apache-2.0"),
    ({"README.md": "---\nlicense: llama3.2\n---\n", "LICENSE.txt": "LLAMA 3.2 COMMUNITY LICENSE\n…"}, "llama3.2",
     "begins: LLAMA 3.2 COMMUNITY LICENSE"),
    ({"README.md": "---\nlicense: other\nlicense_name: my-own\nlicense_link: https://x.y/z\n---\n"}, "other", "my-own"),
    ({"README.md": "---\nlicense: [mit\n---\n"}, None, "do not say"),
    ({"README.md": "---\nlicense: [mit, gpl]\n---\n"}, None, "do not say"),
    ({"README.md": "license: mit"}, None, "do not say"),
    ({"LICENSE": APACHE}, "apache-2.0", "LICENSE says apache-2.0"), ({"LICENCE.md": MIT}, "mit", "LICENCE.md says mit"),
    ({"LICENSE": MIT + "\nNo commercial use.\n"}, None, "LICENSE begins: MIT License"),
    ({"LICENSE": "Our licence.\n\n" + APACHE}, None, "begins: Our licence."),
    ({"LICENSE": MIT, "README.md": "---\nlicense: apache-2.0\n---\n"}, None, "LICENSE says mit"),
    ({"LICENSE": ""}, None, "do not say")])
def test_the_licence_is_what_the_backbones_files_agree_on(texts, licence, says, tmp_path):
    (tmp_path / "base").mkdir()
    for name, text in texts.items():
        (tmp_path / "base" / name).write_text(text)
    front, text = page(tmp_path, source=tmp_path / "base")
    assert front.get("license") == licence and says in re.sub(r"\\(.)", r"\1", text)


def test_a_gguf_file_says_its_licence_in_its_metadata(tmp_path):
    import fuzz

    fields, tensors = fuzz.gguf_parts()
    (tmp_path / "m.gguf").write_bytes(fuzz.a_gguf(fields | {"general.license": "Apache-2.0"}, tensors))
    front, text = page(tmp_path, config=CONFIG | {"backbone": str(tmp_path / "m.gguf")}, source=tmp_path / "m.gguf")
    assert front["license"] == "apache-2.0" and "base_model" not in front and str(tmp_path) not in text


@pytest.mark.parametrize(("backbone", "local", "base"), [
    ("meta/llama", False, "meta/llama"), ("bert-base", False, "google-bert/bert-base-uncased"), ("minilm", True, None),
    ("models/llama", True, None), ("/models/llama", True, None)])
def test_the_base_model_is_a_name_on_the_hub_or_left_out(backbone, local, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source := tmp_path / backbone if local else tmp_path / "cache").mkdir(parents=True, exist_ok=True)
    front, text = page(tmp_path, config=CONFIG | {"backbone": backbone},
                       source=source.relative_to(tmp_path) if backbone == "models/llama" else source)
    assert front.get("base_model") == base and "/models" not in text


# --------------------------------------------------------------------------------------------------- from the commands


def load(readme, name, place, backbone=None):
    """What a card's Python code leaves behind, with the export at `place`."""
    code = re.search(r"```python\n(.*?)\n```", readme, re.S)[1].replace(repr(name), repr(str(place)))
    if backbone:
        code = re.sub(r"BACKBONE = '.*?'", f"BACKBONE = {str(backbone)!r}", code)
    exec(code, found := {})
    return found


def test_both_exports_of_a_run_have_a_card_whose_code_loads_them(tmp_path, tiny_llama, monkeypatch):
    backbone = shutil.copytree(tiny_llama, tmp_path / "base")
    (backbone / "tokenizer_config.json").write_text(
        '{"eos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}')
    monkeypatch.setattr("sys.argv", ["train.py", "--data-dir", "/home/me/data", "--lr", "0.1"])
    run(train, "--backbone", backbone, "--method", "lora", "--rank", 4, "--steps", 2, "--batch-size", 2, "--lr", 0.1,
        "--limit", 2, "--dtype", "float32", "--out", tmp_path / "run")
    expected = sibo.load(model.from_pretrained(backbone), tmp_path / "run")(ids())
    for kind in ("hf", "peft"):
        run(evaluation, tmp_path / "run", "--export", kind, tmp_path / kind)
        readme = (tmp_path / kind / "README.md").read_text()
        found = load(readme, kind, tmp_path / kind, backbone)
        torch.testing.assert_close(output(found["model"].eval(), ids()), expected, rtol=0, atol=2e-5)
        assert found["tokenizer"]("ab")["input_ids"] and "\npython train.py --lr 0.1\n" in readme
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert ["train", result["sha256"]["train"]] in cells(readme) and str(tmp_path) not in readme


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_the_code_of_a_classifiers_card_loads_it_with_its_head(kind, tmp_path):
    _, ours = twins("bert", tmp_path / "base", True)
    expected = output(stir(inject(ours, "lora")), ids())
    if kind == "hf":
        folder.write(ours, tmp_path / "out", tmp_path / "base")
    else:
        export.to_peft(ours, tmp_path / "out", str(tmp_path / "base"))
    (tmp_path / "base" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    assert not (tmp_path / "out" / "README.md").exists()  # it has no run
    card.write(tmp_path / "out", kind, "out", CONFIG | {"task": "mnli"}, RESULT, SETTINGS, tmp_path / "base", 3)
    found = load((tmp_path / "out" / "README.md").read_text(), "out", tmp_path / "out", tmp_path / "base")
    torch.testing.assert_close(output(found["model"].eval(), ids()), expected, rtol=0, atol=2e-5)


def test_the_code_of_a_sibo_runs_card_loads_it_where_this_project_is_not(tmp_path, tiny_llama):
    m = stir(sibo.inject(model.from_pretrained(tiny_llama), "adapter", 0.3, bottleneck=4))
    sibo.save(m, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(recipes.run_of(
        "adapter-sibo", lam=0.3, backbone=str(tiny_llama), bottleneck=4, dtype="float32").config()))
    run(evaluation, tmp_path / "run", "--export", "hf", tmp_path / "hf")
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert ["λ", "0.3"] in cells(readme) and "\ntokenizer = " in readme
    code = re.search(r"```python\n(.*?)\ntokenizer = ", readme, re.S)[1]  # tiny_llama's names no class
    subprocess.run([sys.executable, "-I", "-c", f"{code}\nimport torch\nids = torch.tensor({ids().tolist()})\n"
                    "torch.save(model(ids).logits.detach(), 'logits.pt')"], cwd=tmp_path, check=True, timeout=300,
                   env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), m(ids()).detach(), rtol=0, atol=2e-5)


def test_a_folder_with_code_of_its_own_says_that_it_must_be_trusted(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    assert "from_pretrained(DIR, trust_remote_code=True)" in page(tmp_path, "hf")[1]
    (tmp_path / "config.json").write_text("{}")
    assert "trust_remote_code" not in page(tmp_path, "hf")[1]


def test_no_token_stands_in_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "one-of-another-form")
    page(tmp_path, result=RESULT | {"command": "python train.py hf_abcdefghij one-of-another-form"})
    assert "abcdefghij" not in (text := (tmp_path / "README.md").read_text()) and "another-form" not in text


def test_a_spoiled_result_is_refused_before_anything_is_written(tmp_path, tiny_llama):
    m = sibo.inject(model.from_pretrained(tiny_llama), "lora", 0.0, rank=4)
    sibo.save(m, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(
        recipes.run_of("lora", backbone=str(tiny_llama), rank=4).config()))
    (tmp_path / "run" / "result.json").write_text('{"score": NaN}')
    with pytest.raises(SystemExit):
        run(evaluation, tmp_path / "run", "--export", "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
