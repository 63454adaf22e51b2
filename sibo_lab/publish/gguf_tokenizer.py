"""A backbone's tokenizer in the metadata of a .gguf file, as llama.cpp's converter writes it (its conversion/base.py).

What is written is read back as llama.cpp does, and refused where it would give other ids. Two differences are
llama.cpp's own: it composes no characters (Qwen's NFC), and of LLaMA's texts see `LEAD`."""

import sys
from pathlib import Path

from sibo_lab.backbone import chat_template, gguf, tokenizer, tokenizer_json, tokenizer_model
from sibo_lab.backbone.subwords import BPE
from sibo_lab.files import one_line, quoted

KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # of roles: KEY_token_id
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
LEAD = ("llama.cpp puts a blank before each text and after each special token, this tokenizer none before another "
        "blank or inside a text: such texts get other ids there")
PREFIX = "tokenizer.ggml."


def fields(path: Path, size: int) -> dict[str, object]:
    """The metadata of the tokenizer at `path` for a model of `size` embeddings: of a folder's what is said above, of a
    .gguf file's its own. ValueError for one that llama.cpp would read otherwise."""
    t = tokenizer.read(path)
    if path.suffix == ".gguf":
        return {key: value for key, value in gguf.read(path)[0].items() if key.startswith("tokenizer.")}
    if not isinstance(t, BPE):
        raise ValueError(f"{t.file}: expected a BPE for a .gguf file, byte-level or SentencePiece, got another kind")
    if t.vocab_size > size:
        raise ValueError(f"{t.file}: expected at most {size} tokens, as there are embeddings, got {t.vocab_size}; "
                         "llama.cpp reads no others: leave the last ones out of the tokenizer's files")
    found, wrong = _shared(t) | (_pieces(t) if t.space else _byte_level(t)), f"its pattern {quoted(t.words)}"
    for pre in ["default"] if t.space else [p for p, how in tokenizer_model.GGUF.items() if how["words"] == t.words]:
        if not (wrong := _difference(t, spec := found | {"pre": pre})):
            break
    else:
        raise ValueError(f"{t.file}: expected a tokenizer that a .gguf file can say (pre-tokenizers "
                         f"{', '.join(tokenizer_model.GGUF)}), got another one, by {wrong}; bring one that it can")
    if t.space in ("always", "first"):
        print(f"{t.file}: {LEAD}", file=sys.stderr)
    if not set(pads := [f"[PAD{i}]" for i in range(t.vocab_size, size)]).isdisjoint(spec["tokens"]):
        raise ValueError(f"{t.file}: expected no token [PAD…], which fills up the vocabulary, got one")
    spec["tokens"], spec["token_type"] = spec["tokens"] + pads, spec["token_type"] + [UNUSED] * len(pads)
    if "scores" in spec:
        spec["scores"] = spec["scores"] + [-10000.0] * len(pads)
    template, place = chat_template.find(path)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{place}: expected a text, got {quoted(template)}")
    return {PREFIX + key: value for key, value in spec.items()} | (
        {"tokenizer.chat_template": template} if template else {})


def _shared(t: BPE) -> dict:
    """Tokens, their types, and what is special among them."""
    special = {role: i for role in KEYS if (i := getattr(t, f"{role}_id")) is not None}
    before, after = (t.templates[0][:(at := t.templates[0].index("A"))], t.templates[0][at + 1:])
    for role, ids in (("bos", before), ("eos", after)):
        if ids not in ([], [special.get(role)]):
            raise ValueError(f"{t.file}: expected {role} or nothing around a text, as a .gguf file can say, got {ids}")
    for token in (*t.added.values(), *t.added_normalized.values()):
        if flag := next((f for f in ("single_word", "lstrip", "rstrip") if token.get(f)), None):
            raise ValueError(f"{t.file}: added token {quoted(t.tokens[token['id']])}: expected one that takes no "
                             f"blanks or letters into account, as in llama.cpp, got {flag}")
    if len(t.eos_ids) > 3:
        raise ValueError(f"{t.file}: expected at most 3 tokens that end a text, as eos, eot and eom, got {t.eos_ids}")
    ends = zip(("eot", "eom"), (i for i in t.eos_ids if i != t.eos_id), strict=False)
    return {"tokens": [t.tokens.get(i, f"[PAD{i}]") for i in range(t.vocab_size)],
            "token_type": _types(t),
            **{f"{KEYS[role]}_token_id": i for role, i in special.items()}, **{f"{end}_token_id": i for end, i in ends},
            "add_bos_token": bool(before), "add_eos_token": bool(after)}


def _types(t: BPE) -> list[int]:
    """Later ones win."""
    kinds = {i: UNUSED if token in t.unused else NORMAL for i, token in t.tokens.items()}
    kinds |= {t.vocab[f"<0x{b:02X}>"]: BYTE for b in range(256)} if t.space else {}
    kinds |= {token["id"]: USER_DEFINED for token in (*t.added.values(), *t.added_normalized.values())}
    kinds |= dict.fromkeys(t.special, CONTROL)
    kinds |= {t.unk_id: UNKNOWN} if t.space else {}
    return [kinds.get(i, UNUSED) for i in range(t.vocab_size)]


def _byte_level(t: BPE) -> dict:
    if not (merges := tokenizer_json.read_merges(t.file)):
        raise ValueError(f"{t.file}: expected merges, as llama.cpp needs one at least, got none")
    return {"model": "gpt2", "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]}


def _pieces(t: BPE) -> dict:
    """Scores as in tokenizer.model, or in the order of tokenizer.json's merges."""
    if t.file.name == "tokenizer.model":
        scores = tokenizer_model.pieces(t.file)[1]
        scores += [-1000.0] * (t.vocab_size - len(scores))  # added tokens, as by the converter
    else:
        order = {ids[0]: -float(n) for n, ids in enumerate(t.ranks.values()) if len(ids) == 1}
        scores = [order.get(i, 0.0) if len(t.tokens.get(i, "")) > 1 else 0.0 for i in range(t.vocab_size)]
    return {"model": "llama", "scores": scores, "add_space_prefix": t.space not in ("never", "replace")}


def _difference(t: BPE, spec: dict) -> str:
    """What the fields are read back as, where that gives other ids: the first part that differs, or ""."""
    try:
        again = tokenizer_model.from_gguf({PREFIX + key: value for key, value in spec.items()})
    except ValueError as e:
        return one_line(e)
    parts = {
        "its pattern": lambda t: t.words, "its merges": lambda t: [*t.ranks.items()], "normalizer NFC": lambda t: t.nfc,
        "ignore_merges": lambda t: t.whole, "add_prefix_space": lambda t: t.prefix_space,
        "pieces of one score": lambda t: t.tied, "unused pieces": lambda t: t.unused,
        "its special tokens": lambda t: t.special | {t.unk_id} if t.space else t.special,
        "its added tokens": lambda t: {text: x["id"] for text, x in (t.added | t.added_normalized).items()
                                       if x["id"] not in t.special},
        "what stands around a text": lambda t: [*t.templates[0]],
        "its bos, eos, pad and unk": lambda t: [t.bos_id, t.eos_id, t.pad_id, t.unk_id, t.eos_ids]}
    return next((name for name, part in parts.items() if part(t) != part(again)), "")
