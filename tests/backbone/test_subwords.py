"""subwords.py against its oracles, on texts of all kinds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_oracles import TEXT, assert_equal, known_to_both, many, needs_data, only_known, real_texts

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
