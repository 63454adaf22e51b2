"""gguf.py: a .gguf file is the model that it was converted from, and a bad one is refused by name."""

import inspect
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from twins import LLAMA3, assert_same_model, refused, rope_freqs, theirs_of, words

import model
from sibo_lab.backbone import gguf as ours

HF = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
      "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
      "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
      "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def write_gguf(file: Path, theirs: torch.nn.Module, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
               fields: dict | None = None, tensors: dict | None = None, architecture: str | None = None) -> Path:
    """As llama.cpp's converter: its names, norms and biases in F32, and in LLaMA and SmolLM3 the rows of q and k of a
    head permuted so that the pairs (i, i + D/2) of the rotary embedding become neighbours. `fields` of the architecture
    come on top; None takes one away."""
    c, stored = theirs.config, theirs.state_dict()
    w = gguf.GGUFWriter(file, arch := architecture or c.model_type)
    w.add_string("general.name", "tiny")  # transformers reads it
    w.add_token_list([str(i) for i in range(c.vocab_size)])
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    known = {"embedding_length": c.hidden_size, "attention.head_count": c.num_attention_heads,
             "attention.head_count_kv": c.num_key_value_heads, "feed_forward_length": c.intermediate_size,
             "block_count": c.num_hidden_layers, "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
             "rope.freq_base": c.rope_parameters["rope_theta"], "context_length": c.max_position_embeddings,
             "attention.key_length": head_dim, "attention.value_length": head_dim, "vocab_size": c.vocab_size}
    for key, value in (known | (fields or {})).items():
        if value is not None:
            add = {int: w.add_uint32, float: w.add_float32, str: w.add_string, bool: w.add_bool, list: w.add_array}
            add[type(value)](f"{arch}.{key}", value)

    def add(name: str, data: np.ndarray) -> None:
        if arch in ("llama", "smollm3") and name.split(".")[-2] in ("attn_q", "attn_k"):
            heads = c.num_attention_heads if "attn_q" in name else c.num_key_value_heads
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if data.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            w.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
        else:
            w.add_tensor(name, np.ascontiguousarray(data))

    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"} | {
        f"blk.{i}.{theirs}.{leaf}": f"model.layers.{i}.{hf}.{leaf}" for theirs, hf in HF.items()
        for i in range(c.num_hidden_layers) for leaf in ("weight", "bias")}
    for name, hf in names.items():
        if hf in stored and not (name == "output.weight" and c.tie_word_embeddings):
            add(name, stored[hf].numpy())
    for name, data in (tensors or {}).items():
        w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


F32, Q8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
KINDS = {"llama": {}, "llama with biases": {"attention_bias": True, "mlp_bias": True}, "qwen2": {
    "use_sliding_window": False}, "qwen3": {"head_dim": 12}, "smollm3": {"num_hidden_layers": 5,
                                                                        "no_rope_layer_interval": 4}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_it_was_converted_from(tmp_path, kind, tied):
    theirs = theirs_of(kind.split()[0], tie_word_embeddings=tied, **THETA, **KINDS[kind])
    assert_same_model(model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs)), theirs)


@pytest.mark.parametrize("family, changes", [("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 128})])
def test_transformers_reads_the_same_model_from_the_file(tmp_path, family, changes):
    """Its reader takes LLaMA's head_dim from rope.dimension_count, and Qwen3's is always 128."""
    theirs = theirs_of(family, **changes)
    file = write_gguf(tmp_path / "m.gguf", theirs, fields={"rope.dimension_count": 8} if family == "llama" else None)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert_same_model(model.from_pretrained(file), read.eval())


@pytest.mark.parametrize("fields, scaling", [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    ({"rope.scaling.factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    ({"rope.scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    ({"rope.scale_linear": 2.0, "rope.scaling.factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 3.0}, {"rope_type": "default"}),
    ({"rope.scaling.type": "linear"}, {"rope_type": "default"}),
    ({"rope.scaling.factor": 0.0}, {"rope_type": "default"})])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_positions_are_stretched_as_llama_cpp_does(tmp_path, family, fields, scaling):
    theirs = theirs_of(family, rope_parameters={"rope_theta": 500.0, **scaling})
    assert_same_model(model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs, fields=fields)), theirs,
                      words(2, 40))


def test_rope_freqs_are_llama_3s_scaling(tmp_path):
    theirs = theirs_of("llama", rope_parameters={"rope_theta": 100.0, **LLAMA3})
    divisors = rope_freqs(100.0, 8, 8.0, 1.0, 4.0, 32)
    assert len(set(divisors)) > 2, "some frequencies stay, some are divided, some between"
    file = write_gguf(tmp_path / "m.gguf", theirs, tensors={"rope_freqs.weight": divisors})
    assert_same_model(model.from_pretrained(file), theirs, words(2, 40))


def test_the_metadata_as_a_config_json_is_the_same_model_in_transformers(tmp_path):
    theirs = theirs_of("llama", rope_parameters={"rope_theta": 100.0, **LLAMA3})
    file = write_gguf(tmp_path / "m.gguf", theirs, tensors={"rope_freqs.weight": rope_freqs(100., 8, 8., 1., 4., 32)})
    spec = ours.spec(file, *ours.read(file))
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig(**spec)).eval()
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(again(words(2, 40)).logits, theirs(words(2, 40)).logits, atol=1e-5, rtol=0)


def test_a_quantized_gguf_file_is_the_model_with_its_matrices_rounded(tmp_path):
    theirs = theirs_of("llama", intermediate_size=64)
    ours = model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs, Q8))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() > 1:  # Q8_0: 32 weights of a row share a half-precision scale, the largest of them becomes 127
                blocks = p.view(-1, 32)
                scale = blocks.abs().max(1, keepdim=True).values / 127
                p.copy_(((blocks / scale).round() * scale.half().float()).view_as(p))
    assert_same_model(ours, theirs)


ONE = np.ones(4, np.float32)


@pytest.mark.parametrize("changes, named", [
    ({"architecture": "gemma"}, "expected general.architecture one of llama, qwen2, qwen3, smollm3, got 'gemma'"),
    ({"fields": {"rope.scaling.type": "yarn"}}, "expected llama.rope.scaling.type 'none' or 'linear', got 'yarn'"),
    ({"fields": {"rope.scaling.factor": "3"}}, "expected llama.rope.scaling.factor a number, got '3'"),
    ({"fields": {"context_length": None}}, "got no 'context_length'"),
    ({"fields": {"expert_count": 8}}, "expected llama.expert_count 0, got 8"),
    ({"fields": {"attention.sliding_window": 4096}}, "expected llama.attention.sliding_window 0, got 4096"),
    ({"fields": {"attention.value_length": 4}}, "expected llama.attention.value_length 8, got 4"),
    ({"fields": {"rope.dimension_count": 4}}, "expected llama.rope.dimension_count 8, got 4"),
    ({"fields": {"attention.causal": False}}, "expected llama.attention.causal True, got False"),
    ({"fields": {"logit_scale": 2.0}}, "expected llama.logit_scale to be absent, got 2.0"),
    ({"fields": {"of.tomorrow": 1}}, "expected llama.of.tomorrow to be absent, got 1"),
    ({"tensors": {"rope_freqs.weight": np.ones(3, np.float32)}}, "rope scaling: long_factor: expected 4 numbers"),
    ({"tensors": {"rope_freqs.weight": -ONE}}, "long_factor: expected positive numbers"),
    ({"tensors": {"rope_freqs.weight": np.ones(4, np.float16)}}, "expected rope_freqs.weight in float32"),
    ({"tensors": {"blk.0.attn_sinks.weight": ONE}}, "unexpected tensor 'blk.0.attn_sinks.weight'")])
def test_a_gguf_file_of_another_kind_is_refused(tmp_path, changes, named):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama"), **changes)
    with refused(str(file), named):
        model.from_pretrained(file)


def test_factors_of_frequencies_are_refused_where_llama_cpp_reads_none(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("qwen2"), tensors={"rope_freqs.weight": ONE})
    with refused("unexpected tensor 'rope_freqs.weight'"):
        model.from_pretrained(file)


def test_a_part_of_a_model_and_an_adapter_are_refused(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama"))
    fields, stored = ours.read(file)
    with refused("expected split.count 1, a whole model in one file, got 2"):
        ours.spec(file, fields | {"split.count": 2}, stored)
    with refused("expected general.type 'model', got 'adapter'"):
        ours.spec(file, fields | {"general.type": "adapter"}, stored)


@pytest.mark.parametrize("family", ours.FAMILIES)
def test_every_key_that_llama_cpp_knows_is_read_or_refused_or_changes_nothing(tmp_path, family):
    """The gguf package lists them; 77 is nothing that any of them means by default."""
    file = write_gguf(tmp_path / "m.gguf", theirs_of(family))
    fields, stored = ours.read(file)
    keys = [value for kind in vars(gguf.Keys).values() if inspect.isclass(kind)
            for owner in (kind, *filter(inspect.isclass, vars(kind).values())) for value in vars(owner).values()
            if isinstance(value, str) and value.startswith("{arch}.")]
    assert len(keys) > 100
    for key in {key.removeprefix("{arch}.") for key in keys} - {*ours.READ, *ours.INERT}:
        with refused(f"{family}.{key}", "got 77"):
            ours.spec(file, fields | {f"{family}.{key}": 77}, stored)


@pytest.mark.parametrize("left", [0, 4, 500, 5000, -100])
def test_a_truncated_gguf_file_is_refused(tmp_path, left):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama"))
    file.write_bytes(file.read_bytes()[:left])
    with refused(str(file), "not a whole GGUF file"):
        model.from_pretrained(file)


def test_without_the_gguf_package_folders_load_and_a_gguf_file_says_what_to_install(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama"))
    theirs_of("llama").save_pretrained(tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_same_model(model.from_pretrained(tmp_path / "folder"), theirs_of("llama"))
    with refused("a .gguf file needs the gguf package: pip install gguf"):
        model.from_pretrained(file)


EACH = {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2], "feed_forward_length": [48, 48]}


def test_numbers_for_each_layer_are_one_where_they_are_equal(tmp_path):
    theirs = theirs_of("llama")
    assert_same_model(model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs, fields=EACH)), theirs)


@pytest.mark.parametrize("key", EACH)
@pytest.mark.parametrize("each", [[4, 2], [4], [4, 4, 4]], ids=str)
def test_numbers_that_differ_by_layer_are_refused_by_their_key(tmp_path, key, each):
    with refused(f"llama.{key} the same number for each layer, got {each}"):
        model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs_of("llama"), fields={key: each}))


def test_shapes_are_looked_at_without_numbers(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama", intermediate_size=64), kind=Q8)
    m = model.build(model.config.read_spec(file))
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    model.check(m, file)
    m.head = torch.nn.Linear(32, 60, bias=False, device="meta")
    with refused("m.gguf: tensor 'lm_head.weight'", "shape [60, 32], got torch.float32 of shape [61, 32]"):
        model.check(m, file)
