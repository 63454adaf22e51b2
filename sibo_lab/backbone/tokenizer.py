"""The tokenizer that belongs to a backbone."""

from pathlib import Path

from sibo_lab.backbone import locate, subwords, tokenizer_files


def from_pretrained(name_or_dir: str | Path) -> subwords.Tokenizer:
    """The tokenizer of a short name, a folder, a .gguf file or a hub id (see locate.py).
    FileNotFoundError where a folder has none; ValueError naming the file that is malformed or not supported."""
    return tokenizer_files.read(locate.locate(name_or_dir))


def for_model(name_or_dir: str | Path, vocab_size: int, *roles: str) -> subwords.Tokenizer:
    """from_pretrained, checked against the model: ValueError where an id has no row among its `vocab_size` embeddings,
    or a special token is missing that its work needs (`roles`: eos to end an answer, pad to fill a batch)."""
    t = from_pretrained(name_or_dir)
    if t.vocab_size > vocab_size:
        raise ValueError(f"{name_or_dir}: found a tokenizer of {t.vocab_size} ids, and {vocab_size} embeddings, which "
                         "must be as many or more; bring the tokenizer that belongs to these weights")
    for role in roles:
        if getattr(t, f"{role}_id") is None:
            raise ValueError(f"{name_or_dir}: found a tokenizer without {role} token, expected one; name it in "
                             "special_tokens_map.json or tokenizer_config.json")
    return t
