"""Runs side by side: mean ± standard deviation over seeds, and the difference from the plain method. The official code
reports one seed per number, but seeds often differ more than methods do."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from sibo_lab import cli, files
from sibo_lab.evaluation import metrics

PLAIN = {"lam": 0.0, "lam_by_depth": "even", "learn_lam": False, "sibo_at": None, "frozen_too": False,
         "skip": "mixed"}  # settings without h0
REMEDIES = {"stochastic_depth": 0.0, "similarity_loss": 0.0}  # others than h0, off
OLD = {"score_by": "answers", "lam_by_depth": "even"} | REMEDIES  # what config.json does not say in older runs
TABLE = ("backbone", "task", "test", "score_on", "score_by", "limit")  # what all runs of a table share
AGAINST = "against plain (95 %)"
ASIDE = ("out", "data_dir", "log")  # of this machine, and how a run is followed: they change no number


@dataclass(frozen=True)
class Done:
    """A finished run, as it is saved too."""

    config: dict  # config.json
    result: dict  # result.json
    right: dict[str, str]  # by task, which answers were right: "0110…" (answers.jsonl)
    losses: Sequence[float] = ()  # mean training loss of each quarter of the steps (metrics.jsonl)
    answers: dict[str, list[float]] = field(default_factory=dict)  # by task, the loss of each right answer, in nats
    where: str = ""  # it was read; not saved


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seeds."""

    runs: dict[int, Done]  # by seed
    plain: dict[int, Done]  # the same without h0, and without other remedies if there are such runs

    @property
    def config(self) -> dict:
        return next(iter(self.runs.values())).config

    @property
    def first(self) -> dict:
        return next(iter(self.runs.values())).result

    def over_seeds(self, key: str) -> np.ndarray:
        """One figure of result.json, for each seed."""
        return np.array([run.result[key] for run in self.runs.values()])


def read(places: Sequence[str | Path]) -> list[Done]:
    """All finished runs in and below folders, and in files from `save`; FileNotFoundError for none."""
    runs = []
    for place in map(Path, places):
        if place.suffix == ".jsonl" and place.is_file():
            lines = enumerate(place.read_text("utf-8").splitlines(), 1)
            runs += [_saved(line, f"{place}, line {i}") for i, line in lines]
        elif not place.is_dir():
            raise FileNotFoundError(f"{place}: expected a folder of runs, or a .jsonl file of saved ones, got neither")
        runs += map(_finished, sorted(file.parent for file in place.rglob("result.json")))
    if not runs:
        raise FileNotFoundError(f"{', '.join(map(str, places))}: expected finished runs (with a result.json), got none")
    return runs


def _saved(line: str, where: str) -> Done:
    try:
        run = Done(**json.loads(line))
        if {"seed", "method", "lam"} <= run.config.keys() and "score" in run.result:
            return replace(run, config=OLD | run.config, where=where)
    except (ValueError, TypeError, AttributeError):
        pass
    raise ValueError(f"{where}: expected a run that eval.py --table --save wrote, got {files.quoted(line)}")


def _finished(folder: Path) -> Done:
    right, answers = {}, {}
    for answer in _lines(folder / "answers.jsonl"):
        if "right" in answer:
            right[answer["task"]] = right.get(answer["task"], "") + str(int(answer["right"]))
        if "loss" in answer:
            lost = math.nan if answer["loss"] is None else answer["loss"]
            answers.setdefault(answer["task"], []).append(round(lost, 5))
    return Done(OLD | files.read_json(folder / "config.json"), files.read_json(folder / "result.json"), right,
                quarters(losses(folder)), answers, str(folder))


def losses(folder: Path) -> np.ndarray:
    """Of each training step; nan where it was skipped."""
    return np.array([line["loss"] for line in _lines(folder / "metrics.jsonl")], float)


def quarters(loss: np.ndarray) -> list[float]:
    """The mean of each quarter of the steps; empty for fewer than four."""
    return [float(np.nanmean(part)) for part in np.array_split(loss, 4)] if len(loss) >= 4 else []


def _lines(file: Path) -> list[dict]:
    return list(map(json.loads, file.read_text("utf-8").splitlines())) if file.is_file() else []


def save(runs: Sequence[Done], file: Path) -> None:
    """One line of JSON per run, without ASIDE."""
    lines = []
    for run in map(asdict, runs):
        del run["where"]
        for key in ASIDE:
            run["config"].pop(key, None)
        run["result"]["command"] = without_folders(run["result"]["command"])
        lines.append(json.dumps(run) + "\n")
    files.write(file, "".join(lines))


def without_folders(command: str) -> str:
    """A command line that holds on other machines too."""
    return re.sub(r""" --(data-dir|out|results)[ =]('[^']*'|"[^"]*"|[^\s'"])*""", "", command)


def groups(runs: Sequence[Done]) -> list[list[SeedGroup]]:
    """The rows of each table; ValueError names two runs with one place in it and other results, and two that would be
    compared but learned from or were scored on other examples."""
    def key(config):
        return json.dumps({k: v for k, v in sorted(config.items()) if k not in ("seed", *ASIDE)})

    def order(g):
        return g.config["method"], g.config["lam"], g.config["sibo_at"] or "", g.config["lr"]

    tables = {}
    for run in runs:
        rows = tables.setdefault(json.dumps([run.config[k] for k in TABLE]), {})
        same = rows.setdefault(key(run.config), SeedGroup({}, {})).runs.setdefault(run.config["seed"], run)
        if _found(same) != _found(run):
            raise ValueError(f"{same.where} and {run.where}: expected one run of {run.config['method']} with seed "
                             f"{run.config['seed']} and these settings, got two with other results; leave one out")
    for rows in tables.values():
        for g in rows.values():
            config = g.config | PLAIN | {"method": g.config["method"].removesuffix("-sibo")}
            plain = rows.get(key(config | REMEDIES)) or rows.get(key(config))
            if plain and plain is not g:
                g.plain.update(plain.runs)
                for pair in _pairs(g):
                    _require_same_examples(*pair)
    return [sorted(rows.values(), key=order) for rows in tables.values()]


def _found(run: Done) -> str:
    return json.dumps([run.result.get(key) for key in ("score", "loss", "similarity", "sha256")], sort_keys=True)


def _require_same_examples(ours: Done, plain: Done) -> None:
    a, b = (run.result.get("sha256", {}) for run in (ours, plain))
    for name in sorted(a.keys() & b.keys()):
        if a[name] != b[name]:
            what = name if name == "backbone" else f"{name} examples"
            raise ValueError(f"{ours.where} and {plain.where}: expected the same {what}, to compare them, got "
                             f"sha256 {a[name][:9]}… and {b[name][:9]}…; leave one out, or repeat it on the other's")


def difference(group: SeedGroup) -> metrics.Difference | None:
    """The score minus the plain method's: Student's t over equal seeds (same data, same order), or for one seed the
    normal interval over the test examples."""
    pairs = _pairs(group)
    if not pairs:
        return None
    each = np.array([ours.result["score"] - plain.result["score"] for ours, plain in pairs])
    mean, n = float(each.mean()), len(each)
    if n > 1:
        return metrics.Difference(mean, metrics.student_t(n - 1) * float(each.std(ddof=1)) / math.sqrt(n))
    ours, plain = pairs[0]
    tests = [np.array(list(ours.right[t]), float) - np.array(list(plain.right[t]), float) for t in ours.right]
    if not tests or min(map(len, tests)) < 2:
        return metrics.Difference(mean, math.nan)
    variance = sum(d.var(ddof=1) / len(d) / len(tests) ** 2 for d in tests)  # the score is the mean of the tests'
    return metrics.Difference(mean, 1.96 * math.sqrt(variance))


def loss_difference(group: SeedGroup) -> metrics.Difference | None:
    """The held-out loss per answer minus the plain method's, paired by seed and example; below 0 is better."""
    pairs = _pairs(group)
    if not pairs or not all(run.answers for pair in pairs for run in pair):
        return None
    return metrics.paired(np.array([np.concatenate([np.subtract(ours.answers[t], plain.answers[t])
                                                    for t in ours.answers]) for ours, plain in pairs]))


def _pairs(group: SeedGroup) -> list[tuple[Done, Done]]:
    return [(ours, group.plain[seed]) for seed, ours in sorted(group.runs.items()) if seed in group.plain]


def tables(runs: Sequence[Done], markdown: bool = False) -> str:
    return "\n\n".join(_table(rows, markdown) for rows in groups(runs))


def _table(rows: Sequence[SeedGroup], markdown: bool) -> str:
    config, result = rows[0].config, rows[0].first
    varying = [k for k in config if k not in (*TABLE, *ASIDE, "seed", "device", "method")
               and len({json.dumps(g.config.get(k)) for g in rows}) > 1]
    scale, digits = (100, ".1f") if result["metric"] == "accuracy" else (1, ".3f")
    on = " (validation)" * (config["score_on"] == "validation")
    scored, lost = result["metric"] != "loss", all(
        run.result.get("loss") is not None for g in rows for run in g.runs.values())
    cells = [["method", *varying, "seeds", *[result["metric"] + " %" * (scale == 100) + on, AGAINST] * scored,
              *["loss per answer" + on * (not scored), f"loss {AGAINST}", "could show"] * lost,
              *result["parts"], "similarity", "trained parameters"]]
    for g in rows:
        d, more = difference(g), loss_difference(g)
        cells.append([
            g.config["method"],
            *("" if x is None else f"{x:g}" if isinstance(x, float) else x for x in map(g.config.get, varying)),
            len(g.runs),
            *[_over_seeds(scale * g.over_seeds("score"), digits), _against(d, scale, digits)] * scored,
            *[_over_seeds(g.over_seeds("loss"), ".3f") if lost else "", _against(more, 1, ".4f"),
              f"{more.could_show:.4f}" if more else ""] * lost,
            *(f"{scale * np.mean([x[part] for x in g.over_seeds('parts')]):{digits}}" for part in result["parts"]),
            f"{g.over_seeds('similarity').mean():.3f}",
            f"{g.first['trainable_parameters']:,}"])
    title = f"{config['backbone']} on {config['task']}"
    if markdown:
        head, *lines = ["| " + " | ".join(map(str, row)) + " |" for row in cells]
        return "\n".join([f"**{title}**", "", head, "|" + "---|" * len(cells[0]), *lines])
    return f"{title}\n{cli.format_table(cells)}"


def _over_seeds(values: np.ndarray, digits: str) -> str:
    return f"{values.mean():{digits}}" + (f" ± {values.std(ddof=1):{digits}}" if len(values) > 1 else "")


def _against(d: metrics.Difference | None, scale: float, digits: str) -> str:
    if d is None:
        return ""
    half = " (no interval)" if math.isnan(d.half) else f" ± {scale * d.half:{digits}}"
    return f"{scale * d.mean:+{digits}}{half}"


def name(g: SeedGroup, rows: Sequence[SeedGroup]) -> str:
    """A label: what sets a group apart from the others of its method."""
    c = g.config
    labels = {"lam": "λ {lam}", "sibo_at": "{sibo_at}", "frozen_too": "frozen too", "skip": "{skip} skip",
              "side": "side {side}", "lam_by_depth": "λ {lam_by_depth}", "learn_lam": "λ learned",
              "stochastic_depth": "stochastic depth {stochastic_depth}",
              "similarity_loss": "similarity loss {similarity_loss}", "lr": "lr {lr}"}
    same = [other.config for other in rows if other.config["method"] == c["method"]]
    own = [k for k in labels if c[k] and len({json.dumps(other[k]) for other in same}) > 1]
    return ", ".join([c["method"], *(labels[k].format_map(c) for k in own)])


def side_by_side(results: Sequence[dict]) -> str:
    """The frozen model and each run, as a table."""
    r = results[0]
    score = (lambda x: f"{100 * x:.1f} %") if r["metric"] == "accuracy" else "{:.4f}".format

    def loss(x):
        return "" if x is None else f"{x:.4f}"

    rows = [
        ("", "before", "{method}".format_map),
        (r["metric"], score(r["baseline_score"]), lambda x: score(x["score"])),
        *((f"  {p}", "", lambda x, p=p: score(x["parts"][p])) for p in r["parts"]),
        *[("loss per answer", loss(r.get("baseline_loss")), lambda x: loss(x.get("loss")))] * (
            r.get("loss") is not None and r["metric"] != "loss"),
        ("scored on", r["baseline_n"], "{n}".format_map),
        ("λ", "", lambda x: f"{np.mean(x['lambda']):.3g}"),
        ("similarity, last five layers", f"{r['baseline_similarity']:.3f}", "{similarity:.3f}".format_map),
        ("trainable parameters", 0, "{trainable_parameters:,}".format_map),
        ("  share", "", lambda x: f"{x['trainable_parameters'] / x['total_parameters']:.2%}"),
        ("training seconds", "", "{train_seconds:.0f}".format_map),
        ("tokens/s", "", "{tokens_per_second:.0f}".format_map),
        ("peak memory, GB", "", lambda x: f"{x['peak_memory_bytes'] / 1e9:.2f}")]
    return cli.format_table([[label, before, *map(of, results)] for label, before, of in rows])


def name_of(backbone_or_task: str) -> str:
    """The last part of a path or hub id, without a file's ending (but with a name's dots: llama-3.2-1b)."""
    return re.sub(r"\.(gguf|parquet|(jsonl?|csv)(\.gz)?)$", "", Path(backbone_or_task).name)
