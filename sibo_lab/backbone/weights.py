"""Weights from a checkpoint folder: safetensors and pickles of plain tensors, by Hugging Face's names."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch

from sibo_lab import files
from sibo_lab.backbone import gguf


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of each weight of the checkpoint at `path`, on the CPU, one shard at a time."""
    if path.suffix == ".gguf":
        yield from ((rename(name, gguf.NAMES, path), tensor) for name, tensor in gguf.tensors(path))
        return
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = path / f"{stem}.{suffix}.index.json"
        if index.is_file():
            said = files.read_json(index).get("weight_map")
            names = set(map(str, said.values())) if isinstance(said, dict) else []
            if not names or not all(re.fullmatch(r"[\w-][\w.-]{0,200}", n) for n in names):
                raise ValueError(f"{index}: found shards {files.quoted(sorted(names)[:3])} in its weight_map, expected the "
                                 "names of files beside it")
            shards = [path / n for n in sorted(names)]
        else:
            shards = [path / f"{stem}.{suffix}"] if (path / f"{stem}.{suffix}").is_file() else []
        for file in shards:
            yield from (files.read_safetensors(file) if suffix == "safetensors" else _pickled_tensors(file))
        if shards:
            return
    raise FileNotFoundError(f"{path}: found neither model.safetensors nor pytorch_model.bin, nor their index.json")


def _pickled_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with open(file, "rb") as f:
            zipped = f.read(4) == b"PK\3\4"  # files older than PyTorch 1.6 are no archives and cannot be mapped
            f.seek(0)
            if zipped:
                with zipfile.ZipFile(f) as z:
                    files.check_archive(z)
                    if (claimed := sum(info.file_size for info in z.infolist())) > (size := os.path.getsize(file)):
                        raise ValueError(f"its members claim {claimed} bytes of {size}")
                    with z.open(next((n for n in z.namelist() if n.endswith("/data.pkl")), "data.pkl")) as pickle:
                        _check_pickle(pickle)
            else:  # its magic number, version, platform, tensors and their keys, each a pickle
                for _ in range(5):
                    _check_pickle(f)
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # the unpickler meets a torn file with whatever its slices raise
        if isinstance(e, OSError) and e.filename:
            raise
        raise ValueError(f"{file}: not a file of plain tensors ({type(e).__name__}: {files.one_line(e)})") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}: found a {type(stored).__name__}, expected a dictionary of tensors")
    for name, tensor in stored.items():
        whole = isinstance(tensor, torch.Tensor) and tensor.nbytes <= tensor.untyped_storage().nbytes()
        if not isinstance(name, str) or not whole:  # a stride of 0 makes a large one of few bytes
            raise ValueError(f"{file}: found {type(tensor).__name__} {files.quoted(name)}, expected names and whole tensors")
        yield name, tensor


PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch \w+Storage")


def _check_pickle(stream: IO[bytes]) -> None:
    """Refuses what no dictionary of tensors needs. PyTorch's own unpickler runs no code either, but a few bytes can ask
    it for a bytearray of any size, or to hash tuples of the same tuples for ever."""
    last, memo = "", {}
    for op, arg, _ in pickletools.genops(stream):
        if op.name == "GLOBAL" and not PICKLED.fullmatch(arg):
            raise ValueError(f"found {arg}")
        if op.name.endswith("GET") and memo.get(arg, "").startswith("TUPLE"):
            raise ValueError("found a tuple that is used twice")
        if op.name.endswith("PUT"):
            memo[arg] = last
        else:
            last = op.name


def rename(name: str, names: Mapping[str, str | None], path: Path) -> str | None:
    """Looks `name` up in a map whose {} stands for a layer's number; ValueError for a name it does not know."""
    number = re.search(r"\.(\d+)\.", name)
    template = name[: number.start()] + ".{}." + name[number.end():] if number else name
    if template not in names:
        raise ValueError(f"{path}: found tensor {files.quoted(name)}, expected none of that name in this kind of model")
    new = names[template]
    return new.format(number[1]) if new and number else new


def old_spelling(name: str, prefix: str) -> str:
    """A tensor's name without the family's prefix and, in BERT files of TensorFlow descent, gamma and beta renamed."""
    name = name.removeprefix(prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
