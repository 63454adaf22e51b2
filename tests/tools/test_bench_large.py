"""The shapes of billions, tried on small ones."""

import pytest
import torch

import model
from sibo_lab import files
from sibo_lab.backbone import locate
from sibo_lab.tools import bench_large

TINY = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "rms_norm_eps": 1e-6}
TINY_GPTJ = {"model_type": "gptj", "vocab_size": 90, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}


@pytest.mark.parametrize("spec", [TINY, TINY_GPTJ])
def test_a_written_shape_is_many_shards_that_load_whole(tmp_path, spec):
    bench_large.write_shape(spec, tmp_path)
    index = files.read_json(tmp_path / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) == len(index["weight_map"])
    m = model.from_pretrained(tmp_path, torch.bfloat16)  # strict: nothing missing, nothing unknown
    assert sum(p.numel() * 2 for p in m.parameters()) == index["metadata"]["total_size"]
    logits = m(torch.arange(9)[None])
    assert torch.isfinite(logits).all() and logits.std() > 0.01
    assert all(p.detach().float().std().item() == pytest.approx(0.02, rel=0.2) for p in m.parameters() if p.dim() > 1)
    assert all(bool((p == name.endswith("weight")).all()) for name, p in m.named_parameters() if p.dim() == 1)
    bench_large.write_shape(spec | {"vocab_size": 7}, tmp_path)
    assert files.read_json(tmp_path / "config.json") == spec  # it was there already


@pytest.mark.parametrize("method", ["adapter-sibo", "lora"])
def test_a_shape_trains_by_the_papers_recipe_and_its_memory_is_watched(tmp_path, monkeypatch, method):
    monkeypatch.setitem(locate.SHAPES, "tiny", TINY)
    bench_large.write_shape(TINY, tmp_path)
    found = bench_large.train_shape("tiny", method, tmp_path, steps=2)
    assert (found["shape"], found["method"], found["base_bits"]) == ("tiny", method, None)
    assert len(found["losses"]) == len(found["step_seconds"]) == 2
    assert 0 < found["highest"]["anonymous"] <= found["peak"]
    assert found["trained"] == (2 * 2 * 64 * 256 if method == "adapter-sibo" else 2 * 32 * (3 * 128 + 2 * 160))
