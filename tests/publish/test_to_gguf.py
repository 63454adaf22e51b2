"""What leaves for llama.cpp's format is the same model and tokenizer, here and in transformers, or refused by name."""

import io
import json
import random
from dataclasses import fields

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from fuzz import a_gguf, gguf_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import inject, stir
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from twins import LLAMA3, pair, refused, rope_freqs, words

import eval as evaluation
import model
import train
from sibo_lab import cli, export
from sibo_lab.backbone import config, subwords, tokenizer
from sibo_lab.backbone import gguf as reader
from sibo_lab.publish import gguf_tokenizer, to_gguf

SIZE = 400  # embeddings
TEXTS = [" ".join(random.Random(i).choices("the cat's hat sat on 12345 mats, ñandú 中文\n\n  don't".split(" "), k=9))
         for i in range(300)]
SPLITS = {"qwen2": subwords.QWEN2, "llama-bpe": subwords.LLAMA3, "smaug-bpe": subwords.LLAMA3,
          "tekken": subwords.TEKKEN}
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_level(folder, pre="gpt-2", files="tokenizer.json", **settings):
    """Writes a tokenizer of about 380 tokens that `tokenizers` trained, with the split of this name; returns it."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    before = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else [pre_tokenizers.Split(
        Regex(SPLITS[pre]), "isolated")] if pre in SPLITS else []
    t = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    t.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    t.normalizer, t.decoder = normalizers.NFC() if pre == "qwen2" else None, decoders.ByteLevel()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=375, show_progress=False,
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    spec = json.loads(t.to_str())
    spec["model"]["vocab"] |= {"Ġwholly": len(spec["model"]["vocab"])}  # that no merge makes
    t = Tokenizer.from_str(json.dumps(spec))
    t.add_special_tokens([AddedToken(x, special=True) for x in ("<|bos|>", "<|im_start|>", "<|im_end|>")])
    t.add_tokens([AddedToken("<think>", normalized=False)])
    if pre == "llama-bpe":
        t.post_processor = processors.TemplateProcessing("<|bos|> $A", "<|bos|> $A $B", [(
            "<|bos|>", t.token_to_id("<|bos|>"))])
    folder.mkdir(exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>",
              "chat_template": CHAT} | settings
    if files == "tokenizer.json":
        t.save(str(folder / files))
    else:
        t.model.save(str(folder))
        added = {c: i for c, i in t.get_vocab().items() if c.startswith("<")}
        (folder / "added_tokens.json").write_text(json.dumps({c: i for c, i in added.items() if len(c) > 1}))
        config["tokenizer_class"] = "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return t


def exported(folder, file, outtype=None, lora=True, **more):
    """The .gguf file of a folder's model, with a stirred LoRA folded, and that model."""
    m = model.from_pretrained(folder, **more)
    if lora:
        stir(inject(m, "lora"))
    to_gguf.write(m, file, to_gguf.header(folder), outtype)
    return m


def from_transformers(file):
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


# ------------------------------------------------------------------------------------------------------------- weights

KINDS = {"llama": {}, "llama, tied": {"tie_word_embeddings": True}, "llama, wide heads": {"head_dim": 12},
         "mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}, "qwen3": {"head_dim": 128}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_the_same_model_here_and_in_transformers(kind, tmp_path):
    pair(kind.split(",")[0], tmp_path / "base", vocab_size=SIZE, **KINDS[kind])
    byte_level(tmp_path / "base")
    m = exported(tmp_path / "base", file := tmp_path / "m.gguf")
    expected = m(words(2, 20, SIZE))
    assert torch.equal(model.from_pretrained(file)(words(2, 20, SIZE)), expected)
    torch.testing.assert_close(from_transformers(file)(words(2, 20, SIZE)).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "more"), [
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"attention_bias": True, "head_dim": 12}),
    ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}), ("qwen3", {"head_dim": 12}),
    ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 3.0}}),
    ("qwen3", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 3.0}}),
    ("llama", {"rope_parameters": {"rope_theta": 100.0, **LLAMA3}})], ids=str)
def test_what_transformers_reads_of_no_gguf_file_is_the_same_model_here(family, more, tmp_path):
    """Biases of LLaMA, SmolLM3, other heads of Qwen3 and stretched positions."""
    theirs, _ = pair(family, tmp_path / "base", vocab_size=SIZE, **more)
    byte_level(tmp_path / "base")
    exported(tmp_path / "base", file := tmp_path / "m.gguf", lora=False)
    again = model.from_pretrained(file)(words(2, 40, SIZE))
    torch.testing.assert_close(again, theirs(words(2, 40, SIZE)).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, model.from_pretrained(tmp_path / "base")(words(2, 40, SIZE)), rtol=0, atol=1e-5)


def test_llama_3s_factors_are_those_of_llama_cpps_converter(tmp_path):
    pair("llama", tmp_path / "base", vocab_size=SIZE, rope_parameters={"rope_theta": 100.0, **LLAMA3})
    byte_level(tmp_path / "base")
    exported(tmp_path / "base", tmp_path / "m.gguf", lora=False)
    stored = reader.read(tmp_path / "m.gguf")[1]["rope_freqs.weight"].data.view("<f4")
    np.testing.assert_allclose(stored, rope_freqs(100.0, 8, 8.0, 1.0, 4.0, 32), rtol=1e-6)


ROUNDED = {"f32": lambda p: p, "f16": lambda p: p.half().float(), "bf16": lambda p: p.bfloat16().float()}


def q8_0(p):
    """32 weights of a row share a half-precision scale, the largest of them becomes 127; other rows are F16."""
    if p.shape[-1] % 32:
        return p.half().float()
    blocks = p.view(-1, 32)
    scale = blocks.abs().max(1, keepdim=True).values / 127
    return ((blocks / scale).round() * scale.half().float()).view_as(p)


@pytest.mark.parametrize("outtype", [*ROUNDED, "q8_0"])
def test_matrices_are_rounded_as_asked_and_all_else_stays(outtype, tmp_path):
    """The width of the feed-forward layer, 48, is no multiple of Q8_0's 32."""
    pair("llama", tmp_path / "base", vocab_size=SIZE, attention_bias=True)
    byte_level(tmp_path / "base")
    m = exported(tmp_path / "base", file := tmp_path / "m.gguf", outtype, lora=False)
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    for name, t in reader.read(file)[1].items():
        short = outtype == "q8_0" and t.shape[-1] % 32
        assert t.kind == (0 if len(t.shape) == 1 else 1 if short else kind), name
    round_ = (ROUNDED | {"q8_0": q8_0})[outtype]
    for (name, p), again in zip(m.named_parameters(), model.from_pretrained(file).parameters(), strict=True):
        # the reader permutes rows back before this: rounding rows is the same in any order
        torch.testing.assert_close(again, round_(p.detach()) if p.ndim > 1 else p, rtol=0, atol=0, msg=name)
    from_transformers(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_by_default_nothing_is_rounded(dtype, tmp_path):
    pair("qwen2", tmp_path / "base", vocab_size=SIZE, use_sliding_window=False)
    byte_level(tmp_path / "base")
    m = exported(tmp_path / "base", file := tmp_path / "m.gguf", lora=False, dtype=dtype)
    again = model.from_pretrained(file)
    assert all(torch.equal(p.float(), q) for p, q in zip(m.parameters(), again.parameters(), strict=True))
    sizes = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
    assert reader.read(file)[0]["general.file_type"] == sizes[dtype]


@pytest.mark.parametrize(("outtype", "value", "fits"), [
    ("f16", 65504.0, True), ("f16", 70000.0, False), ("bf16", 70000.0, True), ("q8_0", 70000.0, True),
    ("q8_0", 9e6, False), ("f32", float("inf"), False), ("f32", float("nan"), False), ("bf16", 3.4e38, False)])
def test_a_number_that_the_type_cannot_hold_is_refused_and_no_file_stays(outtype, value, fits, tmp_path):
    pair("llama", tmp_path / "base", vocab_size=SIZE)
    byte_level(tmp_path / "base")
    m, head, file = model.from_pretrained(tmp_path / "base"), to_gguf.header(tmp_path / "base"), tmp_path / "m.gguf"
    m.requires_grad_(False).blocks[1].mlp.up_proj.weight[3, 4] = value
    if fits:
        to_gguf.write(m, file, head, outtype)
        assert np.isclose(model.from_pretrained(file).blocks[1].mlp.up_proj.weight[3, 4].item(), value, rtol=1e-2)
        return
    with refused("tensor blk.1.ffn_up.weight: expected numbers up to", f"{outtype.upper()} holds"):
        to_gguf.write(m, file, head, outtype)
    assert {f.name for f in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_written_and_another_is(tied, tmp_path):
    pair("llama", tmp_path / "base", vocab_size=SIZE, tie_word_embeddings=tied)
    byte_level(tmp_path / "base")
    exported(tmp_path / "base", tmp_path / "m.gguf")
    assert ("output.weight" in reader.read(tmp_path / "m.gguf")[1]) != tied


# ------------------------------------------------------------------------------------------------------------ settings

OTHER = {"vocab_size": 410, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
         "intermediate_size": 40,
         "num_key_value_heads": 1, "max_position_embeddings": 99, "head_dim": 12, "rms_norm_eps": 3e-4,
         "rope_theta": 777.5, "rope_scaling": {"rope_type": "linear", "factor": 2.5}, "attention_dropout": 0.3,
         "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "sliding_window": 7,
         "use_sliding_window": True, "max_window_layers": 1, "layer_types": ["sliding_attention"] * 5,
         "no_rope_layers": [0, 1, 1, 1, 1], "no_rope_layer_interval": 2}
BASE = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
REFUSED = {"mistral": {"sliding_window"}, "qwen2": {"head_dim", "hidden_size", "num_attention_heads"},
           "qwen3": {"attention_bias"},
           "smollm3": {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}}


@pytest.mark.parametrize("family", config.LLAMAS)
def test_every_setting_is_in_the_file_or_refused_by_name_or_changes_no_number(family, tmp_path):
    """Each field of the Config, so that one of tomorrow is looked at too."""
    byte_level(tmp_path)
    base = BASE | {"model_type": family} | ({"sliding_window": None} if family == "mistral" else {})
    for name in (field.name for field in fields(config.LLAMAS[family])):
        edited = base | {name: OTHER[name]}
        if name in ("layer_types", "sliding_window") and family not in ("llama", "mistral"):
            edited |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
        (tmp_path / "config.json").write_text(json.dumps(edited))
        slides = name in ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers")
        c = config.parse(edited, "config.json")
        if name in REFUSED.get(family, ()) or slides and any(map(c.slides, range(5))):
            with refused(str(tmp_path), "expected"):
                to_gguf.header(tmp_path)
            continue
        head, m = to_gguf.header(tmp_path), model.build(edited).to_empty(device="cpu")
        for p in m.parameters():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        to_gguf.write(m.eval(), file := tmp_path / f"{name}.gguf", head)
        torch.testing.assert_close(model.from_pretrained(file)(words(2, 30, SIZE)), m(words(2, 30, SIZE)), msg=name)


@pytest.mark.parametrize(("family", "changes", "named"), [
    ("gptj", {}, "got gptj, which llama.cpp does not run"), ("bert", {}, "got bert"),
    ("mistral", {}, "sliding_window: expected [False, False]"), ("qwen2", {}, "sliding_window"),
    ("qwen2", {"use_sliding_window": False, "rope_parameters": {"rope_theta": 9.0, **LLAMA3}}, "none or linear"),
    ("smollm3", {"num_hidden_layers": 5}, "no_rope_layers"),
    ("qwen3", {"attention_bias": True}, "got blk.0.attn_output.bias")])
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(family, changes, named, tmp_path):
    pair(family, tmp_path / "base", **changes)
    byte_level(tmp_path / "base")
    with refused(str(tmp_path / "base"), named):
        to_gguf.header(tmp_path / "base")


@pytest.mark.parametrize("name", ["lora-sibo", "lora, learned λ", "adapter", "adapter-sibo", "lora, frozen too"])
def test_h0_and_adapters_are_refused_with_the_reason_and_nothing_is_folded(name, tmp_path):
    pair("llama", tmp_path / "base", vocab_size=SIZE)
    byte_level(tmp_path / "base")
    m = stir(inject(model.from_pretrained(tmp_path / "base"), name))
    expected = m(words(2, 9))
    with refused("expected a plain LoRA, got", "llama.cpp has no place for h0 or an adapter's tanh"):
        to_gguf.write(m, tmp_path / "m.gguf", to_gguf.header(tmp_path / "base"))
    assert torch.equal(m(words(2, 9)), expected) and not (tmp_path / "m.gguf").exists()


def test_a_file_that_is_there_and_one_of_another_name_are_refused(tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    for file in (tmp_path / "m.gguf", tmp_path / "m.bin"):
        with refused("expected a new file, named NAME.gguf, got", str(file)):
            export.require_new(file)


# ----------------------------------------------------------------------------------------------------------- tokenizers

ALPHABET = "aabceehtnois  \t\n.,'’-_/0123456789ÄßéÉ́ñ中文字日本ﬁ🙂\u200b\u00a0\x00▁<>|[]"
STRINGS = st.one_of(st.text(ALPHABET, max_size=30), st.text(max_size=8), st.sampled_from(TEXTS), st.lists(
    st.sampled_from(["<|bos|>", "<|im_end|>", "<think>", "[PAD399]", " wholly", "wholly", "a"]), max_size=5).map(
        "".join))


def from_fields(found, tmp_path):
    w = gguf.GGUFWriter(file := tmp_path / "t.gguf", "llama")
    add = {bool: w.add_bool, int: w.add_uint32, str: w.add_string, list: w.add_array}
    for key, value in found.items():
        add[type(value)](key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tokenizer.from_pretrained(file)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", *SPLITS])
def test_a_byte_level_tokenizer_has_the_same_ids_from_the_file(pre, tmp_path):
    oracle = byte_level(tmp_path, pre)
    found = gguf_tokenizer.fields(tmp_path, SIZE)
    assert found["tokenizer.ggml.pre"] == pre and len(found["tokenizer.ggml.tokens"]) == SIZE
    assert found["tokenizer.ggml.add_bos_token"] == (pre == "llama-bpe")
    assert found["tokenizer.chat_template"] == CHAT
    ours = from_fields(found, tmp_path)
    assert ours.tokens[ours.bos_id] == "<|bos|>" and ours.tokens[ours.eos_id] == "<|im_end|>" and ours.pad_id is None
    assert ours.decode([SIZE - 1]) == tokenizer.read(tmp_path).decode([SIZE - 1]) == "\ufffd"  # fills up

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(STRINGS)
    def check(text):
        ids = oracle.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)

    check()


def test_vocab_json_and_merges_txt_are_read_too(tmp_path):
    byte_level(tmp_path, files="vocab.json")
    ours, oracle = from_fields(gguf_tokenizer.fields(tmp_path, SIZE), tmp_path), tokenizer.read(tmp_path)
    for text in [*TEXTS[:20], "a<|im_end|> b"]:
        assert ours.encode(text) == oracle.encode(text)


@pytest.mark.parametrize(("change", "named"), [
    (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": subwords.GPT4O}), "its pattern"),
    (lambda s: s.update(normalizer=None), "by normalizer NFC"),
    (lambda s: s["model"].update(ignore_merges=True), "by ignore_merges"),
    (lambda s: s["added_tokens"][-1].update(lstrip=True), "'<think>': expected one that takes no blanks"),
    (lambda s: s["added_tokens"][-1].update(single_word=True), "got single_word"),
    (lambda s: s["model"].update(merges=[]), "expected merges"),
    (lambda s: s.update(post_processor=json.loads(processors.TemplateProcessing(
        "<think> $A", "$A $B", [("<think>", s["added_tokens"][-1]["id"])]).__getstate__())), "bos or nothing around")])
def test_a_tokenizer_that_llama_cpp_would_run_otherwise_is_refused_by_what_differs(change, named, tmp_path):
    byte_level(tmp_path, "qwen2")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with refused(str(tmp_path / "tokenizer.json"), named):
        gguf_tokenizer.fields(tmp_path, SIZE)


@pytest.mark.parametrize("others", [["<|im_start|>"], ["<|bos|>", "<|im_start|>"], ["<|bos|>", "<|im_start|>", "a"]],
                         ids=len)
def test_up_to_three_tokens_that_end_a_text_come_along(others, tmp_path):
    vocab = byte_level(tmp_path).get_vocab()
    ends = [vocab[token] for token in ("<|im_end|>", *others)]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    if len(ends) > 3:
        with refused("expected at most 3 tokens that end a text, as eos, eot and eom, got"):
            gguf_tokenizer.fields(tmp_path, SIZE)
        return
    assert from_fields(gguf_tokenizer.fields(tmp_path, SIZE), tmp_path).eos_ids == ends


def test_tokens_without_an_embedding_are_refused(tmp_path):
    size = byte_level(tmp_path).get_vocab_size()
    with refused(f"expected at most {size - 1} tokens, as there are embeddings, got {size}"):
        gguf_tokenizer.fields(tmp_path, size - 1)


@pytest.mark.parametrize(("pre", "family"), [("gpt-2", "llama"), ("qwen2", "qwen2"), ("qwen2", "qwen3")])
def test_transformers_reads_the_same_tokenizer_and_template(pre, family, tmp_path):
    """Of llama's pre-tokenizers it knows GPT-2's alone."""
    pair(family, tmp_path / "base", vocab_size=SIZE, **KINDS[family])
    oracle = byte_level(tmp_path / "base", pre)
    exported(tmp_path / "base", tmp_path / "m.gguf", lora=False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*TEXTS[:50], "a<|im_end|>b<think>", " wholly 123", "DON'T 1\n\n  x"]:
        assert theirs(text)["input_ids"] == oracle.encode(text).ids
    assert (theirs.bos_token, theirs.eos_token, theirs.chat_template) == ("<|bos|>", "<|im_end|>", CHAT)


def sentencepieces(folder, **more):
    """Writes a tokenizer.model that sentencepiece trained; returns what it splits with."""
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=(out := io.BytesIO()), model_type="bpe", vocab_size=360,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False, **more)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.mark.parametrize("more", [{}, {"add_dummy_prefix": False, "pad_id": 3}], ids=str)
def test_tokenizer_model_has_the_same_ids_scores_and_types_from_the_file(more, tmp_path):
    oracle = sentencepieces(tmp_path, **more)
    added = {len(oracle): {"content": "<|im_start|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    found = gguf_tokenizer.fields(tmp_path, SIZE)
    pieces = range(n := len(oracle))
    assert found["tokenizer.ggml.tokens"][:n + 1] == [*(oracle.id_to_piece(i) for i in pieces), "<|im_start|>"]
    assert found["tokenizer.ggml.scores"][:n + 1] == [*(oracle.get_score(i) for i in pieces), -1000.0]
    assert found["tokenizer.ggml.token_type"] == [
        2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1 for i in pieces
        ] + [3] + [5] * (SIZE - n - 1)
    ours = from_fields(found, tmp_path)
    assert (ours.pad_id == 3) == bool(more)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(STRINGS)
    def check(text):
        assert ours.encode(text) == [1, *oracle.encode(text)]
        assert ours.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text))

    check()


def test_an_added_token_that_is_found_after_a_blank_alone_is_refused(tmp_path):
    n = len(sentencepieces(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tag>": n}))  # SentencePiece's prefix is part of it
    with refused("tokenizer.model: expected a tokenizer that a .gguf file can say", "by its added tokens"):
        gguf_tokenizer.fields(tmp_path, SIZE)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_class_that_leads_with_other_blanks_says_so_and_other_texts_have_the_same_ids(legacy, tmp_path, capsys):
    sentencepieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}))
    oracle = tokenizer.read(tmp_path)
    found = gguf_tokenizer.fields(tmp_path, SIZE)
    assert "llama.cpp puts a blank before each text" in (line := capsys.readouterr().err) and line.count("\n") == 1
    ours = from_fields(found, tmp_path)
    for text in TEXTS[:50]:
        assert ours.encode(text.strip()) == oracle.encode(text.strip())


def llama_json(folder, **changes):
    """A tokenizer.json as LLaMA's own, of sentencepiece's merges; returns `tokenizers` on it."""
    oracle = sentencepieces(folder)
    pieces = [oracle.id_to_piece(i) for i in range(len(oracle))]
    vocab, own = {piece: i for i, piece in enumerate(pieces)}, set(pieces)
    merges = [(piece[:k], piece[k:]) for piece in pieces[259:] if len(piece) > 1 for k in range(1, len(piece))
              if {piece[:k], piece[k:]} <= own]
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    t.add_special_tokens([AddedToken(x, normalized=False) for x in ("<unk>", "<s>", "</s>")])
    (folder / "tokenizer.model").unlink()
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return t


def test_a_tokenizer_json_of_llama_gets_scores_in_the_order_of_its_merges(tmp_path):
    oracle = llama_json(tmp_path)
    ours = from_fields(gguf_tokenizer.fields(tmp_path, SIZE), tmp_path)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(STRINGS)
    def check(text):
        ids = oracle.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == oracle.decode(ids)

    check()


def test_a_llama_vocabulary_that_scores_would_merge_otherwise_is_refused(tmp_path):
    llama_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"], spec["normalizer"] = {"type": "Metaspace", "replacement": "▁", "split": True,
                                                 "prepend_scheme": "always"}, None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with refused(str(tmp_path / "tokenizer.json"), "by its pattern"):
        gguf_tokenizer.fields(tmp_path, SIZE)


def test_a_gguf_backbones_own_tokenizer_and_template_come_along_as_they_are(tmp_path):
    parts, tensors = gguf_parts()
    file = tmp_path / "base.gguf"
    file.write_bytes(a_gguf(parts | {"tokenizer.chat_template": CHAT, "tokenizer.ggml.of_tomorrow": "x"}, tensors))
    m = exported(file, tmp_path / "m.gguf")
    before, after = (reader.read(f)[0] for f in (file, tmp_path / "m.gguf"))
    own = {key for key in before if key.startswith("tokenizer.")}
    assert len(own) > 5 and all(after[key] == before[key] for key in own)
    assert torch.equal(model.from_pretrained(tmp_path / "m.gguf")(words(2, 9, 9)), m(words(2, 9, 9)))


# ----------------------------------------------------------------------------------------------------------- commands


def run(module, *args):
    cli.run(module.main, module.parser(), list(map(str, args)))


def test_the_commands_write_a_run_that_scores_the_same(tmp_path, capsys):
    pair("llama", tmp_path / "base", vocab_size=SIZE, max_position_embeddings=512)
    byte_level(tmp_path / "base")
    common = ("--backbone", tmp_path / "base", "--rank", 4, "--steps", 2, "--batch-size", 2, "--lr", 0.1, "--limit", 2,
              "--dtype", "float32", "--cutoff", 400)
    run(train, *common, "--method", "lora", "--out", tmp_path / "run")
    capsys.readouterr()
    run(evaluation, tmp_path / "run", "--export", "gguf", tmp_path / "m.gguf")
    assert capsys.readouterr().out == f"{tmp_path / 'm.gguf'}\n"
    run(evaluation, tmp_path / "run", "--limit", 2)
    same = capsys.readouterr().out
    run(evaluation, "--backbone", tmp_path / "m.gguf", "--limit", 2)
    assert capsys.readouterr().out == same
    run(evaluation, tmp_path / "run", "--export", "gguf", tmp_path / "q.gguf", "--outtype", "q8_0")
    assert reader.read(tmp_path / "q.gguf")[0]["general.file_type"] == 7


@pytest.mark.parametrize(("config", "more", "named"), [
    ({"method": "lora-sibo", "lam": 0.2}, (), "got λ = 0.2, and llama.cpp has no h0"),
    ({"method": "lora-sibo", "lam": 0.1, "learn_lam": True}, (), "got λ = 0.1"),
    ({"method": "adapter-sibo", "lam": 0.2}, (), "got adapters, which llama.cpp has no place for"),
    ({"method": "lora", "lam": 0.0, "base_bits": 4}, (), "16 bits or wider, got 4"),
    ({"method": "lora", "lam": 0.0}, ("--merge",), "expected --merge with hf only"),
    ({"method": "lora", "lam": 0.0}, ("--export", "hf", "x", "--outtype", "f16"), "FILE, got --export hf"),
    ({"method": "lora", "lam": 0.0}, ("--export", "gguf", "x.bin"), "a new file, named NAME.gguf, got x.bin"),
    ], ids=str)
def test_a_run_that_no_gguf_file_holds_is_refused_by_its_config_in_one_line(config, more, named, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"task": "word-problems", "backbone": "no/such"} | config))
    with pytest.raises(SystemExit) as error:
        run(evaluation, tmp_path, "--export", "gguf", tmp_path / "m.gguf", *more)
    line = capsys.readouterr().err
    assert error.value.code == 2 and named in line and line.count("\n") == 1 and not (tmp_path / "m.gguf").exists()
