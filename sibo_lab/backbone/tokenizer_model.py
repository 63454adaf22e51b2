"""Tokenizers from tokenizer.model and GGUF: SentencePiece's pieces and their scores, or GPT-2's merges in GGUF."""

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sibo_lab.backbone.subwords import BPE, LLAMA3, QWEN2, SPACE, TEKKEN, WORDS, WORDS_DIGITS_APART, Tokenizer
from sibo_lab.backbone.tokenizer_json import (
    SUPPORTED,
    around,
    byte_level,
    get,
    lead_of_llama,
    require,
    sentencepiece,
    several,
    special_tokens,
)
from sibo_lab.files import Reader, quoted

GGUF = {  # by "pre" of a gpt2 vocabulary; "default" is llama.cpp's own split
    "gpt-2": {"words": WORDS}, "smollm": {"words": WORDS_DIGITS_APART}, "qwen2": {"words": QWEN2, "nfc": True},
    "llama-bpe": {"words": LLAMA3, "ignore_merges": True}, "smaug-bpe": {"words": LLAMA3},
    "tekken": {"words": TEKKEN, "ignore_merges": True}}


def pieces(file: Path) -> tuple[list[str], list[float], list[int], dict, dict]:
    """Texts, scores and types of tokenizer.model's pieces, and its settings of training and of normalization."""
    # numbers as in sentencepiece_model.proto
    messages = list(_protobuf(file.read_bytes()))
    trainer, normalizer = ({k: v for f, m in messages if f == field for k, v in _protobuf(m)} for field in (2, 3))
    if trainer.get(3, 1) != 2:
        raise ValueError(f"model_type: expected 2, for BPE, got {trainer.get(3, 1)}")
    found = [{2: bytes(4), 3: 1} | dict(_protobuf(message)) for field, message in messages if field == 1]
    for i, piece in enumerate(found):
        if [type(piece.get(field)) for field in (1, 2, 3)] != [bytes, bytes, int] or len(piece[2]) != 4:
            raise ValueError(f"malformed piece {i}: expected its text, score and type, got {quoted(piece)}")
    return ([piece[1].decode() for piece in found], [struct.unpack("<f", piece[2])[0] for piece in found],
            [piece[3] for piece in found], trainer, normalizer)


def from_sentencepiece(file: Path, config: dict) -> Tokenizer:
    tokens, scores, kinds, trainer, normalizer = pieces(file)
    vocab = {token: i for i, token in enumerate(tokens)}
    roles, spelled = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}, dict(enumerate(vocab))
    defaults = {role: spelled.get(trainer.get(*at)) for role, at in roles.items()}
    spec = {
        "scores": scores, "token_type": kinds,
        "precompiled_charsmap": normalizer.get(2) or normalizer.get(6),
        "remove_extra_whitespaces": normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24),
        "add_space_prefix": normalizer.get(3, 1)}
    _check_pieces(vocab, spec)
    if config["class"] == "LlamaTokenizer":
        own = [{"content": piece, "special": spec["token_type"][i] == 3} for piece, i in vocab.items()
               if spec["token_type"][i] in (3, 4)]
        config["extra_special_tokens"] = [*several(config.get("extra_special_tokens")), *own]
        defaults, spec["space"] = {}, lead_of_llama(config)
    else:
        require("tokenizer.model", {key: config.get(key) for key in SUPPORTED["tokenizer.model"]})
    added, named = special_tokens(file, vocab, config, {}, defaults)
    return _from_pieces(vocab, added, named, config | spec)


def from_gguf(fields: dict) -> Tokenizer:
    """fields: the metadata of a .gguf file."""
    spec = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    tokens = get(spec, "tokens", [str])
    vocab = {token: i for i, token in enumerate(tokens)}
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot", "eom": "eom"}
    # ids past the vocabulary, such as 2^32 - 1 for none, are passed over, as by llama.cpp
    named = {role: i if (i := get(spec, f"{key}_token_id", int, None)) in range(len(tokens)) else None
             for role, key in keys.items()}
    named["stops"] = [i for i in (named.pop("eot"), named.pop("eom")) if i is not None]
    kind, pre = get(spec, "model", str), spec.get("pre")
    if kind == "llama":
        return _from_pieces(vocab, [], named, spec)
    if kind != "gpt2" or pre not in GGUF:
        raise ValueError("expected tokenizer 'llama', or 'gpt2' with pre-tokenizer "
                         f"{' or '.join(map(repr, GGUF))}, got {quoted(kind)} with {quoted(pre)}")
    kinds = dict(enumerate(get(spec, "token_type", [int])))  # 3: control, 4: user-defined, 5: unused
    vocab = {token: i for token, i in vocab.items() if kinds.get(i) != 5}
    added = [{"content": token, "id": i, "special": kinds[i] == 3} for token, i in vocab.items()
             if kinds.get(i) in (3, 4)]
    template = around(named, {"add_bos_token": pre in ("llama-bpe", "tekken")} | spec)
    return byte_level((vocab, added, named, template), get(spec, "merges", [str]), **GGUF[pre])


def _check_pieces(vocab: dict, spec: dict) -> None:
    if spec.get("precompiled_charsmap") or spec.get("remove_extra_whitespaces"):
        raise ValueError("unsupported normalization of characters or spaces")
    scores, kinds = get(spec, "scores", [float]), get(spec, "token_type", [int])
    whole = len(vocab) == len(kinds) == len(scores) == 1 + max(vocab.values(), default=-1)  # no piece twice
    if not whole or not {2, 3, 6} <= set(kinds) <= {1, 2, 3, 4, 5, 6}:
        raise ValueError("expected each piece once, of type normal, unknown, control, user-defined, unused or byte")


def _from_pieces(vocab: dict, added: list, named: dict, spec: dict) -> BPE:
    """SentencePiece; `spec` as in a .gguf file. With "space", prefixes and special tokens are as in LlamaTokenizer."""
    _check_pieces(vocab, spec)
    kinds = spec["token_type"]
    scores = {piece: spec["scores"][i] for piece, i in vocab.items() if kinds[i] in (1, 5) and len(piece) > 1}
    merged, times = sorted(scores, key=lambda piece: -scores[piece]), Counter(scores.values())
    shared = (vocab, added, named, around(named, {"add_bos_token": True} | spec))
    space = spec.get("space") or ("prefix" if spec.get("add_space_prefix", True) else "replace")
    how = {"scores": scores, "unused": {piece for piece in scores if kinds[vocab[piece]] == 5}}
    t = sentencepiece(shared, merged, space, **how)
    # Pieces that merging never comes to, tiktoken would take whole. No text has a byte of 255.
    made = [piece for piece in merged if t.engine._encode_single_piece(piece.encode() + b"\xff")[1:] == [255]]
    # Of pieces that share a score it makes the first first, not the leftmost. The two agree on LLaMA's runs of blanks,
    # which come after all others.
    last = min(scores.values(), default=0)
    if not any(piece.strip(SPACE) for piece, score in scores.items() if score == last) and all(
            list(t._best_first(run)) == t._word(run) for run in (SPACE * n for n in range(100))):
        times[last] = 1
    t = t if len(made) == len(merged) else sentencepiece(shared, made, space, **how)
    t.tied = {piece[:2] for piece, score in scores.items() if times[score] > 1 or piece in how["unused"]}
    if "space" not in spec:
        # As in sentencepiece, not looked for in texts: no text can spell its own end. User-defined pieces are.
        t.controls = {piece: {"id": i} for piece, i in vocab.items() if kinds[i] == 3}
        t.added_normalized |= {piece: {"id": i} for piece, i in vocab.items() if kinds[i] == 4}
    t.special.update(i for i, kind in enumerate(kinds) if kind in (2, 3))
    return t


def _protobuf(data: bytes | int) -> Iterator[tuple[int, int | bytes]]:
    """(field, value) pairs; messages and values of fixed size stay bytes."""
    if isinstance(data, int):
        raise ValueError("not a SentencePiece model: expected a message, got a number")
    r = Reader(data, "not a whole SentencePiece model")

    def varint() -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = r.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value  # -1, for none, reads as 2^64 - 1: no id, no size
        raise r.error("a number of more than 10 bytes")

    while r.at < len(data):
        field, wire = divmod(varint(), 8)
        size = varint() if wire in (0, 2) else {1: 8, 5: 4}.get(wire)
        if size is None:
            raise r.error(f"wire type {wire}")
        yield field, r.take(size) if wire else size
