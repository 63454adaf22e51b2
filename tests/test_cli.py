"""sibo_lab/cli.py and sibo_lab/__main__.py: how a command starts and ends."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from sibo_lab import __main__ as sibo_lab_main
from sibo_lab import cli

ROOT = Path(__file__).parent.parent

def ended(capsys, main, *args, parser=None):
    """(exit code, lines on stderr) of a command that ends early."""
    with pytest.raises(SystemExit) as e:
        cli.run(main, parser or cli.Parser("x.py"), list(args))
    out, err = capsys.readouterr()
    assert not out
    return e.value.code, err.splitlines()


@pytest.mark.parametrize("error", [ValueError("a: expected b,\n  got c"), FileNotFoundError("a: expected b, got c")])
def test_bad_input_is_one_line_and_exit_code_2(capsys, error):
    def main(args):
        raise error

    assert ended(capsys, main) == (2, ["error: a: expected b, got c"])


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda args: 1 / 0, cli.Parser("x.py"), [])


def test_a_wrong_option_is_one_line_and_options_are_not_abbreviated(capsys):
    for option in ("--nothing", "--off"):
        assert ended(capsys, print, option) == (2, [f"error: unrecognized arguments: {option}; see python x.py --help"])


def test_usage_and_hints_name_every_command_as_it_is_typed():
    p = cli.Parser("x.py")
    p.prog = "-m x"
    for parser, name in ((cli.Parser("x.py"), "python x.py"), (p, "python -m x"),
                         (p.add_subparsers().add_parser("y"), "python -m x y")):
        assert parser.format_usage().startswith(f"usage: {name} [-h] [--offline]")
        with pytest.raises(ValueError, match=f"; see {name} --help$"):
            parser.parse_args(["--nothing"])


def test_offline_is_the_hubs_own_switch(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    cli.run(lambda args: None, cli.Parser("x.py"), [])
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    cli.run(lambda args: None, cli.Parser("x.py"), ["--offline"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_ctrl_c_is_one_line_with_the_shells_exit_code(capsys):
    def main(args):
        raise KeyboardInterrupt

    assert ended(capsys, main) == (130, ["stopped"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_noted_and_a_second_obeyed(capsys, number):
    before = signal.getsignal(number)

    def main(args):
        with cli.stop_asked() as asked:
            signal.raise_signal(number)
            assert asked == [number]
            signal.raise_signal(number)

    assert ended(capsys, main) == (128 + number, ["stopped"]) and signal.getsignal(number) is before


def test_a_thread_that_gets_no_signals_may_ask_for_them():
    seen = []

    def work():
        with cli.stop_asked() as asked:
            seen.append(asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_tokens_of_the_hub_are_blotted_out_of_errors(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "one-of-another-form")

    def main(args):
        raise OSError("401 for hf_abcdefgh, one-of-another-form")

    assert ended(capsys, main) == (2, ["error: 401 for hf_…, …"])


def test_the_columns_of_a_table_are_aligned_on_the_left_or_the_right():
    rows = [["name", "n", "of"], ["a", 10, "x"], ["bbbbb", 9, ""]]
    assert cli.format_table(rows).splitlines() == ["name    n  of", "a      10   x", "bbbbb   9"]
    assert cli.format_table(rows, left=(0, 1)).splitlines()[1] == "a      10   x"


@pytest.mark.parametrize(("args", "module", "options"), [
    (["data", "list"], "sibo_lab.data.commands", ["list"]),
    (["study", "lambda", "--seeds", "0,1"], "sibo_lab.tools.study", ["lambda", "--seeds", "0,1"]),
    (["export", "runs/a", "hf", "b", "--device", "cpu"], "eval", ["runs/a", "--export", "hf", "b", "--device", "cpu"]),
    (["export", "--help"], "eval", ["--help", "--export"]),
    (["table", "runs", "more", "--markdown"], "eval", ["--table", "runs", "more", "--markdown"]),
    (["table", "--help"], "eval", ["--help"]),
])
def test_each_command_of_the_package_hands_its_options_to_one_module(monkeypatch, args, module, options):
    ran, parser = [], SimpleNamespace()
    room = SimpleNamespace(main="main", parser=lambda: parser)
    monkeypatch.setattr(sys, "argv", ["sibo_lab", *args])
    monkeypatch.setattr(sibo_lab_main.importlib, "import_module", lambda name: ran.append(name) or room)
    monkeypatch.setattr(cli, "run", lambda *given: ran.append(given))
    sibo_lab_main.main()
    assert ran == [module, ("main", parser, options)]
    usage = {"export": "export RUN hf|peft|gguf PLACE", "table": "table DIR …"}.get(args[0])
    assert vars(parser) == ({"usage": f"python -m sibo_lab {usage} [options of eval.py]"} if usage else {})


@pytest.mark.parametrize("args", [[], ["date"], ["help"]])
def test_an_unknown_command_is_one_line_that_lists_all(monkeypatch, capsys, args):
    monkeypatch.setattr(sys, "argv", ["sibo_lab", *args])
    with pytest.raises(SystemExit) as e:
        sibo_lab_main.main()
    line, = capsys.readouterr().err.splitlines()
    assert e.value.code == 2
    assert line.startswith("error: expected python -m sibo_lab data|study|bench|export|table, got ")


SLOW = ("matplotlib", "huggingface_hub", "gguf", "pyarrow", "transformers", "datasets", "jinja2", "pip", "bitsandbytes",
        "sympy", "torch._dynamo", "torch._inductor")  # to import, and needed by some work alone


def test_commands_start_without_what_only_some_work_needs():
    modules = "sibo_lab.data.commands", "sibo_lab.tools.bench", "eval", "train"
    code = (f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name).parser()\n"
            f"    print(name, *sys.modules.keys() & {set(SLOW)})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [*modules]


def test_the_list_of_commands_needs_no_torch():
    code = ("import sys; from sibo_lab import __main__; sys.argv[1:] = ['--help']; __main__.main(); "
            "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m sibo_lab")
