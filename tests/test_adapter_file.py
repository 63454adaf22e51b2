"""adapter_file.py, and sibo.save and sibo.load: what is saved comes back bit for bit, and what does not fit is refused.

Files of the first format, which held samples of the backbone in their metadata, load as they always did."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import CASES, FAMILIES, Toy, hugging_face, ids, inject, output, stir, tiny
from torch import nn

import sibo


def read(folder):
    """(trained tensors, samples of the backbone, settings) of a saved adapter."""
    file = folder / "adapter.safetensors"
    with safe_open(file, "pt") as f:
        spec = json.loads(f.metadata()["sibo"])
    stored = load_file(file)
    samples = {n.removeprefix(".frozen."): stored.pop(n) for n in list(stored) if n.startswith(".frozen.")}
    return stored, samples, spec


def rewrite(folder, change_tensors=lambda tensors: None, change_spec=lambda spec: None):
    """The same file with other tensors, or with other settings."""
    file = folder / "adapter.safetensors"
    tensors, (_, _, spec) = load_file(file), read(folder)
    change_tensors(tensors), change_spec(spec)
    save_file(tensors, file, {"sibo": json.dumps(spec)})


# ------------------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("family,name", CASES)
def test_what_is_saved_comes_back_bit_for_bit(family, name, tmp_path):
    head = 3 if family == "bert" else None
    m = stir(inject(tiny(family, num_labels=head), name))
    sibo.save(m, tmp_path / "new" / "folder")
    fresh = sibo.load(tiny(family, num_labels=head), tmp_path / "new" / "folder")
    assert fresh.sibo == m.sibo
    assert torch.equal(fresh(ids()), m(ids()))
    again = sibo.load(inject(tiny(family, num_labels=head), name), tmp_path / "new" / "folder")  # injected by hand
    assert torch.equal(again(ids()), m(ids()))


def test_a_file_holds_exactly_what_was_trained_and_its_settings(tmp_path):
    sibo.save(inject(tiny(), "lora, learned λ", dropout=0.05), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["adapter.safetensors"]
    modules = [f"blocks.{i}.{t}" for i in (0, 1) for t in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj",
                                                           "mlp.down_proj")]
    stored, _, spec = read(tmp_path)
    assert stored.keys() == {f"{n}.{p}" for n in modules for p in ("down", "up")} | {
        f"blocks.{i}.mlp.up_proj.lam_logit" for i in (0, 1)}
    assert spec.pop("backbone") == asdict(tiny().config) and spec == {
        "method": "lora", "lam": 0.3, "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "sibo_at": ["up_proj"], "h0": None, "modules_to_save": [], "rank": 3, "alpha": 6.0, "dropout": 0.05,
        "bottleneck": 3, "side": "out", "skip": "mixed", "lam_by_depth": "even", "learn_lam": True,
        "frozen_too": False, "format": 2}


@pytest.mark.parametrize("family,name", CASES)
def test_beside_them_stand_a_few_values_of_the_frozen_backbone(family, name, tmp_path):
    m = stir(inject(tiny(family), name))
    sibo.save(m, tmp_path)
    stored, samples, _ = read(tmp_path)
    frozen = dict(tiny(family).named_parameters())
    assert stored.keys() == {n for n, p in m.named_parameters() if p.requires_grad}
    outside = {n for n in frozen if not n.startswith("blocks.")}
    assert outside <= samples.keys() and 1 <= len(samples.keys() - outside) <= 8
    for n, values in samples.items():
        assert values.dtype == frozen[n].dtype and values.numel() == min(64, frozen[n].numel())
        assert set(values.tolist()) <= set(frozen[n].flatten().tolist())


def test_what_is_saved_twice_is_the_same_to_the_byte(tmp_path):
    m = inject(tiny(), "lora-sibo")
    for i in range(30):
        sibo.save(m, tmp_path / str(i))
    assert len({file.read_bytes() for file in tmp_path.glob("*/*")}) == 1


def test_a_classifier_is_saved_with_the_adapter(tmp_path):
    sibo.save(inject(tiny("bert", num_labels=3), "adapter-sibo"), tmp_path)
    adapters = {f"blocks.{i}.{t}.{p}" for i in (0, 1) for t in ("attn", "mlp") for p in ("down", "up")}
    head = {f"classifier.{x}.{p}" for x in ("pooler", "out") for p in ("weight", "bias")}
    assert read(tmp_path)[0].keys() == adapters | head


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fully_trained_model_is_saved_whole(family, tmp_path):
    m = tiny(family).requires_grad_(True)
    m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})
    sibo.save(m, tmp_path)
    stored, samples, spec = read(tmp_path)
    assert stored.keys() == m.state_dict().keys() and not samples and spec.keys() == {"method", "backbone", "format"}
    assert torch.equal(sibo.load(tiny(family), tmp_path)(ids()), m(ids()))


def test_a_transformers_model_saves_and_loads_too(tmp_path):
    m = stir(inject(hugging_face("bert", head=True), "lora-sibo"))
    sibo.save(m, tmp_path)
    assert torch.equal(output(sibo.load(hugging_face("bert", head=True), tmp_path), ids()), output(m, ids()))


def test_a_merged_or_a_frozen_model_has_nothing_to_save(tmp_path):
    for m in (sibo.merge(inject(tiny(), "lora-sibo")), tiny().requires_grad_(False)):
        with pytest.raises(ValueError, match="Llama: expected trained tensors, got none; save before merge"):
            sibo.save(m, tmp_path)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("change,says", [
    (lambda t: t.pop("blocks.1.mlp.up"), r"tensor 'blocks\.1\.mlp\.up': expected \(16, 3\), got none"),
    (lambda t: t.update({"blocks.2.mlp.up": torch.ones(2)}),
     r"tensor 'blocks\.2\.mlp\.up': expected none, got \(2,\)"),
    (lambda t: t.update({"blocks.0.mlp.down": torch.ones(16, 3)}),
     r"tensor 'blocks\.0\.mlp\.down': expected \(3, 16\), got \(16, 3\)")])
def test_a_missing_extra_or_misshaped_tensor_is_named_with_its_file(change, says, tmp_path):
    sibo.save(inject(tiny(), "adapter-sibo"), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/adapter.safetensors: {says}"):
        sibo.load(tiny(), tmp_path)


@pytest.mark.parametrize("other,says", [
    ({"hidden_size": 32}, r"tensor 'blocks\.0"),
    ({"num_hidden_layers": 1}, "another backbone: expected num_hidden_layers 2, got 1"),
    ({"num_hidden_layers": 3}, r"tensor 'blocks\.2")])
def test_a_file_of_another_size_of_model_is_refused(other, says, tmp_path):
    sibo.save(inject(tiny(), "lora-sibo"), tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{says}"):
        sibo.load(tiny(**other), tmp_path)


@pytest.mark.parametrize("mine", [{"lam": 0.2}, {"rank": 4}, {"alpha": 5.0}, {"sibo_at": "attn"},
                                  {"targets": "up_proj"}, {"frozen_too": True}])
def test_a_file_of_other_settings_is_refused_where_the_model_is_injected_already(mine, tmp_path):
    sibo.save(inject(tiny(), "lora-sibo"), tmp_path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*: expected \w+=.*, got "):
        sibo.load(inject(tiny(), "lora-sibo", **mine), tmp_path)


def test_a_file_that_lacks_a_setting_is_refused_also_where_the_models_own_is_none(tmp_path):
    m = sibo.inject(nn.Sequential(nn.Linear(4, 4)), "lora", 0.0, targets="0", rank=2)
    sibo.save(m, tmp_path)
    assert read(tmp_path)[2]["h0"] is None
    rewrite(tmp_path, change_spec=lambda spec: spec.pop("h0"))
    with pytest.raises(ValueError, match=r"adapter\.safetensors: expected h0=None, got None"):
        sibo.load(m, tmp_path)


def test_a_file_whose_names_are_not_whole_is_refused_before_the_model_is_touched(tmp_path):
    sibo.save(inject(tiny(), "lora-sibo"), tmp_path)
    rewrite(tmp_path, change_spec=lambda spec: spec.update(h0="0"))
    m = tiny()
    with pytest.raises(ValueError, match=r"expected h0='blocks\.0', got '0'"):
        sibo.load(m, tmp_path)
    assert not hasattr(m, "sibo")


def test_a_truncated_file_is_named(tmp_path):
    sibo.save(inject(tiny(), "lora"), tmp_path)
    file = tmp_path / "adapter.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 1, 20, 0):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(file))):
            sibo.load(tiny(), tmp_path)


@pytest.mark.parametrize("metadata", [None, {"sibo": "{"}, {"sibo": "{}"}, {"sibo": "[]"},
                                      {"sibo": '{"colour": "red"}'}, {"sibo": '{"method": "lora", "backbone": [1]}'}])
def test_a_file_without_its_settings_is_refused_and_none_are_made_up(metadata, tmp_path):
    sibo.save(inject(tiny(), "lora-sibo", lam=0.2), tmp_path)
    file = tmp_path / "adapter.safetensors"
    save_file(load_file(file), file, metadata)
    m = tiny()
    with pytest.raises(ValueError, match=re.escape(str(file))):
        sibo.load(m, tmp_path)
    assert not hasattr(m, "sibo")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "adapter.safetensors"))):
        sibo.load(tiny(), tmp_path)


# ------------------------------------------------------------------------------------------------------ other backbones


def with_other(m, name, factor):
    with torch.no_grad():
        m.get_parameter(name).mul_(factor)
    return m


@pytest.mark.parametrize("name", ["embed.weight", "blocks.1.mlp.up_proj.weight"])
def test_other_frozen_values_are_another_backbone(name, tmp_path):
    m = sibo.inject(tiny(), "lora", 0.3, targets="up_proj", rank=3)  # up_proj's own weight is then NAME.base.weight
    sibo.save(m, tmp_path)
    rewrite(tmp_path, lambda t: t.update({f".frozen.{name}": sample(tiny().get_parameter(name))}))
    sibo.load(tiny(), tmp_path)
    for other in (with_other(tiny(), name, 1 + 1e-9), with_other(tiny(), name, 1.02).bfloat16()):
        with pytest.raises(ValueError, match=f"another backbone: expected other values in {name}"):
            sibo.load(other, tmp_path)
        assert not hasattr(other, "sibo") and all(p.requires_grad for p in other.parameters())


def sample(p):
    flat = p.detach().flatten()
    return flat[::max(1, len(flat) // 64)][:64].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_to_another_precision_is_the_same_backbone(dtype, tmp_path):
    sibo.save(inject(tiny(), "lora-sibo"), tmp_path)
    assert sibo.load(tiny(dtype=dtype), tmp_path).sibo.rank == 3


def llava(dtype=torch.float32, **text):
    """A model of transformers that is composed of two, each with a configuration of its own."""
    import transformers as hf

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    m = hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**size, image_size=8, patch_size=4),
        text_config=hf.LlamaConfig(**size, vocab_size=64, **text)))
    m.config.text_config.dtype = dtype  # as from_pretrained leaves it
    return m.to(dtype)


def test_a_composed_backbone_is_the_same_in_another_precision_and_another_one_by_its_parts_numbers(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    sibo.save(sibo.inject(llava(), targets="language_model.*.*.*.up_proj", rank=3), tmp_path)
    assert sibo.load(llava(torch.bfloat16, use_cache=False, attention_dropout=0.1), tmp_path).sibo.rank == 3
    for other, says in (({"rms_norm_eps": 1e-4}, r"text_config\.rms_norm_eps 1e-06, got 0\.0001"),
                        ({"rope_parameters": rope}, r"text_config\.rope_parameters {.*'default'")):
        with pytest.raises(ValueError, match=f"another backbone: expected {says}"):
            sibo.load(llava(**other), tmp_path)


@pytest.mark.parametrize("key", ["attention_chunk_size", "lsh_attn_chunk_length", "output_multiplier",
                                 "output_logit_soft_cap", "mm_tokens_per_image", "num_experts_per_token",
                                 "_remove_final_layer_norm"])
def test_a_setting_that_changes_numbers_is_compared_whatever_its_name(key, tmp_path):
    sibo.save(sibo.inject(llava(**{key: 4}), targets="language_model.*.*.*.up_proj", rank=3), tmp_path)
    with pytest.raises(ValueError, match=f"another backbone: expected text_config.{key} 4, got 8"):
        sibo.load(llava(**{key: 8}), tmp_path)
    sibo.load(llava(**{key: 4}), tmp_path)
    rewrite(tmp_path, change_spec=lambda spec: spec["backbone"]["text_config"].pop(key))  # as files were once
    sibo.load(llava(**{key: 4}), tmp_path)


@pytest.mark.parametrize("key", ["chunk_size_feed_forward", "chunk_size", "output_scores", "output_hidden_states",
                                 "output_router_logits", "pad_token_id", "image_token_index", "suppress_tokens",
                                 "tokenizer_class", "_attn_implementation_autoset", "_name_or_path"])
def test_a_setting_that_changes_no_number_is_not_compared(key, tmp_path):
    first, other = llava(), llava()
    setattr(first.config.text_config, key, 4), setattr(other.config.text_config, key, 8)
    sibo.save(sibo.inject(first, targets="language_model.*.*.*.up_proj", rank=3), tmp_path)
    sibo.load(other, tmp_path)


def test_a_sample_of_a_tensor_that_the_model_lacks_is_another_backbone(tmp_path):
    sibo.save(inject(tiny(), "lora-sibo"), tmp_path)
    rewrite(tmp_path, lambda t: t.update({".frozen.norm.bias": torch.zeros(16)}))
    with pytest.raises(ValueError, match="another backbone: expected a tensor 'norm.bias', got none"):
        sibo.load(tiny(), tmp_path)


def test_a_module_whose_config_is_no_dataclass_is_known_by_its_values_alone(tmp_path):
    m = sibo.inject(Toy().double(), "lora", 0.3, targets="sub", h0="embed", rank=1)
    sibo.save(m, tmp_path)
    _, samples, spec = read(tmp_path)
    assert spec["backbone"] == {} and samples.keys() == {"embed.weight", "first.weight", "sub.weight"}
    with pytest.raises(ValueError, match="another backbone"):
        sibo.load(Toy().double(), tmp_path)


# ---------------------------------------------------------------------------------------------------- the first format


def write_first_format(m, folder, **backbone):
    """As files were until November 2026: λ's logit was called `logit`, samples were JSON lists of numbers, h0 was the
    output of a named module, and heads were not named."""
    trained = {n.replace("lam_logit", "logit"): p.detach() for n, p in m.named_parameters() if p.requires_grad}
    frozen = {n.replace(".base.", "."): p for n, p in m.named_parameters() if not p.requires_grad}
    names = list(frozen)[::max(1, len(frozen) // 8)]
    h0 = "embeddings" if hasattr(m, "embeddings") else "embed"
    spec = asdict(m.sibo) | {"h0": h0} if hasattr(m, "sibo") else {"method": "full"}
    spec.pop("modules_to_save", None)
    spec["backbone"] = {"config": asdict(m.config), "dtype": str(frozen[names[0]].dtype) if names else None,
                        "values": {n: sample(frozen[n]).tolist() for n in names}} | backbone
    folder.mkdir()
    save_file(trained, folder / "adapter.safetensors", {"sibo": json.dumps(spec)})


@pytest.mark.parametrize("family,name", CASES)
def test_a_file_of_the_first_format_loads_bit_for_bit(family, name, tmp_path):
    m = stir(inject(tiny(family), name, **({"targets": ("q_proj",)} if "lora" in name and family != "bert" else {})))
    write_first_format(m, tmp_path / "run")
    fresh = sibo.load(tiny(family), tmp_path / "run")
    assert replace(fresh.sibo, h0=None) == m.sibo and torch.equal(fresh(ids()), m(ids()))


def test_a_fully_trained_model_of_the_first_format_loads(tmp_path):
    m = tiny().requires_grad_(True)
    m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})
    write_first_format(m, tmp_path / "run")
    assert torch.equal(sibo.load(tiny(), tmp_path / "run")(ids()), m(ids()))


def test_a_file_of_the_first_format_without_a_backbone_loads(tmp_path):
    m = stir(inject(tiny(), "lora-sibo"))
    write_first_format(m, tmp_path / "run")
    rewrite(tmp_path / "run", change_spec=lambda spec: spec.pop("backbone"))
    assert torch.equal(sibo.load(tiny(), tmp_path / "run")(ids()), m(ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_the_first_format_knows_its_backbone_in_another_precision_too(dtype, tmp_path):
    write_first_format(inject(tiny(), "lora-sibo"), tmp_path / "run")
    assert sibo.load(tiny(dtype=dtype), tmp_path / "run").sibo.rank == 3


def test_a_file_of_the_first_format_refuses_another_backbone(tmp_path):
    write_first_format(inject(tiny(), "lora-sibo"), tmp_path / "run")
    with pytest.raises(ValueError, match="another backbone: expected other values in embed.weight"):
        sibo.load(with_other(tiny(), "embed.weight", 1 + 1e-9), tmp_path / "run")
    with pytest.raises(ValueError, match="another backbone: expected rms_norm_eps 1e-06, got 0.0001"):
        sibo.load(tiny(rms_norm_eps=1e-4), tmp_path / "run")


@pytest.mark.parametrize("backbone", [
    {"config": [1]}, {"dtype": "torch.nn"}, {"values": None}, {"values": {"no.such": [0.1]}},
    *({"values": {"embed.weight": values}} for values in ("none", [None], [0.1], [[]]))])
def test_a_broken_backbone_in_a_file_of_the_first_format_is_an_error_that_names_the_file(backbone, tmp_path):
    write_first_format(inject(tiny(), "lora-sibo"), tmp_path / "run", **backbone)
    m = tiny()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run" / "adapter.safetensors"))) as error:
        sibo.load(m, tmp_path / "run")
    assert "\n" not in str(error.value) and not hasattr(m, "sibo")
