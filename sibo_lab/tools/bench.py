"""Speed and memory beside transformers + peft: same weights, batches, tokens and LoRA (docs/performance.md).

Sides take turns. Quote the ratio, the median of the pairs' ratios: seconds change with the machine and its load."""

import json
import os
import platform
import re
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from sibo_lab import cli, files
from sibo_lab.backbone import locate
from sibo_lab.tools import bench_process, bench_scaling, bench_speed
from sibo_lab.tools.bench_large import train_shape, write_shape
from sibo_lab.tools.bench_rows import Row, Rows, filled, paired, table
from sibo_lab.training import options, recipes

OUT = Path("docs/results/bench.json")
PAGE = Path("docs/performance.md")  # whose tables are OUT's
GROUPS = {
    "training": partial(bench_speed.at_threads, bench_speed.training),
    "generation": partial(bench_speed.at_threads, bench_speed.generation),
    "overhead": partial(bench_speed.at_threads, bench_speed.overhead),
    "memory": bench_process.memory, "estimates": bench_process.estimates, "loading": bench_process.loading,
    "start": bench_process.start, "busy": bench_process.beside_busy, "scaling": bench_scaling.scaling,
    "cuda": bench_speed.cuda}


def machine() -> Rows:
    """What the others were measured on, and how busy it was just before."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    units = "with" if options.fast_bfloat16() else "without"
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    yield paired("; ".join([f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores {units} bfloat16 "
                            f"units", *gpu, f"torch {torch.__version__}",
                            f"{os.getloadavg()[0]:.1f} processes at work before"]), "cores", [os.cpu_count()])


def parser() -> cli.Parser:
    p = cli.Parser("-m sibo_lab bench", description="Speed and memory against transformers + peft, and of SIBO against "
                   f"the plain method. A whole run writes {OUT} and the tables of {PAGE}.")
    p.add_argument("--only", metavar="GROUPS", default=",".join(GROUPS), help="some of %(default)s (default: all)")
    p.add_argument("--out", type=Path, help="instead: a file of its rows (default of --only GROUPS: none)")
    p.add_argument("--big", choices=("llama7b", "gptj6b"), help="instead: train this shape, and watch memory")
    p.add_argument("--method", default="adapter-sibo", choices=recipes.METHODS[1:], help="of --big (%(default)s)")
    p.add_argument("--base-bits", type=int, choices=[8, 4], help="of --big (default: 16)")
    p.add_argument("--folder", type=Path, help="of --big: its 13 GB of random weights, written if missing")
    return p


def main(args: Namespace) -> None:
    if args.big:
        path = args.folder or files.cache() / "bench" / args.big
        write_shape(locate.SHAPES[args.big], path)
        print(json.dumps(bench_process.in_fresh_process(train_shape, args.big, args.method, path, args.base_bits),
                         indent=1))
        return
    names = args.only.split(",")
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"--only: expected some of {', '.join(GROUPS)}, got {name!r}")
    rows: list[Row] = []
    out = args.out or (OUT if set(names) == set(GROUPS) else None)  # a part must not replace the whole
    for name, group in {"machine": machine, **{name: GROUPS[name] for name in names}}.items():
        for row in group():
            row.group = name
            rows.append(row)
            print(table([row]).splitlines()[1], flush=True)
        if out:
            files.write(out, json.dumps([asdict(r) for r in rows], indent=1) + "\n")  # what there is, if it is stopped
    print(table(rows))
    if out and "scaling" in names:
        bench_scaling.draw_scaling(rows, out.with_name("scaling.png"))
    if out == OUT:
        files.write(PAGE, filled(PAGE.read_text("utf-8"), rows))
