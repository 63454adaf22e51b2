"""A run as other libraries' files, and theirs as ours: peft's LoRA folders, Hugging Face's checkpoint folders.

peft (0.21) holds W + s·AB and nothing of h0, so it takes plain LoRA, exactly, and nothing else. A Hugging Face folder
takes what is folded into the weights: all of a plain LoRA; of LoRA-SIBO all but its branch h0·[A][λsB], which stands in
a file of its own, with the weights under a name that transformers does not load alone, in silence, as another model."""

import json
import re
import shutil
from pathlib import Path

import torch
from torch import nn

import sibo
from sibo_lab import files
from sibo_lab.backbone import config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "generation_config.json")


def their_name(m: nn.Module, ours: str) -> str:
    """Hugging Face's name of a module or weight of ours: blocks.3.attn.q_proj of a LLaMA is
    model.layers.3.self_attn.q_proj. A BERT without a head is their BertModel, whose names have no prefix."""
    number = re.search(r"\.(\d+)\.", ours)
    template = ours.replace(number[0], ".{}.", 1) if number else ours
    for theirs, mine in m.names.items():
        for end in ("", ".weight"):
            if mine == template + end:
                bare = re.match(r"lm_head|classifier", theirs) or hasattr(m, "classifier") and m.classifier is None
                return ("" if bare else m.prefix) + theirs.removesuffix(end).format(number[1] if number else "")
    raise ValueError(f"{ours}: found no name of it in transformers' {type(m).__name__}, so it cannot be written there")


def to_peft(m: nn.Module, folder: Path, backbone: str) -> None:
    """Writes what peft.PeftModel.from_pretrained loads onto transformers' model of the same weights.

    ValueError for what peft cannot express: adapters, λ > 0, and full fine-tuning, which has no adapter at all."""
    s = getattr(m, "sibo", None)
    if s is None or s.method != "lora" or s.lam:
        found = "a model trained whole" if s is None else "adapters" if s.method != "lora" else f"λ = {s.lam}"
        raise ValueError(f"--export peft: found {found}, expected a plain LoRA: peft's modules never see h0, and none "
                         "is a bottleneck adapter; LoRA-SIBO can be exported with hf, folded")
    tensors, adapted = {}, []
    for name, x in m.named_modules():
        if isinstance(x, sibo.LoRA):
            adapted.append(their_name(m, name))
            tensors |= {f"base_model.model.{adapted[-1]}.lora_A.weight": x.down,
                        f"base_model.model.{adapted[-1]}.lora_B.weight": x.up}
    head = [(n, p) for n, p in m.named_parameters() if n.startswith("classifier.")]
    tensors |= {f"base_model.model.{their_name(m, n)}": p for n, p in head}
    files.write_tensors(folder / "adapter_model.safetensors", {n: p.detach() for n, p in tensors.items()}, {})
    files.write(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": backbone, "inference_mode": True, "bias": "none",
        "task_type": "SEQ_CLS" if head else "FEATURE_EXTRACTION" if hasattr(m, "classifier") else "CAUSAL_LM",
        "r": s.rank, "lora_alpha": s.alpha, "lora_dropout": s.dropout,
        "target_modules": adapted,  # whole names: of a last one alone peft would adapt every module that has it
        "modules_to_save": ["classifier", "pooler"] if head else None}, indent=2) + "\n")


def from_peft(m: nn.Module, folder: Path) -> nn.Module:
    """Puts a LoRA that peft saved onto our model `m`, in place, and returns it; ValueError for any other kind."""
    file = folder / "adapter_config.json"
    said = files.read_json(file)
    for key, plain in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("use_rslora", False),
                       ("fan_in_fan_out", False), ("rank_pattern", {}), ("alpha_pattern", {}), ("lora_bias", False)):
        if (found := said.get(key, plain)) not in (plain, None):
            raise ValueError(f"{file}: found {key} {found!r}, expected {plain!r}, as plain LoRA has it")
    stored = files.read_tensors(folder / "adapter_model.safetensors")[0]
    ours = {f"base_model.model.{their_name(m, n)}": n for n, x in m.named_modules() if isinstance(x, nn.Linear)}
    names = {n.rpartition(".lora_")[0] for n in stored if ".lora_" in n}
    if unknown := sorted(names - ours.keys()):
        raise ValueError(f"{folder}: found a LoRA on {unknown[0][:200]!r}, expected modules of this model")
    sibo.inject(m, "lora", 0.0, targets=tuple(sorted(ours[n] for n in names)), rank=said.get("r"),
                alpha=said.get("lora_alpha"), dropout=said.get("lora_dropout") or 0.0)
    back = {f"{n}.{theirs}": f"{ours[n]}.{mine}" for n in names
            for mine, theirs in (("down", "lora_A.weight"), ("up", "lora_B.weight"))}
    trained = {n: p for n, p in m.named_parameters() if p.requires_grad}
    back |= {f"base_model.model.{their_name(m, n)}": n for n in trained if n.startswith("classifier.")}
    files.assign(trained, {back.get(n, n): t for n, t in stored.items()}, folder / "adapter_model.safetensors")
    return m


def to_hugging_face(m: nn.Module, folder: Path, source: Path) -> None:
    """Folds the LoRA of `m` into its weights, in place, and writes them as a Hugging Face folder, with the files of the
    backbone's folder or .gguf file `source` beside them. With λ > 0: see `attach`.

    ValueError for adapters, which no weight holds, and for frozen_too, whose W reads h̃."""
    s = getattr(m, "sibo", None)
    if s and s.lam and s.frozen_too:
        raise ValueError("--export hf: found frozen_too, whose frozen weights read h̃; transformers has no such module")
    if s and s.lam:  # a BERT's embeddings are a module of theirs whose parts alone have names in the map
        h0 = their_name(m, f"{s.h0}.word").rpartition(".")[0] if s.h0 == "embeddings" else their_name(m, s.h0)
    if s:
        sibo.merge(m)
    folded = {n: x for n, x in m.named_modules() if isinstance(x, sibo.FoldedLoRA)}
    tensors, branch = {}, {}
    for name, p in m.state_dict().items():
        if name == "h0_down.weight" or ".lora." in name or name == "head.weight" and m.config.tie_word_embeddings:
            continue
        if (owner := name.removesuffix(".base.weight")) in folded:
            theirs, rank = their_name(m, owner), s.rank
            start = folded[owner].index * rank
            branch |= {f"{theirs}.A": m.h0_down.weight[start:start + rank], f"{theirs}.B": p[:, -rank:]}
            name, p = f"{owner}.weight", p[:, :-rank]
        tensors[their_name(m, name.replace(".base.", "."))] = p
    said = config.read_spec(source)
    head = getattr(m, "classifier", None)
    kind = {"llama": "LlamaForCausalLM", "gptj": "GPTJForCausalLM",
            "bert": "BertForSequenceClassification" if head else "BertModel"}[said["model_type"]]
    said |= {"architectures": [kind], "dtype": str(p.dtype).removeprefix("torch.")}
    if head:
        n = head.out.out_features
        said |= {"id2label": {i: f"LABEL_{i}" for i in range(n)}, "label2id": {f"LABEL_{i}": i for i in range(n)},
                 "problem_type": "regression" if n == 1 else "single_label_classification"}
    for file in TOKENIZER_FILES if source.is_dir() else ():
        if (source / file).is_file():
            files.write(folder / file, lambda draft, file=file: shutil.copyfile(source / file, draft))
    if branch:
        files.write_tensors(folder / "h0_branch.safetensors", branch, {"h0": h0})
    files.write_tensors(folder / ("folded.safetensors" if branch else "model.safetensors"), tensors,
                             {"format": "pt"})
    files.write(folder / "config.json", json.dumps(said, indent=2) + "\n")


@torch.no_grad()
def attach(theirs: nn.Module, folder: Path) -> nn.Module:
    """Puts a folded LoRA-SIBO, as to_hugging_face wrote it, into transformers' own model of that config.json, in place:
    the weights, and h0's branch as hooks: y ← y + (h0 A) B."""
    weights, _ = files.read_tensors(folder / "folded.safetensors")
    branch, said = files.read_tensors(folder / "h0_branch.safetensors")
    parameters = {n: p for n, p in theirs.named_parameters()  # tied, or of a BertModel, which we have without one
                  if n in weights or not n.startswith(("lm_head.", "pooler."))}
    files.assign(parameters, weights, folder / "folded.safetensors")
    seen = {}
    theirs.get_submodule(said["h0"]).register_forward_hook(lambda _, args, h0: seen.update(h0=h0))
    for name in {n[:-2] for n in branch}:
        def add(_, args, y, A=branch[f"{name}.A"], B=branch[f"{name}.B"]):
            return y + seen["h0"].to(A.dtype) @ A.T @ B.T
        theirs.get_submodule(name).register_forward_hook(add)
    return theirs
