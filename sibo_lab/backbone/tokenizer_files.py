"""Tokenizers from tokenizer.json, tokenizer.model, vocab.txt, vocab.json and merges.txt, or GGUF."""

import struct
from collections.abc import Iterator
from pathlib import Path

from sibo_lab.backbone import gguf
from sibo_lab.backbone.subwords import BPE, SPACE, WORDS, WORDS_DIGITS_APART, Tokenizer, WordPiece
from sibo_lab.files import Reader, one_line, quoted, read_json

SUPPORTED = {  # of settings that change the ids, the values that are implemented
    "WordPiece": {"continuing_subword_prefix": ("##",)},
    "BPE": {"dropout": (None, 0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
            "ignore_merges": (None, False)},
    "BertNormalizer": {"clean_text": (True,)},
    "ByteLevel": {"add_prefix_space": (False,), "use_regex": (None, True)},
    "Digits": {"individual_digits": (True,)},
    "Prepend": {"prepend": (SPACE,)},
    "Replace": {"pattern": ({"String": " "},), "content": (SPACE,)},
    "Metaspace": {"replacement": (SPACE,), "split": (None, True, False),
                  "prepend_scheme": (None, "always", "first", "never")},
    "vocab.txt": {"never_split": (None, []), "do_basic_tokenize": (None, True)},
    "merges.txt": {"add_prefix_space": (None, False)},
}


def read(path: Path) -> Tokenizer:
    """The tokenizer of a folder or a .gguf file, as tokenizer.from_pretrained says."""
    # tokenizer.model first: the weights were trained with it, and a converted tokenizer.json takes a "</s>" typed in a
    # text for its end.
    readers = {"tokenizer.model": _from_sentencepiece, "tokenizer.json": _from_tokenizer_json, "vocab.txt": _from_vocab,
               "vocab.json": _from_merges, "encoder.json": _from_merges}
    file = path if path.suffix == ".gguf" else next((path / n for n in readers if (path / n).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: expected a tokenizer, one of {', '.join(readers)}, got none")
    try:
        return readers.get(file.name, _from_gguf)(file)
    except ValueError as e:
        raise ValueError(f"{file}: {one_line(e).removeprefix(f'{file}: ')}") from e


def _byte_level(shared: tuple, merges: list, digits_apart: bool = False) -> BPE:
    # GPT-2 writes a byte as a letter: itself if printable, else the next from U+0100 on.
    printable, spare = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    byte = {chr(b if b in printable else next(spare)): b for b in range(256)}
    vocab, merged = shared[0], _merged(merges, shared[0])
    spelled = {token: bytes(map(byte.get, token)) for token in vocab if set(token) <= byte.keys()}
    if strange := next((token for token in merged if token not in spelled), None):
        raise ValueError(f"malformed merge: expected letters that stand for bytes, got {quoted(strange)}")
    ranks = {bytes([b]): [vocab[letter]] if letter in vocab else [] for letter, b in byte.items()}
    ranks |= {spelled[token]: [vocab[token]] for token in merged}
    return BPE(*shared, ranks=ranks, spelled={vocab[token]: data for token, data in spelled.items()},
               words=WORDS_DIGITS_APART if digits_apart else WORDS)


def _sentencepiece(shared: tuple, merged: list[str], space: str, by_word: bool = False) -> BPE:
    """merged: pieces of several characters, in order. by_word: each space begins a new word."""
    vocab, byte_ids = shared[0], [shared[0].get(f"<0x{b:02X}>") for b in range(256)]
    if any(SPACE in piece.lstrip(SPACE) for piece in merged):
        raise ValueError("unsupported piece with a space after another character: texts are merged word by word")
    if None in byte_ids:
        raise ValueError("expected byte fallback, a token for each of the 256 bytes")
    # tiktoken begins with bytes, SentencePiece with characters: these are merged first, prefix by prefix.
    characters = sorted({c for piece in vocab for c in piece})
    strings = [bytes([b]) for b in range(256)] + [c.encode()[:size] for size in (2, 3, 4) for c in characters]
    pieces = {piece.encode(): [vocab[piece]] for piece in (*(c for c in characters if c in vocab), *merged)}
    # A character that is no piece, or a prefix of one, is spelled in byte tokens.
    ranks = {data: pieces.get(data) or [byte_ids[b] for b in data] for data in (*strings, *pieces)}
    spelled = {i: piece.replace(SPACE, " ").encode() for piece, i in vocab.items()}
    return BPE(*shared, ranks=ranks, spelled=spelled | {i: bytes([b]) for b, i in enumerate(byte_ids)}, space=space,
               words="▁[^▁]*|[^▁]+" if by_word else "▁*[^▁]+|▁+")


def _from_tokenizer_json(file: Path) -> Tokenizer:
    # "truncation" and "padding" are its author's habits (MiniLM: 128 tokens): not applied.
    spec = read_json(file)
    model, added = _get(spec, "model", dict), _added(spec)
    vocab, unk = _ids(model.get("vocab")), _get(model, "unk_token", str, None)
    shared = (vocab, added, _named(file.parent, vocab, added, {"unk": unk}), _post_processor(spec))
    kind = _get(model, "type", str, "BPE" if "merges" in model else "WordPiece")  # older files leave it out
    listed = _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
    names, steps = [step["type"] for step in listed], {step["type"]: step for step in listed}
    for part, settings in (steps | {kind: model}).items():
        _require(part, settings)
    match (kind, bool(model.get("byte_fallback")), *names):
        case ("WordPiece", False, "BertNormalizer", "BertPreTokenizer"):
            clean = steps["BertNormalizer"]
            return WordPiece(*shared, lowercase=_get(clean, "lowercase", bool),
                             strip_accents=_get(clean, "strip_accents", bool, None),
                             split_cjk=_get(clean, "handle_chinese_chars", bool),
                             max_chars=_get(model, "max_input_chars_per_word", int))
        case ("BPE", False, "ByteLevel") | ("BPE", False, "Digits", "ByteLevel"):
            t = _byte_level(shared, _get(model, "merges", list), "Digits" in steps)
            if t.missing and unk:
                raise ValueError("unsupported unk_token with a vocabulary that lacks bytes")
            return t
        case ("BPE", True, "Prepend", "Replace") | ("BPE", True, "Replace"):
            space, by_word = "prefix" if "Prepend" in steps else "replace", False
        case ("BPE", True, "Metaspace"):
            space, by_word = listed[0].get("prepend_scheme") or "always", listed[0].get("split") is not False
        case _:
            raise ValueError(
                f"unsupported model {kind} after {', '.join(names) or 'no steps'}: expected WordPiece after "
                "BertNormalizer, BertPreTokenizer; BPE after (Digits,) ByteLevel, or, with byte_fallback, after "
                "(Prepend,) Replace or Metaspace")
    return _sentencepiece(shared, _merged(_get(model, "merges", list), vocab), space, by_word)


def _from_vocab(file: Path) -> Tokenizer:
    vocab = {line: i for i, line in enumerate(file.read_text("utf-8").removesuffix("\n").split("\n"))}
    config, late, named = _beside(file, vocab, {r: f"[{r.upper()}]" for r in ("unk", "sep", "pad", "cls", "mask")})
    _require("vocab.txt", config)
    cls, sep = named["cls"], named["sep"]
    if None in (cls, sep):
        raise ValueError("expected [CLS] and [SEP] in the vocabulary")
    shared = (vocab, _special(vocab, named.values()) + late, named, ([cls, "A", sep], [cls, "A", sep, "B", sep]))
    return WordPiece(*shared, lowercase=_get(config, "do_lower_case", bool, True),
                     strip_accents=_get(config, "strip_accents", bool, None),
                     split_cjk=_get(config, "tokenize_chinese_chars", bool, True))


def _from_merges(file: Path) -> Tokenizer:
    merges = file.with_name("merges.txt" if file.name == "vocab.json" else "vocab.bpe")
    if not merges.is_file():
        raise FileNotFoundError(f"{merges}: no such file, expected beside {file.name}")
    vocab = _ids(read_json(file))
    lines = [line for line in merges.read_text("utf-8").split("\n") if line and not line.startswith("#version")]
    config, late, named = _beside(file, vocab, dict.fromkeys(("bos", "eos"), "<|endoftext|>"))
    _require("merges.txt", config)
    shared = (vocab, _special(vocab, named.values()) + late, named, _around(named, config))
    return _byte_level(shared, lines)


def _from_sentencepiece(file: Path) -> Tokenizer:
    # numbers as in sentencepiece_model.proto
    messages = list(_protobuf(file.read_bytes()))
    trainer, normalizer = ({k: v for f, m in messages if f == field for k, v in _protobuf(m)} for field in (2, 3))
    if trainer.get(3, 1) != 2:
        raise ValueError(f"model_type: expected 2, for BPE, got {trainer.get(3, 1)}")
    pieces = [{2: bytes(4), 3: 1} | dict(_protobuf(message)) for field, message in messages if field == 1]
    for i, piece in enumerate(pieces):
        if [type(piece.get(field)) for field in (1, 2, 3)] != [bytes, bytes, int] or len(piece[2]) != 4:
            raise ValueError(f"malformed piece {i}: expected its text, score and type, got {quoted(piece)}")
    vocab = {piece[1].decode(): i for i, piece in enumerate(pieces)}
    spelled, roles = dict(enumerate(vocab)), {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    config, late, named = _beside(file, vocab, {role: spelled.get(trainer.get(*at)) for role, at in roles.items()})
    return _from_pieces(vocab, late, named, config | {
        "scores": [struct.unpack("<f", piece[2])[0] for piece in pieces],
        "token_type": [piece[3] for piece in pieces],
        "precompiled_charsmap": normalizer.get(2) or normalizer.get(6),
        "remove_extra_whitespaces": normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24),
        "add_space_prefix": normalizer.get(3, 1)})


def _from_gguf(file: Path) -> Tokenizer:
    spec = {key.removeprefix("tokenizer.ggml."): value for key, value in gguf.read(file)[0].items()}
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {role: _get(spec, f"{key}_token_id", int, None) for role, key in roles.items()}
    vocab = {token: i for i, token in enumerate(_get(spec, "tokens", [str]))}
    kind, pre = _get(spec, "model", str), spec.get("pre")
    if kind == "llama":
        return _from_pieces(vocab, [], named, spec)
    if kind != "gpt2" or pre not in ("smollm", "gpt-2"):  # "default" is llama.cpp's own split
        raise ValueError("expected tokenizer 'llama', or 'gpt2' with pre-tokenizer 'smollm' or 'gpt-2', got "
                         f"{quoted(kind)} with {quoted(pre)}")
    kinds = dict(enumerate(_get(spec, "token_type", [int])))  # 3: control, 4: user-defined
    added = [{"content": token, "id": i, "special": kinds[i] == 3} for token, i in vocab.items()
             if kinds.get(i) in (3, 4)]
    return _byte_level((vocab, added, named, _around(named, spec)), _get(spec, "merges", [str]), pre == "smollm")


def _from_pieces(vocab: dict, added: list, named: dict, spec: dict) -> BPE:
    """SentencePiece; `spec` as in a .gguf file."""
    if spec.get("precompiled_charsmap") or spec.get("remove_extra_whitespaces"):
        raise ValueError("unsupported normalization of characters or spaces")
    scores, kinds = _get(spec, "scores", [float]), _get(spec, "token_type", [int])
    if not len(vocab) == len(kinds) == len(scores) or set(kinds) != {1, 2, 3, 6}:
        raise ValueError("expected each piece once, of type normal, unknown, control or byte")
    normal = [piece for piece, i in vocab.items() if kinds[i] == 1 and len(piece) > 1]
    shared = (vocab, added, named, _around(named, {"add_bos_token": True} | spec))
    t = _sentencepiece(shared, sorted(normal, key=lambda piece: -scores[vocab[piece]]),
                       "prefix" if spec.get("add_space_prefix", True) else "replace")
    # As in sentencepiece, not looked for in texts: no text can spell its own end.
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


def _merged(merges: list, vocab: dict) -> list[str]:
    """What the merges make, in order."""
    made = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        two = isinstance(pair, list) and [*map(type, pair)] == [str, str] and all(pair)
        if not two or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"malformed merge: expected two tokens that make a third, got {quoted(merge)}")
        made.append("".join(pair))
    return made


def _special(vocab: dict, ids) -> list[dict]:
    ids = set(ids)
    return [{"content": token, "id": i, "special": True} for token, i in vocab.items() if i in ids]


def _beside(file: Path, vocab: dict, defaults: dict) -> tuple[dict, list[dict], dict]:
    """Beside a vocabulary: tokenizer_config.json, tokens added later, and what _named returns."""
    late = _ids(_json(file.with_name("added_tokens.json")))
    tokens = _special(late, late.values()) + _added({"added_tokens": []} | _json(file.with_name("tokenizer.json")))
    added = list({token["content"]: token for token in tokens if token["content"] not in vocab}.values())
    return _json(file.with_name("tokenizer_config.json")), added, _named(file.parent, vocab, added, defaults)


def _named(folder: Path, vocab: dict, added: list[dict], defaults: dict) -> dict[str, int | None]:
    """Ids by role: as the tokenizer's files name them, else the default, else the model's."""
    table, named = vocab | {token["content"]: token["id"] for token in added}, {}
    configs = [_json(folder / f"{name}.json") for name in (
        "tokenizer_config", "special_tokens_map", "generation_config", "config")]
    for role in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"):
        name = next(filter(None, (config.get(f"{role}_token") for config in configs[:2])), None)
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not (isinstance(name, str) and name in table):
            raise ValueError(f"{role}_token: expected a token of the vocabulary, got {quoted(name)}")
        ids = [config.get(f"{role}_token_id") for config in configs[2:]]
        ids = [i[0] if isinstance(i, list) and i else i for i in ids]  # the first of several
        models = next((i for i in ids if type(i) is int and i in table.values()), None)  # old configs have -1 for none
        named[role] = vocab.get(defaults.get(role), models) if name is None else table[name]
    return named


def _around(named: dict, config: dict) -> tuple:
    """bos before and eos after each text, as add_bos_token and add_eos_token say."""
    before, after = ([named[role]] if _get(config, f"add_{role}_token", bool, None) else [] for role in ("bos", "eos"))
    if None in before + after:
        raise ValueError("expected a bos or eos token to add, got none")
    return [*before, "A", *after], [*before, "A", *after, *before, "B", *after]


def _post_processor(spec: dict) -> tuple:
    steps = [step for step in _steps(spec.get("post_processor")) if step["type"] != "ByteLevel"]  # offsets only
    if not steps:
        return ["A"], ["A", "B"]
    if (names := [step["type"] for step in steps]) != ["TemplateProcessing"]:
        raise ValueError(f"post_processor: expected TemplateProcessing, got {', '.join(names)}")
    special = _get(steps[0], "special_tokens", dict)
    ids = {"A": ["A"], "B": ["B"]} | {name: _get(token, "ids", [int]) for name, token in special.items()}
    return tuple([i for item in _get(steps[0], form, [dict]) for part in item.values()
                  for i in _get(ids, _get(part, "id", str), list)] for form in ("single", "pair"))


def _steps(step: dict | None) -> list[dict]:
    """The members of a Sequence, or the only step."""
    if step is None or _get(step, "type", str) != "Sequence":
        return [step] if step else []
    members = next((key for key in step if key != "type"), "its members")
    return [member for member in _get(step, members, [dict]) if _get(member, "type", str)]


def _get(spec: object, key: str, kind, *default):
    """spec[key] if it is of this type, or a list ([type]) of it, or the default; else ValueError."""
    value = spec.get(key, *default) if isinstance(spec, dict) else None
    each, several = (kind[0], "a list of ") if isinstance(kind, list) else (kind, "")
    values = value if several else [value]
    fits = isinstance(values, list) and all(type(v) is each for v in values)
    if not fits and not (default and value is default[0]):
        raise ValueError(f"malformed {quoted(key)[1:-1]}: expected {several}{each.__name__}, got {quoted(value)}")
    return value


def _ids(vocab: object) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"malformed vocabulary: expected tokens with integers as ids, got {quoted(vocab)}")
    return vocab


def _added(spec: dict) -> list[dict]:
    tokens = _get(spec, "added_tokens", [dict])
    for token in tokens:
        _get(token, "id", int)
        _get(token, "content", str)
        for flag in ("special", "single_word", "lstrip", "rstrip", "normalized"):
            _get(token, flag, bool)
    return tokens


def _require(part: str, spec: dict) -> None:
    for key, values in SUPPORTED.get(part, {}).items():
        if (value := spec.get(key)) not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"unsupported {key} of {part}: expected {expected}, got {quoted(value)}")


def _json(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}
