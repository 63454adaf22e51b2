"""weights.py: every kind of file a checkpoint comes in gives the same model, and a bad one is refused by name.

The oracle is the transformers model that the files were made from."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from twins import FAMILIES, assert_same_model, edit_tensors, refused, theirs_of

import model
from sibo_lab.backbone import weights


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


# ------------------------------------------------------------------------------------------------ files of all kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_safetensors_checkpoint_is_the_whole_model(tmp_path, family):
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_model(model.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_pytorch_bin_files_hold_the_same_model(tmp_path, family, shards, zipped):
    theirs = theirs_of(family)
    assert_same_model(model.from_pretrained(bin_files(theirs, tmp_path, shards=shards, zipped=zipped)), theirs)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_old_bert_files_with_gamma_and_beta_and_a_language_model_head_are_understood(tmp_path, prefix):
    theirs = theirs_of("bert", kind="BertForPreTraining")
    stored = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
              .replace("bert.", prefix): t for n, t in theirs.state_dict().items()}
    assert any("gamma" in n for n in stored) and any(n.startswith("cls.") for n in stored)
    assert_same_model(model.from_pretrained(bin_files(theirs, tmp_path, stored, zipped=False)), theirs.bert)


@pytest.mark.parametrize("task", ["MaskedLM", "PreTraining", "QuestionAnswering", "TokenClassification",
                                  "NextSentencePrediction", "MultipleChoice", "SequenceClassification"])
def test_a_bert_with_the_head_of_another_task_is_its_base(tmp_path, task):
    theirs = theirs_of("bert", kind=f"BertFor{task}")
    theirs.save_pretrained(tmp_path)
    assert_same_model(model.from_pretrained(tmp_path), theirs.bert)


def test_a_model_with_an_adapter_beside_it_is_refused_as_transformers_would_load_both(tmp_path):
    theirs = theirs_of("llama")
    theirs.save_pretrained(tmp_path)
    lora = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    both = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any("lora_A" in n for n in both.state_dict())
    with refused(str(tmp_path), "expected a model alone, got one with peft's adapter_config.json", "--peft"):
        model.from_pretrained(tmp_path)


def test_files_of_a_base_model_have_no_prefix_and_may_lack_a_tied_head(tmp_path):
    theirs = theirs_of("llama", tie_word_embeddings=True)
    theirs.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_model(model.from_pretrained(tmp_path), theirs)


E, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("change, tied", [
    (lambda stored: stored.update({HEAD: stored[E].clone()}), True),
    (lambda stored: stored.update({HEAD: stored[E] + 1}), False),
    (lambda stored: stored.update({HEAD: stored.pop(E)}), True)], ids=["equal", "different", "instead"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_tied_config_with_a_head_in_the_file_is_what_transformers_makes_of_it(tmp_path, kind, change, tied):
    theirs_of("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_tensors(tmp_path, change)
    if kind == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model.from_pretrained(tmp_path)
    assert ours.config.tie_word_embeddings is (ours.head.weight is ours.embed.weight) is tied
    assert_same_model(ours, theirs.eval())


def test_without_embedding_and_head_the_embedding_is_missing(tmp_path):
    theirs_of("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda stored: stored.pop(E))
    with refused("1 tensors are missing", "'embed.weight'"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("first, then", [
    ("model.safetensors", "model.safetensors.index.json"), ("model.safetensors", "pytorch_model.bin"),
    ("model.safetensors.index.json", "pytorch_model.bin"), ("model.safetensors", "pytorch_model.bin.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json")])
def test_of_several_checkpoints_in_a_folder_transformers_choice_is_read(tmp_path, first, then):
    for seed, file in ((0, first), (1, then)):
        m, size, folder = theirs_of("llama", seed), "20KB" if "index" in file else "1GB", tmp_path / str(seed)
        if file.startswith("model"):
            m.save_pretrained(folder, max_shard_size=size)
        else:
            folder.mkdir()
            bin_files(m, folder, shards=3 if "index" in file else 1)
        shutil.copytree(folder, tmp_path / "both", dirs_exist_ok=True)
    chosen = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    assert torch.equal(chosen.lm_head.weight, theirs_of("llama", 0).lm_head.weight)
    assert_same_model(model.from_pretrained(tmp_path / "both"), chosen)


@pytest.mark.parametrize("family, extra", [
    ("gptj", {"transformer.h.1.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.1.attn.masked_bias": torch.ones(1)}),
    ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ("qwen2", {"model.rotary_emb.inv_freq": torch.ones(4), "layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ("bert", {"embeddings.position_ids": torch.arange(64)[None], "embeddings.token_type_ids": torch.zeros(1, 64)})])
def test_tensors_that_old_files_hold_and_nobody_needs_are_left_out(tmp_path, family, extra):
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda stored: stored.update(extra))
    assert_same_model(model.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("family", ["llama", "gptj", "bert"])
def test_prefixes_of_wrappers_are_understood(tmp_path, family, prefix):
    theirs = theirs_of(family)
    assert_same_model(model.from_pretrained(bin_files(
        theirs, tmp_path, {prefix + n: t for n, t in theirs.state_dict().items()})), theirs)


def test_blocks_compiled_one_by_one_are_understood(tmp_path):
    theirs = theirs_of("llama")
    stored = {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in theirs.state_dict().items()}
    assert_same_model(model.from_pretrained(bin_files(theirs, tmp_path, stored)), theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_that_of_every_weight_and_the_numbers_are_the_files(tmp_path, dtype):
    theirs = theirs_of("llama")
    theirs.save_pretrained(tmp_path)
    ours = model.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert torch.equal(ours.head.weight, theirs.lm_head.weight.to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_whole_and_in_eval_mode(tmp_path, family):
    theirs_of(family).save_pretrained(tmp_path)
    m = model.from_pretrained(tmp_path)
    assert not any(t.is_meta for t in [*m.parameters(), *m.buffers()])
    assert not any(x.training for x in m.modules())
    assert all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_training_never_writes_into_the_files(tmp_path, kind):
    theirs = theirs_of("llama")
    theirs.save_pretrained(tmp_path) if kind == "safetensors" else bin_files(theirs, tmp_path)
    with torch.no_grad():
        for p in model.from_pretrained(tmp_path).parameters():
            p.add_(1)
    assert_same_model(model.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_the_digest_of_weights_is_another_where_any_tensor_is(tmp_path, kind):
    theirs = theirs_of("llama")

    def digest():
        theirs.save_pretrained(tmp_path) if kind == "safetensors" else bin_files(
            theirs, tmp_path, shards=2 if kind == "shards" else 1)
        return weights.digest(tmp_path)

    found = [digest(), digest()]
    for p in theirs.parameters():
        with torch.no_grad():
            p.view(-1)[-1] += 1
        found.append(digest())
    assert found[0] == found[1] and len(set(found)) == len(found) - 1


def test_of_13_gb_the_digest_misses_no_matrix(tmp_path):
    file = tmp_path / "model.gguf"
    with open(file, "wb") as f:
        f.truncate(13 * 10**9)  # of zeros, which take no disk
        found = {weights.digest(file)}
        for start in (10**6, 7 * 10**9 + 1, 12 * 10**9):
            f.seek(start)
            f.write(b"\1" * 2 * 4096 * 4096)  # one of LLaMA-7B's
            f.flush()
            found.add(weights.digest(file))
    assert len(found) == 4


# ------------------------------------------------------------------------------------------------- BERT's classifier


@pytest.mark.parametrize("pooled", [True, False])
def test_a_new_classifier_starts_small_on_the_files_pooler_where_there_is_one(tmp_path, pooled):
    theirs = transformers.BertModel(theirs_of("bert").config, add_pooling_layer=pooled)
    theirs.save_pretrained(tmp_path)
    head = model.from_pretrained(tmp_path, num_labels=3).classifier
    assert head.out.weight.shape == (3, 32) and not head.out.bias.any()
    assert 0 < head.out.weight.std() < 0.05
    if pooled:
        assert torch.equal(head.pooler.weight, theirs.pooler.dense.weight)
    else:
        assert 0 < head.pooler.weight.std() < 0.05 and not head.pooler.bias.any()


@pytest.mark.parametrize(("dtype", "head"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                             (torch.float64, torch.float64)])
def test_a_classifier_which_is_trained_has_at_least_32_bits_and_the_files_own_numbers(tmp_path, dtype, head):
    theirs = theirs_of("bert")
    theirs.save_pretrained(tmp_path)
    m = model.from_pretrained(tmp_path, dtype, num_labels=3)
    assert {p.dtype for p in m.classifier.parameters()} == {head}
    assert {p.dtype for n, p in m.named_parameters() if not n.startswith("classifier.")} == {dtype}
    assert torch.equal(m.classifier.pooler.weight, theirs.pooler.dense.weight.to(head))


def test_a_classifier_in_the_file_is_loaded_if_asked_for_and_of_that_many_classes(tmp_path):
    theirs = theirs_of("bert", kind="BertForSequenceClassification", num_labels=3)
    theirs.save_pretrained(tmp_path)
    assert_same_model(model.from_pretrained(tmp_path, num_labels=3), theirs)
    assert_same_model(model.from_pretrained(tmp_path), theirs.bert)
    with refused("'classifier.bias'", "numbers of shape [2], got torch.float32 of shape [3]"):
        model.from_pretrained(tmp_path, num_labels=2)


# ----------------------------------------------------------------------------------------------- what is not a model


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, named", [
    (lambda stored: stored.pop(Q), ("1 tensors are missing", "'blocks.1.attn.q_proj.weight'")),
    (lambda stored: stored.update({"model.layers.1.self_attn.w_proj.weight": torch.ones(1)}),
     ("unexpected tensor 'layers.1.self_attn.w_proj.weight'",)),
    (lambda stored: stored.update({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}),
     ("unexpected tensor 'model.layers.2.mlp.up_proj.weight'",)),
    (lambda stored: stored.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}),
     ("unexpected tensor 'model.layers.1.self_attn.q_proj.bias'",)),
    (lambda stored: stored.update({Q: torch.ones(32, 31)}),
     (Q, "numbers of shape [32, 32], got torch.float32 of shape [32, 31]")),
], ids=["missing", "unknown", "of one layer more", "a bias too many", "mis-shaped"])
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, named):
    theirs_of("llama").save_pretrained(tmp_path)
    edit_tensors(tmp_path, change)
    with refused(str(tmp_path), *named):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, tensor", [
    ("qweight", torch.ones(4, 32, dtype=torch.int32)), ("scales", torch.ones(1, 32)), ("g_idx", torch.ones(32)),
    ("weight.absmax", torch.ones(4)), ("weight.quant_state.bitsandbytes__nf4", torch.ones(4, dtype=torch.uint8)),
    ("SCB", torch.ones(32)), ("weight_scale", torch.ones(1)), ("weight_scale_inv", torch.ones(1, 1))])
def test_quantized_weights_are_refused_by_name_where_no_config_says_so(tmp_path, name, tensor):
    theirs_of("llama").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda stored: stored.update({f"model.layers.0.self_attn.q_proj.{name}": tensor}))
    with refused(str(tmp_path), f"got quantized ones ('layers.0.self_attn.q_proj.{name}')", "not quantized"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_weights_of_8_bits_are_refused(tmp_path, dtype):
    theirs_of("llama").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda stored: stored.update({Q: stored[Q].to(dtype)}))
    with refused(Q, f"expected float16 to float64 numbers of shape [32, 32], got {dtype}"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin", "m.gguf",
                                  "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, file):
    theirs_of("llama").config.save_pretrained(tmp_path)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with refused(str(tmp_path / file), "got a Git-LFS pointer to it; run `git lfs pull` there"):
        model.from_pretrained(tmp_path / file if file == "m.gguf" else tmp_path)


@pytest.mark.parametrize("left", [0, 4, 2000, -100])
def test_a_truncated_safetensors_file_is_refused(tmp_path, left):
    theirs_of("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with refused(str(file), "not a whole safetensors file"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("left", [0, 4, 2000, -100])
def test_a_truncated_bin_file_is_refused(tmp_path, left, zipped):
    file = bin_files(theirs_of("llama"), tmp_path, zipped=zipped) / "pytorch_model.bin"
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
    theirs_of("llama").config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({Q: Evil(tmp_path / "mark")}, file, _use_new_zipfile_serialization=zipped)
    with refused(str(file), "not a file of plain tensors"):
        model.from_pretrained(tmp_path)
    assert not (tmp_path / "mark").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "mark").exists(), "the file was a real danger"


def test_a_bin_file_of_something_else_than_tensors_by_name_is_refused(tmp_path):
    theirs_of("llama").config.save_pretrained(tmp_path)
    torch.save([torch.ones(3)], tmp_path / "pytorch_model.bin")
    with refused("pytorch_model.bin", "expected a dictionary of tensors, got a list"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shard", ["../elsewhere.bin", "/etc/passwd", "a/b.bin", "..", ""])
def test_an_index_may_name_files_beside_it_and_no_others(tmp_path, suffix, shard):
    theirs_of("llama").config.save_pretrained(tmp_path)
    (tmp_path / f"{suffix}.index.json").write_text(json.dumps({"weight_map": {Q: shard}}))
    with refused(f"{suffix}.index.json", shard, "expected the names of files beside it"):
        model.from_pretrained(tmp_path)


def test_a_shard_that_the_index_names_and_nobody_has_is_named(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with refused(gone.name, by=FileNotFoundError):
        model.from_pretrained(tmp_path)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    theirs_of("llama").config.save_pretrained(tmp_path)
    with refused(str(tmp_path), "expected model.safetensors, pytorch_model.bin or", by=FileNotFoundError):
        model.from_pretrained(tmp_path)


def test_rename_maps_a_layers_number_through_the_template():
    names = {"h.{}.a": "blocks.{}.b", "top": "end", "h.{}.dropped": None}
    found = [weights.rename(n, names, Path("f")) for n in ("h.12.a", "top", "h.3.dropped")]
    assert found == ["blocks.12.b", "end", None]
    with pytest.raises(ValueError, match=re.escape("f: unexpected tensor 'h.1.z'")):
        weights.rename("h.1.z", names, Path("f"))


def test_names_of_modules_become_those_of_weights_and_biases_inside_and_outside_of_the_blocks():
    names = weights.names({"wte": "embed", "cls": None}, "h.{}", {"ln": "norm"}, unused=["h.{}.mask"])
    assert names == {"h.{}.mask": None, "wte.weight": "embed.weight", "wte.bias": "embed.bias", "cls.weight": None,
                     "cls.bias": None, "h.{}.ln.weight": "blocks.{}.norm.weight", "h.{}.ln.bias": "blocks.{}.norm.bias"}
    names = weights.names({}, "layer.{}", {"LayerNorm": "norm"}, unused=[])
    assert weights.rename("bert.layer.7.LayerNorm.gamma", names, Path("f"), "bert.") == "blocks.7.norm.weight"
