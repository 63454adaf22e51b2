"""A run's card: the README.md of an export, which a hub shows first. It says only what the run's own files say, and
shows whatever stands in them as text: no name can break its front matter or its tables."""

import hashlib
import re
from pathlib import Path

from sibo_lab import cli, files
from sibo_lab.backbone import gguf, locate
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import compare
from sibo_lab.settings import Settings

METHODS = {"full": "all weights trained", "adapter": "adapters (Eq. 1)", "lora": "LoRA (Eq. 2)",
           "adapter-sibo": "adapters that also see h0, what entered the first block (Adapter-SIBO, Eq. 4)",
           "lora-sibo": "LoRA that also sees h0, what entered the first block (LoRA-SIBO, Eq. 5)"}
NOTHING = hashlib.sha256().hexdigest()  # of no examples
OF_METHOD = {"lora": ("rank", "alpha", "dropout", "frozen_too"), "adapter": ("bottleneck", "side", "skip")}
OF_RUN = ("steps", "batch_size", "lr", "warmup", "cutoff", "dtype", "base_bits", "seed")  # of config.json
PAPER = "[SIBO: A Simple Booster for Parameter-Efficient Fine-Tuning](https://arxiv.org/abs/2402.11896)"
CITATION = """@inproceedings{wen2024sibo, title = {{SIBO}: A Simple Booster for Parameter-Efficient Fine-Tuning},
  author = {Wen, Zhihao and Zhang, Jie and Fang, Yuan}, year = {2024}, url = {https://arxiv.org/abs/2402.11896},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2024}}"""
LICENCES = {  # how their own texts begin and end: with more after them they are others
    "apache-2.0": (r"\s*Apache License\s+Version 2\.0, January 2004\s.*",
                   r"(limitations under the License\.|END OF TERMS AND CONDITIONS)\s*"),
    "mit": (r"\s*(The )?MIT License( \(MIT\))?\s+((Copyright|All rights)[^\n]*\n\s*)*Permission is hereby granted.*",
            r"IN THE\s+SOFTWARE\.\s*")}


def read(run: Path) -> dict:
    """A run's result.json; {} where it was not scored. ValueError if it is malformed, or if huggingface_hub, which
    writes the front matter, is missing."""
    try:
        import huggingface_hub  # noqa: F401  slow to import
    except ImportError:
        raise ValueError("--export: a model card needs huggingface_hub: pip install huggingface_hub") from None
    return files.read_json(run / "result.json") if (run / "result.json").is_file() else {}


def write(folder: Path, kind: str, name: str, config: dict, result: dict, settings: Settings | None, source: Path,
          num_labels: int = 0) -> None:
    """Adds the card to `folder`, an export of `kind` "hf" or "peft" that goes by `name`. config: the run's config.json;
    result: its result.json; settings: those in force; source: the backbone's files; num_labels: 0 of an LLM."""
    base = _hub_id(str(config.get("backbone")), source)
    backbone, licences = base or compare.name_of(str(config.get("backbone"))), _licences(source)
    if source.is_file() and source.name != backbone:
        backbone += f" ({source.name})"  # whose name says its bits
    on = ", ".join(_tasks(config.get("test") or config.get("task")))
    versions, meta = _dict(result, "versions"), {key: result.get(key) for key in ("date", "git")}
    parts = [
        f"---\n{_front_matter(kind, name, config, result, _agreed(licences), base, num_labels)}\n---\n",
        f"# {_text(compare.name_of(name))}\n\n{_summary(folder, kind, backbone, config, settings)}\n",
        _section("Method", _table(["", ""], _method(backbone, config, result, settings))),
        _section("Data", _table(["examples", "sha256"], [
            [compare.name_of(part), x] for part, x in _dict(result, "sha256").items()
            if part != "backbone" and x != NOTHING])),
        _section("Scores", _table([f"on {on}", result.get("metric", "score"), "95 % interval", "examples"],
                                  _scores(result, num_labels))),
        _section("How to load it", _fenced(_loading(folder, kind, name, backbone, source, num_labels), "python")),
        _section("How to ask it", "" if num_labels else _asking(str(config.get("protocol", "clean")))),
        _section("How it was trained", _fenced(compare.without_folders(str(result.get("command", ""))), "sh"),
                 _table(["", ""], [[key, value] for key, value in (meta | versions).items() if value])),
        _section("Licence", _licence(licences)), _section("Citation", _fenced(CITATION, "bibtex"))]
    files.write(folder / "README.md", cli.without_secrets("\n".join(filter(None, parts))))


def _front_matter(kind: str, name: str, config: dict, result: dict, licence: dict, base: str | None,
                  num_labels: int) -> str:
    from huggingface_hub import EvalResult, ModelCardData
    task, method = "text-classification" if num_labels else "text-generation", _line(config.get("method", ""))
    on, score = ", ".join(_tasks(config.get("test") or config.get("task"))), result.get("score")
    split = "validation" if result.get("scored_on") == "validation" else None
    scored = [EvalResult(task, on, on + f" ({split})" * bool(split), _line(result.get("metric", "score")),
                         round(score, 6), dataset_split=split)] if type(score) in (int, float) else None
    return ModelCardData(
        **licence, base_model=base, library_name="peft" if kind == "peft" else "transformers", pipeline_tag=task,
        tags=list(dict.fromkeys(filter(None, ("sibo" * method.endswith("-sibo"), method.partition("-")[0], method)))),
        model_name=_line(compare.name_of(name)) or "model", eval_results=scored).to_yaml()


def _summary(folder: Path, kind: str, backbone: str, config: dict, settings: Settings | None) -> str:
    on = f", fine-tuned on {_text(', '.join(names))}" if (names := _tasks(config.get("task"))) else ""
    how = f"{_text(_known(config, settings))}, of {PAPER}" if settings else METHODS["full"]
    held = ("what was trained, to be put onto the backbone's own weights" if kind == "peft" else
            "the whole model, the backbone's weights included")
    said = files.read_json(folder / "config.json").get("sibo", {"method": "lora-folded"}) if kind == "hf" else {}
    if settings and settings.method == "lora" and said.get("method") == "lora-folded":
        held += ", with LoRA folded in"
    return f"The backbone {_text(backbone)}{on}: {how}. This folder holds {held}."


def _known(config: dict, settings: Settings | None) -> str:
    name = config.get("method") or (settings.method if settings else "full")
    return METHODS.get(name, name)


def _method(backbone: str, config: dict, result: dict, settings: Settings | None) -> list[list]:
    lam = result.get("lambda", None if settings and settings.learn_lam else settings.lam if settings else 0.0)
    rows = [["backbone", backbone], ["method", _known(config, settings)],
            [f"λ, learned, of {len(lam)} modules in their order" if isinstance(lam, list) else "λ", lam]]
    if settings:
        rows += [["λ by depth", None if settings.lam_by_depth == "even" else settings.lam_by_depth],
                 ["adapted", settings.targets], ["get h0", settings.sibo_at if settings.lam else None],
                 ["trained whole", settings.modules_to_save]]
        rows += [[key, getattr(settings, key) or None] for key in OF_METHOD[settings.method]]
    rows += [[label, f"{n:,}" if type(n := result.get(key)) is int else None] for label, key in (
        ("trained parameters", "trainable_parameters"), ("parameters", "total_parameters"))]
    return [row for row in rows + [[key, config.get(key)] for key in OF_RUN] if row[1] not in (None, (), [])]


def _scores(result: dict, num_labels: int) -> list[list]:
    """This model's row, those of its parts and of other metrics, and the baseline's."""
    def said(x: object) -> object:
        return f"{x:.4f}" if type(x) is float else x

    interval, on, rows = result.get("interval"), result.get("scored_on", "test"), []
    if "score" in result:
        between = " to ".join(str(said(x)) for x in interval) if isinstance(interval, list) else ""
        rows.append(["this model" + f" ({on})" * (on != "test"), said(result["score"]), between, result.get("n", "")])
    for key in ("parts", "more"):
        rows += [[part, said(score), "", ""] for part, score in _dict(result, key).items()]
    if "baseline_score" in result:
        guess = ("the backbone, frozen", "always the mean", "always the commonest class")[min(num_labels, 2)]
        rows.append([guess, said(result["baseline_score"]), "", result.get("baseline_n", "")])
    return rows


def _asking(protocol: str) -> str:
    """The prompt that a question stands in."""
    if protocol not in batch.PROMPTS:
        return "By the chat template of its tokenizer."
    return "\n\n".join(["In the prompt that it was tuned with:", _fenced(batch.prompt("QUESTION", protocol), "")])


def _loading(folder: Path, kind: str, name: str, backbone: str, source: Path, num_labels: int) -> str:
    """Python that loads what stands in `folder`."""
    auto = f"AutoModelFor{'SequenceClassification' if num_labels else 'CausalLM'}"
    own_code = kind == "hf" and "auto_map" in files.read_json(folder / "config.json")
    tokenizer = kind == "peft" or any(f.name.startswith(("tokenizer.", "vocab.")) for f in folder.iterdir())
    trust, labels = ", trust_remote_code=True" * own_code, f", num_labels={num_labels}" * (num_labels > 0)
    lines = [f"from transformers import {auto}" + ", AutoTokenizer" * tokenizer, "",
             f"DIR = {_line(name)!r}  # this folder, or its name on the hub"]
    if kind == "peft":
        file = f", gguf_file={source.name!r}" if source.is_file() else ""
        at = "the folder of that file" if file else "its name there, or its folder"
        lines = ["from peft import PeftModel", *lines, f"BACKBONE = {_line('FOLDER' if file else backbone)!r}  # {at}",
                 f"model = PeftModel.from_pretrained({auto}.from_pretrained(BACKBONE{labels}{file}), DIR)"]
    else:
        lines.append(f"model = {auto}.from_pretrained(DIR{trust})" + "  # transformers 4.53.3 or newer" * own_code)
    more = f"tokenizer = AutoTokenizer.from_pretrained({f'BACKBONE{file}' if kind == 'peft' else f'DIR{trust}'})"
    return "\n".join(lines + [more] * tokenizer)


# ---------------------------------------------------------------------------------------------------- names, licences


def _hub_id(backbone: str, source: Path) -> str | None:
    """Of a backbone that came from the hub; None of a folder, a file and a wheel."""
    name = locate.HUB.get(backbone, backbone)
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.A) and Path(backbone) != source else None


def _tasks(names: object) -> list[str]:
    """The tasks of config.json's `task` or `test`, without folders."""
    each = map(str, names if isinstance(names, list) else [names] if names else [])
    return [_line(compare.name_of(n)) for one in each for n in ([one] if tasks.OWN.search(one) else one.split("+"))]


def _licences(source: Path) -> dict[str, dict[str, str]]:
    """What the backbone's files say of its licence, in a front matter's words, by where they say it; of a text that is
    not among LICENCES how it "begins"."""
    from huggingface_hub import metadata_load
    if source.is_file():
        name = gguf.read(source)[0].get("general.license")
        return {"metadata, general.license,": {"license": name.lower()}} if isinstance(name, str) else {}
    found = {}
    try:
        said = metadata_load(source / "README.md") or {}
        found["README.md"] = {key: v for key, v in said.items() if key in ("license", "license_name", "license_link")
                              and isinstance(v, str) and (key != "license_link" or v.startswith("https://"))}
    except Exception:  # none there, or YAML's errors: it says nothing then
        pass
    for file in sorted(f for f in source.iterdir() if re.match(r"(LICEN[CS]E|COPYING)(\.|$)", f.name) and f.is_file()):
        text = file.read_text("utf-8", "replace")
        known = [name for name, ends in LICENCES.items() if re.fullmatch("".join(ends), text, re.S)]
        found[file.name] = {"license": known[0]} if known else {"begins": next(iter(text.strip().splitlines()), "")}
    return {where: said for where, said in found.items() if "license" in said or said.get("begins")}


def _agreed(licences: dict[str, dict[str, str]]) -> dict[str, str]:
    """The front matter's share of them, {} where they differ or are no hub's word for a licence."""
    known = [said for said in licences.values() if "license" in said]
    if len({said["license"] for said in known}) != 1 or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", known[0]["license"]):
        return {}
    return known[0]


def _licence(licences: dict[str, dict[str, str]]) -> str:
    said = [f"The backbone's {_text(where)} says {_text(x.get('license_name', x['license']))}." if "license" in x else
            f"The backbone's {_text(where)} begins: {_text(x['begins'])}" for where, x in licences.items()]
    return "\n\n".join(said) or "The backbone's files do not say what its licence is: look where it came from."


# ---------------------------------------------------------------------------------------------------------- Markdown


def _dict(result: dict, key: str) -> dict:
    return found if isinstance(found := result.get(key), dict) else {}


def _line(value: object) -> str:
    """As one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _text(value: object) -> str:
    """As Markdown that shows it, and means nothing else."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else _line(value)
    return re.sub(r"([\\`*_\[\]<>|~$&#!:@])", r"\\\1", shown)


def _table(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _fenced(code: str, language: str) -> str:
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in code)
    return f"{fence}{language}\n{shown}\n{fence}" if code.strip() else ""


def _section(title: str, *parts: str) -> str:
    body = "\n\n".join(filter(None, parts))
    return f"## {title}\n\n{body}\n" if body else ""
