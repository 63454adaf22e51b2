"""Tokenizers and their oracles, for all tests of the room."""

import json

import gguf
import pytest
import sentencepiece
from tokenizer_oracles import DATA, bpe_oracle, folder
from tokenizers import Tokenizer

from sibo_lab.backbone import locate, tokenizer


@pytest.fixture(scope="session")
def minilm():
    return tokenizer.from_pretrained("minilm")


@pytest.fixture(scope="session")
def minilm_oracle():
    oracle = Tokenizer.from_file(str(locate.locate("minilm") / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    return oracle


@pytest.fixture(scope="session")
def smollm2():
    return tokenizer.from_pretrained("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_oracle():
    fields = gguf.GGUFReader(locate.locate("smollm2-135m")).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    return bpe_oracle({token: i for i, token in enumerate(tokens)}, merges, tokens[:17], digits=True)


@pytest.fixture(scope="session")
def gpt2_files():
    source = DATA / "tokenizers" / "gpt2"
    if not source.is_dir():
        pytest.skip("the data folder is not there")
    return (source / "encoder.json").read_text("utf-8"), (source / "vocab.bpe").read_text("utf-8")


@pytest.fixture(scope="session")
def gpt2(gpt2_files, tmp_path_factory):
    return tokenizer.from_pretrained(folder(tmp_path_factory.mktemp("gpt2"), encoder__json=gpt2_files[0],
                                            vocab__bpe=gpt2_files[1]))


@pytest.fixture(scope="session")
def gpt2_oracle(gpt2_files):
    merges = [line for line in gpt2_files[1].split("\n")[1:] if line]
    return bpe_oracle(json.loads(gpt2_files[0]), merges, ["<|endoftext|>"], digits=False)


@pytest.fixture(scope="session")
def llama_model():
    file = DATA / "tokenizers" / "llama" / "tokenizer.model"
    if not file.is_file():
        pytest.skip("the data folder is not there")
    return file.read_bytes()


@pytest.fixture(scope="session")
def llama(llama_model, tmp_path_factory):
    return tokenizer.from_pretrained(folder(tmp_path_factory.mktemp("llama"), tokenizer__model=llama_model))


@pytest.fixture(scope="session")
def llama_oracle(llama_model):
    return sentencepiece.SentencePieceProcessor(model_proto=llama_model)


@pytest.fixture(scope="session")
def llama_pieces(llama_oracle):
    ids = range(llama_oracle.vocab_size())
    return [llama_oracle.id_to_piece(i) for i in ids], [llama_oracle.get_score(i) for i in ids]
