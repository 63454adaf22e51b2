"""A run as a Hugging Face folder: what folds into the weights. The branch h0·[A][λsB] of LoRA-SIBO gets its own file,
and the weights a name that transformers does not load, for without the branch they are another model."""

import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import sibo
from sibo_lab import files
from sibo_lab.backbone import config, tokenizer_out
from sibo_lab.export import require_empty, their_name
from sibo_lab.stacks import Anatomy

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe",
                   "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*")


def write(m: nn.Module, folder: Path, source: Path) -> None:
    """Folds the LoRA of `m`, in place, and writes a Hugging Face folder, with config and tokenizer from the backbone's
    folder or .gguf file `source`; for λ > 0 see `attach`. ValueError for adapters and frozen_too, which do not fold,
    and for a `folder` with files in it."""
    require_empty(folder)
    s = getattr(m, "sibo", None)
    if s and s.lam and s.frozen_too:
        raise ValueError("--export hf: expected a W that reads h, got frozen_too; no W in transformers reads h̃")
    if s and s.lam and s.h0 not in (None, "blocks.0", "embed", "embeddings"):  # older adapter files name the last two
        raise ValueError(f"--export hf: expected an h0 that the first block reads, got h0={s.h0!r}")
    sibo.merge(m)
    tensors, branch = _folded(m)
    head, spec = getattr(m, "classifier", None), config.read_spec(source)
    kind = "BertForSequenceClassification" if head else m.config.architecture
    spec.pop("torch_dtype", None)  # the older name of dtype
    spec |= {"architectures": [kind], "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}
    if hasattr(m, "head"):  # one that was adapted or trained whole is no longer the embedding
        spec["tie_word_embeddings"] = "lm_head.weight" not in tensors
    if head:
        n = head.out.out_features
        spec |= {"id2label": {i: f"LABEL_{i}" for i in range(n)}, "label2id": {f"LABEL_{i}": i for i in range(n)},
                 "problem_type": "regression" if n == 1 else "single_label_classification"}
    for name, content in _tokenizer(source).items():
        files.write(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):  # none in a .gguf file
        files.write(folder / file.relative_to(source), lambda draft, file=file: shutil.copyfile(file, draft))
    if branch:
        files.write_tensors(folder / "h0_branch.safetensors", branch, {})
    files.write_tensors(folder / ("folded.safetensors" if branch else "model.safetensors"), tensors, {"format": "pt"})
    files.write(folder / "config.json", json.dumps(spec, indent=2) + "\n")


def _tokenizer(source: Path) -> dict[str, dict]:
    """What tokenizer_out makes of a .gguf file's, or {}, and a line on stderr, where tokenizer.json cannot say it."""
    try:
        return tokenizer_out.from_gguf(source) if source.suffix == ".gguf" else {}
    except ValueError as e:
        print(f"{e}; the weights are written without a tokenizer", file=sys.stderr)
        return {}


def _folded(m: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a merged model by Hugging Face's names, and h0's branch: A (r, d) and B (d_out, r) by module."""
    folded = {f"{n}.base.weight": x for n, x in m.named_modules() if isinstance(x, sibo.FoldedLoRA)}
    tensors, branch = {}, {}
    for name, p in m.state_dict().items():
        if name.endswith("h0_down.weight") or name == "head.weight" and p.data_ptr() == m.embed.weight.data_ptr():
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
    """Puts a folded LoRA-SIBO, as `write` wrote it, into transformers' model of its config.json, in place: the
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
