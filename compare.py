"""Runs side by side: mean ± standard deviation over seeds, and the difference to the plain method with an interval.

Reads what train.py left in run folders (config.json, result.json, answers.jsonl, metrics.jsonl) and nothing else. The
official code reports one seed a number; differences between seeds are often larger than those between methods, so a
difference stands here only beside its interval: over several seeds Student's t of the differences of equal seeds (same
data, same order), with one seed the normal interval over the test examples, each answered by both."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import checkpoint
import cli

PLAIN = {"lam": 0.0, "learn_lam": False, "sibo_at": None, "frozen_too": False, "skip": "mixed"}  # settings without h0
NOT_SHOWN = ("seed", "out", "data_dir", "device", "backbone", "task", "test", "score_on", "limit")


@dataclass(frozen=True)
class Done:
    """A finished run: its settings (config.json), what came of it (result.json), by test task which of its answers were
    right (answers.jsonl): "0110…", and the mean training loss of each quarter of its steps (metrics.jsonl)."""

    config: dict
    result: dict
    right: dict[str, str]
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class Group:
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
            found.append(Done(checkpoint.read_json(folder / "config.json"),
                              checkpoint.read_json(folder / "result.json"), _right(folder / "answers.jsonl"),
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
    checkpoint.write(file, "".join(json.dumps(line) + "\n" for line in lines))


def groups(runs: Sequence[Done]) -> list[list[Group]]:
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
        found.append([Group(same, rows.get(key(c | PLAIN | {"method": c["method"].removesuffix("-sibo")}))
                            if c["method"].endswith("-sibo") else None)
                      for same in rows.values() for c in [next(iter(same.values())).config]])
        found[-1].sort(key=lambda g: (g.config["method"], g.config["lam"], g.config["sibo_at"] or "", g.config["lr"]))
    return found


def difference(group: Group) -> tuple[float, float] | None:
    """Mean difference of the score to the plain method's, and half the width of its 95 % interval (nan: unknown)."""
    seeds = sorted(set(group.runs) & set(group.plain or {}))
    if not seeds:
        return None
    pairs = [(group.runs[s], group.plain[s]) for s in seeds]
    each = np.array([a.result["score"] - b.result["score"] for a, b in pairs])
    if len(each) > 1:
        return float(each.mean()), student_t(len(each) - 1) * float(each.std(ddof=1)) / math.sqrt(len(each))
    right = [(pairs[0][0].right[t], pairs[0][1].right[t]) for t in pairs[0][0].right]
    if not right or min(len(a) for a, _ in right) < 2:
        return float(each[0]), math.nan
    variance = 0.0
    for a, b in right:  # of each test's mean; the score is the mean of the tests
        by_example = np.array(list(a), dtype=float) - np.array(list(b), dtype=float)
        variance += by_example.var(ddof=1) / len(a) / len(right) ** 2
    return float(each[0]), 1.96 * math.sqrt(variance)


def student_t(df: int) -> float:
    """The 97.5 % point of Student's t: with t = √df tan u its density is that of cos(u)^(df−1)."""
    u = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos(u) ** (df - 1))
    return float(math.sqrt(df) * np.tan(np.interp(0.95 * mass[-1], mass, u)))


def table(runs: Sequence[Done], markdown: bool = False) -> str:
    """Every table of the runs as text or Markdown."""
    return "\n\n".join(_table(rows, markdown) for rows in groups(runs))


def _table(rows: Sequence[Group], markdown: bool) -> str:
    first = next(iter(rows[0].runs.values()))
    shown = ["method"] + [k for k in first.config if k not in (*NOT_SHOWN, "method")
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
    return f"{title}\n{cli.aligned(cells)}"


def name(g: Group, rows: Sequence[Group]) -> str:
    """What sets a group apart from the others, as a label."""
    c, varying = g.config, []
    for k in ("lam", "sibo_at", "frozen_too", "skip", "side", "learn_lam", "lr"):
        if len({json.dumps(o.config[k]) for o in rows if o.config["method"] == c["method"]}) > 1 and c[k]:
            varying.append({"lam": f"λ {c[k]}", "frozen_too": "frozen too", "learn_lam": "λ learned",
                            "lr": f"lr {c[k]}", "skip": f"{c[k]} skip", "side": f"side {c[k]}"}.get(k, str(c[k])))
    return ", ".join([c["method"], *varying])


def look(name: str) -> dict:
    """A method's colour and line, the same in all pictures: plain methods are dashed, SIBO's are solid."""
    method = name.split(",")[0].removesuffix("-sibo")
    colour = {"frozen": "k", "adapter": "C0", "lora": "C1", "full": "C2"}.get(method, "C3")
    return {"color": colour, "ls": ":" if method == "frozen" else "-" if "-sibo" in name else "--"}


def draw(runs: Sequence[Done], path: Path) -> None:
    """Every seed's score as a dot (plain methods: a ring), their mean as a bar; a panel for each table."""
    tables = groups(runs)
    fig = Figure(figsize=(7, 0.6 + sum(0.8 + 0.32 * len(rows) for rows in tables)), dpi=150, layout="constrained")
    panels = fig.subplots(len(tables), squeeze=False, height_ratios=[len(rows) + 1.5 for rows in tables])[:, 0]
    for ax, rows in zip(panels, tables, strict=True):
        for y, g in enumerate(rows):
            score, colour = g.over_seeds("score"), look(g.config["method"])["color"]
            filled = colour if "sibo" in g.config["method"] else "none"
            ax.plot(score, [y] * len(score), "o", ms=4, alpha=0.6, color=colour, mfc=filled)
            ax.plot([score.mean()] * 2, [y - 0.3, y + 0.3], lw=2, color=colour)
        ax.set_yticks(range(len(rows)), [name(g, rows) for g in rows])
        ax.invert_yaxis()
        ax.grid(alpha=0.3, axis="x")
        ax.spines[["top", "right"]].set_visible(False)
        result = rows[0].first
        ax.set(xlabel=result["metric"] + (" (validation)" if result["scored_on"] == "validation" else "")
               + "; a dot per seed, a bar their mean", title=f"{result['backbone']} on {result['task']}")
    checkpoint.write(path, fig.savefig)
