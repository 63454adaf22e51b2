"""gguf.py: a .gguf file is the model that it was converted from, and a bad one is refused by name."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from twins import assert_same_model, refused, theirs_of

import model


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
    theirs = theirs_of("llama", tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert_same_model(model.from_pretrained(write_gguf(tmp_path / "m.gguf", theirs, F32)), theirs)


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


@pytest.mark.parametrize("changes, named", [
    ({"architecture": "qwen2"}, "expected general.architecture 'llama', got 'qwen2'"),
    ({"scaling": gguf.RopeScalingType.YARN}, "expected llama.rope.scaling.type 'none', got 'yarn'"),
    ({"without_context": True}, "no 'llama.context_length'"),
    ({"extra": ["rope_freqs.weight"]}, "unexpected tensor 'rope_freqs.weight'")])
def test_a_gguf_file_of_another_kind_is_refused(tmp_path, changes, named):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama"), F32, **changes)
    with refused(str(file), named):
        model.from_pretrained(file)


@pytest.mark.parametrize("left", [0, 4, 500, 5000, -100])
def test_a_truncated_gguf_file_is_refused(tmp_path, left):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama"), F32)
    file.write_bytes(file.read_bytes()[:left])
    with refused(str(file), "not a whole GGUF file"):
        model.from_pretrained(file)


def test_without_the_gguf_package_folders_load_and_a_gguf_file_says_what_to_install(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", theirs_of("llama"), F32)
    theirs_of("llama").save_pretrained(tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_same_model(model.from_pretrained(tmp_path / "folder"), theirs_of("llama"))
    with refused("a .gguf file needs the gguf package: pip install gguf"):
        model.from_pretrained(file)
