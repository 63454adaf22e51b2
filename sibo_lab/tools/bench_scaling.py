"""Tokens per second against the batch, the length and the threads: rows, and their picture."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from sibo_lab import files
from sibo_lab.evaluation import pictures
from sibo_lab.tools.bench_large import random_batches, trainer
from sibo_lab.tools.bench_rows import Row, Rows, paired, seconds
from sibo_lab.tools.bench_speed import Case, decoding, ours, smollm2, speed, threads

LENGTHS = (128, 256, 512, 1024, 2048)
SCALES = {"batch": (1, 2, 4, 8, 16, 32), "length": LENGTHS}


def scaling(case: Case | None = None) -> Rows:
    """Tokens per second of random rows: batches of 128 tokens, one row of many lengths, 8 × 128 on more threads."""
    case, cores = case or smollm2(), torch.get_num_threads()
    step, m = trainer(ours(case)), ours(case).eval()
    counts = sorted({cores, *(2**i for i in range(cores.bit_length()))})
    for axis, x in ((axis, x) for axis, values in (SCALES | {"threads": counts}).items() for x in values):
        size, length = {"batch": (x, 128), "length": (1, x), "threads": (8, 128)}[axis]
        with threads(x if axis == "threads" else cores):
            some = random_batches(3, size, length)
            yield paired(f"training, {axis} {x}", "tokens/s", [speed(step, rows) for rows in some][1:])
            ids = torch.tensor([r.ids for r in some[0]])
            with ExitStack() as packed:
                token = decoding(m, ids, packed)
                found = [size / seconds(token) for _ in range(9)]
            yield paired(f"decoding, {axis} {x}", "tokens/s", found[1:])


def draw_scaling(rows: Sequence[Row], path: Path) -> None:
    fig, *panels = pictures.figure(height=9, ratios=(1, 1, 1))
    for ax, (axis, what) in zip(panels, (("batch", "rows of 128 tokens"), ("length", "tokens of one row"),
                                         ("threads", "threads, 8 rows of 128 tokens")), strict=True):
        for work, mark in (("training", "o-"), ("decoding", "s--")):
            start = f"{work}, {axis} "
            points = {int(r.name.removeprefix(start)): r.ours for r in rows if r.name.startswith(start)}
            ax.loglog(points.keys(), points.values(), mark, ms=4, label=work, base=2)
            ax.set_xticks([*points], [*points])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(xlabel=what, ylabel="tokens per second")
    panels[0].legend(frameon=False)
    files.write(path, fig.savefig)
