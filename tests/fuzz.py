"""Files from strangers: mutations of small valid files of every format, read as the project reads them.

    python tests/fuzz.py [FORMAT...] [--inputs 20000]     all formats by default, one line each; exit code 1 on failure
    python tests/fuzz.py FORMAT --repeat FOLDER           reads again what a failure left in FOLDER

The claim: each input is accepted, and then works, or ends in a ValueError or OSError of one line that names the file;
no other exception, no crash, nothing that takes over 2 s of CPU time or over 1 GiB of memory. Each format runs in
a process of its own, which a hang or a crash ends; what was read then stays in the folder that is printed.
Mutations of the structure (a JSON node becomes something else, a header's number huge, a pickle inside an archive that
is whole) find more than those of the bytes; the n-th input of a format is always the same. In the suite (test_fuzz.py)
hypothesis draws instead of a seed."""

import argparse
import contextlib
import copy
import gzip
import importlib.util
import io
import json
import math
import multiprocessing
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent.parent))

import model
import sibo
from sibo_lab import export, files
from sibo_lab.backbone import chat_template, gguf, subwords, tokenizer, tokenizer_out
from sibo_lab.data import download, readers, tasks
from sibo_lab.evaluation import answers

MOST_SECONDS, MOST_BYTES = 2.0, 1 << 30

# ---------------------------------------------------------------------------------------------------------- mutations

NUMBERS = (0, 1, -1, 2, 7, 255, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def bytes_of(draw: Random, valid: bytes) -> bytes:
    """One to three of: a byte flipped, a cut, an insertion, a slice twice or gone, a binary or written number huge."""
    spoiled = bytearray(valid)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randint(0, max(len(spoiled) - 1, 0))
        match draw.randint(0, 7):
            case 0:
                spoiled[at:at + 1] = bytes([draw.randint(0, 255)])
            case 1:
                del spoiled[at:]
            case 2:
                spoiled[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(12)))
            case 3:
                del spoiled[at:at + draw.randint(1, 64)]
            case 4:
                spoiled[at:at] = spoiled[at:at + draw.randint(1, 64)]
            case 5:
                size = draw.choice([1, 2, 4, 8])
                number = draw.choice(NUMBERS) % (1 << 8 * size)
                spoiled[at:at + size] = number.to_bytes(size, draw.choice(["little", "big"]))
            case 6:
                if digits := list(re.finditer(rb"\d+", spoiled)):
                    found = draw.choice(digits)
                    spoiled[found.start():found.end()] = str(draw.choice(NUMBERS)).encode()
            case 7:
                spoiled[at:at] = draw.choice([
                    b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\r", b"\n", b"\t", b"[" * 100_000, b"9" * 5000, b"x" * 5000,
                    "\u2028".encode(), b"\xed\xa0\x80", b"NaN", b"-", b'"', b"{", b"\\ud800"])
    return bytes(spoiled)


DEEP, LONG = "@deep@", "@long@"  # placeholders for what json.dumps cannot write
HOSTILE = (None, True, False, *NUMBERS, 10**9, 10**12, 10**400, 0.5, 1.5, -0.5, 1e-300, 1e308, float("nan"),
           float("inf"), "", "a", "0", "Ġ", "▁", "../a", "/etc/passwd", "\ud800", "\0", "x" * 5000, "A", [], [[]], [0],
           ["a", "a"], [None], [0] * 1000, {}, {"a": None}, {"type": "Sequence"}, {"content": "a"}, DEEP, LONG)


def nested(depth: int) -> object:
    value = None
    for _ in range(depth):
        value = [value]
    return value


def json_of(draw: Random, valid: object, depth: int = 12) -> object:
    """One to three times: a node becomes something hostile or another node's copy, goes, is renamed, or is repeated."""
    spoiled = {"": json.loads(json.dumps(valid))}
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, key = spoiled, ""
        for _ in range(draw.randint(0, depth)):
            if not isinstance(place[key], dict | list) or not place[key]:
                break
            place = place[key]
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        match draw.randint(0, 7):
            case 0 if key != "":
                del place[key]
            case 1 if isinstance(place, dict) and key != "":
                place[draw.choice(["", "a", "type", "b\n", "\ud800", "x" * 5000])] = place.pop(key)
            case 2 if isinstance(place, list):
                few = isinstance(place[key], dict | list)
                place.extend([place[key]] * draw.choice([1, 2] if few else [1, 2, 1000]))
            case 3:
                other = spoiled[""]
                while isinstance(other, dict | list) and other and draw.random() < 0.5:
                    other = draw.choice(list(other.values() if isinstance(other, dict) else other))
                place[key] = json.loads(json.dumps(other))
            case 4 if type(n := place[key]) in (int, float) and abs(n) < 1 << 64:
                place[key] = draw.choice([-n, n + 1, n * 2, n - 1, float(n), str(n)])
            case 5:
                place[key] = nested(draw.choice([3, 100, 400]))
            case _:
                place[key] = copy.deepcopy(draw.choice(HOSTILE))
    return spoiled[""]


def written(found: object) -> bytes:
    text = json.dumps(found).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{LONG}"', "9" * 5000)
    return text.encode()


def json_file(draw: Random, valid: object) -> bytes:
    return written(json_of(draw, valid)) if draw.randrange(3) else bytes_of(draw, json.dumps(valid).encode())


# -------------------------------------------------------------------------------------------------- small valid files

LLAMA = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 16, "head_dim": 4,
         "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "attention_dropout": 0.0, "tie_word_embeddings": False, "rope_theta": 10000.0, "quantization_config": None,
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 16}}
GPTJ = {"model_type": "gptj", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": None,
        "n_positions": 16, "rotary_dim": 4, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
QWEN = LLAMA | {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0,
                "layer_types": ["sliding_attention"], "rope_scaling": None, "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 100.0, "factor": 1.0, "attention_factor": 1.0,
                    "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "no_rope_layers": [0], "no_rope_layer_interval": 4, "sliding_window": None,
                   "use_sliding_window": False, "layer_types": None}
BERT = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "max_position_embeddings": 16, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None, "position_embedding_type": "absolute", "is_decoder": False}


def weights(spec: dict, names: dict | None = None) -> dict[str, torch.Tensor]:
    """Random tensors by Hugging Face's names, for a model of one block."""
    m = model.build(spec)
    theirs = {new.replace("{}", "0"): m.prefix * (names is None and "lm_head" not in old) + old.replace("{}", "0")
              for old, new in m.names.items() if new}
    draw = torch.Generator().manual_seed(0)
    return {theirs[n]: torch.randn(p.shape, generator=draw) * 0.1 for n, p in m.named_parameters()}


def a_gguf(fields: dict, tensors: list) -> bytes:
    """A .gguf file of these fields, of types after Python's, and tensors (name, shape, type, offset), then zeros."""
    def text(value: str) -> bytes:
        encoded = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(encoded)) + encoded

    def field(value: object) -> bytes:
        match value:
            case bool():
                code, body = 7, struct.pack("<?", value)
            case int():
                code, form = (4, "<I") if 0 <= value < 1 << 32 else (10, "<Q") if value >= 0 else (11, "<q")
                body = struct.pack(form, value)
            case float():
                code, body = 12, struct.pack("<d", value)
            case str():
                code, body = 8, text(value)
            case list():
                each = [field(x) for x in value]
                first = each[0][:4] if each else struct.pack("<I", 4)
                code, body = 9, first + struct.pack("<Q", len(value)) + b"".join(x[4:] for x in each)
            case _:
                code, body = 99, b""
        return struct.pack("<I", code) + body

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    out += b"".join(text(key) + field(value) for key, value in fields.items())
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)
    out += bytes(-len(out) % 32)
    return out + bytes(min(max((t[3] + 4 * math.prod(t[1]) for t in tensors), default=0), 1 << 15))


def gguf_parts(family: str = "llama") -> tuple[dict, list]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab"]
    spec = LLAMA | {"model_type": family, "vocab_size": len(pieces), "rope_scaling": None}
    own = {"embedding_length": 8, "attention.head_count": 2, "attention.head_count_kv": 1, "block_count": 1,
           "feed_forward_length": 8, "attention.layer_norm_rms_epsilon": 1e-6, "context_length": 16,
           "rope.freq_base": 10000.0, "attention.key_length": 4, "attention.value_length": 4,
           "rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "expert_count": 0}
    fields = {"general.architecture": family, "general.alignment": 32,
              **{f"{family}.{key}": value for key, value in own.items()},
              "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces,
              "tokenizer.ggml.scores": [float(-i) for i in range(len(pieces))],
              "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5], "tokenizer.ggml.bos_token_id": 1,
              "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True}
    shapes = {re.sub(r"^model\.", "", name): list(t.shape) for name, t in weights(spec).items()}
    tensors, offset = [], 0
    for theirs, ours in gguf.NAMES.items():
        if not (shape := shapes.get(re.sub(r"^model\.", "", ours).replace("{}", "0"))):
            continue  # a bias, or another family's
        tensors.append([theirs.replace("{}", "0"), shape[::-1], 0, offset])
        offset += -(-4 * int(np.prod(shape)) // 32) * 32
    return fields, tensors


def varint(n: int) -> bytes:
    n, out = n % (1 << 64), bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def protobuf(message: list) -> bytes:
    """(field, value) pairs: a number, 4 bytes (a list of one float), text, or a message inside (a list of pairs)."""
    out = b""
    for field, value in message:
        if isinstance(value, int):
            out += varint(field << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(field << 3 | 5) + np.float32(value).tobytes()
        else:
            body = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else protobuf(value)
            out += varint(field << 3 | 2) + varint(len(body)) + body
    return out


def fits_protobuf(message: object) -> bool:
    return isinstance(message, list) and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and 0 < pair[0] < 1 << 29 and
        (isinstance(pair[1], int | float | str) or fits_protobuf(pair[1])) for pair in message)


def sentencepiece_parts() -> list:
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256)),
              ("▁", 1), ("a", 1), ("b", 1), ("▁a", 1), ("ab", 1)]
    listed = [[1, [[1, text], [2, -float(i)], [3, kind]]] for i, (text, kind) in enumerate(pieces)]
    trainer = [[3, 2], [40, 0], [41, 1], [42, 2], [43, -1], [35, 1]]
    return [*listed, [2, trainer], [3, [[1, "identity"], [3, 1], [4, 0], [5, 1]]]]


ADDED = {"id": 5, "content": "<x>", "special": True, "single_word": False, "lstrip": True, "rstrip": True,
         "normalized": False}
WORDPIECE = {
    "added_tokens": [ADDED], "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                                            "strip_accents": None, "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}}], "pair": [
        {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]},
                           "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]}}},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "##b": 4}}}
BYTE_LEVEL = {
    "added_tokens": [ADDED], "normalizer": None, "post_processor": {"type": "ByteLevel"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4}, "merges": ["a b", ["Ġ", "ab"]],
              "dropout": None, "ignore_merges": False}}
SPLIT = BYTE_LEVEL | {  # as Llama 3 and Qwen
    "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": subwords.LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
    "model": BYTE_LEVEL["model"] | {"ignore_merges": True}}
BYTE_TOKENS = {f"<0x{b:02X}>": b + 3 for b in range(256)}
FALLBACK = {
    "added_tokens": [ADDED | {"id": 1, "content": "<s>"}], "post_processor": None,
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {
        "type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": None, "model": {
        "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": ["a b", "▁ ab"],
        "vocab": {"<unk>": 0, "<s>": 1} | BYTE_TOKENS | {"a": 259, "b": 260, "ab": 261, "▁": 262, "▁ab": 263}}}
SETTINGS = {"bos_token": "[CLS]", "eos_token": {"content": "[SEP]"}, "unk_token": "[UNK]", "do_lower_case": True,
            "strip_accents": None, "tokenize_chinese_chars": True, "never_split": None, "add_bos_token": True}
BYTE_SETTINGS = {"bos_token": "a", "eos_token": {"content": "b"}, "add_prefix_space": False, "add_eos_token": True}
TABLE = ["id\tsentence1\tsentence2\tlabel", "1\tA man.\tOne.\tentailment", "2\tNo.\tYes.\tnot_entailment"]


# ------------------------------------------------------------------------------------------------------- the formats


@dataclass(frozen=True)
class Case:
    """A folder of valid files, and how to spoil some of them."""

    files: dict[str, bytes]
    spoilt: dict[str, Callable[[Random], bytes]]


def read_model(folder: Path) -> None:
    for path in [*folder.glob("*.gguf")] or [folder]:
        m = model.from_pretrained(path, num_labels=2 if "bert" in folder.name else None)
        m(torch.tensor([[1, 2, 3]]))


def read_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("*.gguf")] or [folder]:
        t = tokenizer.from_pretrained(path)
        for text in ("a ab\n<x> b", "ab" * 300, "\u4e00 é1"):
            t.decode(t.encode(text, pair="b"))
        t.decode(range(-1, 9))


def read_gguf(folder: Path) -> None:
    read_model(folder)
    read_tokenizer(folder)
    tokenizer_out.from_gguf(folder / "m.gguf")


def blank() -> torch.nn.Module:
    """A LLaMA of zeros."""
    m = model.build(LLAMA | {"rope_scaling": None}).to_empty(device="cpu")
    for p in m.parameters():
        torch.nn.init.zeros_(p)
    return m


def read_adapter(folder: Path) -> None:
    sibo.load(blank(), folder)(torch.tensor([[1, 2, 3]]))


def read_peft(folder: Path) -> None:
    export.from_peft(blank(), folder)(torch.tensor([[1, 2, 3]]))


def read_chat(folder: Path) -> None:
    chat = chat_template.Chat(folder, tokenizer.from_pretrained(folder))
    turns = [("system", "s"), ("user", "ab"), ("assistant", "b a"), ("user", "a"), ("assistant", "ab")]
    for some in (turns, turns[1:3]):
        chat.encode(chat.prompt(some[:-1]) + "".join(text for text, _ in chat.pieces(some)))


def read_data(folder: Path) -> None:
    for task in [*tasks.TASKS.values(), *(tasks.task(str(f)) for f in folder.glob("own.*"))]:
        for split, names in (("train", task.train), ("test", task.test)):
            if names and all((folder / file).is_file() for file in names):
                for row in readers.load(task, split, folder):
                    if isinstance(row, tasks.Example):
                        answers.is_right(task, row.output, row.answer)


def read_zip(folder: Path) -> None:
    for archive, file in (("SST-2.zip", "glue/SST-2/train.tsv"), ("QNLIv2.zip", "glue/QNLI/dev.tsv")):
        if (folder / "glue" / archive).is_file():
            (folder / file).unlink(missing_ok=True)
            download.fetch([file], folder, base="file:///nowhere/")
            assert {p.name for p in folder.rglob("*")} <= {archive, "glue", *Path(file).parts}
            assert {p.name for p in folder.parent.iterdir()} <= {"zip-0", "zip-1"}


def safetensors_file(draw: Random, valid: bytes) -> bytes:
    size = int.from_bytes(valid[:8], "little")
    header, body = valid[8:8 + size], valid[8 + size:]
    match draw.randrange(4):
        case 0:
            return bytes_of(draw, valid)
        case 1:
            header = bytes_of(draw, header)
        case _:
            header = written(json_of(draw, json.loads(header), 4))
    return len(header).to_bytes(8, "little") + header + body


def config_cases() -> list[Case]:
    return [Case({"config.json": written(spec), "model.safetensors": save(weights(spec))},
                 {"config.json": partial(json_file, valid=spec)}) for spec in (LLAMA, GPTJ, BERT, QWEN, SMOLLM3)]


def tokenizer_json_cases() -> list[Case]:
    return [Case({"config.json": b"{}", "tokenizer.json": written(spec)},
                 {"tokenizer.json": partial(json_file, valid=spec)})
            for spec in (WORDPIECE, BYTE_LEVEL, SPLIT, FALLBACK)]


def vocab_cases() -> list[Case]:
    vocab = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##b\n"
    return [Case({"config.json": b"{}", "vocab.txt": vocab, "tokenizer_config.json": written(SETTINGS)}, {
        "vocab.txt": partial(bytes_of, valid=vocab), "tokenizer_config.json": partial(json_file, valid=SETTINGS),
        "special_tokens_map.json": partial(json_file, valid={"pad_token": "[PAD]", "mask_token": {"content": "a"}}),
        "added_tokens.json": partial(json_file, valid={"<new>": 8})})]


def merges_cases() -> list[Case]:
    vocab, merges = BYTE_LEVEL["model"]["vocab"], "#version: 0.2\na b\nĠ ab\n".encode()
    return [Case({a: json.dumps(vocab).encode(), b: merges, "tokenizer_config.json": json.dumps(BYTE_SETTINGS).encode(),
                  "config.json": json.dumps(LLAMA).encode()},
                 {a: partial(json_file, valid=vocab), b: partial(bytes_of, valid=merges),
                  "tokenizer_config.json": partial(json_file, valid=BYTE_SETTINGS), "config.json": partial(
                      json_file, valid={"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": -1})})
            for a, b in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))]


def tokenizer_model_cases() -> list[Case]:
    parts = sentencepiece_parts()
    whole = protobuf(parts)

    def spoilt(draw: Random) -> bytes:
        message = json_of(draw, parts, 4)
        return protobuf(message) if draw.randrange(4) and fits_protobuf(message) else bytes_of(draw, whole)

    return [Case({"config.json": b"{}", "tokenizer.model": whole}, {"tokenizer.model": spoilt})]


def safetensors_cases() -> list[Case]:
    whole = {written(spec): save(weights(spec), {"format": "pt"}) for spec in (LLAMA, BERT)}
    return [Case({"config.json": config, "model.safetensors": file},
                 {"model.safetensors": partial(safetensors_file, valid=file)})
            for config, file in whole.items()]


def index_cases() -> list[Case]:
    stored = weights(LLAMA)
    names = [list(stored)[::2], list(stored)[1::2]]
    cases = []
    for suffix, write in (("model.safetensors", save), ("pytorch_model.bin", saved)):
        files = [f"{i}.{suffix.rpartition('.')[2]}" for i in range(2)]
        where = dict(zip(files, names, strict=True))
        index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, ns in where.items() for n in ns}}
        parts = {f: write({n: stored[n] for n in ns}) for f, ns in where.items()}
        cases.append(Case({"config.json": json.dumps(LLAMA).encode(), f"{suffix}.index.json": written(index)} | parts,
                          {f"{suffix}.index.json": partial(json_file, valid=index)}))
    return cases


def saved(stored: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(stored, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def with_pickle(archive: bytes, spoilt: bytes) -> bytes:
    """The archive, whole, with another data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, spoilt if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


OPS = b"".join(getattr(pickle, op) for op in (
    "REDUCE", "BUILD", "BINPERSID", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS", "MARK", "NEWOBJ",
    "EMPTY_DICT", "EMPTY_TUPLE", "EMPTY_LIST", "APPEND", "NONE", "NEWTRUE", "STOP")) + b"h\0h\1h\2h\3h\4h\5h\6h\7"
GLOBALS = [b"cbuiltins\nbytearray\n", b"cbuiltins\nset\n", b"ctorch\nTensor\n", b"ctorch\nSize\n", b"cos\nsystem\n",
           b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
           b"ccollections\nCounter\n", b"ctorch\nHalfStorage\n", b"ctorch._utils\n_rebuild_parameter\n",
           b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR", b"cbuiltins\neval\n(X\x01\0\0\x001tR"]


def pickle_of(draw: Random, valid: bytes) -> bytes:
    """Its numbers, names, and operations changed."""
    spoiled = bytearray(valid)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randint(2, len(spoiled) - 1)
        match draw.randint(0, 4):
            case 0 if numbers := list(re.finditer(rb"K[\0-\xff]", spoiled)):
                found = draw.choice(numbers)
                spoiled[found.start():found.end()] = b"\x8a\x08" + draw.choice(NUMBERS[:11]).to_bytes(
                    8, "little", signed=True)
            case 1:
                found = draw.choice(list(re.finditer(rb"c[\w.]+\n\w+\n", valid)))[0]
                spoiled = bytearray(bytes(spoiled).replace(found, draw.choice(GLOBALS), 1))
            case 2:
                spoiled[at:at + draw.randrange(2)] = bytes(draw.choice(OPS) for _ in range(draw.randrange(5)))
            case 3:
                spoiled[at:at] = draw.choice(GLOBALS)
            case _:
                spoiled = bytearray(bytes_of(draw, bytes(spoiled)))
                if len(spoiled) < 4:
                    break
    return bytes(spoiled)


def bin_cases() -> list[Case]:
    stored = weights(LLAMA)
    w, whole, old = stored["model.norm.weight"], saved(stored), saved(stored, zipped=False)
    with zipfile.ZipFile(io.BytesIO(whole)) as z:
        inner = z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))
    odd = [w.expand(1 << 20, 8), w.to_sparse(), w.to(torch.complex64), w.bool(), w[:0], w.to("meta"), w.int(), None, 1,
           "a", [w], {"a": w}, torch.nn.Parameter(w), w[::2]]

    def spoilt(draw: Random) -> bytes:
        match draw.randrange(5):
            case 0:
                return with_pickle(whole, pickle_of(draw, inner))
            case 1:
                return pickle_of(draw, old)
            case 2:
                return bytes_of(draw, whole)
            case 3:
                return bytes_of(draw, old)
            case _:
                name = draw.choice([*stored, 1, ("a",), "\ud800"])
                return saved(stored | {name: draw.choice(odd)}, draw.random() < 0.5)

    return [Case({"config.json": written(LLAMA), "pytorch_model.bin": whole}, {"pytorch_model.bin": spoilt})]


def gguf_of(draw: Random, fields: dict, tensors: list) -> bytes:
    if draw.random() < 0.5:
        fields = json_of(draw, fields, 2)
    else:
        tensors = json_of(draw, tensors, 3)
    try:
        return a_gguf(fields, tensors)
    except (TypeError, ValueError, AttributeError, struct.error, MemoryError, OverflowError, RecursionError):
        return bytes_of(draw, a_gguf(*gguf_parts()))  # what cannot be written as GGUF


def gguf_cases() -> list[Case]:
    def spoilt(draw: Random, parts: tuple) -> bytes:
        return gguf_of(draw, *parts) if draw.randrange(3) else bytes_of(draw, a_gguf(*parts))

    return [Case({"m.gguf": a_gguf(*parts)}, {"m.gguf": partial(spoilt, parts=parts)})
            for parts in map(gguf_parts, ("llama", "qwen3"))]


def adapter_cases() -> list[Case]:
    """Each in today's form, and as files were until November 2026."""
    cases = []
    for method, more in (("lora", {"learn_lam": True}), ("adapter", {})):
        m = sibo.inject(blank(), method, 0.2, rank=2, bottleneck=2, **more)
        with tempfile.TemporaryDirectory() as folder:
            sibo.save(m, folder)
            stored, metadata = files.read_tensors(Path(folder, "adapter.safetensors"))
        spec = json.loads(metadata["sibo"])
        cases += [adapter_case(stored, spec), adapter_case(*old_form(stored, spec))]
    return cases


def old_form(stored: dict[str, torch.Tensor], spec: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Samples of the backbone were numbers in the metadata, λ's log-odds had another name."""
    samples = {n.removeprefix(".frozen."): t.tolist() for n, t in stored.items() if n.startswith(".frozen.")}
    trained = {n.replace(".lam_logit", ".logit"): t for n, t in stored.items() if not n.startswith(".frozen.")}
    spec = {k: v for k, v in spec.items() if k not in ("format", "modules_to_save")} | {"h0": "embed"}
    return trained, spec | {"backbone": {"config": spec["backbone"], "dtype": "torch.float32", "values": samples}}


def adapter_case(stored: dict[str, torch.Tensor], spec: dict) -> Case:
    whole = save(stored, {"sibo": json.dumps(spec)})

    def spoilt(draw: Random) -> bytes:
        if draw.randrange(3):
            return save(stored, {"sibo": written(json_of(draw, spec, 4)).decode()})
        return safetensors_file(draw, whole)

    return Case({"adapter.safetensors": whole}, {"adapter.safetensors": spoilt})


def peft_cases() -> list[Case]:
    """With what peft writes of every key, and what its oldest versions wrote."""
    name, d = "base_model.model.model.layers.0.self_attn.q_proj", LLAMA["hidden_size"]
    stored = {f"{name}.lora_A.weight": torch.ones(2, d), f"{name}.lora_B.weight": torch.ones(d, 2),
              "base_model.model.model.norm.weight": torch.ones(d)}
    spec = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05,
            "target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*v_proj", "modules_to_save": ["model.norm"],
            "rank_pattern": {r"layers\.\d+.self_attn.(q|k)_proj": 2}, "alpha_pattern": {"q_proj": 16},
            "layers_to_transform": [0], "layers_pattern": ["layers"], "use_rslora": True, "bias": "none",
            "use_dora": False, "init_lora_weights": True, "eva_config": None, "loftq_config": {}}

    def spoilt(draw: Random) -> bytes:
        name = draw.choice([*stored, "base_model.model.lm_head.base_layer.weight"])
        return saved(stored | {name: draw.choice([torch.ones(2, d), torch.ones(1), torch.ones(2, d).expand(99, 2, d)])})

    files = {"adapter_config.json": written(spec)}
    return [Case(files | {"adapter_model.safetensors": save(stored)}, {
                "adapter_config.json": partial(json_file, valid=spec),
                "adapter_model.safetensors": partial(safetensors_file, valid=save(stored))}),
            Case(files | {"adapter_model.bin": saved(stored)}, {"adapter_model.bin": spoilt})]


def data_json_cases() -> list[Case]:
    question = "Please choose: what?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2/answer3/answer4"
    files = {
        "own.json": [{"instruction": f"Say {i}.", "input": "", "output": "ab", "answer": "b"} for i in range(3)],
        "llm_adapters/openbookqa/test.json": [{"instruction": question, "input": "", "answer": "answer2",
                                               "output": "the correct answer is answer2"}],
        "llm_adapters/AddSub/test.json": [{"instruction": "1 + 1?", "input": "", "output": "3", "answer": "2.0"}],
        "llm_adapters/mawps/trainset.json": [{"id": 1, "original_text": "N?", "equation": "X=((22.0-14.0)/4.0)",
                                              "ans": 2.0}]}
    return [Case({name: written(rows)}, {name: partial(json_file, valid=rows)}) for name, rows in files.items()]


def data_jsonl_cases() -> list[Case]:
    files = {"own.jsonl": [{"instruction": f"Say {i}.", "output": "ab"} for i in range(3)],
             "raw/gsm8k/train.jsonl": [{"question": "How?", "answer": "48/2 = <<48/2=24>>24\n#### 1,024"}] * 2}

    return [Case({name: b"\n".join(map(written, rows))}, {name: partial(lines_of, rows=rows)})
            for name, rows in files.items()]


CHATML = ("{% for m in messages %}<s>{{ m['role'] }}\n{{ m.content | trim }}<s>\n{% endfor %}"  # <s>: a token
          "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
SPELLS = [
    "{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ cycler.__init__.__globals__ }}", "{% for m in x %}",
    "{{ messages | attr('__class__') }}", "{{ '%s'.format(messages) }}", "{{ '{0.__class__}'.format(1) }}", "{{ 1/0 }}",
    "{{ messages.append(1) }}", "{% include 'a' %}", "{% import 'os' as os %}", "{{ raise_exception('no\n\nno') }}",
    "{{ messages[9] }}", "{{ messages[9].content }}", "{{ lipsum() }}", "{% for i in range(10 ** 9) %}a{% endfor %}",
    "{{ namespace(a=1).__init__ }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ bos_token }}", "{# ",
    "{{ strftime_now('%Y') }}", "{% generation %}", "{% endgeneration %}", "{{ messages | tojson }}", "{{ messages }}",
    "{{ dict(a=1).__class__ }}", "{% break %}", "{{ (1).__class__ }}", "\ufdd0", "{{ joiner.__call__ }}"]


def template_of(draw: Random) -> str:
    """A spell put in, at a border between tags more often than elsewhere; or a piece of the template gone or twice."""
    text = CHATML
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.choice([m.start() for m in re.finditer(r"\{[%{]|$", text)]) if draw.random() < 0.7 else draw.randint(
            0, len(text))
        text = text[:at] + draw.choice([draw.choice(SPELLS), "", text[at:at + 20]]) + text[at + draw.choice((0, 0, 9)):]
    return text


def chat_cases() -> list[Case]:
    def spoilt(draw: Random) -> bytes:
        return template_of(draw).encode() if draw.random() < 0.8 else bytes_of(draw, CHATML.encode())

    fixed = {"config.json": b"{}", "tokenizer.json": written(FALLBACK)}
    return [Case(fixed | {"chat_template.jinja": CHATML.encode()}, {"chat_template.jinja": spoilt}),
            Case(fixed | {"tokenizer_config.json": written({"chat_template": CHATML})}, {
                "tokenizer_config.json": partial(json_file, valid={"chat_template": [
                    {"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools }}"}]})})]


MESSAGES = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"Say {i}."},
                          {"role": "assistant", "content": "ab"}], "answer": "b"} for i in range(3)]
ROWS = [{"prompt": f"Say {i}.", "completion": i, "system": "s", "history": [["a", "b"]]} for i in range(3)]
SHAREGPT = [{"conversations": [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": "ab"}]}
            for i in range(3)]


def a_parquet(rows: object) -> bytes:
    """ValueError, TypeError or ArrowException for rows that Parquet does not hold."""
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def rows_cases() -> list[Case]:
    """A user's own rows, in other forms than data.json's."""
    def a_csv(rows: list[dict]) -> bytes:
        lines = [",".join(rows[0]), *(",".join(f'"{x}"' for x in row.values()) for row in rows)]
        return "\n".join(lines).encode()

    def packed(draw: Random) -> bytes:
        spoilt = gzip.compress(written(json_of(draw, SHAREGPT)), 1, mtime=0)
        return spoilt if draw.randrange(2) else bytes_of(draw, gzip.compress(written(SHAREGPT), 1, mtime=0))

    def table(draw: Random) -> bytes:
        whole = a_csv(asked)
        return bytes_of(draw, whole) if draw.randrange(2) else table_of(draw, whole.decode().split("\n"), ",")

    def columns(draw: Random) -> bytes:
        with contextlib.suppress(Exception):  # what Parquet does not hold
            return a_parquet(json_of(draw, draw.choice([MESSAGES, ROWS])))
        return bytes_of(draw, a_parquet(MESSAGES))

    asked = [{"question": f"Say {i}, now?", "answer": "ab"} for i in range(3)]
    cases = [Case({"own.json": written(MESSAGES)}, {"own.json": partial(json_file, valid=MESSAGES)}),
             Case({"own.jsonl": b"\n".join(map(written, ROWS))}, {"own.jsonl": partial(lines_of, rows=ROWS)}),
             Case({"own.json.gz": gzip.compress(written(SHAREGPT))}, {"own.json.gz": packed}),
             Case({"own.csv": a_csv(asked)}, {"own.csv": table})]
    if importlib.util.find_spec("pyarrow"):
        cases.append(Case({"own.parquet": a_parquet(MESSAGES)}, {"own.parquet": columns}))
    return cases


def lines_of(draw: Random, rows: list) -> bytes:
    """JSON lines."""
    def lines(found: object) -> bytes:
        return b"\n".join(map(written, found)) if isinstance(found, list) else written(found)

    return lines(json_of(draw, rows)) if draw.randrange(3) else bytes_of(draw, lines(rows))


def table_of(draw: Random, lines: list[str], between: str = "\t") -> bytes:
    """A cell becomes something else, or columns and lines come and go."""
    rows = [line.split(between) for line in lines]
    for _ in range(draw.choice((1, 1, 2, 3))):
        row = draw.choice(rows)
        match draw.randint(0, 3):
            case 0 if row:
                row[draw.randint(0, len(row) - 1)] = draw.choice(
                    ["", "0", "-1", "9" * 5000, "1." + "1" * 5000 + "x", "nan", "inf", "\0", "(F)", "\r", "\u2028",
                     "x" * 5000, "5.0000001", "1e3", "٣", "²", "\\n" * 3000])
            case 1:
                row.append("x")
            case 2 if row:
                row.pop()
            case _:
                rows.append(list(row))
    return "\n".join(between.join(row) for row in rows).encode()


def data_tsv_cases() -> list[Case]:
    files = {"raw/aqua_train.tsv": ["Q?\\nOptions:\\n(A) 1\\n(B) 2\t(B)\tBecause.", "R?\\nOptions:\\n(A) 1\t(A)\tSo."],
             "glue/CoLA/train.tsv": ["gj04\t1\t\tOur friends.", "gj04\t0\t*\tOne."], "glue/RTE/train.tsv": TABLE,
             "glue/STS-B/dev.tsv": ["index\tsentence1\tsentence2\tscore", "0\ta\tb\t3.25", "1\tc\td\t5.0"],
             "glue/MRPC/dev.tsv": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t2\t3\tA.\tB."]}
    def spoilt(draw: Random, lines: list[str]) -> bytes:
        return table_of(draw, lines) if draw.randrange(3) else bytes_of(draw, "\n".join(lines).encode())

    return [Case({name: "\n".join(lines).encode()}, {name: partial(spoilt, lines=lines)})
            for name, lines in files.items()]


def zip_of(draw: Random, members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, content in members.items():
            info = zipfile.ZipInfo(draw.choice(
                [name, name, name, "../" + name, "/" + name, "a/../../" + name, "..\\a", "C:\\a", "\0", name + "\0x"]))
            info.external_attr = draw.choice([0o100644, 0o120777, 0]) << 16
            info.compress_type = draw.choice([0, 8, 8, 12, 14])
            z.writestr(info, content if draw.random() < 0.5 else bytes(500_000))
    spoilt = file.getvalue()
    for _ in range(draw.randint(0, 2)):  # numbers of a header
        at = draw.choice([x.start() for x in re.finditer(rb"PK..", spoilt, re.S)] or [0])
        at += draw.randint(4, 45)
        number = draw.choice([b"\xff" * 4, b"\0\0", b"\1\0", b"\xff\xff\xff\x7f"])
        spoilt = spoilt[:at] + number + spoilt[at + len(number):]
    return spoilt


def zip_cases() -> list[Case]:
    cases = []
    for name in ("SST-2", "QNLI"):
        members = {f"{name}/train.tsv": b"sentence\tlabel\nfine\t1\n" * 9, f"{name}/dev.tsv": b"a\tb\n" * 9}
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
            for member, content in members.items():
                z.writestr(member, content)
        place = f"glue/{download.address(f'glue/{name}/dev.tsv').rpartition('/')[2]}"

        whole = file.getvalue()

        def spoilt(draw: Random, members=members, whole=whole) -> bytes:
            return zip_of(draw, members) if draw.randrange(3) else bytes_of(draw, whole)

        cases.append(Case({place: whole}, {place: spoilt}))
    return cases


FORMATS: dict[str, tuple[Callable[[], list[Case]], Callable[[Path], None]]] = {
    "config": (config_cases, read_model), "safetensors": (safetensors_cases, read_model),
    "index": (index_cases, read_model), "bin": (bin_cases, read_model), "gguf": (gguf_cases, read_gguf),
    "tokenizer.json": (tokenizer_json_cases, read_tokenizer), "vocab.txt": (vocab_cases, read_tokenizer),
    "merges.txt": (merges_cases, read_tokenizer), "tokenizer.model": (tokenizer_model_cases, read_tokenizer),
    "chat": (chat_cases, read_chat), "adapter": (adapter_cases, read_adapter), "peft": (peft_cases, read_peft),
    "rows": (rows_cases, read_data), "data.json": (data_json_cases, read_data),
    "data.jsonl": (data_jsonl_cases, read_data), "data.tsv": (data_tsv_cases, read_data), "zip": (zip_cases, read_zip),
}


# ------------------------------------------------------------------------------------------------------------ running


@dataclass
class Seen:
    """What was measured: inputs, how many were accepted, CPU seconds of the slowest, most bytes taken."""

    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    memory: int = 0


def peak() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def too_long(*_) -> None:
    raise TimeoutError(f"over {2 * MOST_SECONDS:.0f} s")


def one(read: Callable[[Path], None], folder: Path, seen: Seen, before: int) -> str:
    """Reads `folder`: "" if it is accepted, else the error message; AssertionError if that breaks the claim above."""
    start, message = time.process_time(), ""
    signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * MOST_SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the counts of examples that are not the published ones
            read(folder)
    except (ValueError, OSError) as e:
        message = str(e)
        assert not isinstance(e, TimeoutError), message
        one_line = str(folder) in message and "\n" not in message and len(message) < 1500
        assert one_line, f"not one line naming the file: {type(e).__name__} {message[:500]!r}"
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        raise AssertionError(f"{type(e).__name__}: {e!s:.300}") from e
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    took, more = time.process_time() - start, peak() - before
    seen.inputs, seen.accepted = seen.inputs + 1, seen.accepted + (not message)
    seen.slowest, seen.memory = max(seen.slowest, took), max(seen.memory, more)
    assert took <= MOST_SECONDS, f"{took:.1f} s"
    assert more <= MOST_BYTES, f"{more >> 20} MiB"
    return message


def lay(folder: Path, name: str, i: int = 0, **changed: bytes) -> Path:
    """The valid files of a format's i-th case, in a folder of their own; changed: others, with __ for the dot."""
    files = FORMATS[name][0]()[i].files | {file.replace("__", "."): content for file, content in changed.items()}
    place = folder / f"{name}-{'bert' if b'pooler' in files.get('model.safetensors', b'') else i}"
    for file, content in files.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(content)
    return place


def fuzzer(name: str, folder: Path) -> tuple[Callable[[Random], None], Seen]:
    """What spoils and reads one input of a format, in `folder`, where one that fails stays; and what it has seen."""
    made, read = FORMATS[name]
    cases, seen = made(), Seen()
    places = [lay(folder, name, i) for i in range(len(cases))]
    for place in places:
        with contextlib.redirect_stderr(io.StringIO()):
            read(place)  # valid files are accepted
    ways = [(i, file, spoilt) for i, case in enumerate(cases) for file, spoilt in case.spoilt.items()]
    before = peak()

    def check(draw: Random) -> None:
        i, file, spoilt = draw.choice(ways)
        place, valid = places[i], cases[i].files.get(file)
        (place / file).write_bytes(spoilt(draw))
        one(read, place, seen, before)
        if valid is None:  # else: left, where it failed
            (place / file).unlink()
        elif len(cases[i].spoilt) > 1:
            (place / file).write_bytes(valid)

    return check, seen


def run(name: str, inputs: int, folder: Path) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * MOST_BYTES,) * 2)  # a MemoryError fails, a full machine is worse
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    check, seen = fuzzer(name, folder)
    try:
        for n in range(inputs):
            signal.setitimer(signal.ITIMER_PROF, 10)  # ends a process that hangs where no Python runs
            check(Random(n))
    except AssertionError as e:
        print(f"{name:16} input {n}: {e}", flush=True)
        sys.exit(1)
    refused = seen.inputs - seen.accepted
    print(f"{name:16} {seen.inputs:6} inputs  {seen.accepted:6} accepted  {refused:6} refused  "
          f"slowest {seen.slowest:.3f} s  memory +{seen.memory >> 20} MiB", flush=True)
    shutil.rmtree(folder)


def main() -> None:
    p = argparse.ArgumentParser(description="Reads mutated files of every format.")
    p.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    p.add_argument("--inputs", type=int, default=20_000, help="for each format (default: 20000)")
    p.add_argument("--repeat", type=Path, metavar="FOLDER", help="read what a failure left there")
    args = p.parse_args()
    if unknown := [name for name in args.formats if name not in FORMATS]:
        p.error(f"unknown format {unknown[0]!r}, known are {', '.join(FORMATS)}")
    if args.repeat:
        FORMATS[args.formats[0]][1](args.repeat)
        return
    failed = False
    memory = Path("/dev/shm")  # a folder there takes half the time of one on a disk
    for name in args.formats or FORMATS:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=memory if memory.is_dir() else None))
        child = multiprocessing.get_context("fork").Process(target=run, args=(name, args.inputs, folder))
        child.start()
        child.join()
        if child.exitcode:
            failed = True
            why = signal.Signals(-child.exitcode).name if child.exitcode < 0 else "see above"
            print(f"{name:16} FAILED ({why}); the input is in {folder}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
