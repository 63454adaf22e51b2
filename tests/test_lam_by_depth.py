"""λ that changes with depth: what each module gets, and that saving, switching and folding keep it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import sibo_layers, stir, tiny

import sibo
from sibo_lab.publish import folder

IDS = torch.arange(12).reshape(2, 6)
SHARES = {"even": [1, 1, 1, 1], "rising": [0, 2 / 3, 4 / 3, 2], "falling": [2, 4 / 3, 2 / 3, 0],
          "first-third": [1, 1, 0, 0], "last-third": [0, 0, 1, 1]}


def deep(by_depth, method="adapter", **more):
    sizes = {"rank": 3} if method == "lora" else {"bottleneck": 3}
    return stir(sibo.inject(tiny(num_hidden_layers=4), method, 0.2, lam_by_depth=by_depth, **sizes, **more))


@pytest.mark.parametrize("by_depth", SHARES)
def test_each_blocks_module_mixes_its_own_share_of_h0(by_depth):
    m, by_hand = deep(by_depth), deep("even")
    for (_, x), share in zip(sibo_layers(by_hand), SHARES[by_depth], strict=True):
        x.lam_start = 0.2 * share
    assert [x.lam() for _, x in sibo_layers(m)] == pytest.approx([0.2 * share for share in SHARES[by_depth]])
    assert torch.allclose(m(IDS), by_hand(IDS), atol=1e-12)


def test_a_third_is_what_naming_its_modules_is():
    named = deep("even", sibo_at=("blocks.2.mlp", "blocks.3.mlp"))
    assert torch.equal(deep("last-third")(IDS), named(IDS))
    assert "get h0:  2 modules (blocks.2.mlp, blocks.3.mlp)" in sibo.summary(deep("last-third"))
    assert "λ = 0.2, last-third\n" in sibo.summary(deep("last-third")) and "λ = 0.2\n" in sibo.summary(named)


@pytest.mark.parametrize("by_depth", SHARES)
def test_all_modules_of_a_block_have_its_lam(by_depth):
    m = deep(by_depth, "lora", sibo_at="both")
    found = {name: x.lam() for name, x in sibo_layers(m) if "down_proj" not in name}
    assert len(found) == 4 * 4  # of a block's q_proj, k_proj, v_proj and up_proj
    for name, lam in found.items():
        assert lam == pytest.approx(0.2 * SHARES[by_depth][int(name.split(".")[1])])


def test_each_stack_of_an_encoder_decoder_rises_on_its_own():
    from transformers import T5Config, T5Model

    m = sibo.inject(T5Model(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=8, num_layers=3, num_heads=2)), "lora", 0.2,
                    lam_by_depth="rising", targets=("q",), sibo_at=("*.0.SelfAttention.q",))
    lams = {name: x.lam() for name, x in sibo_layers(m) if "SelfAttention" in name}
    for stack in ("encoder", "decoder"):
        assert [lam for name, lam in lams.items() if name.startswith(stack)] == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize("by_depth", SHARES)
def test_one_block_alone_has_lam_itself(by_depth):
    m = sibo.inject(tiny(num_hidden_layers=4), "adapter", 0.2, lam_by_depth=by_depth, sibo_at=("blocks.1.mlp",))
    assert [x.lam() for _, x in sibo_layers(m) if x.lam()] == [pytest.approx(0.2)]


def test_on_average_a_rising_or_falling_lam_is_lam():
    for by_depth in ("rising", "falling"):
        lams = [x.lam() for _, x in sibo_layers(deep(by_depth, "lora", targets=("up_proj",)))]
        assert sum(lams) / len(lams) == pytest.approx(0.2)


@pytest.mark.parametrize("learn_lam", [False, True])
def test_a_saved_model_loads_with_each_modules_lam(tmp_path, learn_lam):
    m = deep("rising", learn_lam=learn_lam)
    sibo.save(m, tmp_path)
    again = sibo.load(tiny(num_hidden_layers=4), tmp_path)
    assert torch.equal(again(IDS), m(IDS)) and again.sibo.lam_by_depth == "rising"


def test_a_file_from_before_lam_could_change_with_depth_loads_as_even(tmp_path):
    m, file = deep("even"), tmp_path / "adapter.safetensors"
    sibo.save(m, tmp_path)
    with safe_open(file, "pt") as f:
        spec = json.loads(f.metadata()["sibo"])
    del spec["lam_by_depth"]
    save_file(load_file(file), file, {"sibo": json.dumps(spec)})
    assert torch.equal(sibo.load(tiny(num_hidden_layers=4), tmp_path)(IDS), m(IDS))


def test_set_lam_keeps_the_shares():
    m = sibo.set_lam(deep("falling"), 0.1)
    assert [x.lam() for _, x in sibo_layers(m)] == pytest.approx([0.1 * share for share in SHARES["falling"]])
    with pytest.raises(ValueError, match="lam: expected below 0.5 to go up to twice that, falling, got 0.5"):
        sibo.set_lam(m, 0.5)


@pytest.mark.parametrize("by_depth", ["rising", "last-third"])
def test_a_folded_lora_is_the_unfolded_one(by_depth):
    m = deep(by_depth, "lora")
    before = m(IDS)
    assert torch.allclose(sibo.merge(m)(IDS), before, atol=1e-10)


def test_a_hugging_face_folder_says_each_modules_lam():
    m = deep("rising")
    layers = dict(sibo_layers(m))
    told = folder.method(m, layers, {name: name for name in layers})
    assert list(told["lam"].values()) == pytest.approx([0.2 * share for share in SHARES["rising"]])
