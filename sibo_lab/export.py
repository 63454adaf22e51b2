"""A plain LoRA as peft's folder, and peft's as ours (peft 0.21, which knows nothing of h0)."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from types import NoneType

import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sibo
from sibo_lab import files
from sibo_lab.backbone import weights
from sibo_lab.stacks import find_all

HONOURED = {  # of the keys of peft's adapter_config.json, by the types of their values
    "r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": (bool,),
    "rank_pattern": (dict, NoneType), "alpha_pattern": (dict, NoneType), "target_modules": (list, str),
    "exclude_modules": (list, str, NoneType), "layers_to_transform": (list, int, NoneType),
    "layers_pattern": (list, str, NoneType), "modules_to_save": (list, NoneType)}
INERT = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "inference_mode", "runtime_config",
         "merge_weights", "megatron_core", "qalora_group_size",  # those read only where another key is on
         "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of init_lora_weights below
         "fan_in_fan_out"}  # of GPT-2's Conv1D; peft reads False for nn.Linear
ONLY = {"peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"), "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others also change the base weights
        } | dict.fromkeys((
            "use_dora", "lora_bias", "use_qalora", "megatron_config", "layer_replication", "alora_invocation_tokens",
            "trainable_token_indices", "target_parameters", "arrow_config", "velora_config", "monteclora_config",
            "use_bdlora", "kasa_config", "ensure_weight_tying", "enable_lora"), (None, False))
MERGE = "if peft's merge_and_unload can fold it, load the folder that save_pretrained then writes"
PEFT, CONFIG = "base_model.model.", "adapter_config.json"  # begins all of peft's names


def their_name(m: nn.Module, ours: str) -> str:
    """Hugging Face's name of one of our modules or weights: blocks.3.attn.q_proj of a LLaMA is their
    model.layers.3.self_attn.q_proj. ValueError if they have no such part."""
    template = re.sub(r"\.\d+\.", ".{}.", ours, count=1)
    names = {mine: theirs for theirs, mine in m.names.items()}
    theirs = names.get(template) or names.get(f"{template}.weight", "").removesuffix(".weight")
    if not theirs:
        raise ValueError(f"{ours}: expected a part that transformers' {type(m).__name__} has too, got one of ours only")
    bare = re.match(r"lm_head|classifier", theirs) or getattr(m, "classifier", m) is None  # None: their BertModel
    return ("" if bare else m.prefix) + theirs.format(*re.findall(r"\.(\d+)\.", ours))


def to_peft(m: nn.Module, folder: Path, backbone: str) -> None:
    """Writes what peft.PeftModel.from_pretrained loads onto transformers' model of the same weights. ValueError for
    what peft cannot express: adapters, λ > 0, full fine-tuning; and for a folder with files in it."""
    require_empty(folder)
    require_on(m)
    s = getattr(m, "sibo", None)
    got = "a fully trained model" if s is None else "adapters" if s.method != "lora" else s.lam and f"λ = {s.lam}"
    if got:
        raise ValueError(f"--export peft: expected a plain LoRA, got {got}: peft has no h0 and no adapters; use hf")
    loras = {n: x for n, x in m.named_modules() if isinstance(x, sibo.LoRA)}
    whole = {their_name(m, n): p.clone() for n, p in m.named_parameters(remove_duplicate=False)  # a tied head too
             if (p.requires_grad or n.startswith("classifier.")) and n.removesuffix(".base.weight").removesuffix(
                 ".base.bias").rpartition(".")[0] not in loras}
    tensors = {f"{PEFT}{their_name(m, n)}.lora_{letter}.weight": p for n, x in loras.items()
               for letter, p in (("A", x.down), ("B", x.up))} | {PEFT + n: p for n, p in whole.items()}
    files.write_tensors(folder / "adapter_model.safetensors", tensors, {})
    files.write(folder / CONFIG, json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": backbone, "inference_mode": True, "bias": "none",
        "task_type": "CAUSAL_LM" if not hasattr(m, "classifier") else "SEQ_CLS" if m.classifier else
        "FEATURE_EXTRACTION",
        "r": s.rank, "lora_alpha": s.alpha, "lora_dropout": s.dropout,
        "target_modules": [their_name(m, n) for n in loras],  # full names: peft adapts all that end in a short one
        "modules_to_save": sorted({n.rpartition(".")[0] for n in whole}) or None}, indent=2) + "\n")


def from_peft(m: nn.Module, folder: Path) -> nn.Module:
    """Puts a LoRA that peft saved onto our model `m`, in place: the function that peft's own reload computes.

    Where ranks differ, lower ones are filled up with zeros in both A and B, which then have no gradient; where scales
    differ, B takes the ratio to the most common one. ValueError names the key or tensor that is more than a plain LoRA,
    or does not fit, before `m` is touched."""
    file, state, spec, (path, stored) = folder / CONFIG, m.state_dict(), peft_spec(folder), _peft_tensors(folder)
    linear = {their_name(m, n): n for n, x in m.named_modules() if isinstance(x, nn.Linear)}
    ours = {PEFT + their_name(m, n): n for n in state}
    try:
        ranks = _ranks_and_scales(spec, [n for n in linear if _is_target(n, spec)])
        kept = {n for n in ours if _is_kept(n.removeprefix(PEFT), spec)}
    except (TypeError, OverflowError, TimeoutError, regex.error) as e:
        raise ValueError(f"{file}: malformed names or numbers ({files.one_line(e)})") from None
    frozen = {n: state[ours[own]] for n in stored if n not in kept and (own := n.replace(".base_layer.", ".")) in ours}
    expected = {n: state[ours[n]] for n in kept} | frozen
    for n, (r, _) in ranks.items():
        d_out, d_in = state[f"{linear[n]}.weight"].shape
        expected |= {f"{PEFT}{n}.lora_{letter}.weight": torch.empty(shape, device="meta")
                     for letter, shape in (("A", (r, d_in)), ("B", (d_out, r)))}
    if strange := sorted(stored.keys() - expected.keys()):
        raise ValueError(f"{path}: tensor {files.quoted(strange[0])}: expected LoRA on this model's target_modules, "
                         f"and modules_to_save; {MERGE}")
    files.require_shapes(expected, stored, path)
    if drawn := [their_name(m, n) for n in getattr(m, "drawn", ()) if PEFT + their_name(m, n) not in kept]:
        raise ValueError(f"{path}: tensor {PEFT + drawn[0]!r}: expected it here, as this backbone's files lack it, got "
                         "none, and a random one answers at random; load the backbone that the LoRA was trained on")
    for n, p in frozen.items():  # peft adds an adapted lm_head's
        if not torch.equal(stored[n].to(p), p):
            raise ValueError(f"{path}: tensor {n!r}: expected this backbone's own weight, got another; load the one "
                             "that the LoRA was trained on")
    loras = {linear[n]: (*ranks[n], *(stored[f"{PEFT}{n}.lora_{letter}.weight"] for letter in "AB")) for n in ranks}
    return _put(m, spec["lora_dropout"], loras, {ours[n]: stored[n] for n in kept}, path)


def _put(m: nn.Module, dropout: float, loras: dict[str, tuple], whole: dict[str, Tensor], path: Path) -> nn.Module:
    """`loras`: rank, scale, A (r, d_in), B (d_out, r) by our module; `whole`: what was trained whole."""
    rank, saved = max(r for r, *_ in loras.values()), tuple({n.rpartition(".")[0] for n in whole})
    if more := sorted({f"{n}.{leaf}" for n in find_all(m, saved) for leaf, _ in m.get_submodule(n).named_parameters()}
                      - whole.keys()):
        raise ValueError(f"{path.with_name(CONFIG)}: modules_to_save: expected modules that a name tells apart here, "
                         f"got one that {files.quoted(more[0])} would be trained with; {MERGE}")
    if rank > (most := max(A.shape[1] + len(B) for _, _, A, B in loras.values())):
        raise ValueError(f"{path}: expected ranks up to {most}, as wide as the modules, got {rank}")
    scale = Counter(s for _, s, *_ in loras.values()).most_common(1)[0][0] or 1.0
    if whole.keys() & {"embed.weight", "head.weight"} and m.head.weight is m.embed.weight:  # peft trains a copy
        m.head.weight = nn.Parameter(m.head.weight.detach().clone())
    try:
        sibo.inject(m, "lora", 0.0, targets=tuple(loras), rank=rank, alpha=scale * rank, dropout=dropout,
                    modules_to_save=saved)
    except ValueError as e:
        raise ValueError(f"{path.with_name(CONFIG)}: {e}") from None
    for n, (r, s, A, B) in loras.items():
        whole |= {f"{n}.down": F.pad(A, (0, 0, 0, rank - r)),
                  f"{n}.up": F.pad(B if s == scale else B.float() * (s / scale), (0, rank - r))}
    files.assign({n: p for n, p in m.named_parameters() if p.requires_grad}, whole, path)
    return m


def peft_spec(folder: Path) -> dict:
    """A folder's adapter_config.json, with peft's defaults. ValueError names a key that is unknown, or not so in a
    plain LoRA."""
    file = folder / CONFIG
    spec = {key: None for key in (*HONOURED, *ONLY)} | {
        "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "bias": "none", "init_lora_weights": True}
    for key, value in (spec := spec | files.read_json(file)).items():
        if key in INERT:
            continue
        if key not in HONOURED and key not in ONLY:
            raise ValueError(f"{file}: expected keys of a plain LoRA that are known here, got {files.quoted(key)} with "
                             f"{files.quoted(value)}; {MERGE}")
        if not (type(value) in HONOURED[key] if key in HONOURED else value in ONLY[key]):
            names = [kind.__name__ for kind in HONOURED[key]] if key in HONOURED else map(repr, ONLY[key])
            raise ValueError(f"{file}: expected {key} {' or '.join(names)}, as in a plain LoRA, got "
                             f"{files.quoted(value)}; {MERGE}")
    return spec


def _peft_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """In the order in which peft looks for them."""
    for name, read in (("adapter_model.safetensors", files.read_safetensors),
                       ("adapter_model.bin", weights.pickled_tensors)):
        if (file := folder / name).is_file():
            files.refuse_pointer(file)
            return file, dict(read(file))
    raise FileNotFoundError(f"{folder}: expected adapter_model.safetensors or adapter_model.bin, got neither")


def _is_target(name: str, spec: dict) -> bool:
    """Whether peft adapts the module of this name: its check_target_module_exists."""
    def named(names: list | str | None) -> bool:
        if isinstance(names, str):
            return bool(regex.fullmatch(names, name, timeout=0.5))
        return any(name == n or name.endswith(f".{n}") for n in names or ())

    if not named(spec["target_modules"]) or named(spec["exclude_modules"]) or _is_kept(name, spec):
        return False
    layers, lists = spec["layers_to_transform"], spec["layers_pattern"] or "[^.]*"
    if layers in (None, []):
        return True
    found = (regex.match(rf"(?:^|.*?\.){x}\.(\d+)\.", name, timeout=0.5)
             for x in ([lists] if isinstance(lists, str) else lists))
    number = next((int(match[1]) for match in found if match), None)
    return number in (layers if isinstance(layers, list) else [layers])


def _is_kept(name: str, spec: dict) -> bool:
    """Whether peft trains the module or weight of this name whole: a module around it ends in modules_to_save."""
    parts = name.split(".")
    return any(".".join(parts[:i]).endswith(tuple(spec["modules_to_save"] or ())) for i in range(1, len(parts) + 1))


def _ranks_and_scales(spec: dict, names: list[str]) -> dict[str, tuple[int, float]]:
    """Of the modules of these names, by the first pattern that fits: peft's get_pattern_key."""
    patterns = {key: [(regex.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in (spec[key] or {}).items()]
                for key in ("rank_pattern", "alpha_pattern")}
    found = {}
    for name in names:
        r, alpha = (next((value for pattern, value in patterns[key] if pattern.match(name, timeout=0.5)), spec[default])
                    for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
        if type(r) is not int or not 1 <= r <= 1 << 20 or type(alpha) not in (int, float) or not abs(alpha) < 1e9:
            raise TypeError(f"{name}: rank {files.quoted(r)}, alpha {files.quoted(alpha)}")
        found[name] = r, alpha / (math.sqrt(r) if spec["use_rslora"] else r)
    if not found:
        raise TypeError(f"target_modules {files.quoted(spec['target_modules'])} name no linear module of this model")
    return found


def require_on(m: nn.Module) -> None:
    """Inside of sibo.disabled heads hold other values, and modules compute nothing."""
    before = getattr(m, "sibo_before", None)
    if before and before.depth:
        raise ValueError(f"{type(m).__name__}: expected the method on, got it disabled; export after sibo.disabled")


def require_empty(folder: Path) -> None:
    """Older weights would be loaded in place of the export's; the backbone's own would be lost."""
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected a new folder to export to, or an empty one, got "
                         f"{'a file' if folder.is_file() else 'one with files in it'}")


def require_new(file: Path) -> None:
    """The same of a .gguf file."""
    if file.suffix != ".gguf" or file.exists():
        raise ValueError(f"--export gguf: expected a new file, named NAME.gguf, got {file}"
                         f"{', which is there' if file.exists() else ''}")
