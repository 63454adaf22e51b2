"""`python -m sibo_lab data|study|bench|export|table …`: every command besides train.py and eval.py."""

import importlib
import sys


def export(args: list[str]) -> list[str]:
    """eval.py's options; ValueError for too few arguments."""
    if len(args) < 3 and not {"-h", "--help"} & {*args}:
        raise ValueError(f"expected python -m sibo_lab export RUN hf|peft|gguf PLACE, got {' '.join(args) or 'no RUN'}")
    return [*args[:1], "--export", *args[1:]]


def table(args: list[str]) -> list[str]:
    """eval.py's options."""
    return args if {"-h", "--help"} & {*args} else ["--table", *args]


COMMANDS = {  # the module that carries it out; the options it takes, from what follows the command's name
    "data": ("sibo_lab.data.commands", list),
    "study": ("sibo_lab.tools.study", list),
    "bench": ("sibo_lab.tools.bench", list),
    "export": ("eval", export),
    "table": ("eval", table),
}


HELP = """usage: python -m sibo_lab COMMAND …   (each has its own --help)
  data list | fetch | overlap | show | harness   the benchmarks' files; what a model sees of them, or of yours
  study NAME                      the paper's analyses: lambda, placement, low-rank, cost, similarity, learned, norms;
                                  and ours, of where an initial residual helps: gain, where, depth, remedies
  bench                           speed and memory
  export RUN hf|peft|gguf PLACE   a run for other libraries, as eval.py --export
  table DIR …                     runs side by side, as eval.py --table"""


def main() -> None:
    name, args = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if name in ("-h", "--help"):
        print(HELP)
        return
    try:
        if name not in COMMANDS:
            raise ValueError(f"expected python -m sibo_lab {'|'.join(COMMANDS)}, got {name or 'no command'}")
        module, options = COMMANDS[name]
        given = options(args)
        room = importlib.import_module(module)  # only this one: `data list` need not wait for the others' libraries
        from sibo_lab import cli  # nor --help for torch
    except (ValueError, ModuleNotFoundError) as e:
        need = "; run it in a checkout, after pip install -r requirements.txt" if isinstance(e, ImportError) else ""
        print(f"error: {e}{need}", file=sys.stderr)
        sys.exit(2)
    parser = room.parser()
    if module == "eval":
        usage, = (line.strip().partition("   ")[0] for line in HELP.splitlines() if line.startswith(f"  {name} "))
        parser.usage = f"python -m sibo_lab {usage} [options of eval.py]"
    cli.run(room.main, parser, given)


if __name__ == "__main__":
    main()
