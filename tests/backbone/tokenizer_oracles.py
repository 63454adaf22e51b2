"""Texts, oracles and files for the tests of tokenizers.

The oracles are `tokenizers` for tokenizer.json and `sentencepiece` for tokenizer.model. Texts come from hypothesis (all
of Unicode, with what tokenizers trip over mixed in) and from real benchmark files."""

import io
import json
import random
import unicodedata
from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

DATA = Path(__file__).parents[3] / "shared" / "data"
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


def bpe_oracle(vocab: dict, merges: list[str], special: list[str], digits: bool) -> Tokenizer:
    oracle = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.Digits(individual_digits=True)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([apart, byte_level]) if digits else byte_level
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return oracle


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
