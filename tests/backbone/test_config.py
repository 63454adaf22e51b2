"""config.py: old spellings mean the same as new ones, and what is not implemented is refused by name."""

import re

import pytest
from twins import LLAMA3, assert_same_model, edit_config, pair, refused, theirs_of, words

import model


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
    ("llama", {"model_type": "mamba"}, "model_type: expected one of bert, gptj, llama, got 'mamba'"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ("bert", {"hidden_act": "swish2"}, "hidden_act: expected gelu, gelu_new, relu, silu, got 'swish2'"),
    ("bert", {"position_embedding_type": "relative_key"},
     "position_embedding_type: expected None or 'absolute', got 'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder: expected None or False, got True"),
    ("gptj", {"quantization_config": {"bits": 4}}, "quantization_config: expected None, got {'bits': 4}"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None},
     "rope scaling: expected one of default, linear, llama3, got 'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}},
     "rope scaling: expected one of default, linear, llama3, got 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}},
     "rope scaling 'linear': factor: expected a positive number, got None"),
    ("llama", {"hidden_size": None}, "hidden_size: expected a positive integer, at most 1048576, got None"),
    ("llama", {"vocab_size": "many"}, "vocab_size: expected a positive integer, at most 2147483648, got 'many'"),
    ("bert", {"num_attention_heads": 5}, "hidden_size: expected a multiple of the 5 heads, got 32"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of num_key_value_heads 3, got 4"),
])
def test_a_setting_that_is_not_implemented_is_refused_by_name(tmp_path, family, changes, named):
    theirs_of(family).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        model.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, named", [
    ("", "not valid JSON"), ('{"model_type": "llama",\n oops}', "line 2"), ('{"\udcff": 1}', "not valid JSON"),
    ("[1]", "expected an object, got a JSON list")])
def test_a_config_that_is_no_json_object_is_refused_with_its_line(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with refused(str(tmp_path / "config.json"), named):
        model.from_pretrained(tmp_path)
