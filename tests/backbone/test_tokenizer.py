"""tokenizer.py against its oracles: `tokenizers` for tokenizer.json, `sentencepiece` for tokenizer.model.

Texts come from hypothesis (all of Unicode, with what tokenizers trip over mixed in) and from real benchmark files."""

import io
import itertools
import json
import random
import shutil
import unicodedata
from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sibo_lab.backbone import locate, tokenizer

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data folder is not there")
many = settings(max_examples=400, deadline=None, derandomize=True)

TRAPS = st.sampled_from([
    "  ", "\t", "\n\n", "\u3000", "\u00a0", "\u2028", "\x85", "\x1c", "\x00", "\x04", "\x1d", "\x7f", "\ufeff",
    "\ufffd", "'s", "'re", "'LL", " 12", "½", "Ⅷ", "٣", "é", "e\u0301", "İ", "ß", "Σ", "ς", "中文",
    "日本", "한국", "\u1100", "😀", "👩\u200d🚀", "▁", "▁▁", "_", "$", "...", "\u037e", "≠", "\U00041234",
    "\U0010ffff", "hello", " world", "playing", "unaffable", "<s>", "</s>", "[SEP]", "<|endoftext|>", "<0x41>"])
TEXT = st.lists(st.one_of(TRAPS, st.text(max_size=6)), max_size=8).map("".join)


def known_to_both(c: str) -> bool:
    """Python and `tokenizers` come with tables of different Unicode versions; both know what stood in version 3.2 and
    has kept its category since."""
    return unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) not in ("Cn", "Cs")


def only_known(text: str) -> str:
    return "".join(filter(known_to_both, text))


def real_texts() -> list[str]:
    """A few thousand lines of benchmarks, whole as they stand in their files."""
    lines = []
    for file in sorted([*DATA.glob("glue/*/dev.tsv"), *DATA.glob("llm_adapters/*/test.json")]):
        lines += random.Random(0).sample(file.read_text("utf-8").split("\n"), 150)
    return lines


def folder(at: Path, **files) -> Path:
    """A tokenizer's folder; `__` in a name stands for the dot."""
    at.mkdir(exist_ok=True)
    for name, content in {"config__json": {}, **files}.items():
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        (at / name.replace("__", ".")).write_bytes(content.encode() if isinstance(content, str) else content)
    return at


def assert_equal(ours, theirs, texts) -> None:
    for text in texts:
        assert ours(text) == theirs(text), repr(text)


# ---------------------------------------------------------------------------------------------------- WordPiece (BERT)

@pytest.fixture(scope="module")
def minilm():
    return tokenizer.from_pretrained("minilm")


@pytest.fixture(scope="module")
def minilm_oracle():
    oracle = Tokenizer.from_file(str(locate.locate("minilm") / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    return oracle


@many
@given(text=TEXT)
def test_wordpiece_equals_tokenizers_on_unicode(minilm, minilm_oracle, text):
    text = only_known(text)
    assert minilm.encode(text) == minilm_oracle.encode(text).ids


def test_wordpiece_treats_every_single_character_like_tokenizers(minilm, minilm_oracle):
    ideographs = range(0x2A700, 0x2CEB0)  # newer, but treated by their numbers alone
    characters = [c for c in map(chr, range(0x110000)) if known_to_both(c) or ord(c) in ideographs]
    words = (f"a{c}b {c} b{c}{c}" for c in characters)
    while chunk := " ".join(itertools.islice(words, 1000)):
        assert minilm.encode(chunk) == minilm_oracle.encode(chunk).ids


@needs_data
def test_wordpiece_equals_tokenizers_on_real_texts(minilm, minilm_oracle):
    assert_equal(minilm.encode, lambda text: minilm_oracle.encode(text).ids, real_texts())


@many
@given(text=TEXT, pair=TEXT)
def test_wordpiece_pairs_are_cls_a_sep_b_sep(minilm, minilm_oracle, text, pair):
    text, pair = only_known(text), only_known(pair)
    ids = minilm.encode(text, pair)
    assert ids == minilm_oracle.encode(text, pair).ids
    assert ids == minilm.encode(text) + minilm.encode(pair)[1:]
    assert ids[0] == 101 and ids[len(minilm.encode(text)) - 1] == ids[-1] == 102


def test_wordpiece_by_hand(minilm):
    words = {i: w for w, i in minilm.vocab.items()}

    def pieces(text):
        return [words[i] for i in minilm.encode(text)]

    assert pieces("Unaffable Ünàffablé!") == "[CLS] una ##ffa ##ble una ##ffa ##ble ! [SEP]".split()
    assert pieces("") == pieces(" \n") == ["[CLS]", "[SEP]"]
    assert pieces("一二") == ["[CLS]", "一", "二", "[SEP]"]
    assert pieces("a" * 100)[1] != "[UNK]" and pieces("a" * 101) == ["[CLS]", "[UNK]", "[SEP]"]


def test_wordpiece_decodes_to_words_with_one_blank_between(minilm):
    assert minilm.decode(minilm.encode("Unaffable  people\n play", "chess")) == "unaffable people play chess"


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


def test_special_ids_of_bert(minilm):
    assert (minilm.pad_id, minilm.unk_id, minilm.bos_id, minilm.eos_id) == (0, 100, None, None)
    assert minilm.vocab_size == 30522


# ------------------------------------------------------------------------------- byte-level BPE (GPT-2, GPT-J, SmolLM2)

def bpe_oracle(vocab: dict, merges: list[str], special: list[str], digits: bool) -> Tokenizer:
    oracle = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.Digits(individual_digits=True)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([apart, byte_level]) if digits else byte_level
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return oracle


@pytest.fixture(scope="module")
def smollm2():
    return tokenizer.from_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def smollm2_oracle():
    fields = gguf.GGUFReader(locate.locate("smollm2-135m")).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    return bpe_oracle({token: i for i, token in enumerate(tokens)}, merges, tokens[:17], digits=True)


@pytest.fixture(scope="module")
def gpt2_files():
    source = DATA / "tokenizers" / "gpt2"
    if not source.is_dir():
        pytest.skip("the data folder is not there")
    return (source / "encoder.json").read_text("utf-8"), (source / "vocab.bpe").read_text("utf-8")


@pytest.fixture(scope="module")
def gpt2(gpt2_files, tmp_path_factory):
    return tokenizer.from_pretrained(folder(tmp_path_factory.mktemp("gpt2"), encoder__json=gpt2_files[0],
                                            vocab__bpe=gpt2_files[1]))


@pytest.fixture(scope="module")
def gpt2_oracle(gpt2_files):
    merges = [line for line in gpt2_files[1].split("\n")[1:] if line]
    return bpe_oracle(json.loads(gpt2_files[0]), merges, ["<|endoftext|>"], digits=False)


@many
@given(text=TEXT)
def test_smollm2_equals_tokenizers_on_unicode(smollm2, smollm2_oracle, text):
    assert smollm2.encode(text) == smollm2_oracle.encode(text).ids


@many
@given(text=TEXT)
def test_gpt2_equals_tokenizers_on_unicode(gpt2, gpt2_oracle, text):
    assert gpt2.encode(text) == gpt2_oracle.encode(text).ids


@needs_data
def test_byte_level_bpe_equals_tokenizers_on_real_texts(smollm2, smollm2_oracle, gpt2, gpt2_oracle):
    assert_equal(smollm2.encode, lambda text: smollm2_oracle.encode(text).ids, real_texts())
    assert_equal(gpt2.encode, lambda text: gpt2_oracle.encode(text).ids, real_texts())


@many
@given(text=TEXT)
def test_gpt2_round_trips_every_text(gpt2, text):
    text = text.replace("<|endoftext|>", "")
    assert gpt2.decode(gpt2.encode(text)) == text


def test_byte_level_bpe_adds_no_special_tokens_and_splits_off_digits(smollm2, gpt2):
    assert smollm2.encode("") == gpt2.encode("") == []
    assert smollm2.encode("12", "34") == [33, 34, 35, 36] == [smollm2.vocab[digit] for digit in "1234"]


def test_smollm2_drops_what_it_has_no_bytes_for_before_it_merges(smollm2):
    assert smollm2.encode("!\x04!\x1d!") == smollm2.encode("!!!") != smollm2.encode("!") * 3
    assert smollm2.encode("a\x04b") == smollm2.encode("a") + smollm2.encode("b") != smollm2.encode("ab")
    assert smollm2.encode("\x04") == []


@many
@given(ids=st.lists(st.integers(0, 49151), max_size=12))
def test_decode_equals_tokenizers_on_any_ids(smollm2, smollm2_oracle, ids):
    assert smollm2.decode(ids) == smollm2_oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", [" " * 100_000, " " * 1_200_000 + "x", "\n " * 600_000 + "7", "a" * 200_000,
                                  "one 12  two, " * 80_000], ids=["blanks", "overflow", "digit", "a", "text"])
def test_very_long_runs_neither_hang_nor_overflow(gpt2, smollm2, text):
    assert gpt2.decode(gpt2.encode(text)) == smollm2.decode(smollm2.encode(text)) == text


def test_the_way_for_long_texts_gives_the_same_ids(gpt2, gpt2_oracle, smollm2, smollm2_oracle):
    text = "x  12'll   \n\n y7  8!!  " * 5_000
    assert gpt2.encode(text) == gpt2_oracle.encode(text).ids
    assert smollm2.encode(text) == smollm2_oracle.encode(text).ids


def test_gpt2_under_its_own_file_names_under_hugging_faces_and_as_tokenizer_json(
        tmp_path, gpt2, gpt2_files, gpt2_oracle):
    hf = tokenizer.from_pretrained(folder(tmp_path / "hf", vocab__json=gpt2_files[0], merges__txt=gpt2_files[1]))
    spec = tokenizer.from_pretrained(folder(tmp_path / "json", tokenizer__json=gpt2_oracle.to_str(),
                                            config__json={"bos_token_id": 50256, "eos_token_id": [50256]}))
    for text in ["Hello  world's 2024!\n", " <|endoftext|>é中", ""]:
        assert gpt2.encode(text) == hf.encode(text) == spec.encode(text)
    for t in (gpt2, hf, spec):
        assert (t.bos_id, t.eos_id, t.pad_id, t.unk_id, t.vocab_size) == (50256, 50256, None, None, 50257)


def test_special_ids_of_smollm2(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.unk_id, smollm2.vocab_size) == (1, 2, 2, 0, 49152)
    assert smollm2.decode([1, *smollm2.encode("Hi"), 2]) == "Hi"


# ------------------------------------------------------------------------------------------- SentencePiece-BPE (LLaMA)

def llama_spec(pieces: list[str], scores: list[float], normalized: bool, normalizer=None, pre=None) -> dict:
    """tokenizer.json as converters write it: each way to make a piece is a merge, in the order of the scores."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [f"{p[:k]} {p[k:]}" for p in sorted(pieces[259:], key=lambda p: -scores[vocab[p]])
              for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    oracle = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    oracle.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                          special_tokens=[("<s>", 1)])
    spec = json.loads(oracle.to_str()) | {"normalizer": normalizer, "pre_tokenizer": pre}
    spec["model"] |= {"vocab": vocab, "merges": merges}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | {"normalized": normalized, "special": True}
    spec["added_tokens"] = [{"id": i, "content": pieces[i]} | flags for i in range(3)]
    return spec


PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                               {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}


@pytest.fixture(scope="module")
def llama_model():
    file = DATA / "tokenizers" / "llama" / "tokenizer.model"
    if not file.is_file():
        pytest.skip("the data folder is not there")
    return file.read_bytes()


@pytest.fixture(scope="module")
def llama(llama_model, tmp_path_factory):
    return tokenizer.from_pretrained(folder(tmp_path_factory.mktemp("llama"), tokenizer__model=llama_model))


@pytest.fixture(scope="module")
def llama_oracle(llama_model):
    return sentencepiece.SentencePieceProcessor(model_proto=llama_model)


@pytest.fixture(scope="module")
def llama_pieces(llama_oracle):
    ids = range(llama_oracle.vocab_size())
    return [llama_oracle.id_to_piece(i) for i in ids], [llama_oracle.get_score(i) for i in ids]


@many
@given(text=TEXT)
def test_llama_equals_sentencepiece_on_unicode_and_never_parses_special_tokens(llama, llama_oracle, text):
    ids = llama_oracle.encode(text)
    assert llama.encode(text) == [1] + ids
    assert llama.encode(text, text) == [1] + ids + [1] + ids
    assert llama.decode([1, *ids, 2]) == llama_oracle.decode(ids)


@needs_data
def test_llama_equals_sentencepiece_on_real_texts_on_runs_and_on_each_piece(llama, llama_oracle, llama_pieces):
    runs = [before + " " * n + after for n in range(40) for before in ("", "a") for after in ("", "b")]
    assert_equal(llama.encode, lambda text: [1] + llama_oracle.encode(text), real_texts() + runs + llama_pieces[0])


@many
@given(text=TEXT)
def test_llama_round_trips_every_text(llama, text):
    assert llama.decode(llama.encode(text)) == text.replace("▁", " ")


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "a" * 200_000, "▁a " * 100_000, "😀" * 100_000])
def test_very_long_runs_neither_hang_nor_overflow_in_llama(llama, text):
    assert llama.decode(llama.encode(text)) == text.replace("▁", " ")


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


def test_special_ids_of_llama(llama):
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.unk_id, llama.vocab_size) == (1, 2, None, 0, 32000)


def write_gguf(file: Path, model: str, tokens, scores=None, kinds=None, pre=None, merges=None) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [1] * len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    optional = {writer.add_tokenizer_pre: pre, writer.add_token_scores: scores, writer.add_token_merges: merges}
    for add, value in optional.items():
        if value is not None:
            add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def train_sentencepiece(**options) -> bytes:
    words = ["the cat sat on the mat", "counting to twelve", "a  double  space", "naïve café, 12 € — 中文"] * 20
    settings = dict(model_type="bpe", vocab_size=340, byte_fallback=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2) | options
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=out, **settings)
    return out.getvalue()


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


def refused(path: Path, *words: str) -> None:
    """One line that names the file and says what was found."""
    with pytest.raises(ValueError) as error:
        tokenizer.from_pretrained(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


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
    ({"added_tokens": [TOKEN]}, "single_word"),
    ({"added_tokens": [TOKEN | {"single_word": False, "content": "a"}]}, "another id")])
def test_what_a_tokenizer_json_asks_for_and_is_not_known_is_refused_by_name(tmp_path, change, named):
    refused(folder(tmp_path / "t", tokenizer__json=SPEC | change), "tokenizer.json", named)


@pytest.mark.parametrize(("change", "named"), [
    ({"model": BYTE_BPE | {"dropout": 0.1}}, "dropout"), ({"model": BYTE_BPE | {"ignore_merges": True}}, "ignore"),
    ({"model": BYTE_BPE | {"end_of_word_suffix": "</w>"}}, "</w>"), ({"model": BYTE_BPE | {"unk_token": "a"}}, "unk"),
    ({"model": BYTE_BPE | {"merges": ["a c"]}}, "'a c'"), ({"model": BYTE_BPE | {"merges": ["a b c"]}}, "'a b c'"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
    ({"pre_tokenizer": {"type": "Split"}}, "Split"), ({"model": BYTE_BPE | {"byte_fallback": True}}, "BPE"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_SPEC["pre_tokenizer"]] * 2}}, "ByteLevel, "),
    ({"normalizer": {"type": "NFC"}}, "NFC")])
def test_what_a_byte_level_tokenizer_json_asks_for_and_is_not_known_is_refused_by_name(tmp_path, change, named):
    refused(folder(tmp_path / "t", tokenizer__json=BYTE_SPEC | change), "tokenizer.json", named)


@pytest.mark.parametrize(("options", "named"), [
    ({"model_type": "unigram"}, "model_type is 1"), ({"normalization_rule_name": "nmt_nfkc"}, "normalisation"),
    ({"remove_extra_whitespaces": True}, "normalisation"), ({"treat_whitespace_as_suffix": True}, "normalisation"),
    ({"byte_fallback": False}, "byte"), ({"user_defined_symbols": ["<u>"]}, "types")])
def test_sentencepiece_models_that_work_otherwise_are_refused(tmp_path, options, named):
    refused(folder(tmp_path / "t", tokenizer__model=train_sentencepiece(**options)), "tokenizer.model", named)


def test_a_spoiled_sentencepiece_model_is_an_error_of_one_line_or_still_a_tokenizer(tmp_path):
    model, chance = train_sentencepiece(), random.Random(0)
    refused(folder(tmp_path / "cut", tokenizer__model=model[:-2]), "tokenizer.model", "cut off")
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
                   tokenizer_config__json={"bos_token": "<s>"}), "bos_token", "'<s>'")
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        tokenizer.from_pretrained(folder(tmp_path / "o", vocab__json=vocab))
    with pytest.raises(FileNotFoundError, match="found no tokenizer"):
        tokenizer.from_pretrained(folder(tmp_path / "p"))


@pytest.mark.parametrize(("model", "pre"), [("gpt2", "llama-bpe"), ("gpt2", "default"), ("gpt2", None), ("bert", None)])
def test_gguf_tokenizers_of_another_kind_are_refused_by_name(tmp_path, model, pre):
    write_gguf(tmp_path / "m.gguf", model, ["a", "b", "ab"], pre=pre, merges=["a b"])
    refused(tmp_path / "m.gguf", repr(model), repr(pre))


def test_a_malformed_gguf_is_an_error_of_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x03" + bytes(11))
    refused(tmp_path / "m.gguf")


def test_half_a_surrogate_pair_is_an_error(minilm, smollm2):
    for t in (minilm, smollm2):
        with pytest.raises(ValueError, match="surrogates"):
            t.encode("a\ud800b")


def test_a_saved_copy_reads_back_the_same(tmp_path, minilm):
    shutil.copytree(locate.locate("minilm"), tmp_path / "copy")
    assert tokenizer.from_pretrained(tmp_path / "copy").encode("Same ids.") == minilm.encode("Same ids.")


def test_an_id_beyond_the_vocabulary_is_decoded_as_the_replacement_character(minilm, smollm2):
    for t in (minilm, smollm2):
        assert t.decode([t.vocab_size + 7]) == "\ufffd"
