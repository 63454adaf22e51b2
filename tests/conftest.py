"""Small real models that several test files train: made by transformers, loaded by us, with a real tokenizer."""

import json
import os
import shutil

import pytest
import torch

from sibo_lab.backbone import locate

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))  # more would wait for each other, spinning
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # in commands too, and fixed: tests compare the last bits


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a random two-layer BERT of width 32 and MiniLM's vocabulary."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(locate.locate("minilm") / name, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a random two-layer LLaMA of width 32 over the 256 bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512)).save_pretrained(folder)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)} | {"<|endoftext|>": 256}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder
