"""sibo_lab/backbone/chat_template.py against transformers' apply_chat_template: text, ids, and who says what."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sibo_lab.backbone import chat_template, tokenizer
from sibo_lab.data import batch, tasks

TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # the published ones, and with marks
SPECIAL = ("<s> </s> <unk> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> "
           "<end_of_turn> <|user|> <|assistant|> <|system|> <|end|> <|endoftext|>").split()
LOOP = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
TEMPLATES = {name: (TRL / f"{name}.jinja").read_text("utf-8") for name in (
    "llama3", "llama3_2", "qwen2_5", "qwen3", "gemma", "phi3")} | {
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == "
    "0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + "
    "message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"}
ASKED = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
MARKED = ("{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] "
          "+ eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}")
NO_SYSTEM, TRIM = {"mistral", "gemma"}, {"llama3", "llama3_2", "gemma"}
DATED = {"llama3_2": {"date_string": "26 Jul 2024"}}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1\ufdd2"), min_size=1, max_size=12).filter(
    str.strip)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that writes a byte-level BPE, trained on a few words, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator([*TEMPLATES.values(), *["of the"] * 99], trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    # a text of its own begins with <s>; one that a template wrote has its own
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = {}

    def write(template):
        if template not in made:
            path = made[template] = tmp_path_factory.mktemp("chat")
            theirs = PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>",
                                             unk_token="<unk>")
            theirs.chat_template = template
            theirs.save_pretrained(path)
        return made[template]

    return write


@pytest.fixture(scope="module")
def twins(folder):
    """(transformers' tokenizer, our Chat) of a template."""
    made = {}

    def of(template):
        if template not in made:
            path = folder(template)
            made[template] = (PreTrainedTokenizerFast.from_pretrained(path),
                              chat_template.Chat(path, tokenizer.read(path)))
        return made[template]

    return of


def conversation(pairs, system=None):
    turns = [] if system is None else [("system", system)]
    return turns + [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def encoded(chat, turns, **options):
    return batch.encode(tasks.Chat.of(turns), chat, 10_000, protocol="chat", **options)


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=TURNS, system=st.none() | TEXT)
@settings(max_examples=25, deadline=None)
def test_a_conversation_and_its_prompt_are_written_as_transformers_writes_them(twins, name, pairs, system):
    theirs, ours = twins(TEMPLATES[name])
    turns = conversation(pairs, None if name in NO_SYSTEM else system)
    expected = theirs.apply_chat_template(messages(turns), tokenize=False, **DATED.get(name, {}))
    assert "".join(text for text, _ in ours.pieces(turns)) == expected
    assert ours.prompt(turns[:-1]) == theirs.apply_chat_template(
        messages(turns[:-1]), tokenize=False, add_generation_prompt=True, **DATED.get(name, {}))


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=TURNS)
@settings(max_examples=25, deadline=None)
def test_the_ids_are_transformers_where_nothing_merges_across_a_turns_border(twins, name, pairs):
    theirs, ours = twins(TEMPLATES[name])
    turns = conversation([(asked.strip(), said.strip()) for asked, said in pairs])
    ids = theirs.apply_chat_template(messages(turns), return_dict=False, **DATED.get(name, {}))
    pieces = [i for text, _ in ours.pieces(turns) for i in theirs.encode(text, add_special_tokens=False)]
    assume(pieces == ids)
    assert encoded(ours, turns).ids == ids == encoded(ours, turns, train_on_inputs=True).labels


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=TURNS)
@settings(max_examples=25, deadline=None)
def test_the_loss_is_on_what_the_assistant_says_and_what_ends_it_and_on_nothing_else(twins, name, pairs):
    _, ours = twins(TEMPLATES[name])
    turns = conversation(pairs)
    row = encoded(ours, turns)
    assert all(label in (-100, i) for label, i in zip(row.labels, row.ids, strict=True))
    labelled = [i for i in row.labels if i != -100]
    said = [text.strip() if name in TRIM else text for _, text in pairs]
    if name == "qwen3":
        said[-1] = f"<think>\n\n</think>\n\n{said[-1].lstrip(chr(10))}"  # only the last turn, after its prompt
        said[:-1] = [text.lstrip("\n") for text in said[:-1]]
    if "<" not in "".join(said).replace("<think>", ""):  # no special token in the texts
        ends = [i for i, token in enumerate(labelled) if token == ours.eos_id]
        parts = [labelled[start:end] for start, end in zip([0, *(i + 1 for i in ends)], ends, strict=False)]
        assert [ours.decode(part) for part in parts] == said
        assert labelled[-1] == ours.eos_id and len(ends) == len(pairs)
    row, given = encoded(ours, turns[:2]), ours.encode(ours.prompt(turns[:1]))
    assert row.ids[:len(given)] == given and row.labels[len(given) - 1] == -100  # as at generation


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3"])
@given(pairs=st.lists(st.tuples(*[st.text("abc é.\n ", min_size=1, max_size=12).map(str.strip).filter(len)] * 2),
                      min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_a_template_that_marks_the_assistants_turns_is_masked_as_transformers_masks_it(twins, name, pairs):
    theirs, ours = twins((TRL / f"{name}_training.jinja").read_text("utf-8"))
    turns, row = conversation(pairs), encoded(ours, conversation(pairs))
    expected = theirs.apply_chat_template(messages(turns), return_dict=True, return_assistant_tokens_mask=True)
    assert row.ids == expected["input_ids"]
    assert [int(label != -100) for label in row.labels] == expected["assistant_masks"]


def test_an_answer_ends_where_the_template_ends_it_or_where_the_tokenizer_does(twins):
    theirs, ours = twins(TEMPLATES["gemma"])
    assert ours.eos_ids == theirs.convert_tokens_to_ids(["<end_of_turn>", "</s>"]) and ours.eos_id == ours.eos_ids[0]


def test_an_answer_is_not_merged_with_the_blank_that_ends_its_prompt(twins):
    theirs, ours = twins("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
                         "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    turns = conversation([("q", "the end")])
    row, given = encoded(ours, turns), ours.encode(ours.prompt(turns[:1]))
    assert theirs.apply_chat_template(messages(turns), return_dict=False)[len(given) - 1] != given[-1]  # "Ġthe"
    assert row.ids[:len(given)] == given and ours.decode([i for i in row.labels if i != -100]) == "the end"


REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "llama" / "tokenizer.model"


@pytest.mark.skipif(not REAL.is_file(), reason="LLaMA's vocabulary is not here")
@pytest.mark.parametrize("legacy", [True, False])
def test_llamas_sentencepiece_finds_the_special_tokens_that_a_template_writes(tmp_path, legacy):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(REAL.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "legacy": legacy, "chat_template": TEMPLATES["mistral"]}))
    chat = chat_template.Chat(tmp_path, tokenizer.read(tmp_path))
    turns = conversation([("Hi", "Ho ho."), ("1", "2")])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    row = encoded(chat, turns)
    assert row.ids == theirs.apply_chat_template(messages(turns), return_dict=False)
    assert row.ids.count(1) == 1 and [i for i in row.labels if i in (1, 2)] == [2, 2]
    assert theirs.decode([i for i in row.labels if i != -100]).replace(" ", "") == "Hoho.</s>2</s>"


# ------------------------------------------------------------------------------------------------------ where it stands
CHATML = TEMPLATES["smollm2"]


def test_chat_template_jinja_goes_before_the_one_in_tokenizer_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert chat_template.read(tmp_path)[0] == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert chat_template.read(tmp_path)[0] == "new"


def test_of_several_named_templates_the_default_one_is_read(tmp_path):
    some = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": some}))
    assert chat_template.read(tmp_path)[0] == "b"


@pytest.mark.parametrize("config", [{}, {"chat_template": None}, {"chat_template": ""}, {"chat_template": 5},
                                    {"chat_template": [{"name": "rag", "template": "a"}]}])
def test_a_backbone_without_a_template_is_refused_in_one_line(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a chat template .* use --protocol clean") as error:
        chat_template.read(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_gguf_brings_its_own():
    from sibo_lab.backbone import locate

    path = locate.locate("smollm2-135m")
    chat = chat_template.Chat(path, tokenizer.read(path))
    assert chat.prompt([("user", "Hi")]).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.end == "<|im_end|>" and encoded(chat, conversation([("Hi", "Ho")])).ids[-2] == chat.eos_id


def test_a_template_that_writes_todays_date_writes_a_fixed_one_and_says_so(folder, capsys):
    path = folder("{{ strftime_now('%d %b %Y') }}" + LOOP + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    chat = chat_template.Chat(path, tokenizer.read(path))
    assert chat.prompt([("user", "a")]) == "26 Jul 2024<|user|>a</s><|assistant|>"
    assert "writes today's date: fixed at 26 Jul 2024" in capsys.readouterr().err


def test_a_template_is_given_the_tokens_that_the_tokenizer_names_not_those_of_the_model(folder, tmp_path):
    source = folder("{{ bos_token }}|{{ pad_token }}|{{ eos_token }}" + LOOP + ASKED)
    path = shutil.copytree(source, tmp_path / "a")
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"bos_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2", "bos_token_id": 0, "pad_token_id": 1}))
    chat, theirs = (chat_template.Chat(path, tokenizer.read(path)), PreTrainedTokenizerFast.from_pretrained(path))
    expected = theirs.apply_chat_template(messages([("user", "a")]), tokenize=False, add_generation_prompt=True)
    assert chat.prompt([("user", "a")]) == expected == "||</s><|user|>a</s><|assistant|>"


def test_a_template_may_count_format_and_repeat(folder):
    path = folder("{{ 2 ** 3 + 1 }}{{ '-' * 3 }}{{ 'Until: 2023 %02d' % 5 }}{{ '{}: 2023 {:>3}'.format(1, 2) }}"
                  "{{ 'a-b' | replace('-', '+') | center(5) }}" + LOOP + ASKED)
    chat = chat_template.Chat(path, tokenizer.read(path))
    assert chat.prompt([("user", "a")]) == "9---Until: 2023 051: 2023   2 a+b <|user|>a</s><|assistant|>"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("template", "says"), [
    (LOOP, "expected it to say where the assistant begins"),
    ("{% for m in messages if m['role'] != 'system' %}" + LOOP.partition("%}")[2] + ASKED,
     "leaves out, or rewrites, a part of the turn 'Be brief.'"),
    (LOOP.replace("m['content']", "m['content'].split('</think>')[-1]") + ASKED,
     "leaves out, or rewrites, a part of the turn '<think>hm</think>one'"),
    (LOOP.replace("m['content']", "(m['content'] if loop.last else '')") + ASKED, "leaves out"),
    (LOOP.replace("eos_token", "(eos_token if m['content'] != 'two' else '')") + ASKED, "no end of the turn 'two'"),
    (LOOP.replace("eos_token", "''") + ASKED, "shows no end of the turn '<think>hm</think>one'"),
    ("{{ messages | length }}" + LOOP + ASKED, "gives something else to be answered than what it writes before"),
    ("{{ raise_exception('No system role') }}", r"refuses a conversation of user, assistant \(No system role\)"),
    ("{{ messages.__class__.__mro__ }}", r"refuses a conversation of .* \(.*unsafe"),
    ("{% for i in range(999999999) %}{% endfor %}", "refuses a conversation of"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "at most 1000000 steps"),
    ("{{ 'a' * 10000000000 }}", r"at most 100000000 characters or items, got \*"),
    ("{{ 10 ** 10 ** 10 }}", r"got \*\*"),
    ("{{ '%9999999999d' % 1 }}", "got %"),
    ("{{ '%9999999999d' | format(1) }}", "got format"),
    ("{{ '{:>9999999999}'.format(1) }}", "got format"),
    ("{{ 'a' | center(10000000000) }}", "got center"),
    ("{{ 'a'.center(10000000000) }}", "got center"),
    ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", r"got \+"),
    ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "got a text"),
    ("{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n }}{% endmacro %}{{ f(19) }}", "at most 1000000 steps"),
    (LOOP.replace("{{", "{% generation %}{% endgeneration %}{{") + ASKED, "expected {% generation %} around what"),
    ("{% generation %}" + LOOP + "{% endgeneration %}" + ASKED, "around nothing that others say"),
    ("{% generation %}a{% generation %}b{% endgeneration %}" + LOOP + "{% endgeneration %}", "got it elsewhere"),
    (MARKED + ASKED.replace("|>", "|><think></think>"), "gives something else to be answered than what it writes"),
    (MARKED, "expected {% generation %} where a prompt ends"),
    (MARKED.replace(" + eos_token }}{% endg", " }}{% endg").replace("tion %}{% else", "tion %}{{ eos_token }}{% else")
     + ASKED, "expected what the assistant says to end in a token that ends"),
    (LOOP.replace("eos_token", "'!'") + ASKED, "expected what the assistant says to end in a token that ends"),
    ("{{ messages.append(1) }}", "refuses a conversation of"),
    ("{{ 1 / 0 }}", "refuses a conversation of"),
    ("{% for m in messages %}", "not a Jinja template"),
])
def test_what_a_template_cannot_show_is_refused_in_one_line(folder, template, says):
    path = folder(template)
    with pytest.raises(ValueError, match=says) as error:
        chat_template.Chat(path, tokenizer.read(path)).pieces(
            conversation([("1?", "<think>hm</think>one"), ("2?", "two")], "Be brief."))
    assert "\n" not in str(error.value) and "chat_template" in str(error.value)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_turn_that_is_left_out_is_missed_however_short_it_is(folder, role):
    path = folder("{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] != '" + role + "' %}{{ m['content'] }}"
                  "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    chat = chat_template.Chat(path, tokenizer.read(path))
    with pytest.raises(ValueError, match="leaves out, or rewrites, a part of the turn 's'"):
        chat.pieces(conversation([("s", "s")], "s"))
    if role != "assistant":
        with pytest.raises(ValueError, match="leaves out, or rewrites, a part of the turn 's'"):
            chat.prompt([("system", "s"), ("user", "s")])


def test_reasoning_that_qwen3_drops_from_earlier_turns_is_refused_and_kept_in_the_last(twins):
    _, ours = twins(TEMPLATES["qwen3"])
    thought = "<think>\nhm\n</think>\n\none"
    said = [text for text, loss in ours.pieces(conversation([("1?", thought)])) if loss]
    assert said == [f"{thought}<|im_end|>"]
    with pytest.raises(ValueError, match="leaves out, or rewrites, a part of the turn '<think>"):
        ours.pieces(conversation([("1?", thought), ("2?", "two")]))
    assert "hm" not in ours.prompt(conversation([("1?", thought)]) + [("user", "2?")])  # as Qwen3 is asked
