"""How a command ends: bad input is one line on stderr and exit code 2, never a traceback or a page of usage; a signal
ends it where nothing is lost."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import parallel


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise ValueError(f"{message}; see python {self.prog} --help")


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Runs `main` on the command line's options; ValueError and OSError, which carry a line for the user, end it."""
    try:
        with parallel.group():
            main(parser.parse_args())
    except (ValueError, OSError) as e:
        line = f"error: {' '.join(str(e).split())}"
        if parallel.first_to_say(line):
            print(line, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        line, code = e.args or ("stopped", 130)
        if parallel.first_to_say(line):
            print(line, file=sys.stderr)
        sys.exit(code)


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """Within it, Ctrl-C and SIGTERM are noted in the list, not obeyed: the caller stops where nothing is lost. A second
    one is obeyed at once."""
    asked: list[int] = []

    def note(number: int, _) -> None:
        if asked:
            raise KeyboardInterrupt("stopped", 128 + number)
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
