"""tokenizer.py: the tokenizer of a backbone, checked against its model."""

import pytest

from sibo_lab.backbone import locate, tokenizer


def test_for_model_takes_a_located_path_and_looks_for_nothing_itself(tiny_llama, monkeypatch):
    expected = tokenizer.from_pretrained(tiny_llama).encode("a text")
    monkeypatch.setattr(locate, "locate", lambda *_: pytest.fail("it was located before"))
    assert tokenizer.for_model(tiny_llama, 257, "eos").encode("a text") == expected


def test_a_tokenizer_of_more_ids_than_embeddings_or_without_a_needed_token_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="expected a tokenizer of at most 255 ids, .* got 257"):
        tokenizer.for_model(tiny_llama, 255)
    with pytest.raises(ValueError, match="expected the token for eos to have an id below 256, .* got 256"):
        tokenizer.for_model(tiny_llama, 256, "eos")
    with pytest.raises(ValueError, match="expected the tokenizer to have a token for pad, got none"):
        tokenizer.for_model(tiny_llama, 300, "eos", "pad")
