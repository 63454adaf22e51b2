"""How a command starts and ends: bad input is one line on stderr and exit code 2, never a traceback or a page of usage;
a signal stops it where nothing is lost."""

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sibo_lab import parallel


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and "python" before the name of each command and subcommand."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--offline", action="store_true", help="touch no network, as HF_HUB_OFFLINE=1")

    @property
    def prog(self) -> str:
        return f"python {self._name}"

    @prog.setter
    def prog(self, name: str) -> None:
        self._name = name.removeprefix("python ")

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def format_table(rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """Rows of cells as lines of text, the columns `left` aligned on the left, the others on the right."""
    line = "  ".join(f"{{!s:{'<' if i in left else '>'}{max(map(len, map(str, column)))}}}"
                     for i, column in enumerate(zip(*rows, strict=True)))
    return "\n".join(line.format(*row).rstrip() for row in rows)


def run(main: Callable[[argparse.Namespace], object], parser: argparse.ArgumentParser,
        argv: Sequence[str] | None = None) -> None:
    """Calls `main` with the options in `argv` (None: the command line's). A ValueError or OSError is for the user."""
    try:
        with parallel.group():
            args = parser.parse_args(argv)
            if args.offline:
                os.environ["HF_HUB_OFFLINE"] = "1"
            main(args)
            print(end="", flush=True)  # not sys.stdout.flush(): only the first process has a stdout
        return
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails too
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as e:
        line, code = without_secrets(f"error: {' '.join(str(e).split())}"), 2
    except KeyboardInterrupt as e:
        line, code = e.args or ("stopped", 130)
    if parallel.first_to_say(line):
        print(line, file=sys.stderr)
    sys.exit(code)


def without_secrets(text: str) -> str:
    """`text` without the hub's token, and any that looks like one."""
    text = re.sub(r"\bhf_\w{4,}", "hf_…", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        text = text.replace(os.environ.get(name) or "\0", "…")
    return text


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """Notes a first Ctrl-C or SIGTERM in the list, so that the caller can stop where nothing is lost; a second stops at
    once."""
    asked = []

    def note(number, _):
        if asked:
            raise KeyboardInterrupt("stopped", 128 + number)
        asked.append(number)

    main = threading.current_thread() is threading.main_thread()  # other threads get no signals
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
