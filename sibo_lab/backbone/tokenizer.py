"""The tokenizer of a backbone."""

from pathlib import Path

from sibo_lab.backbone import locate, subwords, tokenizer_files


def from_pretrained(name_or_dir: str | Path) -> subwords.Tokenizer:
    """The tokenizer of a short name, folder, .gguf file or hub id (see locate.py). FileNotFoundError if a folder has
    none; ValueError names a file that is malformed or not supported."""
    return tokenizer_files.read(locate.locate(name_or_dir))


def for_model(path: Path, vocab_size: int, *roles: str) -> subwords.Tokenizer:
    """The tokenizer at a located path, for a model of so many embeddings.

    Added tokens without an embedding are refused by `encode` where a text has one; padding, which nothing attends to,
    is id 0 then. ValueError if other tokens have none, or if there is no token for a role, such as eos."""
    t = tokenizer_files.read(path)
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
