"""Tokenizers from tokenizer.json, vocab.txt, or vocab.json and merges.txt; what is known of their keys, and of special
tokens in any format."""

from pathlib import Path

from sibo_lab.backbone.subwords import (
    BPE,
    GPT4O,
    LLAMA3,
    QWEN2,
    SPACE,
    TEKKEN,
    WORDS,
    WORDS_DIGITS_APART,
    Tokenizer,
    WordPiece,
)
from sibo_lab.files import quoted, read_json, refuse_pointer

FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ANY = type("Any", (tuple,), {"__contains__": lambda self, value: True})()  # read elsewhere, or nothing depends on it
SUPPORTED = {  # every known key, with the values that are implemented: what is not listed may change the ids
    "tokenizer.json": dict.fromkeys(("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
                                     "post_processor", "decoder", "model"), ANY),
    "WordPiece": {"vocab": ANY, "unk_token": ANY, "continuing_subword_prefix": ("##",),
                  "max_input_chars_per_word": ANY},
    "BPE": {"dropout": (None, 0), "unk_token": ANY, "continuing_subword_prefix": (None, ""), "fuse_unk": ANY,
            "end_of_word_suffix": (None, ""), "byte_fallback": ANY, "ignore_merges": (None, False, True),
            "vocab": ANY, "merges": ANY},
    "BertNormalizer": {"clean_text": (True,), "handle_chinese_chars": ANY, "strip_accents": ANY, "lowercase": ANY},
    "BertPreTokenizer": {},
    "NFC": {},
    "ByteLevel": {"add_prefix_space": (False, True), "trim_offsets": ANY, "use_regex": (None, True, False)},
    "Digits": {"individual_digits": (True,)},
    "Split": {"pattern": tuple({"Regex": pattern} for pattern in (LLAMA3, QWEN2, TEKKEN, GPT4O)),
              "behavior": ("Isolated",), "invert": (False,)},
    "Prepend": {"prepend": (SPACE,)},
    "Replace": {"pattern": ({"String": " "},), "content": (SPACE,)},
    "Metaspace": {"replacement": (SPACE,), "split": (None, True, False), "str_rep": ANY,
                  "add_prefix_space": (None, True), "prepend_scheme": (None, "always", "first", "never")},
    "tokenizer_config.json": {
        **dict.fromkeys((
            # read below
            "tokenizer_class", "legacy", "add_prefix_space", "add_bos_token", "add_eos_token", "added_tokens_decoder",
            "extra_special_tokens", "additional_special_tokens", "do_lower_case", "strip_accents",
            "tokenize_chinese_chars", "clean_up_tokenization_spaces", *(f"{role}_token" for role in ROLES),
            # no id and no text depends on them
            "auto_map", "backend", "chat_control_tokens", "chat_template", "device_map", "from_slow", "init_inputs",
            "is_local", "local_files_only", "max_len", "max_length", "merges_file", "model_input_names",
            "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding", "padding_side",
            "processor_class", "response_schema", "response_template", "special_tokens_map_file",
            "spaces_between_special_tokens", "stride", "tokenizer_file", "transformers_version", "trim_offsets",
            "truncation", "truncation_side", "truncation_strategy", "use_default_system_prompt", "use_fast",
            "verbose", "vocab_file"), ANY),
        "do_basic_tokenize": (None, True), "errors": (None, "replace"), "fix_mistral_regex": (None, False),
        "never_split": (None, []), "sp_model_kwargs": (None, {}), "split_special_tokens": (None, False)},
    "tokenizer.model": {"legacy": (None, True), "add_prefix_space": (None, True)},  # as sentencepiece reads it
}
# The classes of transformers that build their own steps, by tokenizer_class or model_type; the others run the file's.
CLASSES = {"BertTokenizer": "BertTokenizer", "GPT2Tokenizer": "GPT2Tokenizer", "LlamaTokenizer": "LlamaTokenizer",
           "Qwen2Tokenizer": "Qwen2Tokenizer", "PreTrainedTokenizer": None, "TokenizersBackend": None,
           "bert": "BertTokenizer", "gpt2": "GPT2Tokenizer", "gptj": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer",
           "qwen3": "Qwen2Tokenizer"}
BERT = {"do_lower_case": ("lowercase", True), "strip_accents": ("strip_accents", None),
        "tokenize_chinese_chars": ("handle_chinese_chars", True)}  # its flags: their names in tokenizer.json, defaults
DEFAULTS = {  # the special tokens of each class, ids of roles as far as its vocabulary has them
    "BertTokenizer": {role: f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")},
    "GPT2Tokenizer": dict.fromkeys(("bos", "eos"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos", "pad"), "<|endoftext|>"),
    "LlamaTokenizer": {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}}


def byte_level(shared: tuple, merges: list, words: str, ignore_merges: bool = False, **how) -> BPE:
    """shared: what subwords.Tokenizer takes."""
    # GPT-2 writes a byte as a letter: itself if printable, else the next from U+0100 on.
    printable, spare = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    byte = {chr(b if b in printable else next(spare)): b for b in range(256)}
    vocab, merged, added = shared[0], dict.fromkeys(_merged(merges, shared[0])), {t["content"] for t in shared[1]}
    spelled = {token: bytes(map(byte.get, token)) for token in vocab if set(token) <= byte.keys()}
    if strange := next((token for token in merged if token not in spelled), None):
        raise ValueError(f"malformed merge: expected letters that stand for bytes, got {quoted(strange)}")
    ranks = {bytes([b]): [vocab[letter]] if letter in vocab else [] for letter, b in byte.items()}
    ranks |= {spelled[token]: [vocab[token]] for token in merged}
    whole = {data.decode(errors="replace"): vocab[token] for token, data in spelled.items()
             if ignore_merges and len(data) > 1 and token not in merged and token not in added}
    return BPE(*shared, ranks=ranks, spelled={vocab[token]: data for token, data in spelled.items()}, words=words,
               whole=whole, **how)


def sentencepiece(shared: tuple, merged: list[str], space: str, by_word: bool = False, **how) -> BPE:
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
               words="▁[^▁]*|[^▁]+" if by_word else "▁*[^▁]+|▁+", **how)


def from_tokenizer_json(file: Path, config: dict) -> Tokenizer:
    """config: tokenizer.py's."""
    spec = read_json(file)
    listed = [step["type"] for step in _steps(spec.get("pre_tokenizer"))]
    if config["class"] == "LlamaTokenizer" and ("ByteLevel" in listed or config["model_type"] == "mistral"):
        config["class"] = None  # what transformers says of them is wrong, and it knows
    return _from_spec(file, spec, config)


def _from_spec(file: Path, spec: dict, config: dict) -> Tokenizer:
    """tokenizer.json, or what transformers makes of other files. "truncation" and "padding" are its author's habits
    (MiniLM: 128 tokens): not applied."""
    require("tokenizer.json", spec)
    model = get(spec, "model", dict)
    kind = get(model, "type", str, "BPE" if "merges" in model else "WordPiece")  # older files leave it out
    _as_class(config, spec, kind)
    vocab, unk = _ids(model.get("vocab")), get(model, "unk_token", str, None)
    added, named = special_tokens(file, vocab, config, spec, {"unk": unk})
    shared = (vocab, added, named, _template(file, spec, named, config))
    listed = _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
    names, steps = [step["type"] for step in listed], {step["type"]: step for step in listed}
    for part, settings in (steps | {kind: model}).items():
        require(part, settings)
    nfc, lead = "NFC" in steps, steps.get("ByteLevel", {}).get("add_prefix_space")
    how = {"nfc": nfc, "ignore_merges": model.get("ignore_merges")}
    split = steps.get("ByteLevel", {}).get("use_regex") is not False
    match (kind, bool(model.get("byte_fallback")), *names[names[:1] == ["NFC"]:]):
        case ("WordPiece", False, "BertNormalizer", "BertPreTokenizer") if not nfc:
            clean = steps["BertNormalizer"]
            return WordPiece(*shared, lowercase=get(clean, "lowercase", bool),
                             strip_accents=get(clean, "strip_accents", bool, None),
                             split_cjk=get(clean, "handle_chinese_chars", bool),
                             max_chars=get(model, "max_input_chars_per_word", int),
                             tidy=(spec.get("decoder") or {}).get("cleanup") is not False,
                             tidy_text=get(config, "clean_up_tokenization_spaces", bool, None))
        case ("BPE", False, "ByteLevel") if split:
            how |= {"words": WORDS, "prefix_space": lead}
        case ("BPE", False, "Digits", "ByteLevel") if split and not lead:
            how |= {"words": WORDS_DIGITS_APART}
        case ("BPE", False, "Split", "ByteLevel") if not split and not lead:
            how |= {"words": steps["Split"]["pattern"]["Regex"]}
        case ("BPE", True, "Prepend", "Replace") | ("BPE", True, "Replace") if not nfc:
            how = {"space": "prefix" if "Prepend" in steps else "replace", "by_word": False}
        case ("BPE", True, "Metaspace") if not nfc:
            how = {"space": listed[0].get("prepend_scheme") or "always", "by_word": listed[0].get("split") is not False}
        case _:
            raise ValueError(
                f"unsupported model {kind} after {', '.join(names) or 'no steps'}: expected WordPiece after "
                "BertNormalizer, BertPreTokenizer; BPE after (NFC,) ByteLevel with its split, (NFC,) Digits or Split "
                "before ByteLevel without add_prefix_space; or, with byte_fallback, after (Prepend,) Replace or "
                "Metaspace")
    merges = get(model, "merges", list)
    if "space" in how:
        return sentencepiece(shared, _merged(merges, vocab), **how)
    t = byte_level(shared, merges, **how)
    if t.missing and unk:
        raise ValueError("unsupported unk_token with a vocabulary that lacks bytes")
    return t


def _as_class(config: dict, spec: dict, kind: str) -> None:
    """What a class of transformers builds in place of the file's steps, from its flags."""
    steps = {step["type"]: step for step in _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))}
    if config["class"] == "BertTokenizer" and "BertNormalizer" in steps:
        clean = steps["BertNormalizer"]
        for flag, (key, default) in BERT.items():
            if flag not in config and clean.get(key) != default:
                raise ValueError(f"{key}: expected {default}, as BertTokenizer has it where tokenizer_config.json does "
                                 f"not say {flag}, got {quoted(clean.get(key))}; say {flag} there")
            clean[key] = get(config, flag, bool, None) if flag in config else default
    if config["class"] == "LlamaTokenizer" and kind == "BPE":
        spec |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "split": False,
                                                       "prepend_scheme": lead_of_llama(config)}}
        spec["model"]["byte_fallback"] = True
    if config["class"] in ("GPT2Tokenizer", "Qwen2Tokenizer") and "ByteLevel" in steps:
        if (lead := get(config, "add_prefix_space", bool, None)) is not None:
            steps["ByteLevel"]["add_prefix_space"] = lead


def lead_of_llama(config: dict) -> str:
    """Where LlamaTokenizer puts a blank before a text."""
    if get(config, "add_prefix_space", bool, None) is False:
        return "never"
    return "always" if get(config, "legacy", bool, None) else "first"


def from_vocab(file: Path, config: dict) -> Tokenizer:
    vocab = {line: i for i, line in enumerate(file.read_text("utf-8").removesuffix("\n").split("\n"))}
    config["class"] = "BertTokenizer"
    return _from_spec(file, {
        "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100},
        "normalizer": {"type": "BertNormalizer", "clean_text": True} | dict(BERT.values()),
        "pre_tokenizer": {"type": "BertPreTokenizer"}}, config)


def read_merges(file: Path) -> list:
    """The merges of a tokenizer.json, or beside a vocab.json or encoder.json."""
    if file.name == "tokenizer.json":
        return read_json(file)["model"]["merges"]
    merges = file.with_name("merges.txt" if file.name == "vocab.json" else "vocab.bpe")
    if not merges.is_file():
        raise FileNotFoundError(f"{merges}: no such file, expected beside {file.name}")
    refuse_pointer(merges)
    return [line for line in merges.read_text("utf-8").split("\n") if line and not line.startswith("#version")]


def from_merges(file: Path, config: dict) -> Tokenizer:
    qwen = config["class"] == "Qwen2Tokenizer"
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not qwen}
    config["class"] = config["class"] or "GPT2Tokenizer"
    return _from_spec(file, {
        "model": {"type": "BPE", "vocab": read_json(file), "merges": read_merges(file)},
        "normalizer": {"type": "NFC"} if qwen else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level] if qwen else [level]}}, config)


def _merged(merges: list, vocab: dict) -> list[str]:
    """What the merges make, in order, but for what no text comes to: tiktoken merges any two pieces that make a token,
    `tokenizers` only the listed pairs, of which one for each token ever meets."""
    order = {}
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        two = isinstance(pair, list) and [*map(type, pair)] == [str, str] and all(pair)
        if not two or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"malformed merge: expected two tokens that make a third, got {quoted(merge)}")
        order.pop(tuple(pair), None)
        order[tuple(pair)] = None
    halves, numbers, pairs = {}, {}, {}
    for n, pair in (*enumerate(order), *enumerate(order)):  # again for those with a half that is made by a later merge
        known = all(len(half) == 1 or half in numbers for half in pair)
        if known and "".join(pair) not in numbers and _meet(*pair, halves, numbers, pairs):
            halves["".join(pair)], numbers["".join(pair)], pairs[pair] = pair, n, n
    return sorted(numbers, key=numbers.get)


def _meet(left: str, right: str, halves: dict, numbers: dict, pairs: dict) -> bool:
    """Whether two tokens are ever neighbours: undoes their merges from the last, and looks whether an earlier one would
    have taken what then stands at their border."""
    limit = float("inf")
    while pairs.get((left, right), limit) >= limit:
        a, b = numbers.get(left, -1), numbers.get(right, -1)
        if a == b == -1:
            return True
        if a > b:
            limit, left = a, halves[left][1]
        else:
            limit, right = b + 1, halves[right][0]
    return False


def special_tokens(file: Path, vocab: dict, config: dict, spec: dict, defaults: dict) -> tuple[list[dict], dict]:
    """Added tokens, and the ids of special ones by role, as transformers 5 reads them: added_tokens_decoder, or else
    tokenizer.json and added_tokens.json; the special ones that are named, and are new; ids in that order."""
    own = {role: token for role, token in DEFAULTS.get(config["class"], {}).items() if f"{role}_token" not in config}
    names = {role: config[f"{role}_token"] for role in ROLES if config.get(f"{role}_token") is not None}
    others = [token for key, token in config.items() if _is_token(token, key) and key[:-6] not in ROLES]
    extra, late = (several(config.get(f"{kind}_special_tokens")) for kind in ("extra", "additional"))
    special = [*names.values(), *own.values(), *others, *extra, *late]
    if strange := [token for token in special if not _is_token(token)]:
        raise ValueError(f"malformed special token: expected its text, got {quoted(strange[0])}")
    texts = [token["content"] if isinstance(token, dict) else token for token in special]
    roles, known = texts[:len(names) + len(own)], {*texts[:len(texts) - len(late)]} - {*own.values()}
    special = [{"special": True} | (token if isinstance(token, dict) else {}) | {"content": text} | (
        {"special": True} if text in roles else {}) for token, text in zip(special, texts, strict=True)]
    listed = _added({"added_tokens": []} | spec)
    if "added_tokens_decoder" in config:
        decoder = get(config, "added_tokens_decoder", dict)
        later = [token | {"id": int(i)} for i, token in sorted(decoder.items(), key=lambda item: int(item[0]))]
        listed = [] if config["class"] else listed
    else:
        found = _ids(json_or_none(file.with_name("added_tokens.json")))
        later = [{"content": token, "id": found[token], "special": token in known, "normalized": token not in known}
                 for token in sorted(found, key=found.get)]
    if config["class"]:
        later = [token | {"special": token.get("special") or token.get("content") in roles} for token in later]
    added = _numbered(vocab, [*listed, *later, *special])
    table = vocab | {token["content"]: token["id"] for token in added}
    there = vocab.keys() | {token.get("content") for token in (*listed, *later)}  # a class may add its defaults in vain
    ids = {role: table[token] for role, token in (defaults | own).items()
           if f"{role}_token" not in config and token in there}
    ids |= {role: table[text] for role, text in zip(names, texts, strict=False)}
    return added, _named(ids, config, {*table.values()})


def several(tokens: object) -> list:
    """A list of tokens, the values of a dict of them, or one alone."""
    return [*tokens.values()] if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else [
        token for token in (tokens,) if token is not None]


def _is_token(token: object, key: str = "a_token") -> bool:
    return key.endswith("_token") and isinstance(token.get("content") if isinstance(token, dict) else token, str)


def _numbered(vocab: dict, tokens: list[dict]) -> list[dict]:
    """Each added token once, with the id that `tokenizers` gives it: the vocabulary's, or the next."""
    found = {}
    for token in tokens:
        content = get(token, "content", str)
        if not content or content in found:
            continue
        i = vocab.get(content, max(len(vocab), 1 + max((t["id"] for t in found.values()), default=-1)))
        if get(token, "id", int, None) not in (None, i):
            raise ValueError(f"unsupported added token {quoted(content)}: expected id {i}, the vocabulary's or the "
                             f"next one, got {token['id']}")
        found[content] = {"normalized": not token.get("special")} | token | {"id": i}
    return _added({"added_tokens": [dict.fromkeys(FLAGS, False) | token for token in found.values()]})


def _named(ids: dict, config: dict, known: set[int]) -> dict:
    """Ids by role: as the tokenizer's files say ("own"), else as the model's; "stops": all that end a text, for it."""
    named = {"own": ids}
    for role in ROLES:
        models = [i[0] if isinstance(i, list) and i else i for i in config["ids"][role]]  # the first of several
        models = next((i for i in models if type(i) is int and i in known), None)  # old configs have -1 for none
        named[role] = models if ids.get(role) is None else ids[role]
    stops = next((i for i in config["ids"]["eos"] if i is not None), [])
    named["stops"] = [i for i in (stops if isinstance(stops, list) else [stops]) if type(i) is int and i in known]
    return named


def _template(file: Path, spec: dict, named: dict, config: dict) -> tuple:
    """What stands around texts: BertTokenizer's own, tokenizer.json's, or as add_bos_token and add_eos_token say."""
    if config["class"] == "BertTokenizer":
        cls, sep = named["cls"], named["sep"]
        if None in (cls, sep):
            raise ValueError("expected [CLS] and [SEP] in the vocabulary")
        return [cls, "A", sep], [cls, "A", sep, "B", sep]
    if file.name == "tokenizer.json":
        return _post_processor(spec)
    return around(named, config)


def around(named: dict, config: dict) -> tuple:
    """bos before and eos after each text, as add_bos_token and add_eos_token say."""
    before, after = ([named[role]] if get(config, f"add_{role}_token", bool, None) else [] for role in ("bos", "eos"))
    if None in before + after:
        raise ValueError("expected a bos or eos token to add, got none")
    return [*before, "A", *after], [*before, "A", *after, *before, "B", *after]


def _post_processor(spec: dict) -> tuple:
    steps = [step for step in _steps(spec.get("post_processor")) if step["type"] != "ByteLevel"]  # offsets only
    if not steps:
        return ["A"], ["A", "B"]
    if (names := [step["type"] for step in steps]) != ["TemplateProcessing"]:
        raise ValueError(f"post_processor: expected TemplateProcessing, got {', '.join(names)}")
    special = get(steps[0], "special_tokens", dict)
    ids = {"A": ["A"], "B": ["B"]} | {name: get(token, "ids", [int]) for name, token in special.items()}
    return tuple([i for item in get(steps[0], form, [dict]) for part in item.values()
                  for i in get(ids, get(part, "id", str), list)] for form in ("single", "pair"))


def _steps(step: dict | None) -> list[dict]:
    """The members of a Sequence, or the only step."""
    if step is None or get(step, "type", str) != "Sequence":
        return [step] if step else []
    members = next((key for key in step if key != "type"), "its members")
    return [member for member in get(step, members, [dict]) if get(member, "type", str)]


def get(spec: object, key: str, kind, *default):
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
    tokens = get(spec, "added_tokens", [dict])
    for token in tokens:
        get(token, "id", int)
        get(token, "content", str)
        for flag in FLAGS:
            get(token, flag, bool)
        if unknown := token.keys() - {"id", "content", "__type", *FLAGS}:
            raise ValueError(f"unsupported {quoted(min(unknown))} of added token {quoted(token['content'])}")
    return tokens


def require(part: str, spec: dict) -> None:
    """ValueError for a key that is not SUPPORTED, or not with this value."""
    for key, value in spec.items() if part in SUPPORTED else ():
        if key not in SUPPORTED[part] and key != "type" and not _is_token(value, key):
            raise ValueError(f"unsupported {quoted(key)} of {part}: expected one of {', '.join(SUPPORTED[part])}")
    for key, values in SUPPORTED.get(part, {}).items():
        if (value := spec.get(key)) not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"unsupported {key} of {part}: expected {expected}, got {quoted(value)}")


def json_or_none(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}
