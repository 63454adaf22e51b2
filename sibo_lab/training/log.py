"""What a run says of each step: a line of metrics.jsonl, and with --log tensorboard the same numbers as an event file
beside it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sibo_lab import files
from sibo_lab.parallel import rank
from sibo_lab.training.recipes import Run


def require_tensorboard() -> None:
    """ValueError unless it can be imported."""
    try:
        from torch.utils import tensorboard  # noqa: F401  slow to import
    except ImportError:
        raise ValueError("--log tensorboard: needs the tensorboard package: pip install tensorboard") from None


@contextmanager
def open_log(run: Run, step: int) -> Iterator[Callable[[dict], None]]:
    """A function that logs a step's line, of the first process. What was logged after `step` goes: a stopped run was
    ahead of its state."""
    if rank():
        yield lambda line: None
        return
    log = Path(run.out, "metrics.jsonl")
    lines = log.read_text().splitlines(keepends=True)[:step] if step else []
    files.write(log, "".join(lines))
    with open(log, "a") as file, _events(run, list(map(json.loads, lines))) as event:
        def write(line: dict) -> None:
            print(json.dumps(line), file=file, flush=True)
            event(line)

        yield write


@contextmanager
def _events(run: Run, lines: list[dict]) -> Iterator[Callable[[dict], None]]:
    """A function that adds a line's numbers to a new event file, which begins with `lines`. That of a stopped run goes:
    it may lack what was not on disk yet, and holds steps that come again."""
    if not run.log:
        yield lambda line: None
        return
    from torch.utils.tensorboard import SummaryWriter
    for old in Path(run.out).glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(run.out, purge_step=1) as writer:  # a TensorBoard that is watching forgets the old file's too
        def add(line: dict) -> None:
            for name, value in line.items():
                if name != "step" and value is not None:  # None: the step was skipped
                    writer.add_scalar(name, len(value) if isinstance(value, list) else value, line["step"])

        def write(line: dict) -> None:
            add(line)
            writer.flush()

        for line in lines:
            add(line)
        writer.flush()
        yield write
