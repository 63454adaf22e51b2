"""config.py: old spellings mean the same as new ones, and what is not implemented is refused by name."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from twins import FAMILIES, LLAMA3, LLAMAS, assert_same_model, edit_config, pair, refused, theirs_of, words

import model
from sibo_lab.backbone import config

# What no number depends on: names, generation, how outputs look, how new weights are drawn, how a product is computed.
INERT = set("""transformers_version architectures output_hidden_states output_attentions return_dict dtype id2label
    label2id problem_type chunk_size_feed_forward initializer_range use_cache pad_token_id bos_token_id eos_token_id
    pretraining_tp""".split())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_that_transformers_knows_is_honoured_or_fixed_or_inert(family):
    kind = config.CONFIGS[family]
    known = {f.name for f in dataclasses.fields(kind)} | {n for base in kind.__mro__ for n in config.ONLY.get(base, {})}
    theirs = {config.ALIASES.get(f.name, f.name) for f in dataclasses.fields(FAMILIES[family][0])}
    missing = {"rope_parameters"} if family in LLAMAS else {"tie_word_embeddings"} if family == "bert" else set()
    assert theirs - known - INERT == missing, "the first is rope_theta and rope_scaling; a BertModel has no head"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_has_transformers_default(family):
    theirs = {config.ALIASES.get(f.name, f.name): f.default for f in dataclasses.fields(FAMILIES[family][0])}
    for f in dataclasses.fields(config.CONFIGS[family]):
        if f.default is not dataclasses.MISSING and f.name not in ("rope_theta", "rope_scaling"):
            assert f.default == theirs.get(f.name), f.name
    if family in LLAMAS:
        assert config.CONFIGS[family].rope_theta == FAMILIES[family][0]().rope_parameters["rope_theta"]


ODD = {  # other families' settings, and some that people write; none at its default
    "attention_bias": True, "mlp_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
    "layer_types": ["sliding_attention"] * 2, "no_rope_layers": [0, 1], "no_rope_layer_interval": 1, "rotary_dim": 2,
    "hidden_act": "gelu", "activation_function": "relu", "is_decoder": True, "add_cross_attention": True,
    "is_causal": False, "is_encoder_decoder": True, "partial_rotary_factor": 0.5, "rotary_pct": 0.5, "qkv_bias": True,
    "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "original_max_position_embeddings": 7,
    "tie_word_embeddings": True, "pretraining_tp": 2, "chunk_size_feed_forward": 4, "rms_norm_eps": 0.5,
    "layer_norm_eps": 0.5, "layer_norm_epsilon": 0.5, "position_embedding_type": "relative_key", "qk_norm": True,
    "pruned_heads": {"0": [1]}, "torch_dtype": "bfloat16", "attn_logit_softcapping": 5.0, "logits_scaling": 3.0,
    "embedding_multiplier": 3.0, "residual_multiplier": 2.0, "attention_multiplier": 1.0, "attention_chunk_size": 3,
    "final_logit_softcapping": 5.0, "num_local_experts": 4, "clip_qkv": 0.1, "initializer_range": 0.5, "norm_eps": 0.5,
    "per_layer_config": {"0": {"rms_norm_eps": 0.5}}, "transformers_weights": "other.safetensors", "use_bias": True,
    "tie_last_hidden_states": False, "quantization_config": {"quant_method": "gptq"}, "use_cache": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_of_another_family_is_refused_or_means_what_it_means_to_transformers(tmp_path, family):
    theirs_of(family).save_pretrained(tmp_path)

    def accepted(key: str) -> bool:
        try:
            return bool(config.parse(config.read_spec(tmp_path) | {key: ODD[key]}, tmp_path))
        except ValueError:
            return False

    changes = {key: ODD[key] for key in ODD if accepted(key)}
    if family in ("llama", "qwen3", "smollm3"):
        del changes["attention_bias"]  # it needs tensors
    if family in ("llama", "smollm3"):
        del changes["mlp_bias"]
    assert 15 < len(changes) < len(ODD)
    edit_config(tmp_path, **changes)
    kind = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_model(model.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("old, new", [
    ({"rope_theta": 500.0}, {"rope_type": "default"}),
    ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}, {"rope_type": "linear", "factor": 3.0}),
    ({"rope_theta": 500.0, "rope_scaling": LLAMA3}, LLAMA3)])
def test_rope_settings_in_the_old_spelling_mean_the_same(tmp_path, old, new):
    theirs, _ = pair("llama", tmp_path, rope_parameters={"rope_theta": 500.0, **new})
    edit_config(tmp_path, rope_parameters=None, **old)
    assert_same_model(model.from_pretrained(tmp_path), theirs, words(2, 40))


def test_a_config_without_key_value_heads_has_as_many_as_heads(tmp_path):
    theirs, _ = pair("llama", tmp_path, num_key_value_heads=4)
    edit_config(tmp_path, num_key_value_heads=None)
    assert_same_model(model.from_pretrained(tmp_path), theirs, words(2, 8))


@pytest.mark.parametrize("family, changes, named", [
    ("llama", {"model_type": "mamba"}, "model_type: expected one of bert, gptj, llama, mistral, qwen2, qwen3, smollm3, "
                                       "got 'mamba'"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ("bert", {"hidden_act": "swish2"}, "hidden_act: expected gelu, gelu_new, relu, silu, got 'swish2'"),
    ("bert", {"position_embedding_type": "relative_key"},
     "position_embedding_type: expected None or 'absolute', got 'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder: expected None or False, got True"),
    ("gptj", {"quantization_config": {"bits": 4}}, "quantization_config: expected None, got {'bits': 4}"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None},
     "rope scaling: expected one of default, linear, llama3, longrope, got 'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}},
     "rope scaling: expected one of default, linear, llama3, longrope, got 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}},
     "rope scaling 'linear': factor: expected a positive number, got None"),
    ("llama", {"hidden_size": None}, "hidden_size: expected a positive integer, at most 1048576, got None"),
    ("llama", {"vocab_size": "many"}, "vocab_size: expected a positive integer, at most 2147483648, got 'many'"),
    ("bert", {"num_attention_heads": 5}, "hidden_size: expected a multiple of the 5 heads, got 32"),
    ("llama", {"sliding_window": 4096}, "sliding_window: expected None, got 4096"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types: expected None, got ['full_attention', "),
    ("mistral", {"sliding_window": 0}, "sliding_window: expected a positive integer, at most 2147483648, got 0"),
    ("qwen2", {"layer_types": ["full_attention"]},
     "layer_types: expected 'full_attention' or 'sliding_attention' for each of 2 layers, got ['full_attention']"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types: expected 'full_attention' or"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types: expected full_attention where no sliding_window is in use, got"),
    ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers: expected 0 or 1 for each of 2 layers, got [1, 2]"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval: expected a positive integer"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected None or 1, got 0.5"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1, got 0.5"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
     "rope scaling 'default': full_attention: expected no such setting, got {'rope_type': 'default'}"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}},
     "rope scaling 'linear': attention_factor: expected 1, got 2.0"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "of_tomorrow": 3}},
     "rope scaling 'llama3': of_tomorrow: expected no such setting, got 3"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
                                   "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
     "rope scaling 'longrope': short_factor: expected the same as long_factor, got [1.0, 1.0, 1.0, 1.0]"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
                                   "short_factor": [], "long_factor": []}}, "long_factor: expected 4 numbers, got []"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
                                   "short_factor": 2.0, "long_factor": 2.0}}, "long_factor: expected positive numbers"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "attention_factor": 1.2,
                                   "short_factor": [2.0] * 4, "long_factor": [2.0] * 4}},
     "rope scaling 'longrope': attention_factor: expected 1, got 1.2"),
    ("qwen2", {"is_causal": False}, "is_causal: expected None or True, got False"),
    ("qwen3", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config: expected None, got {'0'"),
    ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads: expected None or {}, got {'0': [1]}"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of num_key_value_heads 3, got 4"),
])
def test_a_setting_that_is_not_implemented_is_refused_by_name(tmp_path, family, changes, named):
    theirs_of(family).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        model.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_old_spelling_of_rope_settings_counts_where_both_stand_as_in_transformers(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=500.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_model(model.from_pretrained(tmp_path), theirs, words(2, 40))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("changes", [{}, {"original_max_position_embeddings": 16}])
def test_llama3s_scaling_takes_the_trained_context_from_beside_it(tmp_path, changes, inside):
    theirs_of("llama", max_position_embeddings=64).save_pretrained(tmp_path)
    scaling = {k: v for k, v in LLAMA3.items() if inside or k != "original_max_position_embeddings"}
    edit_config(tmp_path, rope_parameters=None, rope_scaling=scaling, rope_theta=100.0, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_model(model.from_pretrained(tmp_path), theirs, words(2, 40))


@pytest.mark.parametrize("family, key", [("mistral", "num_key_value_heads"), ("smollm3", "tie_word_embeddings"),
                                         ("smollm3", "rope_parameters"), ("mistral", "sliding_window")])
def test_a_family_reads_its_own_default_where_a_key_is_missing(tmp_path, family, key):
    theirs_of(family, num_attention_heads=8, num_key_value_heads=8, sliding_window=None,
              tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: None})
    assert_same_model(model.from_pretrained(tmp_path),
                      transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), words(2, 40))


# -------------------------------------------------------------------------------------------- a BERT without model_type

GOOGLES = """attention_probs_dropout_prob hidden_act hidden_dropout_prob hidden_size initializer_range intermediate_size
    max_position_embeddings num_attention_heads num_hidden_layers type_vocab_size vocab_size""".split()


@pytest.mark.parametrize("keys", [GOOGLES, [*GOOGLES, "architectures"], ["architectures", *GOOGLES[3:]]])
def test_a_bert_is_known_by_its_architecture_or_by_the_keys_of_googles_files(tmp_path, keys):
    theirs = theirs_of("bert", kind="BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: spec[k] for k in keys}))
    assert config.read_spec(tmp_path)["model_type"] == "bert"
    assert_same_model(model.from_pretrained(tmp_path), theirs.bert)


@pytest.mark.parametrize("changes", [
    {"architectures": ["RobertaForMaskedLM"]}, {"architectures": ["BertGenerationEncoder"]}, {"architectures": "Bert"},
    {"architectures": None, "layer_norm_eps": 1e-5}, {"architectures": None, "embedding_size": 128},
    {"architectures": None, "type_vocab_size": None}], ids=str)
def test_what_may_be_a_cousin_of_bert_is_not_taken_for_one(tmp_path, changes):
    theirs_of("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, model_type=None, **changes)
    with refused("model_type: expected one of bert, ", "got None"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, named", [
    ("", "not valid JSON"), ('{"model_type": "llama",\n oops}', "line 2"), ('{"\udcff": 1}', "not valid JSON"),
    ("[1]", "expected an object, got a JSON list")])
def test_a_config_that_is_no_json_object_is_refused_with_its_line(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with refused(str(tmp_path / "config.json"), named):
        model.from_pretrained(tmp_path)
