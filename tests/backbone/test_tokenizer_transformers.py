"""tokenizer.py against transformers' AutoTokenizer: which file wins, what each flag does."""

import json
import logging

import pytest
import torch
import transformers
from tokenizer_oracles import LLAMA_TEXTS, PREPEND, folder, llama_spec, refused, seeded, trained
from twins import generated, theirs_of, words

from sibo_lab.backbone import locate, tokenizer

transformers.utils.logging.set_verbosity(logging.ERROR)

FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
TEXTS = [*seeded(60, "bert", known=True), "Héllo World 中国", "E5 then E22", "e5 then e22, E5E22 e55", " two", "[mask]",
         "  a [MASK] b [PAD]", "hello , world . it 's do n't", "<X>y <x>y x<X>", "a<p> b"]


def assert_as_transformers(at, texts, pairs=True, decoded=True, special=True):
    ours, theirs = tokenizer.from_pretrained(at), transformers.AutoTokenizer.from_pretrained(at)
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids, repr(text)
        if decoded:
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
        if pairs:
            assert ours.encode(text, "é a", special) == theirs.encode(text, "é a", add_special_tokens=special)
    for role in ("bos", "eos", "pad"):
        if (i := getattr(theirs, f"{role}_token_id")) is not None:
            assert getattr(ours, f"{role}_id") == i, role
    return ours, theirs


# ---------------------------------------------------------------------------------------------------------------- BERT


@pytest.fixture(scope="module")
def bert_files():
    source = locate.locate("minilm")
    spec = json.loads((source / "tokenizer.json").read_text("utf-8")) | {"truncation": None, "padding": None}
    return {"json": {"tokenizer__json": spec}, "txt": {"vocab__txt": (source / "vocab.txt").read_bytes()}}


def bert(at, files, config, **others):
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | config
    files = files | {"config__json": {"model_type": "bert"}, "tokenizer_config__json": config}
    return folder(at / "bert", **files | others)


@pytest.mark.parametrize("kind", ["json", "txt"])
@pytest.mark.parametrize("flags", [
    {}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}, {"strip_accents": True},
    {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False, "model_max_length": 3},
    {"clean_up_tokenization_spaces": True}, {"tokenizer_class": "BertTokenizerFast", "padding_side": "left"},
    {"unk_token": "[MASK]"}, {"sep_token": "[unused1]"}, {"pad_token": "<p>"}, {"image_token": "<X>"},
    {"additional_special_tokens": ["<X>"]}, {"extra_special_tokens": {"x_token": "<X>"}},
    {"mask_token": FLAGS | {"content": "[MASK]", "lstrip": True, "__type": "AddedToken"}}], ids=str)
def test_flags_of_bert_win_over_its_tokenizer_json(tmp_path, bert_files, kind, flags):
    assert_as_transformers(bert(tmp_path, bert_files[kind], flags), TEXTS)


def test_a_flag_that_only_tokenizer_json_has_is_refused_where_bert_has_another_default(tmp_path, bert_files):
    spec = bert_files["json"]["tokenizer__json"]
    spec = spec | {"normalizer": spec["normalizer"] | {"lowercase": False}}
    at = folder(tmp_path / "a", tokenizer__json=spec, config__json={"model_type": "bert"})
    refused(at, "lowercase: expected True", "say do_lower_case there")
    assert_as_transformers(bert(tmp_path, {"tokenizer__json": spec}, {"do_lower_case": False}), TEXTS)
    assert_as_transformers(folder(tmp_path / "b", tokenizer__json=spec), TEXTS)  # of no class: as it stands


@pytest.mark.parametrize("kind", ["json", "txt"])
@pytest.mark.parametrize("files", [
    {"added_tokens__json": {"E5": 30522, "E22": 30523}},
    {"added_tokens__json": {"<X>": 30522}, "special_tokens_map__json": {"additional_special_tokens": ["<X>"]}},
    {"added_tokens__json": {"[PAD]": 0, "<p>": 30522}, "special_tokens_map__json": {"pad_token": "<p>"}},
    {"special_tokens_map__json": {"unk_token": "[MASK]", "sep_token": {"content": "[unused1]"}}}], ids=str)
def test_added_tokens_and_special_tokens_map_beside_bert(tmp_path, bert_files, kind, files):
    assert_as_transformers(bert(tmp_path, bert_files[kind], {"unk_token": "[UNK]"}, **files), TEXTS)


@pytest.mark.parametrize("kind", ["json", "txt"])
@pytest.mark.parametrize("tokens", [
    [{"content": "<X>", "special": True}, {"content": "E5"}], [{"content": "E5", "normalized": True}],
    [{"content": "E5", "single_word": True}, {"content": "E22", "lstrip": True, "rstrip": True}]], ids=str)
def test_added_tokens_decoder_wins_over_the_other_files(tmp_path, bert_files, kind, tokens):
    decoder = {str(30522 + i): FLAGS | token for i, token in enumerate(tokens)}
    assert_as_transformers(bert(tmp_path, bert_files[kind], {"added_tokens_decoder": decoder},
                                special_tokens_map__json={"unk_token": "[MASK]"}), TEXTS)


@pytest.mark.parametrize("files", [{"added_tokens__json": {"E5": 30523}}, {"tokenizer_config__json": {
    "added_tokens_decoder": {"7": FLAGS | {"content": "E5"}}}}], ids=str)
def test_an_added_token_whose_id_transformers_would_change_is_refused(tmp_path, bert_files, files):
    at = folder(tmp_path / "a", **bert_files["txt"] | {"config__json": {"model_type": "bert"}} | files)
    assert transformers.AutoTokenizer.from_pretrained(at).convert_tokens_to_ids("E5") == 30522
    refused(at, "'E5': expected id 30522")


# ---------------------------------------------------------------------------------------------------- tokenizer_config


@pytest.mark.parametrize(("key", "value"), [
    ("tomorrow", True), ("split_special_tokens", True), ("never_split", ["a"]), ("do_basic_tokenize", False),
    ("sp_model_kwargs", {"enable_sampling": True}), ("fix_mistral_regex", True), ("errors", "ignore"),
    ("tokenizer_class", "TapasTokenizer"), ("add_cls_token", True)])
def test_a_key_of_tokenizer_config_that_may_change_ids_is_refused_by_name(tmp_path, bert_files, key, value):
    refused(bert(tmp_path, bert_files["txt"], {key: value}), key)


@pytest.mark.parametrize("name", ["BertTokenizer", "GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_every_key_that_transformers_saves_is_known(tmp_path, name):
    t = getattr(transformers, name)(extra_special_tokens=["<X>"])
    t.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    at = folder(tmp_path / "a", vocab__txt="[UNK]\n[CLS]\n[SEP]\na\n",
                tokenizer_config__json=saved | {"tokenizer_class": "BertTokenizer"})
    tokenizer.from_pretrained(at)
    assert len(saved) > 5


# ----------------------------------------------------------------------------------------------------------- byte level


@pytest.mark.parametrize("config", [
    {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
     "add_prefix_space": True, "add_bos_token": False, "clean_up_tokenization_spaces": True},
    {"tokenizer_class": "TokenizersBackend", "eos_token": "<|end|>", "pad_token": "<pad>"},
    {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|end|>", "legacy": True},
    {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {
        "600": FLAGS | {"content": "<tool>"}, "601": FLAGS | {"content": "E5", "lstrip": True}}}], ids=str)
def test_a_llama3_tokenizer_json_beside_its_configuration(tmp_path, config):
    at = folder(tmp_path / "a", tokenizer__json=trained("llama3"), config__json={"model_type": "llama"},
                tokenizer_config__json=config, special_tokens_map__json={"eos_token": "<think>"})
    if "added_tokens_decoder" in config:
        size = len(transformers.AutoTokenizer.from_pretrained(folder(
            tmp_path / "b", tokenizer__json=trained("llama3"))))
        config["added_tokens_decoder"] = {str(size + i): t for i, t in enumerate(
            config["added_tokens_decoder"].values())}
        (at / "tokenizer_config.json").write_text(json.dumps(config))
    assert_as_transformers(at, [*seeded(60, "l3"), "<tool>a E5 b", "a<|end|>"], decoded=False)


@pytest.mark.parametrize("config", [{}, {
    "eos_token": "<|end|>", "tokenizer_class": "Qwen2Tokenizer", "errors": "replace", "split_special_tokens": False,
    "unk_token": None, "bos_token": None}], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_a_qwen_tokenizer_json_and_its_vocab_json_and_merges(tmp_path, config, whole):
    spec = json.loads(trained("qwen2"))
    model = spec["model"]
    merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"])])
    parts = {"vocab__json": model["vocab"], "merges__txt": merges}
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in spec["added_tokens"]}
    at = folder(tmp_path / "a", **({"tokenizer__json": spec} if whole else parts), config__json={"model_type": "qwen2"},
                tokenizer_config__json=config | {"added_tokens_decoder": decoder})
    assert_as_transformers(at, [*seeded(60, "qwen", known=True), "a<|end|>Wo\u0308rd <think>"], decoded=False)


@pytest.mark.parametrize("lead", [True, False, None])
@pytest.mark.parametrize("whole", [True, False])
def test_gpt2_with_add_prefix_space(tmp_path, gpt2_files, gpt2_oracle, lead, whole):
    spec = json.loads(gpt2_oracle.to_str()) | {"added_tokens": []}
    spec["pre_tokenizer"]["add_prefix_space"] = not lead
    files = {"tokenizer__json": spec} if whole else {"vocab__json": gpt2_files[0], "merges__txt": gpt2_files[1]}
    config = {"tokenizer_class": "GPT2Tokenizer"} | ({} if lead is None else {"add_prefix_space": lead})
    if lead is None:
        spec["pre_tokenizer"]["add_prefix_space"] = False
    at = folder(tmp_path / "a", **files, config__json={"model_type": "gpt2"}, tokenizer_config__json=config)
    assert_as_transformers(at, [*seeded(60, "gpt2"), "a<|endoftext|>b", "\u3000a"], decoded=False)


# --------------------------------------------------------------------------------------------------------------- LLaMA


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("flags", [
    {}, {"legacy": True}, {"legacy": None}, {"add_prefix_space": False}, {"legacy": True, "add_prefix_space": True},
    {"add_prefix_space": None, "use_default_system_prompt": True, "pad_token": "[PAD]", "sp_model_kwargs": {}},
    {"added_tokens_decoder": {"32000": FLAGS | {"content": "<|im_start|>", "special": True}}},
    {"added_tokens_decoder": {"1": FLAGS | {"content": "<s>", "normalized": True, "special": True},
                              "32000": FLAGS | {"content": "<|im_start|>", "lstrip": True, "rstrip": True}}}], ids=str)
def test_flags_of_llama(tmp_path, llama_model, llama_pieces, kind, flags):
    files = {"tokenizer__model": llama_model} if kind == "model" else {
        "tokenizer__json": llama_spec(*llama_pieces, False, PREPEND)}
    at = folder(tmp_path / "a", **files, config__json={"model_type": "llama"}, tokenizer_config__json={
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"} | flags)
    # its merges of runs of blanks are those of ids, not of scores, where it has no tokenizer.json
    texts = [text for text in LLAMA_TEXTS if kind == "json" or "  " not in text.replace("▁", " ")]
    assert_as_transformers(at, texts, special=False)


@pytest.mark.parametrize("kind", ["model", "json"])
def test_extra_tokens_of_llama_by_name(tmp_path, llama_model, llama_pieces, kind):
    files = {"tokenizer__model": llama_model} if kind == "model" else {
        "tokenizer__json": llama_spec(*llama_pieces, False, PREPEND)}
    at = folder(tmp_path / "a", **files, config__json={"model_type": "llama"}, tokenizer_config__json={
        "tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}})
    assert_as_transformers(at, ["an image_token", "a<image>b"], special=False)


def test_added_tokens_json_beside_tokenizer_model(tmp_path, llama_model):
    at = folder(tmp_path / "a", tokenizer__model=llama_model, config__json={"model_type": "llama"},
                tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True,
                                        "add_eos_token": True}, added_tokens__json={"<|im_start|>": 32000})
    texts = [text for text in LLAMA_TEXTS if "  " not in text.replace("▁", " ")]
    ours, _ = assert_as_transformers(at, texts)
    assert ours.decode([32000]) == "<|im_start|>"


def test_mistral_runs_its_tokenizer_json_whatever_class_is_named(tmp_path, llama_pieces):
    at = folder(tmp_path / "a", tokenizer__json=llama_spec(*llama_pieces, False, PREPEND),
                config__json={"model_type": "mistral"}, tokenizer_config__json={
                    "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False})
    assert_as_transformers(at, LLAMA_TEXTS, decoded=False)


# -------------------------------------------------------------------------------------------------- special tokens' ids


def test_eos_is_the_tokenizers_and_generation_config_says_what_else_ends_a_text(tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    at = folder(tmp_path / "a", tokenizer__json=trained("llama3"), tokenizer_config__json=config,
                config__json={"model_type": "llama", "eos_token_id": 5},
                generation_config__json={"eos_token_id": [7, 9], "pad_token_id": 3})
    ours, theirs = assert_as_transformers(at, ["a"])
    assert ours.eos_ids == [theirs.eos_token_id, 7, 9] and ours.pad_id == 3
    (at / "generation_config.json").unlink()
    assert tokenizer.from_pretrained(at).eos_ids == [theirs.eos_token_id, 5]
    (at / "tokenizer_config.json").unlink()
    assert tokenizer.from_pretrained(at).eos_ids == [5]


def test_a_penalty_that_answers_are_written_without_is_said(tmp_path, capsys):
    """transformers applies it in greedy search too; sampling's temperature it does not."""
    words = {"vocab__txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nab\n", "config__json": {"model_type": "bert"}}
    tokenizer.from_pretrained(folder(tmp_path / "a", **words, generation_config__json={
        "repetition_penalty": 1.05, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "temperature": 0.7}))
    tokenizer.from_pretrained(folder(tmp_path / "b", **words))
    assert capsys.readouterr().err == (f"{tmp_path / 'a'}: its generation_config.json has repetition_penalty 1.05; "
                                       "answers here are written without it\n")


HONOURED = {"bos_token_id", "eos_token_id", "pad_token_id"}
NEUTRAL = {  # to greedy and beam search: the caller's; sampling's; how it is computed; an assistant's; what is returned
    "max_length": 7, "max_new_tokens": 3, "do_sample": True,
    "temperature": 0.5, "top_k": 2, "top_p": 0.5, "min_p": 0.2, "top_h": 0.4, "typical_p": 0.5, "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1, "renormalize_logits": True, "remove_invalid_values": True, "use_cache": False,
    "cache_implementation": "static", "cache_config": {}, "max_cache_len": 40, "prefill_chunk_size": 2,
    "compile_config": None, "disable_compile": True, "low_memory": False, "continuous_batching_config": None,
    "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9, "max_matching_ngram_size": 3, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "assistant_ensemble_weight": 0.5, "speculation_type": None, "decoder_start_token_id": 3,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "transformers_version": "4.0.0", "_from_model_config": True}


def test_each_key_of_generation_config_is_honoured_or_neutral_or_named():
    theirs = vars(transformers.GenerationConfig()).keys()
    assert set(tokenizer.PLAIN_SEARCH) | HONOURED | NEUTRAL.keys() == theirs
    assert len(tokenizer.PLAIN_SEARCH) + len(HONOURED) + len(NEUTRAL) == len(theirs)  # each in one place


@pytest.mark.parametrize("keys", [*NEUTRAL, "off"])
def test_what_is_neutral_or_off_leaves_greedy_and_beam_search_as_they_are(keys):
    theirs, ids = theirs_of("llama"), words(2, 5)
    said = {k: v for k, v in tokenizer.PLAIN_SEARCH.items() if v not in ([], {})} if keys == "off" else {
        keys: NEUTRAL[keys]}
    for how in ({"num_beams": 1}, {"num_beams": 4}):
        expected = generated(theirs, ids, max_new_tokens=12, **how)
        theirs.generation_config = transformers.GenerationConfig(**{"pad_token_id": 2, **said})
        found = theirs.generate(ids, max_new_tokens=12, do_sample=False, **how)
        assert torch.equal(found if torch.is_tensor(found) else found.sequences, expected)
