"""Runs side by side: mean ± standard deviation over seeds, and the difference to the plain method with an interval.

Reads what train.py left in run folders (config.json, result.json, answers.jsonl, metrics.jsonl) and nothing else. The
official code reports one seed a number; differences between seeds are often larger than those between methods, so a
difference stands here only beside its interval: over several seeds Student's t of the differences of equal seeds (same
data, same order), with one seed the normal interval over the test examples, each answered by both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sibo_lab import cli, files
from sibo_lab.evaluation import metrics

PLAIN = {"lam": 0.0, "learn_lam": False, "sibo_at": None, "frozen_too": False, "skip": "mixed"}  # settings without h0
NOT_IN_TABLE = ("seed", "out", "data_dir", "device", "backbone", "task", "test", "score_on", "limit")


@dataclass(frozen=True)
class Done:
    """A finished run: its settings (config.json), what came of it (result.json), by test task which of its answers were
    right (answers.jsonl): "0110…", and the mean training loss of each quarter of its steps (metrics.jsonl)."""

    config: dict
    result: dict
    right: dict[str, str]
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in their seeds only."""

    runs: dict[int, Done]  # by seed
    plain: dict[int, Done] | None  # the same without h0

    @property
    def config(self) -> dict:
        return next(iter(self.runs.values())).config

    @property
    def first(self) -> dict:
        return next(iter(self.runs.values())).result

    def over_seeds(self, key: str) -> np.ndarray:
        """One figure of result.json, of each seed."""
        return np.array([run.result[key] for run in self.runs.values()])


def read(places: Sequence[str | Path]) -> list[Done]:
    """All finished runs in and below the folders, and those that `save` wrote. FileNotFoundError if there is none."""
    found = []
    for place in map(Path, places):
        if place.suffix == ".jsonl":
            found += [_saved(place, i, line)
                      for i, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1)]
        elif not place.is_dir():
            raise FileNotFoundError(f"{place}: no such folder, expected one with runs in it, or a .jsonl of saved runs")
        for folder in sorted(f.parent for f in place.rglob("result.json")):
            found.append(Done(files.read_json(folder / "config.json"),
                              files.read_json(folder / "result.json"), _right(folder / "answers.jsonl"),
                              _quarters(losses(folder))))
    if not found:
        raise FileNotFoundError(f"{', '.join(map(str, places))}: found no finished run (a folder with result.json)")
    return found


def _saved(file: Path, number: int, line: str) -> Done:
    try:
        run = Done(**json.loads(line))
        if {"seed", "method", "lam"} <= run.config.keys() and "score" in run.result:
            return run
    except (ValueError, TypeError, AttributeError):
        pass
    raise ValueError(f"{file}, line {number}: found {line[:40]!r}…, expected a run that eval.py --table --save wrote")


def _right(file: Path) -> dict[str, str]:
    right: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        answer = json.loads(line)
        if "right" in answer:
            right[answer["task"]] = right.get(answer["task"], "") + str(int(answer["right"]))
    return right


def losses(folder: Path) -> np.ndarray:
    """The training loss of each step (metrics.jsonl); nan where a step was skipped."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return np.array([json.loads(line)["loss"] for line in lines], float)


def _quarters(loss: np.ndarray) -> list[float]:
    return [float(np.nanmean(quarter)) for quarter in np.array_split(loss, 4)] if len(loss) >= 4 else []


def save(runs: Sequence[Done], file: Path) -> None:
    """A line of JSON a run, without what only its machine knows: the paths of its data and of its folder."""
    folders = r""" --(data-dir|out)[ =]('[^']*'|"[^"]*"|[^\s'"])*"""
    lines = [asdict(replace(run, config={k: v for k, v in run.config.items() if k not in ("data_dir", "out")},
                            result=run.result | {"command": re.sub(folders, "", run.result["command"])}))
             for run in runs]
    files.write(file, "".join(json.dumps(line) + "\n" for line in lines))


def groups(runs: Sequence[Done]) -> list[list[SeedGroup]]:
    """A table's rows, for each table: runs of one backbone, tasks and test set belong together."""
    def key(config: dict, without: Sequence[str] = ("seed", "out", "data_dir")) -> str:
        return json.dumps({k: v for k, v in sorted(config.items()) if k not in without})

    tables: dict[str, dict[str, dict[int, Done]]] = {}
    for run in runs:
        c = run.config
        where = json.dumps([c[k] for k in ("backbone", "task", "test", "score_on", "limit")])
        tables.setdefault(where, {}).setdefault(key(c), {})[c["seed"]] = run
    found = []
    for rows in tables.values():
        found.append([SeedGroup(same, rows.get(key(c | PLAIN | {"method": c["method"].removesuffix("-sibo")}))
                            if c["method"].endswith("-sibo") else None)
                      for same in rows.values() for c in [next(iter(same.values())).config]])
        found[-1].sort(key=lambda g: (g.config["method"], g.config["lam"], g.config["sibo_at"] or "", g.config["lr"]))
    return found


def difference(group: SeedGroup) -> tuple[float, float] | None:
    """Mean difference of the score to the plain method's, and half the width of its 95 % interval (nan: unknown)."""
    seeds = sorted(set(group.runs) & set(group.plain or {}))
    if not seeds:
        return None
    pairs = [(group.runs[s], group.plain[s]) for s in seeds]
    each = np.array([a.result["score"] - b.result["score"] for a, b in pairs])
    if len(each) > 1:
        return float(each.mean()), metrics.student_t(len(each) - 1) * float(each.std(ddof=1)) / math.sqrt(len(each))
    right = [(pairs[0][0].right[t], pairs[0][1].right[t]) for t in pairs[0][0].right]
    if not right or min(len(a) for a, _ in right) < 2:
        return float(each[0]), math.nan
    variance = 0.0
    for a, b in right:  # of each test's mean; the score is the mean of the tests
        by_example = np.array(list(a), dtype=float) - np.array(list(b), dtype=float)
        variance += by_example.var(ddof=1) / len(a) / len(right) ** 2
    return float(each[0]), 1.96 * math.sqrt(variance)


def tables(runs: Sequence[Done], markdown: bool = False) -> str:
    """Every table of the runs as text or Markdown."""
    return "\n\n".join(_table(rows, markdown) for rows in groups(runs))


def _table(rows: Sequence[SeedGroup], markdown: bool) -> str:
    first = next(iter(rows[0].runs.values()))
    shown = ["method"] + [k for k in first.config if k not in (*NOT_IN_TABLE, "method")
                          and len({json.dumps(g.config.get(k)) for g in rows}) > 1]
    metric, scale = first.result["metric"], 100 if first.result["metric"] == "accuracy" else 1
    digits = 1 if scale == 100 else 3
    parts = list(first.result["parts"])
    on = " (validation)" if first.config["score_on"] == "validation" else ""
    cells = [[*shown, "seeds", metric + (" %" if scale == 100 else "") + on, "against plain (95 %)", *parts,
              "similarity", "trained parameters"]]
    for g in rows:
        score, d = scale * g.over_seeds("score"), difference(g)
        spread = f" ± {score.std(ddof=1):.{digits}f}" if len(score) > 1 else ""
        against = "" if d is None else f"{scale * d[0]:+.{digits}f}" + (
            " (no interval)" if math.isnan(d[1]) else f" ± {scale * d[1]:.{digits}f}")
        cells.append([*("" if g.config[k] is None else f"{g.config[k]:g}" if isinstance(g.config[k], float)
                        else str(g.config[k]) for k in shown), str(len(score)), f"{score.mean():.{digits}f}{spread}",
                      against, *(f"{scale * np.mean([part[p] for part in g.over_seeds('parts')]):.{digits}f}"
                                 for p in parts),
                      f"{g.over_seeds('similarity').mean():.3f}",
                      f"{g.first['trainable_parameters']:,}"])
    title = f"{first.config['backbone']} on {first.config['task']}"
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([f"**{title}**", "", lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])
    return f"{title}\n{cli.format_table(cells)}"


def name(g: SeedGroup, rows: Sequence[SeedGroup]) -> str:
    """What sets a group apart from the others, as a label."""
    c, varying = g.config, []
    for k in ("lam", "sibo_at", "frozen_too", "skip", "side", "learn_lam", "lr"):
        if len({json.dumps(o.config[k]) for o in rows if o.config["method"] == c["method"]}) > 1 and c[k]:
            varying.append({"lam": f"λ {c[k]}", "frozen_too": "frozen too", "learn_lam": "λ learned",
                            "lr": f"lr {c[k]}", "skip": f"{c[k]} skip", "side": f"side {c[k]}"}.get(k, str(c[k])))
    return ", ".join([c["method"], *varying])


def side_by_side(results: Sequence[dict]) -> str:
    """The frozen model and each run side by side."""
    r = results[0]
    percent = r["metric"] == "accuracy"
    show = (lambda x: f"{100 * x:.1f} %") if percent else (lambda x: f"{x:.4f}")
    rows = [["", "before", *(x["method"] for x in results)],
            [r["metric"], show(r["baseline_score"]), *(show(x["score"]) for x in results)]]
    rows += [[f"  {p}", "", *(show(x["parts"][p]) for x in results)] for p in r["parts"]]
    rows += [["scored on", str(r["baseline_n"]), *(str(x["n"]) for x in results)],
             ["λ", "", *(f"{np.mean(x['lambda']):.3g}" for x in results)],
             ["similarity, last five layers", f"{r['baseline_similarity']:.3f}",
              *(f"{x['similarity']:.3f}" for x in results)],
             ["trainable parameters", "0", *(f"{x['trainable_parameters']:,}" for x in results)],
             ["  share", "", *(f"{x['trainable_parameters'] / x['total_parameters']:.2%}" for x in results)],
             ["training seconds", "", *(f"{x['train_seconds']:.0f}" for x in results)],
             ["tokens/s", "", *(f"{x['tokens_per_second']:.0f}" for x in results)],
             ["peak memory, GB", "", *(f"{x['peak_memory_bytes'] / 1e9:.2f}" for x in results)]]
    return cli.format_table(rows)


def name_of(backbone_or_task: str) -> str:
    """The last part of a path or hub id, without a file's ending (but with a name's own dots: llama-3.2-1b)."""
    name = Path(backbone_or_task).name
    return Path(name).stem if name.endswith((".gguf", ".json", ".jsonl")) else name
