"""subwords.py against its oracles, on texts of all kinds."""

import itertools
import os
import random
import tempfile
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizer_oracles import (
    FORMS,
    TEXT,
    assert_equal,
    folder,
    known_to_both,
    many,
    needs_data,
    only_known,
    real_texts,
    seeded,
    train_sentencepiece,
    trained,
    write_gguf,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from sibo_lab.backbone import tokenizer

# ---------------------------------------------------------------------------------------------------- WordPiece (BERT)

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


@many
@given(text=TEXT, pair=st.none() | TEXT)
def test_without_special_tokens_those_in_the_text_are_still_found(
        minilm, minilm_oracle, smollm2, smollm2_oracle, text, pair):
    pair = pair and only_known(pair)
    for ours, oracle in ((minilm, minilm_oracle), (smollm2, smollm2_oracle)):
        ids = oracle.encode(only_known(text), pair, add_special_tokens=False).ids
        assert ours.encode(only_known(text), pair, add_special_tokens=False) == ids


def test_llama_without_special_tokens_is_sentencepiece_between_control_tokens_of_a_chat_template(llama, llama_oracle):
    a, b = llama_oracle.encode(" a "), llama_oracle.encode("b")
    assert llama.encode(" a </s>b", add_special_tokens=False) == [*a, 2, *b]
    assert llama.encode(" a </s>b") == [1, *llama_oracle.encode(" a </s>b")]
    assert (llama.tokens[llama.bos_id], llama.tokens[llama.eos_id]) == ("<s>", "</s>")


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


def test_special_ids_of_bert(minilm):
    assert (minilm.pad_id, minilm.unk_id, minilm.bos_id, minilm.eos_id) == (0, 100, None, None)
    assert minilm.vocab_size == 30522


# ------------------------------------------------------------------------------- byte-level BPE (GPT-2, GPT-J, SmolLM2)

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


def test_special_ids_of_smollm2(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.unk_id, smollm2.vocab_size) == (1, 2, 2, 0, 49152)
    assert smollm2.decode([1, *smollm2.encode("Hi"), 2]) == "Hi"


# ------------------------------------------------------------------------------------------- SentencePiece-BPE (LLaMA)

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


def test_special_ids_of_llama(llama):
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.unk_id, llama.vocab_size) == (1, 2, None, 0, 32000)


def test_half_a_surrogate_pair_is_an_error(minilm, smollm2):
    for t in (minilm, smollm2):
        with pytest.raises(ValueError, match="surrogates"):
            t.encode("a\ud800b")


def test_an_id_beyond_the_vocabulary_is_decoded_as_the_replacement_character(minilm, smollm2):
    for t in (minilm, smollm2):
        assert t.decode([t.vocab_size + 7]) == "\ufffd"


# -------------------------------------------------------------------------- splits and merges of today's tokenizer.json

SWEEP = int(os.environ.get("TOKENIZER_SWEEP", 500))  # texts per form; above 500 all of Unicode's characters too


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_tokenizer_json_equal_tokenizers_on_unicode(tmp_path, form):
    ours = tokenizer.from_pretrained(folder(tmp_path / "a", tokenizer__json=trained(form)))
    oracle = Tokenizer.from_str(trained(form))
    # Python and `tokenizers` know the same composition (Qwen's), and letters beside single words, of older characters
    texts = [only_known(text) if form == "qwen2" or "rd" in text else text for text in seeded(SWEEP, form)]
    assert_equal(ours.encode, lambda text: oracle.encode(text).ids, texts)
    assert_equal(lambda text: ours.encode(text, "b " + text, False),
                 lambda text: oracle.encode(text, "b " + text, add_special_tokens=False).ids, texts)
    plain = [text.replace("Wörd", "").replace("Wo\u0308rd", "") for text in texts]  # whose "ö" they take for a byte
    assert_equal(lambda text: ours.decode(ours.encode(text)),
                 lambda text: oracle.decode(oracle.encode(text).ids), plain)


@pytest.mark.parametrize("form", FORMS)
def test_forms_split_at_every_single_character_like_tokenizers(tmp_path, form):
    ours = tokenizer.from_pretrained(folder(tmp_path / "a", tokenizer__json=trained(form)))
    oracle = Tokenizer.from_str(trained(form))
    step = 1 if SWEEP > 500 else 997
    ranges = range(0x3100), range(0x3100, 0xD800, step), range(0xF900, 0x10400), range(0x10400, 0x110000, step)
    characters = [c for c in map(chr, itertools.chain(*ranges)) if form != "qwen2" or known_to_both(c)]
    for start in range(0, len(characters), 100):
        text = "".join(f"the{c} {c}{c}1'{c}s\n" for c in characters[start:start + 100])
        assert ours.encode(text) == oracle.encode(text).ids


@pytest.mark.parametrize("form", ["llama3", "qwen2"])
@pytest.mark.parametrize("text", [" " * 90_000 + "x", " " * 1_000_000 + "x", "\n " * 50_000 + "7", "a" * 200_000,
                                  "'" * 99_000], ids=["blanks", "overflow", "lines", "a", "signs"])
def test_very_long_runs_neither_hang_nor_overflow_in_any_form(tmp_path, form, text):
    ours = tokenizer.from_pretrained(folder(tmp_path / "a", tokenizer__json=trained(form)))
    assert ours.decode(ours.encode(text)) == text


LETTERS = st.text("abc", min_size=1, max_size=4)


@settings(many, max_examples=150)
@given(words=st.lists(LETTERS, min_size=2, max_size=9, unique=True), ignore_merges=st.booleans(), data=st.data(),
       texts=st.lists(st.text("abc ", max_size=12), min_size=1, max_size=8))
def test_any_merges_are_made_as_by_tokenizers(words, ignore_merges, data, texts):
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*"abcĠ", *words, *(w[:2] for w in words)]))}
    pairs = [(w[:k], w[k:]) for w in vocab for k in range(1, len(w)) if w[:k] in vocab and w[k:] in vocab]
    drawn, merges = data.draw(st.lists(st.sampled_from(pairs), max_size=12)) if pairs else [], []
    for pair in drawn:  # each half made before
        if all(len(half) == 1 or half in map("".join, merges) for half in pair):
            merges.append(pair)
    oracle = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with tempfile.TemporaryDirectory() as at:
        ours = tokenizer.from_pretrained(folder(Path(at), tokenizer__json=oracle.to_str()))
    assert_equal(ours.encode, lambda text: oracle.encode(text).ids, [*texts, *words])


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_a_token_that_its_merges_never_come_to_is_taken_whole_only_where_merges_are_ignored(tmp_path, ignore_merges):
    vocab = {"a": 0, "aa": 1, "aaa": 2}  # "aaa" is merged from the left: to "aa", "a"
    oracle = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "a"), ("a", "aa")], ignore_merges=ignore_merges))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = tokenizer.from_pretrained(folder(tmp_path / "a", tokenizer__json=oracle.to_str()))
    assert ours.encode("aaa") == oracle.encode("aaa").ids == ([2] if ignore_merges else [1, 0])


# ---------------------------------------------------------------------------------- scores and kinds of SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def extended(model: bytes, pieces: dict[str, tuple[float, int]], change=lambda piece: None) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    for piece in proto.pieces:
        change(piece)
    proto.pieces.extend(sentencepiece_model_pb2.ModelProto.SentencePiece(piece=piece, score=score, type=kind)
                        for piece, (score, kind) in pieces.items())
    return proto.SerializeToString()


def mixed(parts: list[str], n: int = 300) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choice(parts) for _ in range(chance.randrange(14))) for _ in range(n)]


@pytest.mark.parametrize(("pieces", "texts"), [
    (dict.fromkeys(("学的", "大学", "京大", "北京"), (0, NORMAL)), mixed([*"北京大学的 a"])),
    (dict.fromkeys(("大学", "京大", "大学的", "▁北京", "北京"), (-7, NORMAL)), mixed([*"北京大学的 a"])),
    ({"zzqj": (-.5, NORMAL), "▁zzqj": (-.25, NORMAL)}, [*mixed([*"zqj "]), "zzqj"]),
    ({"<u>": (0, USER_DEFINED), "大学学": (0, USER_DEFINED), "a▁bq": (0, USER_DEFINED), "▁▁▁x": (-3, USER_DEFINED)},
     mixed(["<u>", "大学", "学", "a", "b", "q", " ", "x", "▁", "  "])),
    ({"▁▁y": (0, UNUSED), "大学": (0, UNUSED), "京大学": (0, NORMAL)}, mixed([*"京大学 y"]))],
    ids=["tied", "tied below others", "never made", "user-defined", "unused"])
def test_an_extended_vocabulary_equals_sentencepiece(tmp_path, llama_model, pieces, texts):
    model = extended(llama_model, pieces)
    ours = tokenizer.from_pretrained(folder(tmp_path / "a", tokenizer__model=model))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert_equal(ours.encode, lambda text: [1] + oracle.encode(text), texts)
    assert_equal(lambda text: ours.decode(oracle.encode(text)), lambda text: oracle.decode(oracle.encode(text)), texts)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("gguf", [True, False])
def test_any_scores_and_kinds_of_pieces_equal_sentencepiece_from_both_files(tmp_path, seed, gguf):
    chance = random.Random(seed)

    def change(piece):
        if piece.type == NORMAL:
            piece.score = -float(chance.randrange(6 if seed < 5 else 60))
            if len(piece.piece) > 1 and chance.random() < .1:
                piece.type = chance.choice([NORMAL, USER_DEFINED, UNUSED])

    model = extended(train_sentencepiece(), {}, change)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    if gguf:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        at = tmp_path / "m.gguf"
        write_gguf(at, "llama", [p.piece for p in proto.pieces], [p.score for p in proto.pieces],
                   [p.type for p in proto.pieces])
    else:
        at = folder(tmp_path / "a", tokenizer__model=model)
    texts = mixed([*"thecatsonmwelv  12é中", "the ", "cat", " sat", "  ", "double", "▁"], 400)
    assert_equal(tokenizer.from_pretrained(at).encode, lambda text: [1] + oracle.encode(text), texts)
