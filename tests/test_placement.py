"""placement.py: which modules are adapted and which of them get h0, family by family, and every request that fails.

Almost nothing runs here: the models are on the meta device, without weights, so LLaMA-7B is as cheap as a toy."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import Toy
from torch import nn

import model
import sibo
from sibo_lab.placement import place
from sibo_lab.stacks import find, find_all

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LAYERS = (0, 1)


def ours(family):
    return model.build({"model_type": family, **SIZES, "rotary_dim": 4})


def theirs(family, head=False):
    """The same architecture, as transformers builds it."""
    import transformers as hf

    kind = {"llama": hf.LlamaForCausalLM, "gptj": hf.GPTJForCausalLM,
            "bert": hf.BertForSequenceClassification if head else hf.BertModel}[family]
    with torch.device("meta"):
        return kind(kind.config_class(**SIZES, **({"rotary_dim": 4} if family == "gptj" else {})))


def names(prefix, *targets):
    """These modules' names in both layers."""
    return {f"{prefix}.{i}.{t}" for i in LAYERS for t in targets}


def placed(m, method="lora", lam=0.2, **settings):
    """(names of the adapted modules, names of those that get h0, the blocks whose first one reads h0)."""
    found = place(m, sibo.Settings(method, lam, **settings))
    return set(found.widths), set(found.mixed), {stack.sources for stack in found.mixed.values()}


def inject(m, *args, **settings):
    """sibo.inject, also of a model without weights."""
    return sibo.wrap(m, place(m, sibo.Settings(*args, **settings)))


# ------------------------------------------------------------------------------------- METHOD: the table of Section 4.2

QKV = ("q_proj", "k_proj", "v_proj")
LLAMA_LORA = [f"attn.{p}" for p in QKV] + ["mlp.up_proj", "mlp.down_proj"]
GPTJ_LORA = [f"attn.{p}" for p in QKV] + ["mlp.fc_in", "mlp.fc_out"]
HF_LLAMA_LORA = [t.replace("attn.", "self_attn.") for t in LLAMA_LORA]
BERT_LORA = ["attn.q_proj", "attn.v_proj"]
HF_BERT_LORA = ["attention.self.query", "attention.self.value"]
HF_BERT_ADAPTERS = ["attention.output.dropout", "output.dropout"]


@pytest.mark.parametrize("m,prefix,method,side,adapted,get_h0", [
    (ours("llama"), "blocks", "lora", "out", LLAMA_LORA, ["mlp.up_proj"]),
    (ours("llama"), "blocks", "adapter", "out", ["mlp"], ["mlp"]),
    (ours("llama"), "blocks", "adapter", "in", ["mlp.gate_proj", "mlp.up_proj"],
     ["mlp.gate_proj", "mlp.up_proj"]),
    (ours("llama"), "blocks", "adapter", "parallel", ["mlp"], ["mlp"]),
    (ours("bert"), "blocks", "adapter", "parallel", ["attn", "mlp"], ["attn"]),
    (theirs("gptj"), "transformer.h", "adapter", "parallel", ["mlp"], ["mlp"]),
    (ours("gptj"), "blocks", "lora", "out", GPTJ_LORA, ["mlp.fc_in"]),
    (ours("gptj"), "blocks", "adapter", "out", ["mlp"], ["mlp"]),
    (ours("gptj"), "blocks", "adapter", "in", ["mlp.fc_in"], ["mlp.fc_in"]),
    (ours("bert"), "blocks", "lora", "out", BERT_LORA, BERT_LORA),
    (ours("bert"), "blocks", "adapter", "out", ["attn", "mlp"], ["attn"]),
    (theirs("llama"), "model.layers", "lora", "out", HF_LLAMA_LORA, ["mlp.up_proj"]),
    (theirs("llama"), "model.layers", "adapter", "out", ["mlp"], ["mlp"]),
    (theirs("llama"), "model.layers", "adapter", "in", ["mlp.gate_proj", "mlp.up_proj"],
     ["mlp.gate_proj", "mlp.up_proj"]),
    (theirs("gptj"), "transformer.h", "lora", "out", GPTJ_LORA, ["mlp.fc_in"]),
    (theirs("gptj"), "transformer.h", "adapter", "out", ["mlp"], ["mlp"]),
    (theirs("gptj"), "transformer.h", "adapter", "in", ["mlp.fc_in"], ["mlp.fc_in"]),
    (theirs("bert"), "encoder.layer", "lora", "out", HF_BERT_LORA, HF_BERT_LORA),
    (theirs("bert"), "encoder.layer", "adapter", "out", HF_BERT_ADAPTERS, HF_BERT_ADAPTERS[:1]),
    (theirs("bert", head=True), "bert.encoder.layer", "adapter", "out", HF_BERT_ADAPTERS,
     HF_BERT_ADAPTERS[:1]),
])
def test_each_family_is_adapted_where_the_paper_says_and_gets_h0_where_the_paper_says(m, prefix, method, side, adapted,
                                                                                     get_h0):
    blocks = f"{prefix}.0", f"{prefix}.1"
    assert placed(m, method, side=side) == (names(prefix, *adapted), names(prefix, *get_h0), {blocks})
    assert placed(m, method, lam=0.0, side=side) == (names(prefix, *adapted), set(), set())  # the plain method


def test_inject_adapts_and_hooks_what_was_placed():
    m = inject(ours("llama"), rank=2)
    found = {n: x for n, x in m.named_modules() if isinstance(x, sibo.SIBOLayer)}
    assert found.keys() == names("blocks", *LLAMA_LORA)
    assert {n for n, x in found.items() if x.lam_start} == names("blocks", "mlp.up_proj")
    for side in ("_forward_pre_hooks", "_forward_hooks"):
        assert {n for n, x in m.named_modules() if getattr(x, side)} == {"", "blocks.0", "blocks.1"}


def test_bert_has_no_adapters_on_inputs():
    with pytest.raises(ValueError, match="Bert: no known place for adapter, side in; expected targets="):
        placed(ours("bert"), "adapter", side="in")


# ----------------------------------------------------------------------------------------- Table 5: sibo_at, by hand

ATTN, WIDE = [f"attn.{p}" for p in QKV], {"llama": "mlp.down_proj", "gptj": "mlp.fc_out"}


@pytest.mark.parametrize("family,ffn", [("llama", "mlp.up_proj"), ("gptj", "mlp.fc_in")])
def test_sibo_at_moves_h0_to_attention_to_the_ffn_or_to_both_but_never_to_the_wide_module(family, ffn):
    for sibo_at, expected in (("attn", ATTN), ("ffn", [ffn]), ("both", [*ATTN, ffn])):
        adapted, mixed, _ = placed(ours(family), sibo_at=sibo_at)
        assert mixed == names("blocks", *expected) and names("blocks", WIDE[family]) <= adapted


def test_sibo_at_on_berts_two_adapters():
    for sibo_at, expected in (("attn", ["attn"]), ("ffn", ["mlp"]), ("both", ["attn", "mlp"])):
        assert placed(ours("bert"), "adapter", sibo_at=sibo_at)[1] == names("blocks", *expected)
        expected = [dict(zip(("attn", "mlp"), HF_BERT_ADAPTERS, strict=True))[x] for x in expected]
        assert placed(theirs("bert"), "adapter", sibo_at=sibo_at)[1] == names("encoder.layer", *expected)


def test_sibo_at_takes_names_one_or_several():
    assert placed(ours("llama"), sibo_at="k_proj")[1] == names("blocks", "attn.k_proj")
    assert placed(ours("llama"), sibo_at=("k_proj", "0.mlp.up_proj"))[1] == {"blocks.0.mlp.up_proj"} | names(
        "blocks", "attn.k_proj")


def test_targets_of_ones_own_all_get_h0_unless_sibo_at_says_which():
    own = ("gate_proj", "o_proj")
    assert placed(ours("llama"), targets=own)[1] == names("blocks", "mlp.gate_proj", "attn.o_proj")
    assert placed(ours("llama"), targets=own, sibo_at=("o_proj",))[:2] == (
        names("blocks", "mlp.gate_proj", "attn.o_proj"), names("blocks", "attn.o_proj"))
    assert placed(ours("llama"), targets="o_proj")[0] == names("blocks", "attn.o_proj")


def test_sibo_at_finds_targets_of_ones_own_however_these_are_spelled():
    import transformers as hf

    bart = hf.BartModel(hf.BartConfig(vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2,
                                      encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
                                      decoder_ffn_dim=24))
    attention = [f"self_attn.{p}_proj" for p in "qkv"]
    expected = names("encoder.layers", *attention) | names("decoder.layers", *attention, "encoder_attn.q_proj")
    assert placed(bart, targets=("q_proj", "k_proj", "v_proj"), sibo_at="attn")[1] == expected
    for own in (("q_proj", "mlp.up_proj"), ("blocks.*.attn.q_proj", "blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj")):
        assert placed(ours("llama"), targets=own, sibo_at="both")[1] == names("blocks", "attn.q_proj", "mlp.up_proj")
        assert placed(ours("llama"), targets=own, sibo_at="ffn")[1] == names("blocks", "mlp.up_proj")


@pytest.mark.parametrize("m,wide", [(ours("llama"), "down_proj"), (ours("gptj"), "fc_out"), (theirs("gptj"), "fc_out")])
def test_a_module_whose_input_is_not_d_wide_cannot_be_asked_to_take_h0(m, wide):
    for asked in ({"sibo_at": (wide,)}, {"targets": ("q_proj", wide)}):
        with pytest.raises(ValueError, match=rf"0\.mlp\.{wide}: .* reads inputs \d+ wide, where h0 is 16; name others"):
            placed(m, **asked)
    assert placed(m, targets=("q_proj", wide), sibo_at=("q_proj",))  # plainly, it can be adapted


@pytest.mark.parametrize("settings", [{"sibo_at": "o_proj"}, {"sibo_at": ("up_proj", "o_proj")},
                                      {"targets": ("q_proj",), "sibo_at": "ffn"}])
def test_h0_goes_to_adapted_modules_only(settings):
    with pytest.raises(ValueError, match="expected some of the adapted"):
        placed(ours("llama"), **settings)


def test_berts_lora_has_nothing_in_the_ffn_to_take_h0():
    with pytest.raises(ValueError, match=r"'ffn': expected some of the adapted \['q_proj', 'v_proj'\], got \[\]"):
        placed(ours("bert"), sibo_at="ffn")


# --------------------------------------------------------------------------------------------------- names, by segments


def test_a_target_matches_whole_dotted_segments_from_the_right():
    m = ours("llama")
    assert not any(find(m, x) for x in ("proj", "_proj", "n.q_proj", "attn.q", "q_proj.attn", "attn..q_proj", ""))
    assert set(find(m, "q_proj")) == set(find(m, "attn.q_proj")) == names("blocks", "attn.q_proj")
    assert find(m, "1.attn.q_proj") == find(m, "blocks.1.attn.q_proj") == ["blocks.1.attn.q_proj"]
    assert find(m, "x.blocks.1.attn.q_proj") == []


def test_a_star_stands_for_exactly_one_segment():
    m = theirs("bert")
    assert set(find(m, "layer.*.output.dropout")) == names("encoder.layer", "output.dropout")
    assert set(find(m, "output.dropout")) == names("encoder.layer", "output.dropout", "attention.output.dropout")
    assert find(m, "layer.*.dropout") == []
    assert set(find(m, "1.attention.self.*")) == {f"encoder.layer.1.attention.self.{p}"
                                           for p in ("query", "key", "value", "dropout")}


segments = st.lists(st.sampled_from(["a", "b", "ab", "0", "1"]), min_size=1, max_size=3)


@given(st.lists(segments.map(tuple), min_size=1, max_size=6), segments)
def test_find_is_the_suffix_of_the_path_and_nothing_else(paths, target):
    m = nn.Module()
    for path in paths:
        for depth in range(1, len(path) + 1):
            parent = m.get_submodule(".".join(path[:depth - 1]))
            if not hasattr(parent, path[depth - 1]):
                parent.add_module(path[depth - 1], nn.Module())
    every = {tuple(path[:k]) for path in paths for k in range(1, len(path) + 1)}
    assert set(find(m, ".".join(target))) == {".".join(p) for p in every if p[-len(target):] == tuple(target)}


def test_the_models_order_is_kept_and_no_module_is_found_twice():
    m = ours("llama")
    assert find_all(m, ["up_proj", "0.attn.q_proj", "q_proj"]) == [
        "blocks.0.attn.q_proj", "blocks.0.mlp.up_proj", "blocks.1.attn.q_proj", "blocks.1.mlp.up_proj"]


@pytest.mark.parametrize("wrong,near", [("q_porj", "q_proj"), ("attn.q_prj", r"attn\.q_proj"), ("up", "up_proj"),
                                        ("query_proj", "q_proj"), ("xyzzy", None)])
def test_a_target_that_matches_nothing_is_an_error_with_the_near_names(wrong, near):
    hint = f"; did you mean .*{near}" if near else "$"
    with pytest.raises(ValueError, match=f"'{wrong}': expected a module of this Llama, got none of that name{hint}"):
        placed(ours("llama"), targets=(wrong,))


@pytest.mark.parametrize("settings", [{"targets": ("q_proj", "query")}, {"sibo_at": ("up_proj", "query")},
                                      {"targets": ("query", "q_proj"), "lam": 0.0}])
def test_a_list_of_which_a_part_matches_is_an_error_too(settings):
    with pytest.raises(ValueError, match="'query': expected a module of this Llama, got none"):
        placed(ours("llama"), **settings)


@pytest.mark.parametrize("target", ["norm", "embed", "mlp", "0"])
def test_lora_goes_on_linears_only(target):
    with pytest.raises(ValueError, match=r"expected an nn\.Linear.* got a (RMSNorm|Embedding|SwiGLU|LlamaBlock)$"):
        placed(ours("llama"), targets=(target,), lam=0.0)


# ------------------------------------------------------------------------------------------- a model of the user's own


class Mixer(nn.Module):
    """A residual net on patches (B, T, 6): no attention, and an embedding that is a projection."""

    def __init__(self, d=8):
        super().__init__()
        self.patches = nn.Linear(6, d)
        self.steps = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, 2 * d),
                                                 nn.GLU()) for _ in LAYERS)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        h = self.drop(self.patches(x))
        for step in self.steps:
            h = h + step(h)
        return h


@pytest.mark.parametrize("h0", [None, "drop", "patches"])
def test_any_module_is_adapted_by_target_and_source_and_then_computes_eq_5(h0):
    m, x = Mixer(d=6).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    frozen = copy.deepcopy(m)
    sibo.inject(m, "lora", 0.25, targets=("steps.*.1", "steps.*.3"), sibo_at=("steps.*.1",), h0=h0, rank=2, alpha=4.0)
    assert m.sibo.h0 == h0
    h = frozen.patches(x)
    h0 = x if h0 == "patches" else h  # what it reads
    for (norm, first, gelu, second, glu), (_, mixed, _, plain, _) in zip(frozen.steps, m.steps, strict=True):
        nn.init.normal_(mixed.up), nn.init.normal_(plain.up)
        n = norm(h)
        z = gelu(first(n) + 4 / 2 * (0.75 * n + 0.25 * h0) @ mixed.down.T @ mixed.up.T)
        h = h + glu(second(z) + 4 / 2 * z @ plain.down.T @ plain.up.T)
    torch.testing.assert_close(m(x), h, rtol=0, atol=1e-12)
    torch.testing.assert_close(sibo.merge(m)(x), h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method,side,expected", [("lora", "out", (4, 6)), ("adapter", "out", (6, 6)),
                                                  ("adapter", "in", (4, 4)), ("adapter", "parallel", (4, 6))])
def test_a_linear_of_its_own_width_is_read_and_written_where_the_method_says(method, side, expected):
    found = place(nn.Sequential(nn.Linear(4, 6)), sibo.Settings(method, 0.0, targets="0", side=side))
    assert found.widths == {"0": expected}


@pytest.mark.parametrize("lam", [0.0, 0.2])
def test_adapters_on_outputs_that_are_no_linears_take_their_width_from_their_stack(lam):
    found = place(Mixer(), sibo.Settings("adapter", lam, targets=("steps.*",)))
    assert found.widths == {"steps.0": (8, 8), "steps.1": (8, 8)}
    with pytest.raises(ValueError, match=r"drop: expected an nn\.Linear, or .* h0, got a Dropout"):
        placed(Mixer(), "adapter", lam=0.0, targets=("drop",))


def test_a_sub_layer_whose_stack_is_not_as_wide_as_h0_cannot_take_it():
    with pytest.raises(ValueError, match=r"steps\.0: .* 8 wide, where h0 is 6; name others"):
        placed(Mixer(), "adapter", targets=("steps.*",), h0="patches")


def test_without_known_names_targets_have_to_be_given_and_the_refusal_says_which_would_do():
    with pytest.raises(ValueError, match=r"Mixer: no known place for lora, .*; expected targets=, such as steps"):
        placed(Mixer())
    adapted = {"steps.0.1", "steps.1.1"}
    assert placed(Mixer(), targets=("steps.*.1",)) == (adapted, adapted, {("steps.0", "steps.1")})
    assert placed(Mixer(), targets=("steps.*.1",), lam=0.0) == (adapted, set(), set())


def test_without_a_stack_h0_has_to_be_given():
    with pytest.raises(ValueError, match="sub: expected a module in a list of blocks, .* outside of them; pass h0="):
        placed(Toy(), targets="sub")
    assert placed(Toy(), targets="sub", h0="first") == ({"sub"}, {"sub"}, {("first",)})


@pytest.mark.parametrize("h0,says", [
    ("patch", r"h0 'patch': expected one module.*, got \[\]"),
    ("0", r"h0 '0': expected one module.*, got \['steps\.0', 'steps\.0\.0', 'steps\.1\.0'\]"),
    ("patches", r"steps\.0\.1: .* reads inputs 8 wide, where h0 is 6; name others")])
def test_a_source_that_is_absent_ambiguous_or_of_another_width_is_an_error(h0, says):
    with pytest.raises(ValueError, match=says):
        placed(Mixer(), targets=("steps.*.1",), h0=h0)


def test_a_target_inside_a_target_is_adapted_as_well():
    m = inject(ours("llama"), "adapter", 0.0, targets=("mlp", "up_proj"), bottleneck=2)
    found = {n for n, x in m.named_modules() if isinstance(x, sibo.SIBOLayer)}
    assert found == names("blocks", "mlp", "mlp.base.up_proj")
    assert "adapted: 4 modules (mlp, up_proj)" in sibo.summary(m)


# -------------------------------------------------------------------------------- the paper's sizes, on the meta device


def trained(config, **settings):
    m = inject(model.build(config), **settings)
    return sum(p.numel() for p in m.parameters() if p.requires_grad), sum(p.numel() for p in m.parameters())


LLAMA_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32}
GPTJ_6B = {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}
BERT_BASE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12, "intermediate_size": 3072}


@pytest.mark.parametrize("config,settings,expected", [
    # q, k, v: 4096 + 4096 a rank; up: 4096 + 11008; down: 11008 + 4096
    (LLAMA_7B, {"method": "lora", "rank": 32}, 32 * 32 * (3 * 8192 + 2 * 15104)),
    (LLAMA_7B, {"method": "adapter", "bottleneck": 256}, 32 * 256 * 2 * 4096),
    (LLAMA_7B, {"method": "adapter", "bottleneck": 256, "side": "in"}, 32 * 2 * 256 * 2 * 4096),
    (LLAMA_7B, {"method": "lora", "rank": 32, "learn_lam": True}, 32 * (32 * (3 * 8192 + 2 * 15104) + 1)),
    (GPTJ_6B, {"method": "lora", "rank": 32}, 28 * 32 * (3 * 8192 + 2 * (4096 + 16384))),
    (GPTJ_6B, {"method": "adapter", "bottleneck": 256}, 28 * 256 * 2 * 4096),
    (BERT_BASE, {"method": "lora", "rank": 8}, 12 * 8 * 2 * 1536),
    (BERT_BASE, {"method": "adapter", "bottleneck": 64}, 12 * 2 * 64 * 1536),
])
def test_trained_parameters_of_the_papers_models_are_those_computed_by_hand(config, settings, expected):
    assert settings.get("learn_lam") or trained(config, **settings, lam=0.0)[0] == expected  # h0 costs no parameter
    found, total = trained(config, **settings)
    assert found == expected
    assert total - found == sum(p.numel() for p in model.build(config).parameters())


def test_llama_7b_counts_as_published():
    m = model.build(LLAMA_7B)
    assert sum(p.numel() for p in m.parameters()) == 6_738_415_616
    assert trained(LLAMA_7B, method="lora", rank=32)[0] == 56_098_816  # 0.83 %
    assert trained(LLAMA_7B, method="adapter", bottleneck=256)[0] == 67_108_864
