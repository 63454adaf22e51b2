"""A run as other libraries' files, and theirs as ours: peft's LoRA folders (peft 0.21: plain LoRA, nothing of h0), and
Hugging Face's checkpoints: what folds into the weights. The branch h0·[A][λsB] of LoRA-SIBO gets its own file, and the
weights a name that transformers does not load, for without the branch they are another model."""

import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

import sibo
from sibo_lab import files
from sibo_lab.backbone import config
from sibo_lab.stacks import Anatomy

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "generation_config.json")
PLAIN_LORA = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
              "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}
PEFT = "base_model.model."  # begins all of peft's names


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
    what peft cannot express: adapters, λ > 0, full fine-tuning."""
    s = getattr(m, "sibo", None)
    got = "a fully trained model" if s is None else "adapters" if s.method != "lora" else s.lam and f"λ = {s.lam}"
    if got:
        raise ValueError(f"--export peft: expected a plain LoRA, got {got}: peft has no h0, no adapters; hf folds SIBO")
    loras = {their_name(m, n): x for n, x in m.named_modules() if isinstance(x, sibo.LoRA)}
    head = {PEFT + their_name(m, n): p for n, p in m.named_parameters() if n.startswith("classifier.")}
    tensors = {f"{PEFT}{n}.lora_{letter}.weight": p for n, x in loras.items()
               for letter, p in (("A", x.down), ("B", x.up))} | head
    files.write_tensors(folder / "adapter_model.safetensors", tensors, {})
    files.write(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": backbone, "inference_mode": True, "bias": "none",
        "task_type": "SEQ_CLS" if head else "FEATURE_EXTRACTION" if hasattr(m, "classifier") else "CAUSAL_LM",
        "r": s.rank, "lora_alpha": s.alpha, "lora_dropout": s.dropout,
        "target_modules": list(loras),  # full names: peft adapts every module that ends in a short one
        "modules_to_save": ["classifier", "pooler"] if head else None}, indent=2) + "\n")


def from_peft(m: nn.Module, folder: Path) -> nn.Module:
    """Puts a LoRA that peft saved onto our model `m`, in place; ValueError for any other kind."""
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    spec, stored = files.read_json(file), files.read_tensors(weights)[0]
    for key, plain in PLAIN_LORA.items():
        if spec.get(key, plain) not in (plain, None):
            raise ValueError(f"{file}: expected {key} {plain!r}, as in plain LoRA, got {files.quoted(spec[key])}")
    ours = {PEFT + their_name(m, n): n for n, x in m.named_modules() if isinstance(x, nn.Linear)}
    adapted = {n.rpartition(".lora_")[0] for n in stored if ".lora_" in n}
    if unknown := sorted(adapted - ours.keys()):
        raise ValueError(f"{folder}: expected LoRA on modules of this model, got it on {files.quoted(unknown[0])}")
    sibo.inject(m, "lora", 0.0, targets=tuple(sorted(ours[n] for n in adapted)), rank=spec.get("r"),
                alpha=spec.get("lora_alpha"), dropout=spec.get("lora_dropout") or 0.0)
    trained = {n: p for n, p in m.named_parameters() if p.requires_grad}
    names = {PEFT + their_name(m, n): n for n in trained if n.startswith("classifier.")}
    for n in adapted:
        names |= {f"{n}.lora_A.weight": f"{ours[n]}.down", f"{n}.lora_B.weight": f"{ours[n]}.up"}
    files.assign(trained, {names.get(n, n): t for n, t in stored.items()}, weights)
    return m


def to_hugging_face(m: nn.Module, folder: Path, source: Path) -> None:
    """Folds the LoRA of `m`, in place, and writes a Hugging Face folder, with config and tokenizer from the backbone's
    folder or .gguf file `source`; for λ > 0 see `attach`. ValueError for adapters and frozen_too, which do not fold."""
    s = getattr(m, "sibo", None)
    if s and s.lam and s.frozen_too:
        raise ValueError("--export hf: expected a W that reads h, got frozen_too; no W in transformers reads h̃")
    if s and s.lam and s.h0 not in (None, "blocks.0", "embed", "embeddings"):  # older adapter files name the last two
        raise ValueError(f"--export hf: expected an h0 that the first block reads, got h0={s.h0!r}")
    sibo.merge(m)
    tensors, branch = _folded(m)
    head, spec = getattr(m, "classifier", None), config.read_spec(source)
    kind = "BertForSequenceClassification" if head else m.config.architecture
    spec |= {"architectures": [kind], "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}
    if hasattr(m, "head"):
        spec["tie_word_embeddings"] = m.config.tie_word_embeddings  # false where a file had a head of its own after all
    if head:
        n = head.out.out_features
        spec |= {"id2label": {i: f"LABEL_{i}" for i in range(n)}, "label2id": {f"LABEL_{i}": i for i in range(n)},
                 "problem_type": "regression" if n == 1 else "single_label_classification"}
    for file in TOKENIZER_FILES:
        if (source / file).is_file():  # never in a .gguf file
            files.write(folder / file, lambda draft, file=file: shutil.copyfile(source / file, draft))
    if branch:
        files.write_tensors(folder / "h0_branch.safetensors", branch, {})
    files.write_tensors(folder / ("folded.safetensors" if branch else "model.safetensors"), tensors, {"format": "pt"})
    files.write(folder / "config.json", json.dumps(spec, indent=2) + "\n")


def _folded(m: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a merged model by Hugging Face's names, and h0's branch: A (r, d) and B (d_out, r) by module."""
    folded = {f"{n}.base.weight": x for n, x in m.named_modules() if isinstance(x, sibo.FoldedLoRA)}
    tensors, branch = {}, {}
    for name, p in m.state_dict().items():
        if name.endswith("h0_down.weight") or name == "head.weight" and m.config.tie_word_embeddings:
            continue
        theirs = their_name(m, name.replace(".base.", "."))
        if name in folded:
            A = folded[name].residual.down.weight.split(m.sibo.rank)[folded[name].index]
            module, p, B = theirs.removesuffix(".weight"), p[:, :-len(A)], p[:, -len(A):]
            branch |= {f"{module}.A": A, f"{module}.B": B}
        tensors[theirs] = p
    return tensors, branch


@torch.no_grad()
def attach(theirs: nn.Module, folder: Path) -> nn.Module:
    """Puts a folded LoRA-SIBO, as to_hugging_face wrote it, into transformers' model of its config.json, in place: the
    weights, and h0's branch as hooks: y ← y + (h0 A) B."""
    weights, _ = files.read_tensors(folder / "folded.safetensors")
    branch, _ = files.read_tensors(folder / "h0_branch.safetensors")
    parameters = {n: p for n, p in theirs.named_parameters()  # a tied head; a pooler that our BertModel lacks
                  if n in weights or not n.startswith(("lm_head.", "pooler."))}
    files.assign(parameters, weights, folder / "folded.safetensors")
    seen, names = {}, {n[:-2] for n in branch}
    first = theirs.get_submodule(Anatomy.of(theirs).stacks[next(iter(names))].sources[0])
    first.register_forward_pre_hook(lambda _, args: seen.update(h0=args[0]))
    for name in names:
        def add(_, args, y, A=branch[f"{name}.A"], B=branch[f"{name}.B"]):
            return y + seen["h0"].to(A.dtype) @ A.T @ B.T
        theirs.get_submodule(name).register_forward_hook(add)
    return theirs
