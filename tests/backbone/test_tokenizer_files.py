"""tokenizer_json.py, tokenizer_model.py: the same tokenizer from every kind of file, and bad files refused by name."""

import json
import random
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_oracles import (
    PREPEND,
    TEXT,
    assert_equal,
    folder,
    llama_spec,
    many,
    only_known,
    refused,
    seeded,
    train_sentencepiece,
    trained,
    write_gguf,
)
from tokenizers import AddedToken, Tokenizer

from sibo_lab.backbone import locate, tokenizer


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False},
                                    {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}])
def test_wordpiece_from_vocab_txt_equals_tokenizer_json_with_the_same_settings(tmp_path, config):
    source = locate.locate("minilm")
    spec = json.loads((source / "tokenizer.json").read_text("utf-8")) | {"truncation": None, "padding": None}
    spec["normalizer"] |= {"lowercase": config.get("do_lower_case", True), "strip_accents": config.get("strip_accents"),
                           "handle_chinese_chars": config.get("tokenize_chinese_chars", True)}
    oracle = Tokenizer.from_str(json.dumps(spec))
    vocab = folder(tmp_path / "vocab", vocab__txt=(source / "vocab.txt").read_bytes(), tokenizer_config__json=config)
    both = [tokenizer.from_pretrained(vocab), tokenizer.from_pretrained(folder(tmp_path / "j", tokenizer__json=spec))]

    @settings(many, max_examples=100)
    @given(TEXT.map(only_known))
    def check(text):
        assert both[0].encode(text) == both[1].encode(text) == oracle.encode(text).ids

    check()


def test_gpt2_under_its_own_file_names_under_hugging_faces_and_as_tokenizer_json(
        tmp_path, gpt2, gpt2_files, gpt2_oracle):
    hf = tokenizer.from_pretrained(folder(tmp_path / "hf", vocab__json=gpt2_files[0], merges__txt=gpt2_files[1]))
    spec = tokenizer.from_pretrained(folder(tmp_path / "json", tokenizer__json=gpt2_oracle.to_str(),
                                            config__json={"bos_token_id": 50256, "eos_token_id": [50256]}))
    for text in ["Hello  world's 2024!\n", " <|endoftext|>é中", ""]:
        assert gpt2.encode(text) == hf.encode(text) == spec.encode(text)
    for t in (gpt2, hf, spec):
        assert (t.bos_id, t.eos_id, t.pad_id, t.unk_id, t.vocab_size) == (50256, 50256, None, None, 50257)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("normalizer", "scheme", "split"), [
    (PREPEND, None, None), (PREPEND["normalizers"][1], None, None), (None, "always", True), (None, "always", False),
    (None, "first", True), (None, "first", False), (None, "never", True)])
def test_llama_tokenizer_json_equals_tokenizers(tmp_path, llama_pieces, normalizer, scheme, split, normalized):
    pre = scheme and {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    spec = json.dumps(llama_spec(*llama_pieces, normalized, normalizer, pre))
    ours, oracle = tokenizer.from_pretrained(folder(tmp_path / "l", tokenizer__json=spec)), Tokenizer.from_str(spec)

    @settings(many, max_examples=60)
    @given(TEXT, TEXT)
    def check(text, pair):
        assert ours.encode(text) == oracle.encode(text).ids
        assert ours.encode(text, pair) == oracle.encode(text, pair).ids

    check()
    assert_equal(ours.encode, lambda text: oracle.encode(text).ids, ["<s>a", "a</s>b", "a </s> b", " <s> </s></s> x"])


def test_llama_tokenizer_model_wins_over_a_tokenizer_json_whose_conversion_differs(
        tmp_path, llama, llama_model, llama_pieces):
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    spec = llama_spec(*llama_pieces, False, pre=pre)
    alone = tokenizer.from_pretrained(folder(tmp_path / "json", tokenizer__json=spec))
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 32000, "content": "[PAD]"})
    both = tokenizer.from_pretrained(folder(tmp_path / "both", tokenizer__json=spec, tokenizer__model=llama_model,
                                            special_tokens_map__json={"pad_token": {"content": "[PAD]"}}))
    for text in (" two", "x</s>"):
        assert both.encode(text) == llama.encode(text) != alone.encode(text)
    assert (both.pad_id, both.vocab_size) == (32000, 32001) and both.encode("[PAD]") == [1, 32000]


def test_llama_from_gguf_equals_tokenizer_model(tmp_path, llama, llama_pieces):
    file = tmp_path / "m.gguf"
    kinds = [2, 3, 3] + [6] * 256 + [1] * 31741
    write_gguf(file, "llama", tokens=llama_pieces[0], scores=llama_pieces[1], kinds=kinds)
    ours = tokenizer.from_pretrained(file)
    for text in ["  Hello  world", "", "a</s>é\u0378😀\n", "▁"]:
        assert ours.encode(text) == llama.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32000)


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_another_sentencepiece_model_equals_sentencepiece(tmp_path, add_dummy_prefix):
    model = train_sentencepiece(add_dummy_prefix=add_dummy_prefix, pad_id=3)
    ours = tokenizer.from_pretrained(folder(tmp_path / "sp", tokenizer__model=model))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert ours.pad_id == 3

    @many
    @given(st.one_of(TEXT, st.text("the catsonmwlv  é中€", max_size=30)))
    def check(text):
        ids = oracle.encode(text)
        assert ours.encode(text) == [1] + ids
        assert ours.decode(ids) == oracle.decode(ids)

    check()


def test_a_saved_copy_reads_back_the_same(tmp_path, minilm):
    shutil.copytree(locate.locate("minilm"), tmp_path / "copy")
    assert tokenizer.from_pretrained(tmp_path / "copy").encode("Same ids.") == minilm.encode("Same ids.")


# -------------------------------------------------------------------------------------------------------- added tokens

ADDED = [AddedToken("NewÉ", normalized=True), AddedToken("<l>", lstrip=True, normalized=False),
         AddedToken("<r>", rstrip=True, normalized=False), AddedToken("<r><r>", special=True, normalized=False)]


@pytest.mark.parametrize("family", ["minilm_oracle", "gpt2_oracle"])
def test_added_tokens_of_tokenizer_json_are_honoured(tmp_path, request, family):
    oracle = Tokenizer.from_str(request.getfixturevalue(family).to_str())
    oracle.add_tokens(ADDED)
    ours = tokenizer.from_pretrained(folder(tmp_path / "added", tokenizer__json=oracle.to_str()))
    words = st.sampled_from(["newé", "NEWÉ", "NewÉ", "<l>", "<r>", "<r><r>", " ", "  ", "\n", "x", "[SEP]", "[sep]"])

    @many
    @given(st.lists(words, max_size=8).map("".join))
    def check(text):
        assert ours.encode(text) == oracle.encode(text).ids

    check()


# --------------------------------------------------------------------------------------- what is refused, and malformed

TINY = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
        "lowercase": True}
SPEC = {"added_tokens": [], "normalizer": BERT, "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "model": TINY}
BYTE_BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
BYTE_SPEC = SPEC | {"normalizer": None, "model": BYTE_BPE,
                    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
TOKEN = {"id": 9, "content": "<x>", "special": True, "single_word": True, "lstrip": False, "rstrip": False,
         "normalized": False}


def test_the_small_files_that_the_next_tests_spoil_are_read_when_whole(tmp_path):
    assert tokenizer.from_pretrained(folder(tmp_path / "a", tokenizer__json=SPEC)).encode("a A") == [3, 3]
    assert tokenizer.from_pretrained(folder(tmp_path / "b", tokenizer__json=BYTE_SPEC)).encode("aab") == [0, 2]
    assert tokenizer.from_pretrained(folder(tmp_path / "c", tokenizer__model=train_sentencepiece())).encode("") == [1]


@pytest.mark.parametrize(("change", "named"), [
    ({"normalizer": {"type": "NFKC"}}, "NFKC"), ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"normalizer": BERT | {"clean_text": False}}, "clean_text"),
    ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
    ({"model": TINY | {"type": "Unigram"}}, "Unigram"), ({"model": TINY | {"continuing_subword_prefix": "@"}}, "'@'"),
    ({"model": TINY | {"vocab": {"a": -1}}}, "non-negative"), ({"model": TINY | {"vocab": {"a": "0"}}}, "integers"),
    ({"model": TINY | {"vocab": {"a": 0}}}, "unknown token"), ({"model": None}, "malformed"),
    ({"added_tokens": [TOKEN]}, "'<x>': expected id 4"), ({"added_tokens": [TOKEN | {"content": "a"}]}, "id 3"),
    ({"added_tokens": [TOKEN | {"id": 4, "tomorrow": 1}]}, "tomorrow"), ({"tomorrow": 1}, "tomorrow"),
    ({"model": TINY | {"tomorrow": 1}}, "tomorrow"), ({"normalizer": BERT | {"tomorrow": 1}}, "tomorrow")])
def test_what_a_tokenizer_json_asks_for_and_is_not_known_is_refused_by_name(tmp_path, change, named):
    refused(folder(tmp_path / "t", tokenizer__json=SPEC | change), "tokenizer.json", named)


@pytest.mark.parametrize(("change", "named"), [
    ({"model": BYTE_BPE | {"dropout": 0.1}}, "dropout"), ({"model": BYTE_BPE | {"ignore_merges": "no"}}, "'no'"),
    ({"model": BYTE_BPE | {"end_of_word_suffix": "</w>"}}, "</w>"), ({"model": BYTE_BPE | {"unk_token": "a"}}, "unk"),
    ({"model": BYTE_BPE | {"merges": ["a c"]}}, "'a c'"), ({"model": BYTE_BPE | {"merges": ["a b c"]}}, "'a b c'"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "ByteLevel"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": True}]}}, "Digits"),
    ({"pre_tokenizer": {"type": "Split"}}, "Split"), ({"model": BYTE_BPE | {"byte_fallback": True}}, "BPE"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_SPEC["pre_tokenizer"]] * 2}}, "ByteLevel, "),
    ({"normalizer": {"type": "NFD"}}, "NFD")])
def test_what_a_byte_level_tokenizer_json_asks_for_and_is_not_known_is_refused_by_name(tmp_path, change, named):
    refused(folder(tmp_path / "t", tokenizer__json=BYTE_SPEC | change), "tokenizer.json", named)


@pytest.mark.parametrize(("options", "named"), [
    ({"model_type": "unigram"}, "model_type: expected 2, for BPE, got 1"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalization"),
    ({"remove_extra_whitespaces": True}, "normalization"), ({"treat_whitespace_as_suffix": True}, "normalization"),
    ({"byte_fallback": False}, "user-defined, unused or byte")])
def test_sentencepiece_models_that_work_otherwise_are_refused(tmp_path, options, named):
    refused(folder(tmp_path / "t", tokenizer__model=train_sentencepiece(**options)), "tokenizer.model", named)


def test_a_spoiled_sentencepiece_model_is_an_error_of_one_line_or_still_a_tokenizer(tmp_path):
    model, chance = train_sentencepiece(), random.Random(0)
    refused(folder(tmp_path / "cut", tokenizer__model=model[:-2]), "tokenizer.model", "to come")
    refused(folder(tmp_path / "text", tokenizer__model=b"version https://git-lfs\nsize 499723\n"), "tokenizer.model")
    refused(folder(tmp_path / "endless", tokenizer__model=b"\xff" * 40), "10 bytes")
    for _ in range(200):
        spoiled = bytearray(model)
        for _ in range(3):
            spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
        try:
            tokenizer.from_pretrained(folder(tmp_path / "spoiled", tokenizer__model=bytes(spoiled))).encode("a b")
        except ValueError as error:
            assert "tokenizer.model: " in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"{}", b"", b"[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer__json", "vocab__json"])
def test_malformed_json_is_an_error_of_one_line_that_names_the_file(tmp_path, name, content):
    refused(folder(tmp_path / "t", **{name: content}, merges__txt="#version: 0.2\na b\n"), name.replace("__", "."))


def test_malformed_vocabularies_and_merges_name_what_was_found(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 2}
    refused(folder(tmp_path / "v", vocab__txt="a\nb\n[UNK]\n"), "vocab.txt", "[CLS]")
    refused(folder(tmp_path / "m", vocab__json=vocab, merges__txt="#version: 0.2\na x\n"), "vocab.json", "'a x'")
    refused(folder(tmp_path / "n", vocab__json=vocab, merges__txt="a b\n",
                   tokenizer_config__json={"bos_token": 1}), "special token", "got 1")
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        tokenizer.from_pretrained(folder(tmp_path / "o", vocab__json=vocab))
    with pytest.raises(FileNotFoundError, match="expected a tokenizer"):
        tokenizer.from_pretrained(folder(tmp_path / "p"))


@pytest.mark.parametrize(("model", "pre"), [
    ("gpt2", "deepseek-llm"), ("gpt2", "default"), ("gpt2", None), ("bert", None)])
def test_gguf_tokenizers_of_another_kind_are_refused_by_name(tmp_path, model, pre):
    write_gguf(tmp_path / "m.gguf", model, ["a", "b", "ab"], pre=pre, merges=["a b"])
    refused(tmp_path / "m.gguf", repr(model), repr(pre))


@pytest.mark.parametrize(("pre", "form"), [("llama-bpe", "llama3"), ("qwen2", "qwen2"), ("tekken", "tekken")])
def test_gguf_of_todays_forms_equals_tokenizers(tmp_path, pre, form):
    spec, file = json.loads(trained(form)), tmp_path / "m.gguf"
    spec["added_tokens"] = [token | {"normalized": False, "single_word": False} for token in spec["added_tokens"]]
    oracle = Tokenizer.from_str(json.dumps(spec))
    added = {token["id"]: 3 if token["special"] else 4 for token in spec["added_tokens"]}
    tokens = [oracle.id_to_token(i) for i in range(oracle.get_vocab_size())]
    write_gguf(file, "gpt2", tokens, kinds=[added.get(i, 1) for i in range(len(tokens))], pre=pre,
               merges=[*map(" ".join, spec["model"]["merges"])])
    ours = tokenizer.from_pretrained(file)
    texts = seeded(200, pre, known=True)
    assert_equal(lambda text: ours.encode(text, add_special_tokens=False),
                 lambda text: oracle.encode(text, add_special_tokens=False).ids, texts)
    assert ours.encode("a")[:-1] == ([] if form == "qwen2" else [1])  # llama.cpp's bos where the file does not say


def test_gguf_ids_past_the_vocabulary_are_no_tokens_and_eot_ends_a_text_too(tmp_path):
    write_gguf(tmp_path / "m.gguf", "gpt2", ["a", "b", "ab"], pre="gpt-2", merges=["a b"],
               ids={"padding": 4294967295, "unknown": 3, "eot": 1, "eom": 9})
    t = tokenizer.from_pretrained(tmp_path / "m.gguf")
    assert (t.pad_id, t.unk_id, t.bos_id, t.eos_ids) == (None, None, 1, [2, 1])


def test_a_malformed_gguf_is_an_error_of_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x03" + bytes(11))
    refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path, name):
    files = {"vocab.json": {}} if name == "merges.txt" else {}
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (at := folder(tmp_path / "a", **files)).joinpath(name).write_text(pointer)
    if name.startswith(("vocab.j", "merges")):
        (at / "vocab.json").touch()
        (at / "merges.txt").touch()
    refused(at, name, "got a Git-LFS pointer")
