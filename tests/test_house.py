"""The house: what the root holds, who may import whom, and how long things may be. Only the sources are read."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("*.py"), *ROOT.glob("sibo_lab/**/*.py")]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
METHOD = {"sibo", *(f"sibo_lab.{name}" for name in (
    "settings", "stacks", "families", "placement", "wrapping", "initial_residual", "fingerprint", "adapter_file",
    "hugging_face", "switching", "files", "parallel"))}
LAYERS = """
    sibo_lab.parallel
    sibo_lab.cli sibo_lab.fast sibo_lab.files
    sibo_lab.cores
    sibo_lab.settings sibo_lab.stacks sibo_lab.wrapping sibo_lab.fingerprint
    sibo_lab.families sibo_lab.initial_residual
    sibo_lab.placement
    sibo_lab.adapter_file
    sibo_lab.hugging_face
    sibo_lab.switching
    sibo
    sibo_lab.backbone
    model sibo_lab.data sibo_lab.export
    sibo_lab.evaluation
    sibo_lab.training
    sibo_lab.publish
    eval
    train
    sibo_lab.tools
    sibo_lab.__main__
"""  # from bottom to top; a module imports from lower lines, and a room from itself
FLOOR = {name: number for number, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def imported(module):
    """Names of all modules that a module imports, anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: expected absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def place(module):
    """(line in LAYERS, room) of a module."""
    room = next(name for name in (module, module.rpartition(".")[0]) if name in FLOOR)
    return FLOOR[room], room


GRAPH = {module: set(imported(module)) for module in MODULES if MODULES[module].name != "__init__.py"}
OURS = {module: names & MODULES.keys() for module, names in GRAPH.items()}


@pytest.mark.parametrize("module", OURS)
def test_nothing_looks_upward(module):
    (line, room), below = place(module), {name: place(name) for name in OURS[module]}
    assert not {name for name, (floor, of) in below.items() if floor >= line and of != room}


def test_no_module_needs_itself():
    list(TopologicalSorter(OURS).static_order())  # CycleError names the circle


@pytest.mark.parametrize("module", sorted(METHOD))
def test_the_method_stands_on_torch_numpy_and_safetensors_alone(module):
    assert GRAPH[module] <= METHOD | {n for n in GRAPH[module] if n.split(".")[0] in {
        "torch", "numpy", "safetensors", *sys.stdlib_module_names}}


@pytest.mark.parametrize("name", ["files", "cli", "fast"])
def test_the_floor_knows_at_most_parallel(name):
    assert OURS[f"sibo_lab.{name}"] <= {"sibo_lab.parallel"} and not OURS["sibo_lab.parallel"]


def test_the_method_and_the_models_do_not_know_each_other():
    for start, other in (("sibo", "model"), ("model", "sibo")):
        reached = {start}
        while (more := reached.union(*(OURS[name] for name in reached))) != reached:
            reached = more
        assert other not in reached


def test_packages_import_nothing_by_themselves():
    assert not [name for name, file in MODULES.items() if file.name == "__init__.py" for _ in imported(name)]


def test_the_root_holds_four_files_of_code_and_what_a_project_needs():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = ".ci .gitignore LICENSE README.md docs eval.py model.py notebooks pyproject.toml requirements.txt " \
               "sibo.py sibo_lab tests train.py"
    assert sorted({line.split("/")[0] for line in listed.splitlines()}) == expected.split()


@pytest.mark.parametrize("module", GRAPH)
def test_no_function_is_longer_than_60_lines(module):
    functions = [node for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8")))
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60]


def test_the_method_is_short():
    assert 150 <= len((ROOT / "sibo.py").read_text("utf-8").splitlines()) <= 180
    method = ("sibo.py", "sibo_lab/placement.py", "sibo_lab/adapter_file.py")
    assert sum(len((ROOT / name).read_text("utf-8")) for name in method) < 20_000
