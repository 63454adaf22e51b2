"""The tokenizer of a backbone."""

import sys
from pathlib import Path

from sibo_lab import parallel
from sibo_lab.backbone import gguf, locate, subwords
from sibo_lab.backbone.tokenizer_json import (
    CLASSES,
    ROLES,
    from_merges,
    from_tokenizer_json,
    from_vocab,
    json_or_none,
    require,
)
from sibo_lab.backbone.tokenizer_model import from_gguf, from_sentencepiece
from sibo_lab.files import one_line, quoted, refuse_pointer

PLAIN_SEARCH = {  # keys of generation_config.json that change greedy and beam search, off
    "num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "length_penalty": 1, "min_length": 0,
    "min_new_tokens": 0, "exponential_decay_length_penalty": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [],
    "sequence_bias": {}, "early_stopping": False, "guidance_scale": 1, "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0, "watermarking_config": None, "stop_strings": None, "max_time": None,
    "token_healing": False, "penalty_alpha": 0, "dola_layers": None, "num_beam_groups": 1, "diversity_penalty": 0,
    "constraints": None, "force_words_ids": None, "num_return_sequences": 1, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "is_assistant": False, "use_mtp": False}


def from_pretrained(name_or_dir: str | Path) -> subwords.Tokenizer:
    """The tokenizer of a short name, folder, .gguf file or hub id (see locate.py). FileNotFoundError if a folder has
    none; ValueError names a file that is malformed or not supported."""
    return read(locate.locate(name_or_dir))


def for_model(path: Path, vocab_size: int, *roles: str) -> subwords.Tokenizer:
    """The tokenizer at a located path, for a model of so many embeddings.

    Added tokens without an embedding are refused by `encode` where a text has one; padding, which nothing attends to,
    is id 0 then. ValueError if other tokens have none, or if there is no token for a role, such as eos."""
    t = read(path)
    t.limit = vocab_size
    if t.vocab_size > vocab_size and t.size_without_added > vocab_size:
        raise ValueError(f"{path}: expected a tokenizer of at most {vocab_size} ids, as there are embeddings, got "
                         f"{t.vocab_size}; bring the one that belongs to these weights")
    if (t.pad_id or 0) >= vocab_size:
        t.pad_id = 0
    for role in roles:
        if (i := getattr(t, f"{role}_id")) is None:
            raise ValueError(f"{path}: expected the tokenizer to have a token for {role}, got none; name it in "
                             "special_tokens_map.json or tokenizer_config.json")
        if i >= vocab_size:
            raise ValueError(f"{path}: expected the token for {role} to have an id below {vocab_size}, as there are "
                             f"embeddings, got {i}; name another in tokenizer_config.json")
    t.encode("")  # what the template adds has embeddings
    return t


def read(path: Path) -> subwords.Tokenizer:
    """The tokenizer of a folder or a .gguf file, as tokenizer.from_pretrained says.

    Where tokenizer_config.json names a class, the ids are those of transformers 5: its flags win over tokenizer.json's
    steps. Without one tokenizer.model comes first, read as by sentencepiece, which never takes a "</s>" typed in a text
    for its end. Departs from transformers 5.23, to split as the weights were trained: tokenizer.model's pieces are
    merged by their scores, not their ids (other runs of blanks, in LLaMA's), with bos unless add_bos_token is false; a
    tokenizer.json's Digits and Split stay where GPT2Tokenizer or Qwen2Tokenizer has others."""
    readers = {"tokenizer.json": from_tokenizer_json, "vocab.txt": from_vocab, "vocab.json": from_merges,
               "encoder.json": from_merges}
    try:
        if path.suffix == ".gguf":
            return from_gguf(gguf.read(path)[0])
        config = _config(path)
        first = {"tokenizer.model": from_sentencepiece}
        readers = readers | first if config.get("tokenizer_class") else first | readers
        file = next((path / name for name in readers if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: expected a tokenizer, one of {', '.join(readers)}, got none")
        refuse_pointer(path := file)
        t = readers[file.name](file, config)
        t.file, t.kind = file, config["class"]
        return t
    except ValueError as e:
        raise ValueError(f"{path}: {one_line(e).removeprefix(f'{path}: ')}") from e


def _config(folder: Path) -> dict:
    """tokenizer_config.json, and over it special_tokens_map.json where transformers reads that; "class" as in CLASSES,
    "stops" the ids that end generation."""
    config, model = json_or_none(folder / "tokenizer_config.json"), json_or_none(folder / "config.json")
    require("tokenizer_config.json", config)
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    if "added_tokens_decoder" not in config:
        config |= json_or_none(folder / "special_tokens_map.json")
        require("tokenizer_config.json", config)
    kind = model.get("model_type")
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or (kind if kind in CLASSES else None)
    if name is not None and str(name).removesuffix("Fast") not in CLASSES:
        raise ValueError(f"unsupported tokenizer_class: expected one of {', '.join(CLASSES)}, got {quoted(name)}")
    generation = json_or_none(folder / "generation_config.json")
    for key, off in PLAIN_SEARCH.items():
        if generation.get(key) not in (None, off) and not parallel.rank():
            print(f"{folder}: its generation_config.json has {key} {quoted(generation[key])}; answers here are written "
                  "without it", file=sys.stderr)
    ids = {role: [c.get(f"{role}_token_id") for c in (generation, model)] for role in ROLES}
    return config | {"class": CLASSES.get(str(name).removesuffix("Fast")), "ids": ids, "model_type": kind}
