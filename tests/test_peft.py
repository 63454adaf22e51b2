"""A LoRA that peft saved computes here what its own reload computes, or is refused by the name of what is not plain."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
import transformers
import twins
from safetensors.torch import load_file, save_file
from small_models import output
from twins import refused, words

import eval as evaluation
import model
import sibo
from sibo_lab import export
from sibo_lab.publish import folder

KEYS = {**export.HONOURED, **dict.fromkeys(export.INERT), **export.ONLY}
QV = {"llama": ["q_proj", "v_proj"], "gptj": ["q_proj", "v_proj"], "bert": ["query", "value"]}


def stir(loaded):
    with torch.no_grad():
        for i, p in enumerate(p for p in loaded.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.4)
    return loaded


def saved(tmp_path, family="llama", head=None, changes=(), safe=True, **spec):
    """(transformers' model of the backbone, ours), and the folder of a LoRA that peft put on a third."""
    kind = "BertForSequenceClassification" if head else None
    theirs, ours = twins.pair(family, tmp_path / "base", kind=kind, num_labels=head, **dict(changes))
    spec = {"r": 3, "lora_alpha": 7, "target_modules": QV.get(family)} | copy.deepcopy(spec)  # peft adds to its lists
    third = type(theirs).from_pretrained(tmp_path / "base", **({"num_labels": head} if head else {}))
    loaded = stir(peft.get_peft_model(third, peft.LoraConfig(**spec)))
    loaded.save_pretrained(tmp_path / "peft", safe_serialization=safe)
    return theirs, ours


def assert_as_reloaded(theirs, ours, folder):
    plain = output(theirs, words(2, 20)).detach()
    right = output(peft.PeftModel.from_pretrained(theirs, folder).eval(), words(2, 20)).detach()
    got = output(export.from_peft(ours, folder).eval(), words(2, 20)).detach()
    assert (right - plain).abs().max() > 0.1  # the LoRA does something
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", ["llama", "gptj", "bert"])
def test_a_plain_lora_has_the_rank_alpha_and_modules_that_it_had_there(family, tmp_path):
    theirs, ours = saved(tmp_path, family, lora_dropout=0.25)
    assert_as_reloaded(theirs, ours, tmp_path / "peft")
    assert (ours.sibo.rank, ours.sibo.alpha, ours.sibo.dropout) == (3, 7, 0.25)
    assert sum(isinstance(x, sibo.LoRA) for x in ours.modules()) == 4


@pytest.mark.parametrize("spec", [
    {"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}},
    {"rank_pattern": {r"layers\.1\..*": 1, "self_attn.q_proj": 5},
     "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3}},
    {"rank_pattern": {"proj": 9, "^model.layers.(0|1).self_attn.v_proj": 2}}, {"alpha_pattern": {"q_proj": 0}},
    {"lora_alpha": -3}, {"lora_alpha": 0.5}, {"fan_in_fan_out": True}, {"init_lora_weights": "gaussian"},
    {"init_lora_weights": False}, {"r": 4, "init_lora_weights": "orthogonal"}, {"task_type": "CAUSAL_LM"},
    {"target_modules": r".*\.1\..*(up|q)_proj"}, {"target_modules": "all-linear"}, {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    {"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"exclude_modules": r"model\.layers\.1.*"},
    {"modules_to_save": ["score", "no_such_module"]}], ids=str)
def test_a_key_that_changes_the_numbers_is_honoured(spec, tmp_path):
    theirs, ours = saved(tmp_path, **spec)
    assert_as_reloaded(theirs, ours, tmp_path / "peft")


HEADS = [{"target_modules": ["lm_head"], "use_rslora": True}, {"modules_to_save": ["embed_tokens"]},
         {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["norm"]},
         {"target_modules": ["v_proj", "lm_head"], "modules_to_save": ["lm_head"]}]


@pytest.mark.parametrize("spec", HEADS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_heads_embeddings_and_norms_come_along_also_where_the_backbones_are_tied(spec, tied, tmp_path):
    theirs, ours = saved(tmp_path, changes={"tie_word_embeddings": tied}, **spec)
    assert_as_reloaded(theirs, ours, tmp_path / "peft")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_a_small_modern_model_takes_its_lora_and_goes_to_transformers(family, tmp_path):
    theirs, ours = saved(tmp_path, family, target_modules=["q_proj", "down_proj"])
    assert_as_reloaded(theirs, ours, tmp_path / "peft")
    right = output(ours, words(2, 20))
    folder.write(ours, tmp_path / "hf", tmp_path / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [type(loaded).__name__]
    torch.testing.assert_close(output(loaded, words(2, 20)), right, rtol=0, atol=2e-5 * float(right.abs().max()))


@pytest.mark.parametrize("spec", HEADS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_what_came_from_peft_goes_back_and_to_transformers(spec, tied, tmp_path):
    theirs, ours = saved(tmp_path, changes={"tie_word_embeddings": tied}, rank_pattern={"v_proj": 2}, **spec)
    right = output(export.from_peft(ours, tmp_path / "peft"), words(2, 20))
    export.to_peft(ours, tmp_path / "back", "base")
    folder.write(ours, tmp_path / "hf", tmp_path / "base")
    own_head = "lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] != own_head
    for loaded in (type(theirs).from_pretrained(tmp_path / "hf"), model.from_pretrained(tmp_path / "hf"),
                   peft.PeftModel.from_pretrained(theirs, tmp_path / "back").eval()):
        torch.testing.assert_close(output(loaded, words(2, 20)), right, rtol=0, atol=2e-5 * float(right.abs().max()))


@pytest.mark.parametrize("spec", [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_2"}, {"init_lora_weights": "olora"},
    {"init_lora_weights": "lora_ga"}, {"init_lora_weights": "mica"}, {"use_dora": True}, {"bias": "lora_only"},
    {"bias": "all"}, {"lora_bias": True}, {"alora_invocation_tokens": [5, 6]}, {"trainable_token_indices": [3]},
    {"layer_replication": [(0, 2), (1, 2)]}, {"kasa_config": peft.KasaConfig()}, {"velora_config": peft.VeloraConfig()},
    {"ensure_weight_tying": True}], ids=str)
def test_a_key_of_more_than_a_plain_lora_is_refused_by_name(spec, tmp_path):
    _, ours = saved(tmp_path, **spec)
    with refused("adapter_config.json", f"expected {next(iter(spec))} ", "as in a plain LoRA, got", "merge_and_unload"):
        export.from_peft(ours, tmp_path / "peft")
    assert not hasattr(ours, "sibo")


def test_every_key_of_pefts_own_list_is_known():
    assert not {f.name for f in dataclasses.fields(peft.LoraConfig)} - KEYS.keys()


@pytest.mark.parametrize("key", sorted(export.ONLY))
def test_no_key_is_on_in_a_plain_lora(key, tmp_path):
    _, ours = saved(tmp_path)
    edit(tmp_path / "peft", **{key: {"some": "value"}})
    with refused(f"expected {key} "):
        export.from_peft(ours, tmp_path / "peft")


@pytest.mark.parametrize("key", sorted(export.HONOURED))
def test_a_value_of_another_type_is_refused_by_its_key(key, tmp_path):
    _, ours = saved(tmp_path)
    edit(tmp_path / "peft", **{key: True if key != "use_rslora" else 1})
    with refused(f"expected {key} "):
        export.from_peft(ours, tmp_path / "peft")


def test_a_key_of_tomorrow_is_refused_by_name(tmp_path):
    _, ours = saved(tmp_path)
    edit(tmp_path / "peft", use_hyper_lora=0.5)
    with refused("adapter_config.json", "got 'use_hyper_lora' with 0.5"):
        export.from_peft(ours, tmp_path / "peft")


def test_a_folder_of_pefts_first_version_loads(tmp_path):
    theirs, ours = saved(tmp_path, safe=False)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({
        "base_model_name_or_path": "some/llama", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 7, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
        "peft_type": "LORA", "r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}))
    assert_as_reloaded(theirs, ours, tmp_path / "peft")


@pytest.mark.parametrize("spec", [{}, {"target_modules": ["query", "dense"]}, {"modules_to_save": ["pooler"]}], ids=str)
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_classifier_of_transformers_bert_comes_along(spec, task, tmp_path):
    theirs, ours = saved(tmp_path, "bert", 3, task_type=task, **spec)
    assert_as_reloaded(theirs, ours, tmp_path / "peft")
    assert ours.classifier.out.weight.requires_grad == (task == "SEQ_CLS")


def test_other_labels_than_the_classifiers_are_refused(tmp_path):
    saved(tmp_path, "bert", 3, task_type="SEQ_CLS")
    ours = model.from_pretrained(tmp_path / "base", num_labels=3)
    edit_tensors(tmp_path / "peft", {"base_model.model.classifier.weight": torch.zeros(2, 32)})
    with refused("classifier.weight", "expected (3, 32), got (2, 32)"):
        export.from_peft(ours, tmp_path / "peft")


def edit_tensors(folder, new, lost=()):
    file = folder / "adapter_model.safetensors"
    stored = load_file(file) | new
    save_file({n: t for n, t in stored.items() if n not in lost}, file)


NAME = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(("new", "lost", "says"), [
    ({}, [f"{NAME}.lora_B.weight"], "expected (32, 3), got none"),
    ({f"{NAME}.lora_A.weight": torch.ones(2, 32)}, [], "expected (3, 32), got (2, 32)"),
    ({NAME.replace("q_", "k_") + ".lora_A.weight": torch.ones(3, 32)}, [], "expected LoRA on this model's target_mo"),
    ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 61)}, [], "expected LoRA on this model's"),
    ({f"{NAME}.lora_magnitude_vector": torch.ones(32)}, [], "expected LoRA on this model's target_modules"),
    ({"base_model.model.lm_head.weight": torch.ones(61, 32)}, [], "expected this backbone's own weight, got another"),
    ({f"{NAME}.base_layer.weight": torch.ones(32, 32)}, [], "expected this backbone's own weight, got another")],
    ids=range(7))
def test_tensors_and_config_that_do_not_fit_each_other_leave_the_model_as_it_was(new, lost, says, tmp_path):
    _, ours = saved(tmp_path)
    edit_tensors(tmp_path / "peft", new, lost)
    with refused("adapter_model.safetensors", says):
        export.from_peft(ours, tmp_path / "peft")
    assert not hasattr(ours, "sibo")


@pytest.mark.parametrize(("old", "new", "says"), [
    ('"LORA"', '"IA3"', "expected peft_type 'LORA'"), ('"LORA"', '"ADALORA"', "expected peft_type 'LORA'"),
    ('"task_type": null', '"task_type": "TOKEN_CLS"', "expected task_type "), ('"q_proj"', '"("', "tensor"),
    ('"rank_pattern": {}', '"rank_pattern": {"q_proj": 0}', "rank 0"),
    ('"rank_pattern": {}', '"rank_pattern": {"(": 3}', "malformed"),
    ('"rank_pattern": {}', '"rank_pattern": {"(.|.|.)*[^a-z]": 3}', "malformed"),
    ('"alpha_pattern": {}', '"alpha_pattern": {"q_proj": "x"}', "alpha 'x'"),
    ('"modules_to_save": null', '"modules_to_save": [3]', "malformed"),
    ('"lora_alpha": 7', '"lora_alpha": 1e999', "inf"),
    ('"exclude_modules": null', '"exclude_modules": ".*"', "name no linear module of this model")])
def test_a_malformed_config_is_one_line(old, new, says, tmp_path):
    _, ours = saved(tmp_path)
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(file.read_text().replace(old, new))
    with refused("adapter_", says):
        export.from_peft(ours, tmp_path / "peft")


def test_safetensors_win_over_a_pickle_as_in_peft(tmp_path):
    theirs, ours = saved(tmp_path)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    torch.save({n: torch.zeros_like(t) for n, t in stored.items()}, tmp_path / "peft" / "adapter_model.bin")
    assert_as_reloaded(theirs, ours, tmp_path / "peft")


def test_ranks_that_were_filled_up_stay_zero_in_training(tmp_path):
    _, ours = saved(tmp_path, rank_pattern={"q_proj": 1})
    export.from_peft(ours, tmp_path / "peft").train()
    model.loss(ours, words(2, 9), words(2, 9)).backward()
    q = ours.blocks[0].attn.q_proj
    assert q.down.grad[0].abs().sum() > 0 and not q.down.grad[1:].any() and not q.up.grad[:, 1:].any()


def test_no_adapter_at_all_is_named(tmp_path):
    _, ours = saved(tmp_path)
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with refused("expected adapter_model.safetensors or adapter_model.bin, got neither", by=FileNotFoundError):
        export.from_peft(ours, tmp_path / "peft")


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_classifier_that_peft_trained_is_scored_and_nothing_without_one(task_type, tiny_bert, tmp_path, capsys):
    draw = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    theirs = transformers.BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    spec = peft.LoraConfig(r=2, target_modules=["query"], task_type=task_type)
    loaded = stir(peft.get_peft_model(theirs, spec)).eval()
    loaded.save_pretrained(tmp_path / "peft")
    pairs = [("A red house.", f"It is a house of {n} rooms.") for n in range(20)]
    with torch.no_grad():
        right = loaded(**draw(*zip(*pairs, strict=True), return_tensors="pt", padding=True)).logits.argmax(-1).tolist()
    labels = [int(x) ^ (i % 4 == 0) for i, x in enumerate(right)]  # a quarter is wrong
    (tmp_path / "glue/RTE").mkdir(parents=True)
    (tmp_path / "glue/RTE/dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(
        f"{i}\t{a}\t{b}\t{'not_entailment' if y else 'entailment'}\n"
        for i, ((a, b), y) in enumerate(zip(pairs, labels, strict=True))))
    args = evaluation.parser().parse_args(["--backbone", str(tiny_bert), "--peft", str(tmp_path / "peft"), "--task",
                                           "rte", "--data-dir", str(tmp_path)])
    if task_type:
        evaluation.main(args)
        assert capsys.readouterr().out.startswith("accuracy 0.7500 (n 20")
    else:
        with refused("expected a trained classifier head, got none", "or a --peft with a classifier"):
            evaluation.main(args)


def test_a_key_is_refused_before_the_backbone_is_looked_for(tmp_path):
    spec = {"peft_type": "LORA", "target_modules": [], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(spec))
    with refused("expected use_dora None or False"):
        evaluation.main(evaluation.parser().parse_args(["--backbone", "no-such", "--peft", str(tmp_path)]))


def test_a_norm_that_no_name_tells_apart_is_refused_before_the_model_is_touched(tmp_path):
    _, ours = saved(tmp_path, "gptj", modules_to_save=["ln_f"])  # here each block has a norm of that name
    with refused("adapter_config.json: modules_to_save: ", "'blocks.0.norm.bias'"):
        export.from_peft(ours, tmp_path / "peft")
    assert not hasattr(ours, "sibo")


@pytest.mark.parametrize(("spec", "fits"), [({}, False), ({"modules_to_save": ["pooler", "classifier"]}, True)])
def test_a_pooler_that_neither_backbone_nor_lora_has_is_never_drawn(spec, fits, tmp_path):
    theirs, _ = saved(tmp_path, "bert", 3, task_type="SEQ_CLS", **spec)
    twins.edit_tensors(tmp_path / "base", lambda stored: [stored.pop(n) for n in list(stored) if "pooler" in n])
    ours = model.from_pretrained(tmp_path / "base", num_labels=3)
    if fits:
        return assert_as_reloaded(theirs, ours, tmp_path / "peft")
    with refused("'base_model.model.bert.pooler.dense.weight'", "this backbone's files lack it"):
        export.from_peft(ours, tmp_path / "peft")
