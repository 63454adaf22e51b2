"""The benchmark's table: its rows, the arithmetic of pairs, the turns that sides take, and how a page shows it."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from statistics import median
from time import perf_counter

import torch

from sibo_lab import cli
from sibo_lab.training import options

DTYPE = torch.bfloat16 if options.fast_bfloat16() else torch.float32  # the better one on this CPU, as train.py chooses


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Row:
    """A line of the table. `goal` bounds ours / peer, or ours where there is no peer: from below if `faster`, else from
    above. `dtype` is that of our frozen weights, `peer_as` how the peer ran."""

    name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    goal: float | None = None
    faster: bool = False
    met: bool | None = None
    interval: tuple[float, float] | None = None  # 95 %, of the ratio
    threads: int = field(default_factory=torch.get_num_threads)
    dtype: str = named(DTYPE)
    peer_as: str = ""
    group: str = ""


Rows = Iterator[Row]


def paired(name: str, unit: str, ours: Sequence[float] = (), peer: Sequence[float] = (), goal: float | None = None,
           **more) -> Row:
    """Medians of measurements, or of none, paired unless there is no peer; from 30 pairs on, the ratio's interval by
    order statistics. `more`: other fields of the row."""
    row = Row(name, unit, goal=goal, faster=unit.endswith("/s"), **more)
    ratios = sorted(x / y for x, y in zip(ours, peer, strict=True)) if peer else []
    if ours:
        row.ours = median(ours)
    if ratios:
        row.peer, row.ratio = median(peer), median(ratios)
    if ours and goal:
        bounded = row.ratio if ratios else row.ours
        row.met = bounded >= goal if row.faster else bounded <= goal
    if len(ratios) >= 30:
        k = int(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5)
        row.interval = ratios[k], ratios[-1 - k]
    return row


def in_turn(sides: Sequence[Callable], inputs: Sequence) -> list[list]:
    """What each side returns for each input. All take one before the next, in alternating order: a machine that slows
    down slows all alike."""
    found = [[] for _ in sides]
    for i, x in enumerate(inputs):
        for side in range(len(sides))[::1 if i % 2 else -1]:
            found[side].append(sides[side](x))
    return found


def seconds(f: Callable, *args, **kwargs) -> float:
    began = perf_counter()
    f(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


def clocked(sides: Sequence[Callable], inputs: Sequence) -> list[list[float]]:
    """The seconds that each side takes for each input, in turn, after one to warm up."""
    sides = [partial(seconds, side) for side in sides]
    in_turn(sides, inputs[:1])
    return in_turn(sides, inputs)


def cells(r: Row) -> list[str]:
    def show(x: float | None) -> str:
        return "not measured" if x is None else f"{x:.3g}" if abs(x) < 100 or x >= 1e6 else f"{x:.0f}"

    interval = " ({:.3f}–{:.3f})".format(*r.interval) if r.interval else ""
    return [r.name, str(r.threads), r.dtype + (f"; peer: {r.peer_as}" if r.peer_as else ""), show(r.ours),
            show(r.peer) if r.peer or r.ours is None else "", r.unit, f"{r.ratio:.3f}{interval}" if r.ratio else "",
            f"{'≥' if r.faster else '≤'} {r.goal:g}" if r.goal else "", {None: "", True: "yes", False: "no"}[r.met]]


HEAD = ["", "threads", "dtype", "ours", "peer", "unit", "ratio (95 %)", "goal", "met"]


def table(rows: Sequence[Row]) -> str:
    return cli.format_table([HEAD, *map(cells, rows)], left=(0, 2, 5))


def markdown(rows: Sequence[Row]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(page: str, rows: Sequence[Row]) -> str:
    """A Markdown page with the table of each group between its markers, <!-- bench: GROUP --> and <!-- end -->, or that
    there is none."""
    tables = {group: markdown([*some]) for group, some in groupby(rows, lambda r: r.group)}
    tables["machine"] = "".join(f"{r.name}.\n" for r in rows if r.group == "machine")
    return re.sub(r"(<!-- bench: (\w+) -->\n).*?(?=<!-- end -->)",
                  lambda m: m[1] + (tables.get(m[2]) or "(not measured yet)\n"), page, flags=re.DOTALL)
