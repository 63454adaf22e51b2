"""A .gguf file's tokenizer in the files of Hugging Face: the same ids and texts in `tokenizers` and transformers.

Sources: the tokenizer.json of the models' own repositories, and transformers' convert_slow_tokenizer.py. One difference
is transformers' own: it finds LLaMA's control tokens in any text, SentencePiece and this project in none."""

from pathlib import Path

from sibo_lab.backbone import gguf, tokenizer_files
from sibo_lab.backbone.subwords import SPACE, WORDS, WORDS_DIGITS_APART, Tokenizer

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
ROLES = ("bos", "eos", "pad", "unk")


def from_gguf(file: Path) -> dict[str, dict]:
    """The contents of tokenizer.json, tokenizer_config.json and generation_config.json by name; {} where the file has
    no tokenizer. ValueError for one whose splits tokenizer.json cannot say."""
    fields = gguf.read(file)[0]
    if "tokenizer.ggml.model" not in fields:
        return {}
    spec, t = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}, tokenizer_files.read(file)
    parts = _pieces(spec, t, file) if spec["model"] == "llama" else _byte_level(spec)
    added = [{"id": i, "content": t.tokens[i], **PLAIN, "special": i in t.special}
             for i, kind in enumerate(spec["token_type"]) if kind in (2, 3, 4)]
    named = {role: i for role in ROLES if (i := getattr(t, f"{role}_id")) is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": fields.get(f"{fields['general.architecture']}.context_length"),
              "added_tokens_decoder": {str(x["id"]): {k: v for k, v in x.items() if k != "id"} for x in added}}
    config |= {f"{role}_token": t.tokens.get(named.get(role)) for role in ROLES}  # null, or classes bring their own
    if isinstance(chat := fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = chat
    generation = {f"{role}_token_id": i for role, i in named.items() if role != "unk"}
    if len(t.eos_ids) > 1:
        generation["eos_token_id"] = t.eos_ids
    return {"tokenizer.json": {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | parts | {
        "post_processor": _template(t)}, "tokenizer_config.json": config, "generation_config.json": generation}


def _byte_level(spec: dict) -> dict:
    how = tokenizer_files.GGUF[spec["pre"]]
    split = {WORDS: [BYTES], WORDS_DIGITS_APART: [DIGITS, BYTES]}.get(how["words"]) or [
        {"type": "Split", "pattern": {"Regex": how["words"]}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False}]
    return {"normalizer": {"type": "NFC"} if how.get("nfc") else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": split} if len(split) > 1 else split[0],
            "decoder": BYTES,
            "model": _model(spec, [pair.split(" ") for pair in spec["merges"]],
                            ignore_merges=how.get("ignore_merges", False))}


def _pieces(spec: dict, t: Tokenizer, file: Path) -> dict:
    kinds, scores = spec["token_type"], spec["scores"]
    vocab = {piece: i for i, piece in enumerate(spec["tokens"])}
    made = sorted((piece for piece, i in vocab.items() if kinds[i] == 1 and len(piece) > 1),
                  key=lambda piece: -scores[vocab[piece]])
    own = {piece for piece, i in vocab.items() if kinds[i] == 1}
    wrong = ("user-defined pieces" if 4 in kinds else "unused pieces" if 5 in kinds else
             "pieces of one score" if len({scores[vocab[piece]] for piece in made}) < len(made) else
             "pieces whose characters are none" if not own >= set("".join(made)) else "")
    if wrong:
        raise ValueError(f"{file}: expected a vocabulary that tokenizer.json splits as SentencePiece does, got "
                         f"{wrong}; bring the tokenizer of the folder that the .gguf file was made of")
    merges = [[piece[:k], piece[k:]] for piece in made for k in range(1, len(piece)) if {piece[:k], piece[k:]} <= own]
    lead = t.space == "prefix"
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
            if lead else spaces, "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, *[strip] * lead]},
            "model": _model(spec, merges, unk_token=t.tokens.get(t.unk_id), fuse_unk=True, byte_fallback=True)}


def _model(spec: dict, merges: list[list[str]], **more) -> dict:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False} | more | {
            "vocab": {token: i for i, token in enumerate(spec["tokens"])}, "merges": merges}


def _template(t: Tokenizer) -> dict | None:
    """The special tokens around a text and a pair, if there are any."""
    ids = sorted({i for template in t.templates for i in template if isinstance(i, int)})
    if not ids:
        return None

    def steps(template: list) -> list[dict]:
        return [{"SpecialToken": {"id": t.tokens[x], "type_id": 0}} if isinstance(x, int) else
                {"Sequence": {"id": x, "type_id": int(x == "B")}} for x in template]

    return {"type": "TemplateProcessing", "single": steps(t.templates[0]), "pair": steps(t.templates[1]),
            "special_tokens": {t.tokens[i]: {"id": t.tokens[i], "ids": [i], "tokens": [t.tokens[i]]} for i in ids}}
