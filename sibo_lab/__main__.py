"""`python -m sibo_lab data|study|bench|export|table …`: all commands but train.py and eval.py."""

import importlib
import sys

from sibo_lab import cli

COMMANDS = {  # the module that has each command's parser and main, and the options it gets
    "data": ("sibo_lab.data.commands", lambda args: args),
    "study": ("sibo_lab.tools.study", lambda args: args),
    "bench": ("sibo_lab.tools.bench", lambda args: args),
    "export": ("eval", lambda args: [*args[:1], "--export", *args[1:]]),  # RUN peft|hf DIR
    "table": ("eval", lambda args: ["--table", *args]),  # DIR ...
}


def main() -> None:
    name, args = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if name not in COMMANDS:
        print(f"error: expected python -m sibo_lab {'|'.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        sys.exit(2)
    module, options = COMMANDS[name]
    room = importlib.import_module(module)  # only this one: `data list` need not wait for the others' libraries
    cli.run(room.main, room.parser(), options(args))


if __name__ == "__main__":
    main()
