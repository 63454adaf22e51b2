"""Texts, oracles and files for the tests of tokenizers.

The oracles are `tokenizers` for tokenizer.json and `sentencepiece` for tokenizer.model. Texts come from hypothesis (all
of Unicode, with what tokenizers trip over mixed in) and from real benchmark files."""

import io
import json
import random
import unicodedata
from functools import cache
from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from sibo_lab.backbone import tokenizer

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


def seeded(n: int, seed: str, known: bool = False) -> list[str]:
    """Texts of all kinds without hypothesis, for long sweeps; `known`: see only_known."""
    chance, texts = random.Random(seed), []
    traps = [*TRAPS.elements, "'Ll", "'ſ", " 'll", "\r\n", "\r", "//\n", "123456", " 1234", "ǅ", "ʰ", "\u0301", "ᄀ",
             "각", "𝟘𝟙", "<|end|>", "<think>", "Wörd", "Wo\u0308rd", " Wörd.", "xWörd"]
    kinds = [lambda: chance.choice(traps), lambda: chr(chance.randrange(32, 0x250)),
             lambda: chr(chance.choice([chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)])),
             lambda: chance.choice(" \n\r\tabcABC'12.,/")]
    for _ in range(n):
        parts = [chance.choice(kinds) for _ in range(chance.randrange(9))]
        texts.append("".join(make() for make in parts for _ in range(chance.randrange(1, 4))))
    return [only_known(text) for text in texts] if known else texts


LLAMA_TEXTS = [*seeded(60, "llama"), "Hello", "<|im_start|>user\nHi", " two", "a</s>b", " <s> a", "x <|im_start|> y",
               ""]


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


REST, SHORT = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+@|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*@|"
SLASH = REST.replace("[\\r\\n]*|", "[\\r\\n/]*|", 1)
FORMS = {  # as those models' files have them: split, NFC, ignore_merges
    "llama3": (SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST, False, True),
    "qwen2": (SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST, True, False),
    "tekken": (CASED.replace("@", "") + r"\p{N}" + SLASH, False, True),
    "gpt4o": (CASED.replace("@", SHORT + "?") + r"\p{N}{1,3}" + SLASH, False, False)}


@cache
def trained(form: str) -> str:
    """A small tokenizer.json of a form, with added tokens of all kinds and, but for Qwen's, a template with bos."""
    split, nfc, ignore_merges = FORMS[form]
    oracle = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    oracle.normalizer = normalizers.NFC() if nfc else None
    oracle.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    oracle.decoder = decoders.ByteLevel()
    lines = ["The cat's hat isn't I'LL SHOUTED 12345 3.14, 1/2//3!!\r\n\n  indented\t\tx  ",
             "naïve café 中文 日本語 한국 ½", *seeded(300, "train")] * 3
    oracle.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    oracle.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|begin|>", "<|end|>", "<|endoftext|>")])
    oracle.add_tokens([AddedToken("<think>", normalized=False), AddedToken("Wörd", normalized=True, single_word=True)])
    bos = oracle.token_to_id("<|begin|>")
    oracle.post_processor = processors.ByteLevel(trim_offsets=False) if nfc else processors.Sequence([
        processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", bos)])])
    return oracle.to_str()


def refused(path: Path, *words: str) -> None:
    """One line that names the file and says what was found."""
    with pytest.raises(ValueError) as error:
        tokenizer.from_pretrained(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


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


def write_gguf(file: Path, model: str, tokens, scores=None, kinds=None, pre=None, merges=None,
               ids: dict | None = None) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [1] * len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for role, i in (ids or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", i)
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
