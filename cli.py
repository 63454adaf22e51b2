"""How a command ends: bad input is one line on stderr and exit code 2, never a traceback or a page of usage."""

import argparse
import sys
from collections.abc import Callable

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
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
