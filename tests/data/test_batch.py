"""sibo_lab/data/batch.py: what the model sees of an example, which tokens carry the loss, and how rows are batched."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sibo_lab.data import batch, readers, tasks

REAL = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)
WORD_PROBLEMS = tasks.task("word-problems")


# ----------------------------------------------------------------------------------------------------- toy tokenizers
class Letters:
    """One id a character after BOS (0): every prefix of a text has a prefix of its ids."""
    eos_id = 1

    def encode(self, text, pair=None):
        return [0] + [2 + ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i - 2) for i in ids if i > 1)


class Merging(Letters):
    """As Letters without BOS, but runs of white space are one token, as in byte-level BPE: prefixes are not kept."""
    def encode(self, text, pair=None):
        return [2 + ord(run[0]) + (len(run) - 1) * 2_000_000 for run in re.findall(r"\n+|[^\n]", text)]

    def decode(self, ids):
        return "".join(chr((i - 2) % 2_000_000) * ((i - 2) // 2_000_000 + 1) for i in ids if i > 1)


class Words:
    """BERT-like: [CLS] 101, a word is its length, [SEP] 102."""
    def encode(self, text, pair=None):
        ids = [101] + [len(word) for word in text.split()] + [102]
        return ids if pair is None else ids + [len(word) for word in pair.split()] + [102]


# ---------------------------------------------------------------------------------------------- prompt and label mask
def test_the_prompt_is_the_plain_alpaca_form():
    assert batch.prompt("Add 2 and 3.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 2 and 3.\n\n### Response:\n")


def test_the_papers_prompt_is_the_official_codes_string_with_its_indentation_and_its_linters_comment():
    instruction = "Add {2} and 3."
    official = f"""Below is an instruction that describes a task. Write a response that appropriately completes the \
request.  # noqa: E501

                ### Instruction:
                {instruction}
                {""}
                ### Response:
                """
    assert batch.prompt(instruction, "paper") == official


def check_encoding(tokenizer, example, cutoff=10_000, protocol="clean"):
    row = batch.encode(example, tokenizer, cutoff, protocol=protocol)
    given = tokenizer.encode(batch.prompt(example.instruction, protocol))
    assert row.ids[:len(given)] == given and row.labels[:len(given)] == [-100] * len(given)
    assert row.labels[len(given):] == row.ids[len(given):]
    assert row.ids[-1] == tokenizer.eos_id and not row.cut
    assert tokenizer.decode(row.ids[:-1]) == tokenizer.decode(tokenizer.encode(
        batch.prompt(example.instruction, protocol) + example.output))


@given(TEXT, TEXT)
@settings(max_examples=100, deadline=None)
def test_the_loss_is_on_the_output_and_its_eos_and_the_prompt_is_what_generation_sees(instruction, output):
    for tokenizer in (Letters(), Merging()):
        check_encoding(tokenizer, tasks.Example(instruction, output))


def test_an_output_that_begins_with_a_line_feed_leaves_the_prompts_tokens_alone():
    tokenizer = Merging()       # it merges the prompt's last line feed with the output's
    given = tokenizer.encode(batch.prompt("q"))
    assert tokenizer.encode(batch.prompt("q") + "\nA")[:len(given)] != given
    check_encoding(tokenizer, tasks.Example("q", "\nA"))


def test_an_output_that_cannot_be_spelled_after_the_prompt_is_an_error():
    class Spaced(Merging):      # SentencePiece's space before every text, together with a merge across the border
        def encode(self, text, pair=None):
            return super().encode(" " + text if text else "")
    with pytest.raises(ValueError, match="cannot continue the prompt with the output"):
        batch.encode(tasks.Example("q", "\nA"), Spaced(), 1000)


@given(TEXT, TEXT, st.integers(-2, 3) | st.integers(0, 150), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_cutoff_cuts_from_the_right_says_so_and_leaves_no_eos(instruction, output, missing, train_on_inputs):
    tokenizer, example = Letters(), tasks.Example(instruction, output)
    whole = batch.encode(example, tokenizer, 10_000, train_on_inputs)
    cutoff = len(whole.ids) - missing
    row = batch.encode(example, tokenizer, cutoff, train_on_inputs)
    assert row.ids == whole.ids[:cutoff] and row.labels == whole.labels[:cutoff]
    assert row.cut == (len(whole.ids) > cutoff) == (tokenizer.eos_id not in row.ids)


def test_trained_on_inputs_the_labels_are_the_ids():
    row = batch.encode(tasks.Example("q", "a"), Letters(), 1000, train_on_inputs=True)
    assert row.labels == row.ids


# ------------------------------------------------------------------------------------------------------ GLUE encoding
WORDS = st.lists(st.text("abc", min_size=1, max_size=9), max_size=20).map(" ".join)


@given(WORDS, st.none() | WORDS, st.integers(3, 50))
@settings(max_examples=100, deadline=None)
def test_a_pair_fits_the_cutoff_and_the_longer_sentence_gives_way(text, pair, cutoff):
    row = batch.encode_sentence(tasks.Sentence(text, pair, 1), Words(), cutoff)
    whole = Words().encode(text, pair)
    assert row.cut == (len(whole) > cutoff) and len(row.ids) == len(row.types) == min(cutoff, len(whole))
    assert row.cut or row.ids == whole
    if pair is None:
        return
    end = row.ids.index(102)                            # no word is 102 letters long
    assert row.types == [0] * (end + 1) + [1] * (len(row.ids) - end - 1)
    kept = end - 1, len(row.ids) - end - 2
    lost = len(text.split()) - kept[0], len(pair.split()) - kept[1]
    assert row.ids[1:end] == [len(word) for word in text.split()][:kept[0]]
    assert not lost[0] or kept[0] >= kept[1] - 1        # a sentence that lost its end is no shorter than the other
    assert not lost[1] or kept[1] >= kept[0] - 1


def test_glue_asks_for_a_bert_tokenizer():
    with pytest.raises(ValueError, match="expected a BERT's tokenizer, with two special tokens on a text, got 1"):
        batch.encode_sentence(tasks.Sentence("a", None, 1), Letters(), 10)


# ------------------------------------------------------------------------------------------------------------ batches
IDS = st.lists(st.integers(0, 99), min_size=1, max_size=12)


@given(st.lists(IDS, min_size=1, max_size=6), st.sampled_from(["left", "right"]))
@settings(max_examples=50, deadline=None)
def test_a_batch_gives_every_row_back_where_the_mask_is_one(lists, side):
    tensors = batch.collate([batch.Row(ids, ids) for ids in lists], pad_id=7, side=side)
    for ids, row, mask, labels in zip(lists, tensors["input_ids"], tensors["attention_mask"], tensors["labels"],
                                      strict=True):
        assert row[mask == 1].tolist() == labels[mask == 1].tolist() == ids
        assert (row[mask == 0] == 7).all() and (labels[mask == 0] == -100).all()
        assert mask[0 if side == "right" else -1] == 1 and mask.sum() == len(ids)
        assert (mask.diff() <= 0).all() if side == "right" else (mask.diff() >= 0).all()


def test_glue_has_one_label_per_row_and_prompts_have_none():
    rows = [batch.Row([1, 2], 1, types=[0, 1]), batch.Row([1], 0, types=[0])]
    tensors = batch.collate(rows, 0)
    assert tensors["labels"].tolist() == [1, 0] and tensors["labels"].dtype == torch.int64
    assert tensors["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    scores = batch.collate([dataclasses.replace(row, labels=2.5) for row in rows], 0)["labels"]
    assert scores.dtype == torch.float32 and scores.shape == (2,)
    assert set(batch.collate([batch.Row([1, 2])], 0, side="left")) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="padding side: .*got 'middle'"):
        batch.collate(rows, 0, side="middle")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=50), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_epoch_visits_every_index_once_and_the_seed_decides_the_order(lengths, batch_size, seed):
    count = len(lengths)
    steps = -(-count // batch_size)
    first = list(itertools.islice(batch.batches(lengths, batch_size, seed), 2 * steps))
    for epoch in (first[:steps], first[steps:]):
        assert sorted(itertools.chain(*epoch)) == list(range(count))
        assert sorted(map(len, epoch))[1:] == [batch_size] * (steps - 1)
    assert first == list(itertools.islice(batch.batches(lengths, batch_size, seed), 2 * steps))


def test_epochs_and_seeds_differ_in_order():
    same = [1] * 100
    order = list(itertools.islice(batch.batches(same, 100, 0), 2))
    assert order[0] != order[1] and order[0] != next(batch.batches(same, 100, 1)) and order[0] != list(range(100))


def test_batches_hold_rows_of_like_length():
    lengths = [i * 37 % 101 for i in range(160)]
    padding = [sum(max(lengths[i] for i in some) - lengths[j] for j in some)
               for some in itertools.islice(batch.batches(lengths, 10, 0), 16)]
    assert sum(padding) < 16 * 10 * 6  # shuffled alone it is 45 a row


# ------------------------------------------------------------------------------------------------ the real tokenizers
class SentencePiece:
    def __init__(self, path):
        import sentencepiece
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.eos_id = self.model.eos_id()

    def encode(self, text, pair=None):
        return [self.model.bos_id()] + self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(ids)


class ByteLevel:
    eos_id = 50256

    def __init__(self, folder):
        import tokenizers
        self.model = tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))

    def encode(self, text, pair=None):
        return self.model.encode(text).ids

    def decode(self, ids):
        return self.model.decode(ids)


@pytest.fixture(scope="module")
def libraries():
    return SentencePiece(REAL / "tokenizers/llama/tokenizer.model"), ByteLevel(REAL / "tokenizers/gpt2")


@real
@given(TEXT, TEXT | st.sampled_from(["\nA: 7", " 7", "\n\n", "  7", "7 \n"]))
@settings(max_examples=150, deadline=None)
def test_prompt_tokens_begin_the_training_tokens_for_llamas_and_gpt2s_tokenizer(libraries, instruction, output):
    for tokenizer in libraries:
        check_encoding(tokenizer, tasks.Example(instruction, output))
        check_encoding(tokenizer, tasks.Example(instruction, output), protocol="paper")


@real
@pytest.mark.parametrize("protocol", ["clean", "paper"])  # the paper's ends in 16 spaces, one of which would merge
def test_sentencepiece_puts_no_space_between_prompt_and_output(libraries, protocol):
    llama = libraries[0]
    row = batch.encode(tasks.Example("q", "Tom has 7."), llama, 1000, protocol=protocol)
    assert llama.decode(row.ids[:-1]) == batch.prompt("q", protocol) + "Tom has 7."


@real
def test_the_projects_own_llama_tokenizer_keeps_the_prompts_tokens_too(tmp_path):
    from sibo_lab.backbone.tokenizer import from_pretrained

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.model").write_bytes((REAL / "tokenizers/llama/tokenizer.model").read_bytes())
    tokenizer = from_pretrained(tmp_path)
    for example in (*readers.load(WORD_PROBLEMS, "train", None, 20), tasks.Example("q", "\nA: 7"),
                    tasks.Example(" q ", " 7")):
        check_encoding(tokenizer, example)


def test_the_built_in_problems_fit_the_default_backbones_cutoff_and_new_tokens():
    from sibo_lab.backbone.tokenizer import from_pretrained

    tokenizer = from_pretrained("smollm2-135m")
    for problem in readers.load(WORD_PROBLEMS, "train", None, 500) + readers.load(WORD_PROBLEMS, "test", None, 500):
        check_encoding(tokenizer, problem, cutoff=256)
        check_encoding(tokenizer, problem, cutoff=256, protocol="paper")
        assert len(tokenizer.encode(problem.output)) < WORD_PROBLEMS.max_new_tokens


def test_a_sentence_pair_is_encoded_as_the_bert_tokenizer_does():
    from sibo_lab.backbone.tokenizer import from_pretrained

    tokenizer = from_pretrained("minilm")
    for text, pair in [("Tom has 7.", None), ("Tom has 7.", "He doesn't!"), ("", "x"), ("naïve 学", "")]:
        assert batch.encode_sentence(tasks.Sentence(text, pair, 0), tokenizer, 64).ids == tokenizer.encode(text, pair)
