"""tokenizer.py: the tokenizer of a backbone, checked against its model."""

import json

import pytest
from tokenizer_oracles import folder, trained

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


def test_padding_past_the_embeddings_is_fine_and_another_such_token_is_refused_where_a_text_has_it(tmp_path):
    at = folder(tmp_path / "a", tokenizer__json=trained("qwen2"), tokenizer_config__json={
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "eos_token": "<|end|>"})
    whole = tokenizer.from_pretrained(at)
    assert whole.tokens[whole.pad_id] == "[PAD]" and whole.pad_id == whole.vocab_size - 1
    t = tokenizer.for_model(at, whole.eos_id + 1, "eos", "pad")
    assert t.pad_id == 0 and t.encode("a<|end|>b") == whole.encode("a<|end|>b")
    with pytest.raises(ValueError, match=r"token '<think>': expected an id below \d+, as there are embeddings, got"):
        t.encode("a <think>")


def test_a_template_whose_tokens_have_no_embedding_is_refused_at_once(tmp_path):
    spec = json.loads(trained("llama3"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == "<|begin|>"]
    at = folder(tmp_path / "a", tokenizer__json=spec)
    with pytest.raises(ValueError, match="'<|begin|>': expected an id below"):
        tokenizer.for_model(at, spec["added_tokens"][0]["id"])
