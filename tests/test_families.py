"""Models of transformers, by family: where the defaults go, by name, and that they compute what hooks by hand compute.

Tiny random models. Each property is tried for LoRA-SIBO and for Adapter-SIBO; what is refused is asserted as well."""

import copy
import functools
import re
from typing import NamedTuple

import pytest
import torch
import transformers as hf
from by_hand import assert_near, assert_near_gradients, by_hand, draw, gradients, stir, trained_gradients, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sibo

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
S = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
     "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KV = S | {"num_key_value_heads": 2}
G = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
     "pad_token_id": 0}
V = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
     "patch_size": 8}
TWO = {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
       "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
       "eos_token_id": 2, "decoder_start_token_id": 2}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
      "decoder_start_token_id": 0}


class Family(NamedTuple):
    """A model's class and config, and in each stack the modules adapted by LoRA and by adapters; *: those with h0."""

    kind: type
    config: object
    lora: dict[str, str]
    adapter: dict[str, str] | str  # a text: why adapters are refused


def causal(stack, kind, config, lora, adapter="mlp*"):
    return Family(kind, config, {stack: lora}, {stack: adapter} if "*" in adapter else adapter)


QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = f"{QKV} mlp.up_proj* mlp.down_proj"
CROSS = "encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj"
T5_SELF = "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v"
T5_CROSS = "layer.1.EncDecAttention.q layer.1.EncDecAttention.k layer.1.EncDecAttention.v"
BERT, BERT_ADAPTER = "attention.self.query* attention.self.value*", "attention.output.dropout* output.dropout"
ALBERT = "encoder.albert_layer_groups"
BARTS = {"model.encoder.layers": f"{QKV} fc1* fc2", "model.decoder.layers": f"{QKV} {CROSS} fc1* fc2"}
BARTS_ADAPTER = dict.fromkeys(BARTS, "fc2*")
CLIP = {f"{tower}_model.encoder.layers": "self_attn.q_proj* self_attn.v_proj*" for tower in ("text", "vision")}
CAUSAL = {
    "llama": causal("model.layers", hf.LlamaForCausalLM, hf.LlamaConfig(**KV), LLAMA),
    "gemma2": causal("model.layers", hf.Gemma2ForCausalLM, hf.Gemma2Config(**KV, head_dim=4), LLAMA),
    "granite": causal("model.layers", hf.GraniteForCausalLM, hf.GraniteConfig(**KV, embedding_multiplier=12.0), LLAMA),
    "qwen2": causal("model.layers", hf.Qwen2ForCausalLM, hf.Qwen2Config(**KV), LLAMA),
    "qwen3": causal("model.layers", hf.Qwen3ForCausalLM, hf.Qwen3Config(**KV, head_dim=4), LLAMA),
    "qwen2_moe": causal(  # experts see no h0: their rows are not one sequence's tokens
        "model.layers", hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig(
            **KV, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=12),
        "self_attn.q_proj* self_attn.k_proj* self_attn.v_proj* mlp.shared_expert.up_proj mlp.shared_expert.down_proj"),
    "mixtral": causal("model.layers", hf.MixtralForCausalLM, hf.MixtralConfig(**KV, num_local_experts=4),
                      "self_attn.q_proj* self_attn.k_proj* self_attn.v_proj*"),
    "gpt2": causal("transformer.h", hf.GPT2LMHeadModel, hf.GPT2Config(**G), "attn.c_attn mlp.c_fc* mlp.c_proj"),
    "gptj": causal("transformer.h", hf.GPTJForCausalLM, hf.GPTJConfig(**G, rotary_dim=4),
                   "attn.q_proj attn.k_proj attn.v_proj mlp.fc_in* mlp.fc_out"),
    "gpt_neo": causal("transformer.h", hf.GPTNeoForCausalLM, hf.GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2),
        "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj mlp.c_fc* mlp.c_proj"),
    "gpt_neox": causal("gpt_neox.layers", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**S),
                       "attention.query_key_value mlp.dense_h_to_4h* mlp.dense_4h_to_h"),
    "opt": causal("model.decoder.layers", hf.OPTForCausalLM, hf.OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=16,
        pad_token_id=0, max_position_embeddings=64),
        "self_attn.q_proj* self_attn.k_proj* self_attn.v_proj* fc1 fc2", "whose layer puts all tokens in one row"),
    "bloom": causal("transformer.h", hf.BloomForCausalLM, hf.BloomConfig(
        vocab_size=64, hidden_size=16, n_layer=2, n_head=4, pad_token_id=0),
        "self_attention.query_key_value mlp.dense_h_to_4h* mlp.dense_4h_to_h", "mlp.dense_4h_to_h*"),
    "falcon": causal("transformer.h", hf.FalconForCausalLM, hf.FalconConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0),
        "self_attention.query_key_value mlp.dense_h_to_4h* mlp.dense_4h_to_h"),
    "phi": causal("model.layers", hf.PhiForCausalLM, hf.PhiConfig(**S), f"{QKV} mlp.fc1* mlp.fc2"),
    "phi3": causal("model.layers", hf.Phi3ForCausalLM, hf.Phi3Config(**KV),
                   "self_attn.qkv_proj mlp.gate_up_proj* mlp.down_proj"),
    "mpt": causal("transformer.blocks", hf.MptForCausalLM, hf.MptConfig(
        vocab_size=64, d_model=16, n_heads=4, n_layers=2, max_seq_len=64), "attn.Wqkv ffn.up_proj* ffn.down_proj",
        "ffn.down_proj*"),
    "starcoder2": causal("model.layers", hf.Starcoder2ForCausalLM, hf.Starcoder2Config(**KV),
                         f"{QKV} mlp.c_fc* mlp.c_proj"),
}
ENCODERS = {
    "bert": Family(hf.BertModel, hf.BertConfig(**S), {"encoder.layer": BERT}, {"encoder.layer": BERT_ADAPTER}),
    "roberta": Family(hf.RobertaModel, hf.RobertaConfig(**S),
                      {"encoder.layer": BERT}, {"encoder.layer": BERT_ADAPTER}),
    "distilbert": Family(hf.DistilBertModel, hf.DistilBertConfig(
        vocab_size=64, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=64),
        {"transformer.layer": "attention.q_lin* attention.v_lin*"}, {"transformer.layer": "attention.out_lin* ffn"}),
    "deberta-v2": Family(hf.DebertaV2Model, hf.DebertaV2Config(
        **S, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        {"encoder.layer": "attention.self.query_proj attention.self.value_proj*"}, {"encoder.layer": BERT_ADAPTER}),
    "electra": Family(hf.ElectraModel, hf.ElectraConfig(**S, embedding_size=8),
                      {"encoder.layer": BERT}, {"encoder.layer": BERT_ADAPTER}),
    "albert": Family(hf.AlbertModel, hf.AlbertConfig(**S, embedding_size=8),
                     {ALBERT: "albert_layers.0.attention.query* albert_layers.0.attention.value*"},
                     {ALBERT: "albert_layers.0.attention.dense* albert_layers.0.ffn_output"}),
    "modernbert": Family(hf.ModernBertModel, hf.ModernBertConfig(**S, cls_token_id=1, sep_token_id=2),
                         {"layers": "attn.Wqkv*"}, {"layers": "attn* mlp"}),
    "xlnet": Family(hf.XLNetModel, hf.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=24),
                    {"layer": "ff.layer_1* ff.layer_2"}, {"layer": "ff.layer_2*"}),
    "vit": Family(hf.ViTModel, hf.ViTConfig(**V),
                  {"layers": "attention.q_proj* attention.v_proj*"}, {"layers": "attention.o_proj* mlp"}),
    "dinov2": Family(hf.Dinov2Model, hf.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8),
        {"encoder.layer": "attention.q_proj* attention.v_proj*"}, {"encoder.layer": "attention.o_proj* mlp"}),
    "clip": Family(hf.CLIPModel, hf.CLIPConfig(text_config=dict(S), vision_config=dict(V), projection_dim=8),
                   CLIP, dict.fromkeys(CLIP, "self_attn.out_proj* mlp")),
}
PAIRS = {
    "bart": Family(hf.BartForConditionalGeneration, hf.BartConfig(**TWO, max_position_embeddings=64),
                   BARTS, BARTS_ADAPTER),
    "t5": Family(hf.T5ForConditionalGeneration, hf.T5Config(**T5), {
        "encoder.block": f"{T5_SELF} layer.1.DenseReluDense.wi* layer.1.DenseReluDense.wo",
        "decoder.block": f"{T5_SELF} {T5_CROSS} layer.2.DenseReluDense.wi* layer.2.DenseReluDense.wo"},
        {"encoder.block": "layer.1.DenseReluDense.wo*", "decoder.block": "layer.2.DenseReluDense.wo*"}),
    "t5 v1.1": Family(hf.T5ForConditionalGeneration, hf.T5Config(**T5, feed_forward_proj="gated-gelu"), {
        "encoder.block": f"{T5_SELF} layer.1.DenseReluDense.wi_1* layer.1.DenseReluDense.wo",
        "decoder.block": f"{T5_SELF} {T5_CROSS} layer.2.DenseReluDense.wi_1* layer.2.DenseReluDense.wo"},
        {"encoder.block": "layer.1.DenseReluDense.wo*", "decoder.block": "layer.2.DenseReluDense.wo*"}),
    "whisper": Family(hf.WhisperForConditionalGeneration, hf.WhisperConfig(
        **TWO, num_mel_bins=8, max_source_positions=10, max_target_positions=64), BARTS, BARTS_ADAPTER),
}
LLAVA = Family(hf.LlavaForConditionalGeneration, hf.LlavaConfig(
    vision_config=hf.CLIPVisionConfig(**V), text_config=hf.LlamaConfig(**KV), image_token_index=60,
    vision_feature_layer=-1),
    {"model.vision_tower.encoder.layers": "self_attn.q_proj* self_attn.v_proj*", "model.language_model.layers": LLAMA},
    {"model.vision_tower.encoder.layers": "self_attn.out_proj* mlp", "model.language_model.layers": "mlp*"})
FAMILIES = CAUSAL | ENCODERS | PAIRS | {"llava": LLAVA}
CASES = [(name, method) for name, f in FAMILIES.items() for method in ("lora", "adapter")
         if isinstance(getattr(f, method), dict)]
REFUSED = {  # beside the defaults: where a family has no such place
    "opt": ("out", "in", "parallel"), "bert": ("in", "parallel"), "roberta": ("in", "parallel"),
    "deberta-v2": ("in", "parallel"), "electra": ("in", "parallel"), "albert": ("in", "parallel"),
    "distilbert": ("in",), "modernbert": ("in",), "vit": ("in",), "dinov2": ("in",), "clip": ("in",),
    "bart": ("parallel",), "t5": ("parallel",), "t5 v1.1": ("parallel",),
    "whisper": ("parallel",), "qwen2_moe": ("in",), "mixtral": ("in",)}


@functools.cache
def original(name):
    """A family's tiny random model, without dropout; copied before it is changed."""
    torch.manual_seed(0)
    m = draw(FAMILIES[name].kind(FAMILIES[name].config)).eval()
    for x in m.modules():
        for key, value in vars(x).items():
            if re.fullmatch(".*drop(out|path|_prob)?|p", key) and isinstance(value, float):
                setattr(x, key, 0.0)
    return m


def copied(name):
    return copy.deepcopy(original(name))


def named(name, method):
    """(all modules adapted by default, {first block: those that get its h0}), by full names."""
    adapted, at, modules = [], {}, dict(original(name).named_modules())
    for stack, inners in getattr(FAMILIES[name], method).items():
        found = [(f"{stack}.{i}.{inner.rstrip('*')}", inner.endswith("*")) for inner in inners.split()
                 for i in range(9) if f"{stack}.{i}.{inner.rstrip('*')}" in modules]
        adapted, at = adapted + [n for n, _ in found], at | {f"{stack}.0": [n for n, star in found if star]}
    return adapted, at


def adapted(name, method, lam=0.5, **more):
    return stir(sibo.inject(copied(name), method, lam, rank=3, alpha=3.0, bottleneck=3, **more))


@functools.cache
def pair(name, method):
    """(the adapted model, the same by hand, the tensors that the latter trains): shared, not to be changed."""
    m = adapted(name, method)
    trained = weights(m)
    return m, by_hand(copied(name), trained, named(name, method)[1], method=method), trained


def inputs(name, ids=IDS):
    """What a family's forward takes: ids, pixels, sound; for encoder-decoders what goes into both."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(int(ids.sum())))
    if name in ("vit", "dinov2"):
        return {"pixel_values": pixels}
    if name == "clip":
        return {"input_ids": ids, "pixel_values": pixels}
    if name == "llava":
        return {"input_ids": torch.cat((torch.full((2, 4), 60), ids), 1), "pixel_values": pixels}
    if name == "whisper":
        sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(int(ids.sum())))
        return {"input_features": sound, "decoder_input_ids": ids}
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)[:, :5]} if name in PAIRS else {})


def output(m, **kwargs):
    """All tensors of the answer that are not a cache, as one row."""
    out = m(**kwargs, return_dict=False)
    return torch.cat([t.flatten() for t in out if isinstance(t, torch.Tensor)])


def hooks(m):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())


def padded(name, ids=IDS):
    """Inputs of which some are padding, on the left: positions shift, and rows are masked."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return inputs(name, ids) | {"attention_mask": mask}


# ---------------------------------------------------------------------- where, by name


@pytest.mark.parametrize("name,method", CASES)
def test_each_family_is_adapted_and_gets_h0_where_its_table_says(name, method):
    found = {n.replace(".base.", "."): x for n, x in pair(name, method)[0].named_modules()
             if isinstance(x, sibo.SIBOLayer)}
    everywhere, at = named(name, method)
    assert found.keys() == set(everywhere) and len(at) == len(getattr(FAMILIES[name], method))
    assert {n for n, x in found.items() if x.lam_start} == {n for names in at.values() for n in names}


PARALLEL = {  # the stacks, and the feed-forward within each block
    "llama": (["model.layers"], "mlp"), "distilbert": (["transformer.layer"], "ffn"), "vit": (["layers"], "mlp"),
    "dinov2": (["encoder.layer"], "mlp"), "clip": (["text_model.encoder.layers", "vision_model.encoder.layers"], "mlp")}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_adapters_stand_beside_the_feed_forward_and_all_get_h0(name):
    m, (stacks, inner) = adapted(name, "adapter", side="parallel"), PARALLEL[name]
    at = {f"{s}.0": [f"{s}.{i}.{inner}" for i in (0, 1)] for s in stacks}
    found = {n: x for n, x in m.named_modules() if isinstance(x, sibo.SIBOLayer)}
    assert found.keys() == {n for names in at.values() for n in names} and all(x.lam_start for x in found.values())
    right = by_hand(copied(name), weights(m), at, method="adapter", side="parallel")
    with torch.no_grad():
        assert_near(output(m, **inputs(name)), output(right, **inputs(name)))


@pytest.mark.parametrize("name,side", [(name, side) for name, sides in REFUSED.items() for side in sides])
def test_where_a_family_has_no_place_for_adapters_inject_says_so_in_one_line_and_changes_nothing(name, side):
    m = copied(name)
    before = {n: (type(x), len(x._forward_hooks), len(x._forward_pre_hooks)) for n, x in m.named_modules()}
    with pytest.raises(ValueError) as e:
        sibo.inject(m, "adapter", side=side)
    assert "\n" not in str(e.value) and "expected" in str(e.value) and not hasattr(m, "sibo")
    assert before == {n: (type(x), len(x._forward_hooks), len(x._forward_pre_hooks)) for n, x in m.named_modules()}
    assert [p.requires_grad for p in m.parameters()] == [p.requires_grad for p in original(name).parameters()]


@pytest.mark.parametrize("name,side", [(name, side) for name, sides in REFUSED.items() for side in sides
                                       if (name, side) not in (("opt", "out"), ("opt", "in"))])  # those say why
def test_a_refusal_names_targets_that_work(name, side):
    with pytest.raises(ValueError) as e:
        sibo.inject(copied(name), "adapter", side=side)
    names = re.search("such as (.*)", str(e.value))[1].split(" or ")
    m = sibo.inject(copied(name), "adapter", side=side, targets=tuple(names), bottleneck=3)
    assert torch.isfinite(output(m, **inputs(name))).all()


PICTURE = {"pixel_values": torch.randn(2, 3, 32, 32)}
STAGES = {"num_channels": 3, "num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32],
          "num_attention_heads": [2, 2], "sr_ratios": [2, 1]}
HARD = {  # blocks whose modules read something else than (B, T, d): which settings are tried, on which inputs
    "deberta-v3": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(
        **S, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True)), {}, {}),
    "mobilebert": (lambda: hf.MobileBertModel(hf.MobileBertConfig(
        **S, embedding_size=16, intra_bottleneck_size=8, true_hidden_size=8)), {}, {}),
    "longformer": (lambda: hf.LongformerModel(hf.LongformerConfig(
        **S | {"max_position_embeddings": 96}, attention_window=4)), {}, {}),
    "segformer": (lambda: hf.SegformerModel(hf.SegformerConfig(
        **STAGES, strides=[4, 2], patch_sizes=[7, 3], mlp_ratios=[2, 2])), {}, PICTURE),
    "timesformer": (lambda: hf.TimesformerModel(hf.TimesformerConfig(**V, num_frames=2)), {}, {
        "pixel_values": torch.randn(2, 2, 3, 16, 16)}),
    "vitdet": (lambda: hf.VitDetModel(hf.VitDetConfig(**V)), {}, {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "llama4": (lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(
        **KV, head_dim=4, num_local_experts=2, intermediate_size_mlp=24, interleave_moe_layer_step=1)),
        {"method": "adapter"}, {}),
    "swin": (lambda: hf.SwinModel(hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[4, 4], window_size=4)), {}, PICTURE),
    "flaubert": (lambda: hf.FlaubertModel(hf.FlaubertConfig(
        n_words=64, vocab_size=64, emb_dim=16, n_layers=2, n_heads=4)), {}, {}),
}


@pytest.mark.parametrize("name", HARD)
def test_what_inject_accepts_runs_and_what_it_cannot_adapt_it_refuses_in_one_line(name):
    make, asked, given = HARD[name]
    torch.manual_seed(0)
    m = make().eval()
    try:
        sibo.inject(m, **asked, rank=3, bottleneck=3)
    except ValueError as e:
        assert "\n" not in str(e) and "expected" in str(e)
    else:
        assert torch.isfinite(output(m, **given or {"input_ids": IDS})).all()


def t5gemma2():
    sizes = KV | {"head_dim": 4, "layer_types": ["full_attention"] * 2, "bos_token_id": 1, "eos_token_id": 2}
    return hf.T5Gemma2ForConditionalGeneration(hf.T5Gemma2Config(
        encoder={"text_config": sizes, "vision_config": V, "mm_tokens_per_image": 4}, decoder=sizes,
        image_token_index=60, eoi_token_index=61))


def superglue():
    return hf.AutoModelForKeypointMatching.from_config(hf.SuperGlueConfig(
        hidden_size=16, num_attention_heads=4, keypoint_encoder_sizes=[8, 16], gnn_layers_types=["self", "cross"])).gnn


MERGED = {"t5gemma2": (t5gemma2, "q_proj", ("k_proj", "v_proj"), lambda m: m(
              input_ids=IDS, decoder_input_ids=IDS.flip(1))),
          "superglue": (superglue, "query", ("key", "value"), lambda m: m(torch.randn(4, 7, 16)))}


@pytest.mark.parametrize("name", MERGED)
def test_a_key_or_value_that_reads_another_stream_than_the_query_gets_no_h0(name):
    make, query, others, run = MERGED[name]
    torch.manual_seed(0)
    m, reads = make().eval(), {}
    for n, x in m.named_modules():
        x.register_forward_pre_hook(lambda _, args, n=n: reads.setdefault(n, []).extend(args[:1]))
    with torch.no_grad():
        run(m)
    leaves = {n: n.rpartition(".")[0] + f".{query}" for n in reads
              if n.endswith((query, *others)) and "vision" not in n}
    own = {n for n, q in leaves.items() if len(reads[n]) == len(reads[q]) and all(map(torch.equal, reads[n], reads[q]))}
    assert {n.rpartition(".")[2] for n in leaves.keys() - own} == set(others)
    for wrong in leaves.keys() - own:
        with pytest.raises(ValueError, match="expected a module that can take h0, got one which reads the"):
            sibo.inject(copy.deepcopy(m), targets=wrong)
    asked = {"sibo_at": "attn"} if name == "t5gemma2" else {}
    at = sibo.inject(m, **asked)
    assert {x.name for x in at.modules() if isinstance(x, sibo.SIBOLayer) and x.lam_start and x.name in leaves} <= own


# ---------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name,method", CASES)
def test_a_pass_is_the_one_by_hand_also_after_a_pass_on_other_inputs(name, method):
    m, right, _ = pair(name, method)
    with torch.no_grad():
        expected, off = output(right, **inputs(name)), adapted(name, method, lam=0.0)
        output(m, **inputs(name, OTHERS))
        assert_near(output(m, **inputs(name)), expected)
        assert (output(off, **inputs(name)) - expected).abs().max() > 1e-2 * expected.abs().max()  # h0 shows


@pytest.mark.parametrize("name,method", [c for c in CASES if c[0] not in ("vit", "dinov2", "whisper", "llava")])
def test_padding_changes_nothing_about_it(name, method):
    m, right, _ = pair(name, method)
    with torch.no_grad():
        got, expected = output(m, **padded(name)), output(right, **padded(name))
        assert not torch.allclose(expected, output(right, **inputs(name)))
        assert_near(got, expected)


WRITERS = [c for c in CASES if c[0] in CAUSAL | PAIRS or c[0] == "llava"]


@pytest.mark.parametrize("name,method,beams", [(*c, 2) for c in WRITERS] + [(*c, 1) for c in WRITERS[::5]])
def test_generation_with_a_cache_writes_the_same(name, method, beams):
    m, right, _ = pair(name, method)
    mask = {} if name in ("whisper", "llava") else {"attention_mask": padded(name)["attention_mask"]}
    given = {k: v for k, v in inputs(name).items() if not k.startswith("decoder")} | mask
    how = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        m(**inputs(name, OTHERS))  # the pass before must leave nothing behind
        assert torch.equal(m.generate(**given, **how), right.generate(**given, **how))


@pytest.mark.parametrize("name,method", [c for c in CASES if c[1] == "adapter" or c[0] == "albert"])
def test_gradients_are_those_by_hand(name, method):
    m, right, trained = pair(name, method)
    m.zero_grad()
    output(m, **inputs(name)).square().mean().backward()
    expected = gradients(output(right, **inputs(name)).square().mean(), trained)
    assert_near_gradients(trained_gradients(m), expected)


CHECKPOINTED = [name for name in FAMILIES if name not in ("albert", "xlnet")]  # transformers' have none
ADAPTED = [(name, "adapter", False) for name in ("llama", "gpt2", "bart", "bert", "vit")]


@pytest.mark.parametrize("name,method,reentrant", [(name, "lora", False) for name in CHECKPOINTED] + ADAPTED + [
    (name, "lora", True) for name in CHECKPOINTED if name != "llava"])
def test_checkpointing_changes_no_gradient(name, method, reentrant):
    _, right, trained = pair(name, method)
    m = checkpointed(name, method, reentrant)
    uncached = {"use_cache": False} if name in CAUSAL | PAIRS else {}
    output(m, **inputs(name), **uncached).square().mean().backward()
    expected = gradients(output(right, **inputs(name)).square().mean(), trained)
    assert_near_gradients(trained_gradients(m), expected)


def checkpointed(name, method, reentrant):
    m = adapted(name, method).train()
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        m.enable_input_require_grads()
    return m


def test_reentrant_checkpointing_is_refused_where_a_trained_tower_makes_the_next_stacks_h0():
    m = checkpointed("llava", "lora", True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        output(m, **inputs("llava"))


# ---------------------------------------------------------------------- λ → 0, merged, saved, taken out


@pytest.mark.parametrize("name,method", CASES)
def test_lambda_0_is_the_plain_method_and_small_ones_come_near_it(name, method):
    plain = by_hand(copied(name), weights(pair(name, method)[0]), {}, method=method)
    with torch.no_grad():
        expected = output(plain, **inputs(name))
        m = copied(name)
        before = hooks(m)
        off = stir(sibo.inject(m, method, 0.0, rank=3, alpha=3.0, bottleneck=3))
        assert hooks(off) == before
        assert_near(output(off, **inputs(name)), expected, 1e-5)
        m, errors = adapted(name, method), []
        for lam in (1e-2, 1e-3, 0.0):
            errors.append((output(sibo.set_lam(m, lam), **inputs(name)) - expected).abs().max().item())
        assert errors[1] < 0.3 * errors[0] and errors[2] <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", [name for name, method in CASES if method == "lora"])
def test_merged_is_unmerged(name):
    m, right, _ = pair(name, "lora")
    merged = sibo.merge(adapted(name, "lora"))
    with torch.no_grad():
        assert_near(output(merged, **inputs(name)), output(right, **inputs(name)))
    assert not any(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("name,method", CASES)
def test_what_is_saved_comes_back_bit_for_bit(name, method, tmp_path):
    m = pair(name, method)[0]
    sibo.save(m, tmp_path)
    fresh = sibo.load(copied(name), tmp_path)
    with torch.no_grad():
        assert torch.equal(output(fresh, **inputs(name)), output(m, **inputs(name)))
    assert fresh.sibo == m.sibo


@pytest.mark.parametrize("name,method", CASES)
def test_disabled_and_removed_it_is_the_untouched_model_bit_for_bit(name, method):
    m, plain = copy.deepcopy(pair(name, method)[0]), original(name)
    with torch.no_grad():
        expected = output(plain, **inputs(name))
        with sibo.disabled(m):
            assert torch.equal(output(m, **inputs(name)), expected)
        assert not torch.equal(output(m, **inputs(name)), expected)
        sibo.remove(m)
        assert torch.equal(output(m, **inputs(name)), expected)
    a, b = m.state_dict(), plain.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in b)


# ---------------------------------------------------------------------- any settings, any family


SIDES = [(name, "lora", "out") for name in FAMILIES] + [
    (name, "adapter", side) for name in FAMILIES for side in ("out", "in", "parallel")
    if side not in REFUSED.get(name, ())]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=st.sampled_from(SIDES), lam=st.floats(0.01, 0.95), learned=st.booleans(), frozen_too=st.booleans(),
       skip=st.sampled_from(["mixed", "plain"]), T=st.integers(2, 7), seed=st.integers(0, 99))
def test_every_variant_is_the_one_by_hand_on_every_family(case, lam, learned, frozen_too, skip, T, seed):
    name, method, side = case
    m = adapted(name, method, lam, side=side, skip=skip, frozen_too=frozen_too and method == "lora", learn_lam=learned)
    layers = {n.replace(".base.", "."): x for n, x in m.named_modules() if isinstance(x, sibo.SIBOLayer)}
    at = {f"{stack}.0": [n for n, x in layers.items() if x.lam_start and n.startswith(f"{stack}.")]
          for stack in FAMILIES[name].lora}
    right = by_hand(copied(name), weights(m), at, lam, method=method, side=side, skip=skip,
                    frozen_too=frozen_too and method == "lora")
    given = inputs(name, torch.randint(3, 60, (2, T), generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        assert_near(output(m, **given), output(right, **given))

