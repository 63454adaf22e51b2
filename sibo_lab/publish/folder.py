"""A run as a Hugging Face folder, which transformers opens without this project.

What folds into the weights is a plain LLaMA, GPT-J or BERT. All else brings modeling_sibo.py along, made for its
family; its model_type and its file of weights have names of their own, which transformers' classes refuse: without the
code it would be another model."""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

import sibo
from sibo_lab import files
from sibo_lab.backbone import config, tokenizer, tokenizer_out
from sibo_lab.backbone.subwords import QWEN2, WORDS, Tokenizer, WordPiece
from sibo_lab.backbone.tokenizer_json import DEFAULTS, json_or_none
from sibo_lab.export import require_empty, require_on, their_name

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe",
                   "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
STEPS = {"GPT2Tokenizer": (WORDS, False), "Qwen2Tokenizer": (QWEN2, True)}  # how they split, and NFC
PARTS = {"bert": {"attn": "attention.output.dropout", "mlp": "output.dropout"}, "gptj": {"attn": "attn", "mlp": "mlp"}}
LLAMAS_PARTS = {"attn": "self_attn", "mlp": "mlp"}  # of a block, by our names, whose output is the same
CODE = Path(__file__).with_name("modeling_sibo.py")


def write(m: nn.Module, folder: Path, source: Path, classes: Sequence[str] = (), ends: Sequence[int] = ()) -> None:
    """Writes `m` as it is (a plain LoRA is folded first, in place) to a new `folder`, with config and tokenizer from
    the backbone's folder or .gguf file `source`; `classes` are the names of a classifier's, `ends` the ids that end
    what an LLM writes (none: the backbone's). ValueError, before anything is folded or written, for what no module of
    transformers does, for a disabled model, and for a `folder` with files in it."""
    require_empty(folder)
    require_on(m)
    spec, spoken = config.read_spec(source), _tokenizer(source)
    if ends and hasattr(m, "head"):
        said = spoken.get("generation_config.json") or json_or_none(source / "generation_config.json")
        spoken["generation_config.json"] = _generation_config(said, spec, ends)
    s = getattr(m, "sibo", None)
    if s and s.method == "lora" and not s.lam:
        sibo.merge(m)
    layers = {n: x for n, x in m.named_modules() if isinstance(x, sibo.SIBOLayer)}
    names = {n: their_module(m, n, s) for n in layers}
    told = method(m, layers, names) if layers else None
    tensors = dict(_tensors(m, layers, names))
    files.write_tensors(  # first: what may not fit on the disk
        folder / ("model.sibo.safetensors" if told else "model.safetensors"), tensors, {"format": "pt"})
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):  # none in a .gguf file
        files.write(folder / file.relative_to(source), lambda draft, file=file: shutil.copyfile(file, draft))
    for name, content in spoken.items():
        files.write(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    spec = _config(m, spec, tensors, classes)
    if told:
        kind, family = spec["architectures"][0], spec["model_type"]
        auto = f"AutoModel{kind[kind.index('For'):]}" if "For" in kind else "AutoModel"
        files.write(folder / CODE.name, code(kind, family))
        reads = spoken.get("tokenizer_config.json", {}).get("tokenizer_class")  # here for transformers 4's pipelines
        spec |= {
            "model_type": f"sibo-{family}", "architectures": ["SIBOModel"], "tokenizer_class": reads, "sibo": told,
            "auto_map": {"AutoConfig": f"{CODE.stem}.SIBOConfig", auto: f"{CODE.stem}.SIBOModel"}}
    files.write(folder / "config.json", json.dumps(spec, indent=2) + "\n")


def their_module(m: nn.Module, ours: str, s: sibo.Settings) -> str:
    """Hugging Face's name of a module of ours. ValueError if they have none that reads and returns the same."""
    part = re.fullmatch(r"blocks\.(\d+)(?:\.(attn|mlp))?", ours)
    if not part:
        return their_name(m, ours)
    family = next(name for name in ("bert", "gptj", "llama") if name in type(m).__name__.lower())
    if family == "bert" and part[2] and s.side != "out":
        raise ValueError(f"{ours}: expected a module that transformers' BERT has too, got side={s.side!r} of one that "
                         "it splits; adapt its linear modules, or use side='out'")
    block = their_name(m, f"blocks.{part[1]}.mlp_norm" if family != "gptj" else f"blocks.{part[1]}.norm")
    inside = PARTS.get(family, LLAMAS_PARTS)[part[2]] if part[2] else ""
    return f"{block[:block.index(f'.{part[1]}.')]}.{part[1]}.{inside}".rstrip(".")


def method(m: nn.Module, layers: dict[str, sibo.SIBOLayer], names: dict[str, str]) -> dict:
    """What config.json says under "sibo", by their names. ValueError for what modeling_sibo.py does not do."""
    s, wide = m.sibo, m.config.hidden_size
    first = {None: 0, "embed": 0, "embeddings": 0} | {f"blocks.{i}": i for i in range(m.config.num_hidden_layers)}
    if s.lam and s.h0 not in first:  # older adapter files name the embedding
        raise ValueError(f"--export hf: expected an h0 that a block reads, got h0={s.h0!r}")
    for n, x in layers.items():
        if not isinstance(x.base, nn.Linear) and x.down is not None and x.down.shape[1] != wide:
            raise ValueError(f"{n}: expected a linear module, or one {wide} wide, got {x.down.shape[1]}")
    folded = any(isinstance(x, sibo.FoldedLoRA) for x in layers.values())
    told = {"method": f"{s.method}{'-folded' * folded}", "rank": s.rank if s.method == "lora" else s.bottleneck}
    if s.method == "lora":
        told |= {"scale": s.alpha / s.rank, "dropout": s.dropout}
    else:
        told |= {"side": s.side, "skip": s.skip}
    if s.frozen_too and any(x.down is None for x in layers.values()):
        told |= {"rank": 0}  # its weight reads h̃, and holds W_down W_up
    h0 = their_module(m, f"blocks.{first[s.h0]}", s)
    lam = {names[n]: x.lam_start if x.lam_logit is None else x.lam().item() for n, x in layers.items()}
    return told | {"frozen_too": s.frozen_too, "h0": h0, "lam": lam}


def code(kind: str, family: str) -> str:
    """modeling_sibo.py for transformers' class `kind`, such as GPTJForCausalLM."""
    text = CODE.read_text("utf-8").replace("LlamaForCausalLM", kind).replace("sibo-llama", f"sibo-{family}")
    return text.replace("LlamaConfig", re.sub("For.*|Model", "Config", kind))


def _config(m: nn.Module, spec: dict, tensors: dict[str, Tensor], classes: Sequence[str]) -> dict:
    """The backbone's config.json, of these weights."""
    head = getattr(m, "classifier", None)
    spec = {k: v for k, v in spec.items() if k not in ("torch_dtype", "auto_map")}  # dtype's older name; code not here
    spec |= {"architectures": ["BertForSequenceClassification" if head else m.config.architecture],
             "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}
    if hasattr(m, "head"):  # one that was adapted or trained whole is no longer the embedding
        spec["tie_word_embeddings"] = "lm_head.weight" not in tensors
    if head:
        n = head.out.out_features
        named = list(classes) or [f"LABEL_{i}" for i in range(n)]
        spec |= {"id2label": dict(enumerate(named)), "label2id": {name: i for i, name in enumerate(named)},
                 "problem_type": "regression" if n == 1 else "single_label_classification"}
    return spec


def _tokenizer(source: Path) -> dict[str, dict]:
    """The contents, by name, of the tokenizer's files that are not copied: of a .gguf file all, or {}, and a line on
    stderr, where tokenizer.json cannot say it."""
    if source.suffix != ".gguf":
        try:
            return {"tokenizer_config.json": _tokenizer_config(source, tokenizer.read(source))}
        except FileNotFoundError:
            return {}
    try:
        return tokenizer_out.from_gguf(source)
    except ValueError as e:
        print(f"{e}; the weights are written without a tokenizer", file=sys.stderr)
        return {}


def _tokenizer_config(source: Path, t: Tokenizer) -> dict:
    """The backbone's, and in it the class with which transformers, whatever the model_type, gives the ids of `t`."""
    said, kind, own = json_or_none(source / "tokenizer_config.json"), t.kind, {}
    if isinstance(t, WordPiece):
        own = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    elif kind in STEPS and STEPS[kind] != (t.words, t.nfc):  # they run their own steps, not the file's
        kind, own = None, {f"{role}_token": token for role, token in DEFAULTS[kind].items()}
    elif t.file.name == "tokenizer.model" and not (source / "tokenizer.json").is_file():
        kind, own = "LlamaTokenizer", {"add_bos_token": True, "legacy": kind is None}
    return own | said | {"tokenizer_class": kind or "PreTrainedTokenizerFast"}


def _generation_config(said: dict, spec: dict, ends: Sequence[int]) -> dict:
    """What the backbone's says, or config.json where it has none: with these ends, without what scoring did without."""
    said = said or {key: i for key in ("bos_token_id", "pad_token_id") if (i := spec.get(key)) is not None}
    aside = {"_from_model_config", *tokenizer.PLAIN_SEARCH}
    return {key: x for key, x in said.items() if key not in aside} | {"eos_token_id": list(ends)}


def _tensors(m: nn.Module, layers: dict[str, sibo.SIBOLayer], names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The weights by Hugging Face's names; of each adapted module also W_down (r, d_in) and W_up (d_out, r)."""
    for name, p in m.state_dict().items():
        if name in ("head.weight", "head.base.weight") and p.data_ptr() == m.embed.weight.data_ptr():  # tied
            continue
        owner, _, leaf = name.rpartition(".")
        x = layers.get(owner.removesuffix(".base"))
        if name.endswith((".h0_down.weight", ".lam_logit")):
            continue  # below, and in config.json
        if x and leaf in ("down", "up"):
            yield f"{names[owner]}.sibo.{leaf}", p
        elif isinstance(x, sibo.FoldedLoRA) and leaf == "weight":
            down = x.residual.down.weight.split(m.sibo.rank)[x.index]
            yield their_name(m, f"{x.name}.weight"), p[:, :-len(down)]
            yield from ((f"{names[x.name]}.sibo.down", down), (f"{names[x.name]}.sibo.up", p[:, -len(down):]))
        else:
            yield their_name(m, name.replace(".base.", ".")), p
    for n, x in layers.items():
        if x.down is None and not isinstance(x, sibo.FoldedLoRA):  # frozen_too, merged
            d_out, d_in = x.base.weight.shape
            yield f"{names[n]}.sibo.down", x.base.weight.new_empty(0, d_in)
            yield f"{names[n]}.sibo.up", x.base.weight.new_empty(d_out, 0)
