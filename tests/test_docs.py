"""The pages: their links lead somewhere, their commands parse, the README is short and its map of the code is true."""

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

import eval as evaluation
from sibo_lab import __main__ as sibo_lab
from sibo_lab.training import options

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
INLINE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"\b(python|torchrun) ")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"", re.M)

# bash itself expands loops, variables, quotes and continued lines; each command ends up here as its words
RECORD = r"""
python() { printf '%s\x1f' "$@"; printf '\x1e'; }
torchrun() { while [[ $1 == -* ]]; do shift; done; python "$@"; }
taskset() { shift 2; "$@"; }
pip() { :; }; pytest() { :; }
"""


def page_of(path):
    """A page's Markdown; of a notebook, that of its Markdown cells."""
    text = path.read_text()
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def anchors(text):
    """GitHub's names of the headings: lower case, punctuation gone, hyphens for spaces, repeated ones numbered."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCED.sub("", text), re.M):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{n}" if (n := sum(re.sub(r"-\d+$", "", f) == slug for f in found)) else slug)
    return found


def links(text):
    return ["".join(groups) for groups in LINK.findall(INLINE.sub("", FENCED.sub("", text)))]


def spans(text):
    """What stands in inline code."""
    return [" ".join(span.split()) for span in INLINE.findall(FENCED.sub("", text))]


def commands(text, folder):
    """The words of every Python command of a page, in its sh blocks and its inline code."""
    scripts = [body for kind, body in FENCED.findall(text) if kind == "sh"]
    scripts += [span for span in spans(text) if COMMAND.search(span)]
    found = []
    for script in scripts:
        done = subprocess.run(
            [shutil.which("bash"), "-euc", RECORD + script], capture_output=True, text=True, cwd=folder,
            env={"PATH": "", "SIBO_DATA": "DATA"})  # no program but those above can be run
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        found += [words.split("\x1f")[:-1] for words in done.stdout.split("\x1e")[:-1]]
    return found


def parser_of(script, rest):
    """The parser of a command, and the options that it gets."""
    if script == "-m":
        assert rest[0] == "sibo_lab", rest
        module, options_of = sibo_lab.COMMANDS[rest[1]]
        return importlib.import_module(module).parser(), options_of(rest[2:])
    return {"train.py": options.parser, "eval.py": evaluation.parser}[script](), rest


def check(words):
    """Raises unless the command is one of the project's and its own parser accepts it."""
    if words[0].startswith("tests/"):
        assert (ROOT / words[0]).is_file(), words[0]
        return
    parser, rest = parser_of(words[0], words[1:])
    try:
        parser.parse_args(rest)
    except SystemExit as e:  # --help
        assert not e.code


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_picture_of_a_page_leads_somewhere(path):
    for link in links(page_of(path)):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(page_of(target)), f"{link}: expected one of {anchors(page_of(target))}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_is_accepted_by_its_own_parser(path, tmp_path):
    for words in commands(page_of(path), tmp_path):
        try:
            check(words)
        except (KeyError, ValueError, AssertionError) as e:
            raise AssertionError(f"{path.name}: {' '.join(words)}: {e}") from e


def test_loops_continued_lines_and_launchers_are_expanded_as_a_shell_does(tmp_path):
    page = """
Run `for t in cola rte; do python train.py --task $t; done` or

```sh
torchrun --nproc_per_node=8 train.py --shard \\
    --out "a b"     # a comment
OMP_NUM_THREADS=1 python -m sibo_lab data list
```
"""
    assert sorted(commands(page, tmp_path)) == [
        ["-m", "sibo_lab", "data", "list"], ["train.py", "--shard", "--out", "a b"], ["train.py", "--task", "cola"],
        ["train.py", "--task", "rte"]]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_option_and_file_that_a_page_names_exists(path):
    rooms = [importlib.import_module(module) for module, _ in sibo_lab.COMMANDS.values()]
    parsers = [options.parser(), *(room.parser() for room in rooms)]
    known = {name for p in parsers for name in p._option_string_actions}
    for span in spans(page_of(path)):
        if not COMMAND.search(span):
            assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", span)) <= known, span
        for file in re.findall(r"(?<!\S)(?:sibo_lab|tests|docs|notebooks)/[\w./-]+", span):
            assert (ROOT / file).exists(), span


def test_the_readme_is_read_in_one_sitting():
    assert len(README.read_text().splitlines()) <= 150


def test_the_readme_holds_the_two_lines_that_others_rely_on():
    lines = README.read_text().splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    tests = [line for line in lines if re.fullmatch("pip install .* && pytest", line)]  # as the CI script looks for it
    assert tests[0] == "pip install -r requirements.txt -r tests/requirements.txt && pytest"


def test_the_readmes_map_shows_every_file_of_every_room():
    drawn = next(body for _, body in FENCED.findall(README.read_text()) if body.startswith("sibo_lab/"))
    shown, room = {}, None
    for line in drawn.splitlines():
        if match := re.match(r" *(\w+/) +(.*)", line):
            room, text = match.groups()
            names = text.rpartition(": ")[2]
            shown[room] = set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", names)))
        elif line.startswith(" " * 16):  # more of the room above
            shown[room] |= set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", line)))
    package = ROOT / "sibo_lab"
    rooms = {package, *(p.parent for p in package.rglob("*.py"))}
    assert shown == {f"{r.name}/": {p.stem for p in r.glob("*.py") if not p.stem.startswith("__")} for r in rooms}
