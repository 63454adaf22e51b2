"""Text <-> token ids: WordPiece (BERT), byte-level BPE (GPT-2, GPT-J, SmolLM2), SentencePiece-BPE with byte fallback
(LLaMA). Sources: Wu et al. 2016, Sennrich et al. 2016, Radford et al. 2019, Kudo & Richardson 2018.

The ids are those of `tokenizers` (tokenizer.json) and `sentencepiece` (tokenizer.model), but for WordPiece on 749
characters on which Unicode tables disagree, all but four newer than Unicode 3.2. Departs from the official code:
transformers' LlamaTokenizer differs from sentencepiece on leading and double spaces."""

import re
import unicodedata
from collections.abc import Iterable, Iterator

import regex
import tiktoken

from sibo_lab.files import quoted

SPACE = "▁"  # how SentencePiece spells a space
# GPT-2's split into words; possessive quantifiers match the same without backtracking.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same after splitting off each digit: blanks before a digit then end their text.
WORDS_DIGITS_APART = WORDS.replace(r" ?\p{N}++", r"\p{N}").replace(r"\s++$", r"\s++(?=\p{N}|$)")
# Ideographs, each a word to BERT, as in `tokenizers` (where one range begins at 2B920, not 2B820).
CJK = (r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
       r"\U0002f800-\U0002fa1f]")


class Tokenizer:
    """What the families share. bos_id, eos_id, pad_id and unk_id may be None; vocab_size is 1 + the largest id.

    templates: of a text and of a pair, ids, and "A" and "B" for the texts. tokens: each id's as the vocabulary has it,
    which for special ones is their text."""

    def __init__(self, vocab: dict[str, int], added: list[dict], named: dict, templates: tuple):
        for token in added:
            if token.get("single_word") or vocab.get(token["content"], token["id"]) != token["id"]:
                raise ValueError(f"unsupported added token {quoted(token['content'])}: single_word, or another id than "
                                 "the vocabulary's")
        self.vocab = vocab | {token["content"]: token["id"] for token in added}
        self.tokens = {i: token for token, i in self.vocab.items()}
        self.vocab_size = 1 + max(self.tokens, default=0)
        if min(self.tokens, default=-1) < 0 or self.vocab_size > 1 << 31:
            raise ValueError("expected a vocabulary with non-negative integers below 2^31 as ids")
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (named.get(role) for role in ("bos", "eos", "pad", "unk"))
        self.templates = templates
        self.special = {token["id"] for token in added if token["special"]}
        # "normalized": looked for in normalized text, spelled as the normalizer leaves it
        self.added = {token["content"]: token for token in added if not token.get("normalized")}
        self.added_normalized = {self._normalize(token["content"]): token for token in added if token.get("normalized")}

    def encode(self, text: str, pair: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text or a pair, whole, with the template's special tokens unless `add_special_tokens` is False;
        those that stand in the text are found either way. ValueError for half a surrogate pair."""
        parts = {"A": list(self._encode(text)), "B": list(self._encode(pair or ""))}
        template = self.templates[pair is not None] if add_special_tokens else ["A", "B"]
        return [i for step in template for i in parts.get(step, [step])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text without special tokens. Broken UTF-8 and ids without a token, which models with padded embeddings
        write, are U+FFFD."""
        return self._join([self.spelled.get(i, self.unspelled) for i in map(int, ids) if i not in self.special])

    def _encode(self, text: str) -> Iterator[int]:
        text.encode()
        for n, part in enumerate(_split(text, self.added)):
            whole = [part] if isinstance(part, int) else _split(self._normalize(part), self.added_normalized)
            for m, piece in enumerate(whole):
                yield from [piece] if isinstance(piece, int) else self._pieces(piece, first=n == m == 0)


class WordPiece(Tokenizer):
    """BERT: cleans a text, splits it at blanks, punctuation and ideographs, then takes the longest piece first."""

    unspelled = "\ufffd"

    def __init__(self, *shared, lowercase: bool, strip_accents: bool | None, split_cjk: bool, max_chars: int = 100):
        self.lowercase, self.split_cjk, self.max_chars = lowercase, split_cjk, max_chars
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        super().__init__(*shared)
        if self.unk_id is None:
            raise ValueError("expected an unknown token such as [UNK] in the vocabulary, got none")
        self.spelled = self.tokens
        self.longest = max(map(len, self.vocab))

    def _normalize(self, text: str) -> str:
        text = regex.sub(r"(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}\ufffd]", "", text)  # Cn, unassigned characters, are kept
        text = regex.sub(r"\s", " ", text)
        if self.split_cjk:
            text = re.sub(CJK, r" \g<0> ", text)
        if self.strip_accents:
            text = regex.sub(r"\p{Mn}", "", unicodedata.normalize("NFD", text))
        # BERT lowers each character alone; str.lower() looks at a sigma's neighbours
        return text.replace("Σ", "σ").lower() if self.lowercase else text

    def _pieces(self, text: str, first: bool) -> Iterator[int]:
        for word in regex.sub(r"[\p{P}$+<=>^`|~]", r" \g<0> ", text).split():
            yield from self._longest_first(word)

    def _longest_first(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word) <= self.max_chars:
            for end in range(min(len(word), start + self.longest), start, -1):
                if (i := self.vocab.get("##" * (start > 0) + word[start:end])) is not None:
                    break
            else:
                return [self.unk_id]
            ids.append(i)
            start = end
        return ids or [self.unk_id]

    def _join(self, pieces: list[str]) -> str:
        return " ".join(pieces).replace(" ##", "")


class BPE(Tokenizer):
    """Both BPEs, on tiktoken, whose ranks are priorities of merges here, not ids.

    ranks: the ids of each byte string that merging can make, in order of merging, the 256 bytes first.
    spelled: the bytes of each id. words: the pattern of what is merged on its own.
    space: "" for byte-level BPE, else how spaces are replaced: "prefix" and "replace" as tokenizer.json's normalizers
    Prepend and Replace; "always", "first" and "never" as Metaspace, which adds none before a leading one."""

    unspelled = "\ufffd".encode()

    def __init__(self, *shared, ranks: dict[bytes, list[int]], spelled: dict[int, bytes], words: str, space: str = ""):
        self.space, self.words, self.ids = space, words, list(ranks.values())
        super().__init__(*shared)
        self.spelled = spelled | {token["id"]: token["content"].encode() for token in shared[1]}
        self.engine = tiktoken.Encoding("sibo", pat_str=words, special_tokens={},
                                        mergeable_ranks={data: rank for rank, data in enumerate(ranks)})
        self.missing = bytes(b for b in range(256) if not self.ids[b])

    def _normalize(self, text: str) -> str:
        text = SPACE * (self.space == "prefix") + text
        return text.replace(" ", SPACE) if self.space in ("prefix", "replace") else text

    def _pieces(self, text: str, first: bool) -> list[int]:
        if self.space:
            text = text.replace(" ", SPACE)
            if not text.startswith(SPACE) and (self.space == "always" or self.space == "first" and first):
                text = SPACE + text
        if self.space or len(text) <= 100_000 and text.encode().translate(None, self.missing) == text.encode():
            ranks = self.engine.encode_ordinary(text)
        else:
            # Slower, word by word: a million blanks overflow tiktoken's stack, and a byte without a token (SmolLM2
            # lacks 21) must be dropped after the split, before the merges.
            words = (word.encode().translate(None, self.missing) for word in regex.findall(self.words, text))
            ranks = [rank for word in words if word for rank in self.engine._encode_single_piece(word)]
        return [i for rank in ranks for i in self.ids[rank]]

    def _join(self, pieces: list[bytes]) -> str:
        text = b"".join(pieces).decode(errors="replace")
        return text.removeprefix(" ") if self.space in ("prefix", "always", "first") else text


def _split(text: str, added: dict[str, dict]) -> Iterator[int | str]:
    """The ids of added tokens in a text, leftmost then longest first, and the strings between."""
    pattern, end = "|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))), 0
    for match in re.finditer(pattern, text) if pattern else ():
        token, before = added[match.group()], text[end:match.start()]
        if before := before.rstrip() if token.get("lstrip") else before:
            yield before
        yield token["id"]
        end = re.compile(r"\s*").match(text, match.end()).end() if token.get("rstrip") else match.end()
    if end < len(text):
        yield text[end:]
