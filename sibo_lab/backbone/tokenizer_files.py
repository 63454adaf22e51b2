"""The files a tokenizer comes in: tokenizer.json, tokenizer.model, vocab.txt, merges.txt, GGUF."""

import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sibo_lab import files
from sibo_lab.backbone import gguf, subwords


def read(path: Path) -> subwords.Tokenizer:
    """The tokenizer of a folder or a .gguf file."""
    # tokenizer.model goes before tokenizer.json: the weights were trained with it and the other is a conversion;
    # conversions have differed on leading and double spaces, and they take a "</s>" typed in a text for its end.
    readers = {"tokenizer.model": _from_sentencepiece, "tokenizer.json": _from_tokenizer_json, "vocab.txt": _from_vocab,
               "vocab.json": _from_merges, "encoder.json": _from_merges}
    file = path if path.suffix == ".gguf" else next((path / n for n in readers if (path / n).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: found no tokenizer, expected one of {', '.join(readers)}")
    try:
        return readers.get(file.name, _from_gguf)(file)
    except ValueError as e:
        raise ValueError(f"{file}: {files.one_line(e).removeprefix(f'{file}: ')}") from e  # read_gguf names it too


def _byte_level(vocab: dict, added: list, named: dict, templates: subwords.Templates, merges: list, digits_apart: bool) -> subwords.BPE:
    # GPT-2 writes a byte as a letter: itself where that is printable, else the next letter from U+0100 on.
    printable, spare = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    byte = {chr(b if b in printable else next(spare)): b for b in range(256)}
    ranks = {bytes([b]): [vocab[letter]] if letter in vocab else [] for letter, b in byte.items()}
    order = _merged(merges, vocab)
    if strange := next((token for token in order if not byte.keys() >= set(token)), None):
        raise ValueError(f"malformed merge to {files.quoted(strange)}, expected letters that stand for bytes")
    ranks |= {bytes(byte[c] for c in token): [vocab[token]] for token in order}
    spelled = {i: bytes(byte[c] for c in token) for token, i in vocab.items() if byte.keys() >= set(token)}
    return subwords.BPE(vocab, added, named, templates, ranks=ranks, spelled=spelled,
               words=subwords.WORDS_DIGITS_APART if digits_apart else subwords.WORDS)


def _sentencepiece(vocab: dict, added: list, named: dict, templates: subwords.Templates, order: list[str], space: str,
                   by_word: bool = False) -> subwords.BPE:
    """order: the pieces of several characters, first merged first. by_word: each space begins a new word."""
    if any(subwords.SPACE in piece.lstrip(subwords.SPACE) for piece in order):
        raise ValueError("unsupported piece with a space after another character: texts are merged word by word")
    if not all(f"<0x{b:02X}>" in vocab for b in range(256)):
        raise ValueError("expected byte fallback, a token for each of the 256 bytes")
    byte_ids = [vocab[f"<0x{b:02X}>"] for b in range(256)]
    # tiktoken begins with bytes, SentencePiece with characters: so the characters are merged first, prefix by prefix.
    characters = sorted({c for piece in vocab for c in piece})
    strings = [bytes([b]) for b in range(256)] + [c.encode()[:size] for size in (2, 3, 4) for c in characters]
    pieces = {piece.encode(): [vocab[piece]] for piece in (*(c for c in characters if c in vocab), *order)}
    # A character that is no piece, or only the beginning of one, is spelled in byte tokens.
    ranks = {data: pieces.get(data) or [byte_ids[b] for b in data] for data in (*strings, *pieces)}
    spelled = {i: piece.replace(subwords.SPACE, " ").encode() for piece, i in vocab.items()}
    return subwords.BPE(vocab, added, named, templates, ranks=ranks, space=space,
               spelled=spelled | {i: bytes([b]) for b, i in enumerate(byte_ids)},
               words=rf"{subwords.SPACE}[^{subwords.SPACE}]*|[^{subwords.SPACE}]+" if by_word else rf"{subwords.SPACE}*[^{subwords.SPACE}]+|{subwords.SPACE}+")


def _from_tokenizer_json(file: Path) -> subwords.Tokenizer:
    # Its "truncation" and "padding" are conveniences of whoever saved it (MiniLM: to 128 tokens) and are not applied.
    spec = files.read_json(file)
    model, added = _checked(spec, "model", dict), _added(spec)
    vocab, unk = _ids(model.get("vocab")), _checked(model, "unk_token", str, None)
    listed = _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
    names = [step["type"] for step in listed]
    steps = dict(zip(names, listed, strict=True))
    kind = _checked(model, "type", str, "BPE" if "merges" in model else "WordPiece")  # older files leave it out
    shared = (vocab, added, _named(file.parent, vocab, added, {"unk": unk}), _post_processor(spec))
    if kind == "BPE":
        _require("model", model, dropout=(None, 0), continuing_subword_prefix=(None, ""), end_of_word_suffix=(None, ""),
                 ignore_merges=(None, False))
    match (kind, bool(model.get("byte_fallback")), *names):
        case ("WordPiece", False, "BertNormalizer", "BertPreTokenizer"):
            _require("model", model, continuing_subword_prefix=("##",))
            settings = steps["BertNormalizer"]
            _require("BertNormalizer", settings, clean_text=(True,))
            return subwords.WordPiece(*shared, lowercase=_checked(settings, "lowercase", bool),
                             strip_accents=_checked(settings, "strip_accents", bool, None),
                             split_cjk=_checked(settings, "handle_chinese_chars", bool),
                             max_chars=_checked(model, "max_input_chars_per_word", int))
        case ("BPE", False, "ByteLevel") | ("BPE", False, "Digits", "ByteLevel"):
            _require("ByteLevel", steps["ByteLevel"], add_prefix_space=(False,), use_regex=(None, True))
            _require("Digits", steps.get("Digits"), individual_digits=(True,))
            t = _byte_level(*shared, _checked(model, "merges", list), "Digits" in steps)
            if t.missing and unk:
                raise ValueError("unsupported unk_token with a vocabulary that lacks bytes")
            return t
        case ("BPE", True, "Prepend", "Replace") | ("BPE", True, "Replace"):
            _require("Prepend", steps.get("Prepend"), prepend=(subwords.SPACE,))
            _require("Replace", steps["Replace"], pattern=({"String": " "},), content=(subwords.SPACE,))
            space = "prefix" if "Prepend" in steps else "replace"
            return _sentencepiece(*shared, _merged(_checked(model, "merges", list), vocab), space)
        case ("BPE", True, "Metaspace"):
            _require("Metaspace", steps["Metaspace"], replacement=(subwords.SPACE,), split=(None, True, False),
                     prepend_scheme=(None, "always", "first", "never"))
            space, by_word = steps["Metaspace"].get("prepend_scheme"), steps["Metaspace"].get("split")
            return _sentencepiece(*shared, _merged(_checked(model, "merges", list), vocab), space or "always",
                                  by_word is not False)
    raise ValueError(f"unsupported model {kind} after {', '.join(names) or 'no steps'}, expected WordPiece after "
                     "BertNormalizer, BertPreTokenizer; BPE after (Digits,) ByteLevel; or BPE with byte_fallback after "
                     "(Prepend,) Replace or Metaspace")


def _from_vocab(file: Path) -> subwords.Tokenizer:
    vocab = {line.rstrip("\r"): i for i, line in enumerate(file.read_text("utf-8").removesuffix("\n").split("\n"))}
    config, late = _json(file.parent / "tokenizer_config.json"), _late_tokens(file.parent, vocab)
    _require("tokenizer_config.json", config, never_split=(None, []), do_basic_tokenize=(None, True))
    named = _named(file.parent, vocab, late, {r: f"[{r.upper()}]" for r in ("unk", "sep", "pad", "cls", "mask")})
    cls, sep = named["cls"], named["sep"]
    if cls is None or sep is None:
        raise ValueError("expected [CLS] and [SEP] in the vocabulary")
    return subwords.WordPiece(vocab, _special(vocab, named.values()) + late, named, ([cls, "A", sep], [cls, "A", sep, "B", sep]),
                     lowercase=_checked(config, "do_lower_case", bool, True),
                     strip_accents=_checked(config, "strip_accents", bool, None),
                     split_cjk=_checked(config, "tokenize_chinese_chars", bool, True))


def _from_merges(file: Path) -> subwords.Tokenizer:
    merges = file.with_name("merges.txt" if file.name == "vocab.json" else "vocab.bpe")
    if not merges.is_file():
        raise FileNotFoundError(f"{merges}: not found, expected beside {file.name}")
    vocab, config = _ids(files.read_json(file)), _json(file.parent / "tokenizer_config.json")
    lines = [line for line in merges.read_text("utf-8").split("\n") if line and not line.startswith("#version")]
    late = _late_tokens(file.parent, vocab)
    named = _named(file.parent, vocab, late, dict.fromkeys(("bos", "eos"), "<|endoftext|>"))
    _require("tokenizer_config.json", config, add_prefix_space=(None, False))
    return _byte_level(vocab, _special(vocab, named.values()) + late, named, _around(named, config), lines, False)


def _from_sentencepiece(file: Path) -> subwords.Tokenizer:
    # Numbers of fields and types are those of sentencepiece_model.proto.
    messages = list(_protobuf(file.read_bytes()))
    if strange := [field for field, message in messages if field in (1, 2, 3) and isinstance(message, int)]:
        raise ValueError(f"not a SentencePiece model: field {strange[0]} is a number, expected a message")
    trainer, normalizer = ({k: v for f, m in messages if f == field for k, v in _protobuf(m)} for field in (2, 3))
    if trainer.get(3, 1) != 2:
        raise ValueError(f"not a SentencePiece model of type BPE: model_type is {trainer.get(3, 1)}, expected 2")
    pieces = [{2: bytes(4), 3: 1} | dict(_protobuf(message)) for field, message in messages if field == 1]
    for i, piece in enumerate(pieces):
        if not (isinstance(piece.get(1), bytes) and isinstance(piece[3], int) and isinstance(piece[2], bytes)
                and len(piece[2]) == 4):
            raise ValueError(f"malformed piece {i}: found {files.quoted(piece)}, expected its text, score and type")
    vocab = {piece[1].decode(): i for i, piece in enumerate(pieces)}
    said = _json(file.parent / "tokenizer_config.json") | {
        "scores": [struct.unpack("<f", piece[2])[0] for piece in pieces],
        "token_type": [piece[3] for piece in pieces],
        "precompiled_charsmap": normalizer.get(2) or normalizer.get(6),
        "remove_extra_whitespaces": normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24),
        "add_space_prefix": normalizer.get(3, 1)}
    ids = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2), "pad": trainer.get(43, -1)}
    late, spelled = _late_tokens(file.parent, vocab), dict(enumerate(vocab))
    named = _named(file.parent, vocab, late, {role: spelled.get(i) for role, i in ids.items()})
    return _from_pieces(vocab, late, named, said)


def _from_gguf(file: Path) -> subwords.Tokenizer:
    prefix = "tokenizer.ggml."
    said = {key.removeprefix(prefix): value for key, value in gguf.read(file)[0].items() if key.startswith(prefix)}
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {role: _checked(said, f"{key}_token_id", int, None) for role, key in roles.items()}
    vocab = {token: i for i, token in enumerate(_checked(said, "tokens", [str]))}
    kind, pre = _checked(said, "model", str), said.get("pre")
    if kind == "llama":
        return _from_pieces(vocab, [], named, said)
    # llama.cpp's "default" splits in its own way, it is not GPT-2's.
    if kind != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise ValueError(f"unsupported tokenizer {files.quoted(kind)} with pre-tokenizer {files.quoted(pre)}, expected "
                         "'llama', or 'gpt2' with 'smollm' or 'gpt-2'")
    control, user = ({i for i, kind in enumerate(_checked(said, "token_type", [int])) if kind == k} for k in (3, 4))
    added = _special(vocab, control) + _special(vocab, user, special=False)
    return _byte_level(vocab, added, named, _around(named, said), _checked(said, "merges", [str]), pre == "smollm")


def _from_pieces(vocab: dict, added: list, named: dict, said: dict) -> subwords.BPE:
    """A SentencePiece model by what is said of it in a .gguf file's words."""
    if said.get("precompiled_charsmap") or said.get("remove_extra_whitespaces"):
        raise ValueError("unsupported normalisation of characters or spaces, expected a model that asks for none")
    scores, kinds = _checked(said, "scores", [float]), _checked(said, "token_type", [int])
    if not len(vocab) == len(kinds) == len(scores) or set(kinds) != {1, 2, 3, 6}:
        raise ValueError("unsupported pieces, expected each once and of the types normal, unknown, control and byte")
    best_first = sorted((-score, i, piece) for (piece, i), score, kind in zip(vocab.items(), scores, kinds, strict=True)
                        if kind == 1 and len(piece) > 1)
    t = _sentencepiece(vocab, added, named, _around(named, {"add_bos_token": True} | said),
                               [piece for _, _, piece in best_first],
                               "prefix" if said.get("add_space_prefix", True) else "replace")
    # As in sentencepiece, unknown and control pieces are not looked for in texts: none can spell the end of itself.
    t.special.update(i for i, kind in enumerate(kinds) if kind in (2, 3))
    return t


def _protobuf(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of one protobuf message; nested and fixed-size values stay bytes."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if size > len(data) - at:
            raise ValueError(f"not a SentencePiece model, or cut off: {size} bytes expected after {at} of {len(data)}")
        at += size
        return data[at - size:at]

    def varint() -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value  # -1, for none, reads as 2^64 - 1: no id, no size
        raise ValueError(f"not a SentencePiece model: a number of more than 10 bytes before byte {at}")

    while at < len(data):
        field, wire = divmod(varint(), 8)
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"not a SentencePiece model: unknown wire type {wire} before byte {at}")
        yield field, varint() if wire == 0 else take({1: 8, 5: 4}[wire] if wire != 2 else varint())


def _merged(merges: list, vocab: dict[str, int]) -> list[str]:
    """What the merges make, in their order."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        texts = isinstance(pair, list) and all(isinstance(token, str) and token for token in pair)
        if not texts or len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            found = files.quoted(" ".join(pair) if texts else pair)
            raise ValueError(f"malformed merge {found}, expected two tokens that make a third")
    return list(dict.fromkeys(map("".join, pairs)))


def _special(vocab: dict[str, int], ids: Iterable[int | None], special: bool = True) -> list[dict]:
    """Added tokens, one for each of these ids; those that are special are left out by decode."""
    flags = {"special": special} | dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    ids = set(ids)
    return [{"content": token, "id": i} | flags for token, i in vocab.items() if i in ids]


def _late_tokens(folder: Path, vocab: dict[str, int]) -> list[dict]:
    """Tokens that were added after the vocabulary was made: these two files alone know them."""
    listed = _ids(_json(folder / "added_tokens.json"))
    tokens = _special(listed, listed.values()) + _added({"added_tokens": []} | _json(folder / "tokenizer.json"))
    return list({token["content"]: token for token in tokens if token["content"] not in vocab}.values())


def _named(folder: Path, vocab: dict, added: list[dict], defaults: Mapping[str, str | None]) -> dict[str, int | None]:
    """The ids of the tokens with a role: as the tokenizer's files name them, else the default, else the model's."""
    table, named = vocab | {token["content"]: token["id"] for token in added}, {}
    by_name = [_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    by_id = [_json(folder / name) for name in ("generation_config.json", "config.json")]
    for role in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"):
        name = next(filter(None, (config.get(f"{role}_token") for config in by_name)), None)
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not (isinstance(name, str) and name in table):
            raise ValueError(f"{role}_token is {files.quoted(name)}, expected a token of the vocabulary")
        ids = [config.get(f"{role}_token_id") for config in by_id]
        ids = [i[0] if isinstance(i, list) and i else i for i in ids]  # of several, the first
        # old configs have pad_token_id -1 for none
        models = next((i for i in ids if type(i) is int and i in table.values()), None)
        named[role] = vocab.get(defaults.get(role), models) if name is None else table[name]
    return named


def _around(named: dict, config: dict) -> subwords.Templates:
    """bos before and eos after each text, where add_bos_token and add_eos_token say so."""
    before, after = ([named[role]] if _checked(config, f"add_{role}_token", bool, None) else []
                     for role in ("bos", "eos"))
    if None in before + after:
        raise ValueError("expected the name of the bos or eos token that is to be added")
    return [*before, "A", *after], [*before, "A", *after, *before, "B", *after]


def _post_processor(spec: dict) -> subwords.Templates:
    steps = [step for step in _steps(spec.get("post_processor")) if step["type"] != "ByteLevel"]  # offsets only
    if not steps:
        return ["A"], ["A", "B"]
    if (names := [step["type"] for step in steps]) != ["TemplateProcessing"]:
        raise ValueError(f"unsupported post_processor {', '.join(names)}, expected TemplateProcessing")
    ids = {"A": ["A"], "B": ["B"]}
    for name, token in _checked(steps[0], "special_tokens", dict).items():
        ids[name] = _checked(token, "ids", [int])
    single, pair = ([i for item in _checked(steps[0], form, [dict]) for part in item.values()
                     for i in _checked(ids, _checked(part, "id", str), list)] for form in ("single", "pair"))
    return single, pair


def _steps(step: dict | None) -> list[dict]:
    """The members of a Sequence, or the one step there is."""
    if step is None or _checked(step, "type", str) != "Sequence":
        return [step] if step else []
    members = next((key for key in step if key != "type"), "its members")
    return [member for member in _checked(step, members, [dict]) if _checked(member, "type", str)]


def _checked(found: object, key: str, kind: type | list[type], *default: object) -> object:
    """found[key] of this type, or a list ([type]) of it, or the default, also where there is none; else ValueError. So
    a part of a file is used as what it was taken for, and in no other way."""
    value = found.get(key, *default) if isinstance(found, dict) else None
    several, each = isinstance(kind, list), kind[0] if isinstance(kind, list) else kind
    values = (value if isinstance(value, list) else [None]) if several else [value]
    if not (default and value is default[0]) and not all(type(v) is each for v in values):
        expected = f"a list of {each.__name__}" if several else each.__name__
        raise ValueError(f"malformed {files.quoted(key)[1:-1]}: found {files.quoted(value)}, expected {expected}")
    return value


def _ids(vocab: object) -> dict[str, int]:
    """A vocabulary out of a file."""
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"malformed vocabulary: found {files.quoted(vocab)}, expected tokens with integers as ids")
    return vocab


def _added(spec: dict) -> list[dict]:
    """The added tokens of a tokenizer.json."""
    tokens = _checked(spec, "added_tokens", [dict])
    for token in tokens:
        _checked(token, "id", int)
        _checked(token, "content", str)
        for flag in ("special", "single_word", "lstrip", "rstrip", "normalized"):
            _checked(token, flag, bool)
    return tokens


def _require(part: str, found: dict | None, **known: tuple) -> None:
    for key, values in known.items():
        if found is not None and found.get(key) not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"unsupported {key} {files.quoted(found.get(key))} in {part}, expected {expected}")


def _json(file: Path) -> dict:
    """The contents of an optional JSON file."""
    return files.read_json(file) if file.is_file() else {}
