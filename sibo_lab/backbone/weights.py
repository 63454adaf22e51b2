"""A checkpoint's weights, from safetensors, pickles of plain tensors or a .gguf file, by Hugging Face's names."""

import hashlib
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch

from sibo_lab import files
from sibo_lab.backbone import gguf
from sibo_lab.files import quoted


def tensors(path: Path, numbers: bool = True) -> files.Tensors:
    """(Hugging Face's name, tensor), on the CPU, one shard at a time: mapped, so that shapes alone take no reading;
    without `numbers` a .gguf file's are not dequantized."""
    if path.suffix == ".gguf":
        return ((rename(name, gguf.NAMES, path), tensor) for name, tensor in gguf.tensors(path, numbers))
    return chain.from_iterable(map(*chosen(path)))


def chosen(path: Path) -> tuple[Callable[[Path], files.Tensors], list[Path]]:
    """What reads a folder's weights, and the files: as in transformers, one whole file goes before an index, which may
    be older. ValueError or FileNotFoundError names one that is not there, or a pointer to it, or an adapter."""
    if (adapter := path / "adapter_config.json").is_file():  # transformers would load it too
        raise ValueError(f"{path}: expected a model alone, got one with peft's {adapter.name}; keep them apart, and "
                         "load the adapter with eval.py --peft")
    for file, read in (("model.safetensors", files.read_safetensors), ("pytorch_model.bin", pickled_tensors)):
        shards = [path / file] if (path / file).is_file() else _shards(path / f"{file}.index.json")
        for shard in shards:
            if not shard.is_file():
                raise FileNotFoundError(f"{shard}: no such file, and {file}.index.json names it; fetch it too")
            files.refuse_pointer(shard)
        if shards:
            return read, shards
    raise FileNotFoundError(f"{path}: expected model.safetensors, pytorch_model.bin or their index.json, got none")


def digest(path: Path, places: int = 4096) -> str:
    """sha256 of what stands at so many places of each file of weights, spread over all of it: no matrix is missed, and
    13 GB are not read for it. It is of the files: the same for every dtype, another for another layout."""
    found = hashlib.sha256()
    for file in [path] if path.suffix == ".gguf" else chosen(path)[1]:
        with open(file, "rb", buffering=0) as f:
            size = f.seek(0, 2)
            for at in range(0, size, max(64, size // places)):
                f.seek(at)
                found.update(f.read(64))
    return found.hexdigest()


def _shards(index: Path) -> list[Path]:
    if not index.is_file():
        return []
    shards = files.read_json(index).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or not all(re.fullmatch(r"[\w-][\w.-]{0,200}", n) for n in names):
        raise ValueError(f"{index}: expected the names of files beside it, got {quoted(names[:3])}")
    return [index.parent / n for n in names]


def pickled_tensors(file: Path) -> files.Tensors:
    try:
        with open(file, "rb") as f:
            zipped = f.read(4) == b"PK\3\4"  # not before PyTorch 1.6, and then not mapped
            f.seek(0)
            if zipped:
                with zipfile.ZipFile(f) as z:
                    files.check_archive(z)
                    if (claimed := sum(info.file_size for info in z.infolist())) > (size := file.stat().st_size):
                        raise ValueError(f"its members claim {claimed} bytes of {size}")
                    with z.open(next((n for n in z.namelist() if n.endswith("/data.pkl")), "data.pkl")) as pickle:
                        _check_pickle(pickle)
            else:
                for _ in ("magic number", "version", "platform", "tensors", "keys"):
                    _check_pickle(f)
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # on a torn file the unpickler raises anything
        if isinstance(e, OSError) and e.filename:
            raise
        raise ValueError(f"{file}: not a file of plain tensors ({type(e).__name__}: {files.one_line(e)})") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}: expected a dictionary of tensors, got a {type(stored).__name__}")
    for name, tensor in stored.items():
        whole = isinstance(tensor, torch.Tensor) and tensor.nbytes <= tensor.untyped_storage().nbytes()
        if not isinstance(name, str) or not whole:  # strides of 0 make a large tensor of few bytes
            raise ValueError(f"{file}: expected names and whole tensors, got {type(tensor).__name__} {quoted(name)}")
        yield name, tensor


PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch \w+Storage")


def _check_pickle(stream) -> None:
    """Refuses what no dictionary of tensors needs: PyTorch's unpickler runs no code, but few bytes can make it allocate
    a bytearray of any size, or hash tuples of the same tuples forever."""
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


# Old files' buffers, which models compute now.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids|token_type_ids)")
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
QUANTIZED = re.compile(r".*\.(qweight|qzeros|g_idx|scales|SCB|weight_format|weight_scale\w*|input_scale|"
                       r"weight\.(absmax|quant_\w+|nested_\w+|bitsandbytes\w*))(\..*)?")


def names(modules: dict, block: str, inside: dict, unused: Iterable[str] = ()) -> dict[str, str | None]:
    """Hugging Face's names of weights and biases, and ours (None: not needed), from those of `modules` and of those
    `inside` a `block` ({} is its number)."""
    modules = modules | {f"{block}.{theirs}": f"blocks.{{}}.{ours}" for theirs, ours in inside.items()}
    return dict.fromkeys(unused) | {f"{theirs}.{leaf}": ours and f"{ours}.{leaf}"
                                    for theirs, ours in modules.items() for leaf in ("weight", "bias")}


def rename(name: str, names: dict, path: Path, prefix: str = "") -> str | None:
    """Our name of a tensor, from what `names` returned; ValueError if it is unknown."""
    # DataParallel's and torch.compile's prefixes, then the base model's
    name = re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")).removeprefix(prefix)
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")  # old BERTs
    if BUFFERS.fullmatch(name):
        return None
    number = re.search(r"\.(\d+)\.", name)
    template = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    if template not in names and QUANTIZED.fullmatch(name):
        raise ValueError(f"{path}: expected weights as they were trained, got quantized ones ({quoted(name)}); fetch "
                         "the model that is not quantized")
    if template not in names:
        raise ValueError(f"{path}: unexpected tensor {quoted(name)} in this kind of model")
    ours = names[template]
    return ours and ours.format(number and number[1])
