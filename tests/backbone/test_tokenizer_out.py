"""tokenizer_out.py: what is written of a .gguf file's tokenizer has its ids and texts in transformers, and here."""

import json
import random

import gguf
import pytest
import sentencepiece
import transformers
from twins import refused

from sibo_lab.backbone import locate, tokenizer, tokenizer_out

ALPHABET = "aabceehtnois  \t\n.,'’-_/0123456789ÄßéÉ́ñ中文字日本ﬁ🙂👩‍🚀\u200b\u00a0\u2003\x00\x1f\ufffd▁<>|[]"


def texts(n=300, seed=0):
    draw = random.Random(seed)
    yield from ("", " ", "  a", "a  ", "Hello world", "it's 12345 o'clock", "\n\n x", "aaaa aaaaaaa")
    for _ in range(n):
        chars = draw.choices(ALPHABET, k=draw.randint(1, 30)) if draw.random() < 0.7 else [
            chr(draw.choice([draw.randrange(0x20, 0xD800), draw.randrange(0xE000, 0x30000)])) for _ in range(8)]
        yield "".join(chars)


def write(folder, source, model_type="llama"):
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_out.from_gguf(source).items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return tokenizer.from_pretrained(source), transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(ours, theirs, folder):
    again = tokenizer.from_pretrained(folder)
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids == again.encode(text), text
        assert ours.encode(text, "b c") == theirs(text, "b c")["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == again.decode(ids), text
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id") == getattr(again, f"{role}_id")


def test_the_default_backbones_tokenizer_and_template_are_the_same_in_transformers(tmp_path):
    source = locate.locate("smollm2-135m")
    ours, theirs = write(tmp_path / "hf", source)
    assert_same(ours, theirs, tmp_path / "hf")
    turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    written = theirs.apply_chat_template(turns, tokenize=False)
    assert written.startswith("<|im_start|>system\nYou are") and written.endswith("assistant\n4<|im_end|>\n")
    assert theirs.apply_chat_template(turns)["input_ids"] == ours.encode(written)
    assert ours.encode("a<|im_end|>b<|im_start|>") == theirs("a<|im_end|>b<|im_start|>")["input_ids"]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def a_gguf(file, tokens, kinds, model, scores=None, merges=None, pre=None, **more):
    w = gguf.GGUFWriter(file, "llama")
    w.add_context_length(2048)
    w.add_tokenizer_model(model)
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    if scores is not None:
        w.add_token_scores(scores)
    if merges is not None:
        w.add_token_merges(merges)
    if pre:
        w.add_tokenizer_pre(pre)
    for key, value in more.items():
        (w.add_bool if isinstance(value, bool) else w.add_uint32)(f"tokenizer.ggml.{key}", value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


@pytest.mark.parametrize(("pre", "model_type"), [
    ("gpt-2", "llama"), ("smollm", "llama"), ("llama-bpe", "llama"), ("qwen2", "qwen2"), ("qwen2", "qwen3"),
    ("llama-bpe", "smollm3"), ("tekken", "mistral"), ("smaug-bpe", "smollm3")])
def test_a_byte_level_vocabulary_of_each_kind_is_the_same_in_transformers(pre, model_type, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator([*texts(200, 1), "it's 12345 o'clock, the cat's hat\r\n"] * 3, trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(t.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "Ġwholly", "<|begin|>", "<|eot|>", "<think>"]
    last = len(tokens) - 1
    source = a_gguf(tmp_path / "m.gguf", tokens, [*[1] * (last - 2), 3, 3, 4], "gpt2", None,
                    [" ".join(pair) for pair in model["merges"]], pre, bos_token_id=last - 2, eos_token_id=last - 1)
    ours, theirs = write(tmp_path / "hf", source, model_type)
    assert_same(ours, theirs, tmp_path / "hf")
    spelled = "a <think> b<|eot|> wholly\n<|begin|>"
    assert ours.encode(spelled) == theirs(spelled)["input_ids"]
    assert ours.decode(ours.encode(spelled)) == theirs.decode(ours.encode(spelled), skip_special_tokens=True)


def llama_gguf(folder, pieces=(), **more):
    """A vocabulary that SentencePiece trained, as llama.cpp's converter writes it."""
    if not (model := folder / "t.model").exists():
        lines = [" ".join(random.Random(i).choices("the cat sat on a mat with 12 hats and ñandú 中文".split(), k=9))
                 for i in range(200)]
        (folder / "lines.txt").write_text("\n".join(lines), "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "lines.txt"), model_prefix=str(folder / "t"), model_type="bpe", vocab_size=400,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False, minloglevel=2)
    p = sentencepiece.SentencePieceProcessor(str(model))
    tokens = [p.id_to_piece(i) for i in range(len(p))]
    kinds = [2 if p.is_unknown(i) else 3 if p.is_control(i) else 6 if p.is_byte(i) else 1 for i in range(len(p))]
    scores = [p.get_score(i) for i in range(len(p))]
    for each, new in zip((tokens, kinds, scores), zip(*pieces, strict=True) if pieces else ((), (), ()), strict=True):
        each += new
    named = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return a_gguf(folder / "m.gguf", tokens, kinds, "llama", scores, **named | more)


@pytest.mark.parametrize("more", [{}, {"add_bos_token": False, "add_eos_token": True}, {"add_space_prefix": False}],
                         ids=str)
def test_a_llama_vocabulary_is_the_same_in_transformers(more, tmp_path):
    ours, theirs = write(tmp_path / "hf", llama_gguf(tmp_path, **more))
    assert_same(ours, theirs, tmp_path / "hf")
    assert ours.encode("the ñ🙂")[-4:] == list(map(ours.vocab.get, ("<0xF0>", "<0x9F>", "<0x99>", "<0x82>"))) or more


@pytest.mark.parametrize(("piece", "kind", "score", "says"), [
    ("<tag>", 4, 0.0, "user-defined pieces"), ("thecat", 5, -900.0, "unused pieces"),
    ("thecat", 1, -3.0, "pieces of one score"), ("ÿþ", 1, -900.0, "pieces whose characters are none")])
def test_what_tokenizer_json_cannot_say_is_refused(piece, kind, score, says, tmp_path):
    source = llama_gguf(tmp_path, [(piece, kind, score)])
    with refused("m.gguf", says, "bring the tokenizer of the folder"):
        tokenizer_out.from_gguf(source)


def test_a_file_without_a_tokenizer_brings_none(tmp_path):
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    assert tokenizer_out.from_gguf(tmp_path / "m.gguf") == {}
