"""train.py in this process, as its command line calls it."""

import sys

import train
from sibo_lab import cli
from sibo_lab.training import options


def run_train(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of `python train.py` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    try:
        cli.run(train.main, options.parser())
        code = 0
    except SystemExit as e:
        code = e.code or 0
    return code, *capsys.readouterr()
