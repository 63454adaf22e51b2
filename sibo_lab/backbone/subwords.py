"""Text <-> token ids: WordPiece (BERT), byte-level BPE (GPT-2, GPT-J, SmolLM2, Llama 3, Qwen), SentencePiece-BPE with
byte fallback (LLaMA). Sources: Wu et al. 2016, Sennrich et al. 2016, Radford et al. 2019, Kudo & Richardson 2018.

The ids are those of `tokenizers` (tokenizer.json) and `sentencepiece` (tokenizer.model), but for WordPiece on 749
characters on which Unicode tables disagree, all but four newer than Unicode 3.2; Qwen's NFC is Python's, and
the letters beside a single word are those of `regex`."""

import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

import regex
import tiktoken

from sibo_lab.files import quoted

SPACE = "▁"  # how SentencePiece spells a space
# GPT-2's split into words; possessive quantifiers match the same without backtracking.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same after splitting off each digit: blanks before a digit then end their text.
WORDS_DIGITS_APART = WORDS.replace(r" ?\p{N}++", r"\p{N}").replace(r"\s++$", r"\s++(?=\p{N}|$)")
# The patterns of tokenizer.json's Split, on which tiktoken's regular expressions agree with those of `tokenizers`.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s")
LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = LLAMA3.replace("{1,3}", "")
_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
TEKKEN = _CASED % ("", "") + r"|\p{N}" + _SLASH
GPT4O = _CASED % (f"{_SHORT}?", f"{_SHORT}?") + r"|\p{N}{1,3}" + _SLASH
# Ideographs, each a word to BERT, as in `tokenizers` (where one range begins at 2B920, not 2B820).
CJK = (r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
       r"\U0002f800-\U0002fa1f]")


class Tokenizer:
    """What the families share. bos_id, eos_id, pad_id and unk_id may be None; vocab_size is 1 + the largest id.

    file: the one of a folder that it was read from. kind: transformers' class that it was read as; None: of no class.
    eos_ids: eos_id, then what else ends a text written by the model. limit: ids from here on have no embedding.
    named: ids by role, as the tokenizer's own files say. controls: tokens that no text spells, but a chat template may.
    templates: of a text and of a pair, ids, and "A" and "B" for the texts. tokens: each id's, as the vocabulary has it;
    of special ones, their text."""

    def __init__(self, vocab: dict[str, int], added: list[dict], named: dict, templates: tuple):
        self.vocab = vocab | {token["content"]: token["id"] for token in added}
        self.size_without_added = 1 + max({*vocab.values()} - {token["id"] for token in added}, default=0)
        self.tokens = {i: token for token, i in self.vocab.items()}
        self.vocab_size = 1 + max(self.tokens, default=0)
        if min(self.tokens, default=-1) < 0 or self.vocab_size > 1 << 31:
            raise ValueError("expected a vocabulary with non-negative integers below 2^31 as ids")
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (named.get(role) for role in ("bos", "eos", "pad", "unk"))
        self.named = {role: i for role, i in named.get("own", named).items() if isinstance(i, int)}
        self.eos_ids = [i for i in named.get("stops", ()) if i != self.eos_id]
        self.eos_ids[:0] = [] if self.eos_id is None else [self.eos_id]
        self.templates, self.limit, self.controls = templates, self.vocab_size, {}
        self.special = {token["id"] for token in added if token["special"]}
        # "normalized": looked for in normalized text, spelled as the normalizer leaves it
        self.added = {token["content"]: token for token in added if not token.get("normalized")}
        self.added_normalized = {self._normalize(token["content"]): token for token in added if token.get("normalized")}

    def encode(self, text: str, pair: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text or a pair, whole, with the template's special tokens.

        Without them the text is taken for one that a chat template wrote: SentencePiece's control tokens, which no
        other text spells, are found in it too. ValueError for half a surrogate pair, and for a token that has no
        embedding."""
        added = self.added if add_special_tokens else self.added | self.controls
        parts = {"A": list(self._encode(text, added)), "B": list(self._encode(pair or "", added))}
        template = self.templates[pair is not None] if add_special_tokens else ["A", "B"]
        ids = [i for step in template for i in parts.get(step, [step])]
        if (largest := max(ids, default=0)) >= self.limit:
            raise ValueError(f"token {quoted(self.tokens[largest])}: expected an id below {self.limit}, as there are "
                             f"embeddings, got {largest}; leave it out of the texts, or bring weights that have it")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text without special tokens. Broken UTF-8 and ids without a token, which models with padded embeddings
        write, are U+FFFD."""
        return self._join([self.spelled.get(i, self.unspelled) for i in map(int, ids) if i not in self.special])

    def _encode(self, text: str, added: dict[str, dict]) -> Iterator[int]:
        text.encode()
        for n, part in enumerate(_split(text, added)):
            whole = [part] if isinstance(part, int) else _split(self._normalize(part), self.added_normalized)
            for m, piece in enumerate(whole):
                yield from [piece] if isinstance(piece, int) else self._pieces(piece, first=n == m == 0)


class WordPiece(Tokenizer):
    """BERT: cleans a text, splits it at blanks, punctuation and ideographs, then takes the longest piece first."""

    unspelled = "\ufffd"

    def __init__(self, *shared, lowercase: bool, strip_accents: bool | None, split_cjk: bool, max_chars: int,
                 tidy: bool, tidy_text: bool | None):
        self.lowercase, self.split_cjk, self.max_chars = lowercase, split_cjk, max_chars
        self.tidy, self.tidy_text = tidy, tidy_text
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        super().__init__(*shared)
        if self.unk_id is None:
            raise ValueError("expected an unknown token such as [UNK] in the vocabulary, got none")
        self.spelled = self.tokens | {token["id"]: text for text, token in self.added_normalized.items()}
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
        text = ""
        for piece in pieces:
            piece = piece.removeprefix("##") if text and piece.startswith("##") else " " * bool(text) + piece
            text += _tidy(piece) if self.tidy else piece
        return _tidy(text) if self.tidy_text else text


class BPE(Tokenizer):
    """Both BPEs, on tiktoken, whose ranks are priorities of merges here, not ids.

    ranks: the ids of each byte string that merging can make, in order of merging, the 256 bytes first.
    spelled: the bytes of each id. words: the pattern of what is merged on its own. whole: words that are taken whole,
    though merging does not make them. nfc: texts are composed first. prefix_space: a text gets one if it has none.
    scores: of SentencePiece's pieces, for words with one of `tied`, which begin the pieces that share a score, of which
    the leftmost is made first, or are unused: taken apart again.
    space: "" for byte-level BPE, else how spaces are replaced: "prefix" and "replace" as tokenizer.json's normalizers
    Prepend and Replace; "always", "first" and "never" as Metaspace, which adds none before a leading one."""

    unspelled = "\ufffd".encode()

    def __init__(self, *shared, ranks: dict[bytes, list[int]], spelled: dict[int, bytes], words: str, space: str = "",
                 whole: dict[str, int] | None = None, nfc: bool = False, prefix_space: bool = False,
                 scores: dict[str, float] | None = None, unused: set[str] = frozenset()):
        self.space, self.words, self.ids, self.whole, self.nfc = space, words, list(ranks.values()), whole or {}, nfc
        self.prefix_space, self.scores, self.ranks, self.unused, self.tied = prefix_space, scores, ranks, unused, set()
        super().__init__(*shared)
        self.spelled = spelled | {token["id"]: token["content"].encode() for token in shared[1]}
        self.engine = tiktoken.Encoding("sibo", pat_str=words, special_tokens={},
                                        mergeable_ranks={data: rank for rank, data in enumerate(ranks)})
        self.missing = bytes(b for b in range(256) if not self.ids[b])

    def _normalize(self, text: str) -> str:
        text = SPACE * (self.space == "prefix") + (unicodedata.normalize("NFC", text) if self.nfc else text)
        return text.replace(" ", SPACE) if self.space in ("prefix", "replace") else text

    def _pieces(self, text: str, first: bool) -> list[int]:
        if self.space:
            text = text.replace(" ", SPACE)
            if not text.startswith(SPACE) and (self.space == "always" or self.space == "first" and first):
                text = SPACE + text
        elif self.prefix_space and not text.startswith(" "):
            text = " " + text
        if any(head in text for head in self.tied):
            return [i for word in regex.findall(self.words, text) for i in (
                self._best_first(word) if any(head in word for head in self.tied) else self._word(word))]
        data = text.encode()
        if self.space or not self.whole and len(text) <= 100_000 and data.translate(None, self.missing) == data:
            ranks = self.engine.encode_ordinary(text)
        else:
            # Slower, word by word: a million blanks overflow tiktoken's stack, and a byte without a token (SmolLM2
            # lacks 21) must be dropped after the split, before the merges.
            return [i for word in regex.findall(self.words, text) for i in self._word(word)]
        return [i for rank in ranks for i in self.ids[rank]]

    def _word(self, word: str) -> list[int]:
        if word in self.whole:
            return [self.whole[word]]
        data = word.encode().translate(None, self.missing)
        return [i for rank in self.engine._encode_single_piece(data) for i in self.ids[rank]] if data else []

    def _best_first(self, word: str) -> Iterator[int]:
        """SentencePiece's merging: of the pairs with the best score, the leftmost."""
        parts, before, after = list(word), [*range(-1, len(word) - 1)], [*range(1, len(word)), -1]
        pairs, halves = [], {}

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0 or (score := self.scores.get(piece := parts[left] + parts[right])) is None:
                return
            heapq.heappush(pairs, (-score, left, right, len(piece)))
            if piece in self.unused:
                halves[piece] = parts[left], parts[right]

        for at in range(len(word) - 1):
            offer(at, at + 1)
        while pairs:
            _, left, right, size = heapq.heappop(pairs)
            if parts[left] and parts[right] and len(parts[left]) + len(parts[right]) == size:
                parts[left], parts[right], after[left] = parts[left] + parts[right], "", after[right]
                if after[left] >= 0:
                    before[after[left]] = left
                offer(before[left], left)
                offer(left, after[left])
        parts.reverse()
        while parts:
            if (part := parts.pop()) in halves:
                parts += reversed(halves[part])
            elif part in self.vocab:
                yield self.vocab[part]
            else:
                yield from (self.ranks[bytes([byte])][0] for byte in part.encode())

    def _join(self, pieces: list[bytes]) -> str:
        text = b"".join(pieces).decode(errors="replace")
        return text.removeprefix(" ") if self.space in ("prefix", "always", "first") else text


def _tidy(text: str) -> str:
    for blank in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(blank, blank.strip())
    return text


@lru_cache
def _pattern(*tokens: str) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _split(text: str, added: dict[str, dict]) -> Iterator[int | str]:
    """The ids of added tokens in a text, leftmost then longest first, and the strings between."""
    end = 0
    for match in _pattern(*added).finditer(text) if added else ():
        token, before = added[match.group()], text[end:match.start()]
        beside = text[max(0, match.start() - 1):match.start()] + text[match.end():match.end() + 1]
        if token.get("single_word") and regex.search(r"\w", beside):
            continue
        if before := before.rstrip() if token.get("lstrip") else before:
            yield before
        yield token["id"]
        end = re.compile(r"\s*").match(text, match.end()).end() if token.get("rstrip") else match.end()
    if end < len(text):
        yield text[end:]
