"""`pip install .`: what the wheel holds and needs, and that it works from any folder with nothing but torch, numpy and
safetensors there.

The environment is a new one, empty but for links to those three and what they need, so that torch is not copied."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NEEDED = {"torch", "numpy", "safetensors"}
OTHERS = {"gguf", "tiktoken", "regex", "tqdm", "matplotlib", "huggingface_hub", "transformers", "peft"}

SCRIPT = '''
import sys
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
import sibo

class Net(nn.Module):
    """embed → hidden → out: h0 is the embedding, h is what hidden makes of it."""
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
    def forward(self, ids):
        return self.out(torch.tanh(self.hidden(self.embed(ids))))

def net():
    torch.manual_seed(0)
    return Net().double()

x = torch.tensor([[1, 2, 3, 4]])
h0 = net().embed(x)
h = torch.tanh(net().hidden(h0))
targets, lam, s = torch.tensor([2, 3, 4, 5]), 0.25, 6 / 2
lora = sibo.inject(net(), "lora", lam, targets="out", h0="embed", rank=2, alpha=6.0)
assert torch.equal(lora(x), net().out(h))  # W_up = 0
assert sorted(n for n, p in lora.named_parameters() if p.requires_grad) == ["out.down", "out.up"]

A = lora.out.down.detach().clone()
loss = F.cross_entropy(lora(x)[0], targets)
loss.backward()
torch.optim.SGD([lora.out.down, lora.out.up], lr=0.1).step()
low = ((1 - lam) * h + lam * h0) @ A.T
error = (torch.softmax(net().out(h), -1) - F.one_hot(targets, 7)) / 4  # the gradient of the mean cross-entropy
B = -0.1 * s * (error.transpose(1, 2) @ low)[0]
torch.testing.assert_close(lora.out.up.detach(), B, rtol=0, atol=1e-12)
assert torch.equal(lora.out.down, A)  # its gradient goes through W_up, which was 0
after = net().out(h) + s * low @ B.T  # Eq. (5)
torch.testing.assert_close(lora(x), after, rtol=0, atol=1e-12)
assert F.cross_entropy(lora(x)[0], targets) < loss

sibo.save(lora, "saved")
again = sibo.load(net(), "saved")
assert again.sibo == lora.sibo and again.sibo.lam == lam and torch.equal(again(x), lora(x))
merged = sibo.merge(again)
torch.testing.assert_close(merged(x), after, rtol=0, atol=1e-12)
assert not any(p.requires_grad for p in merged.parameters())

adapter = sibo.inject(net(), "adapter", lam, targets="hidden", h0="embed", bottleneck=2)
mixed = (1 - lam) * net().hidden(h0) + lam * h0  # Eq. (4) with W_up = 0
torch.testing.assert_close(adapter(x), net().out(torch.tanh(mixed)), rtol=0, atol=1e-12)

from sibo_lab.training.optimizer import adamw  # as docs/your_model.md has it
learned = sibo.inject(net(), "adapter", lam, targets="hidden", h0="embed", bottleneck=2, learn_lam=True)
before = {n: p.detach().clone() for n, p in learned.named_parameters() if p.requires_grad}
F.cross_entropy(learned(x)[0], targets).backward()
adamw(learned, 0.001).step()  # Adam's first step is its rate
moved = {n: (p - before[n]).abs().max().item() for n, p in learned.named_parameters() if n in before}
assert abs(moved.pop("hidden.lam_logit") - 0.05) < 1e-4 and abs(max(moved.values()) - 0.001) < 1e-4

print(sibo.__file__)
print(*(name for name in sys.argv[1:] if find_spec(name)))
'''


def run(*args, **kwargs):
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, timeout=600, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(requirements):
    return {re.match(r"[\w.-]+", line).group() for line in requirements}


def closure(wanted):
    """The installed distributions among these and all that they need."""
    found, waiting = {}, list(wanted)
    while waiting:
        if (name := waiting.pop()) not in found:
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:  # for another system, or a marker that does not hold here
                continue
            waiting += names(line for line in found[name].requires or () if "extra ==" not in line)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, folder / "checkout", ignore=leave)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",  # torch brings setuptools
        "--wheel-dir", folder, folder / "checkout")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        return email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))))


def test_the_wheel_holds_the_method_and_the_package_and_nothing_else(wheel):
    expected = {"sibo.py", *(str(f.relative_to(ROOT)) for f in ROOT.glob("sibo_lab/**/*.py")),
                *(f"sibo_lab/data/{f.name}" for f in ROOT.glob("sibo_lab/data/*.txt"))}
    assert {"sibo_lab/data/sources.txt", "sibo_lab/data/word_problems.txt", "sibo_lab/training/loop.py"} < expected
    with zipfile.ZipFile(wheel) as z:
        assert {n for n in z.namelist() if ".dist-info/" not in n} == expected


def test_it_needs_torch_numpy_and_safetensors_and_the_lab_the_rest_of_requirements(metadata):
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    lab = {r.name for r in asked if r.marker}
    pinned = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert {r.name for r in asked if not r.marker} == NEEDED and metadata.get_all("Provides-Extra") == ["lab"]
    assert lab == {r.name for r in pinned} - NEEDED
    assert {str(r.marker) for r in asked if r.marker} == {'extra == "lab"'}
    for r in pinned:  # the versions of a checkout are among those allowed
        version = next(iter(r.specifier)).version
        assert version in next(other for other in asked if other.name == r.name).specifier


def test_the_metadata_name_the_project(metadata):
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("sibo", "2.0.0", ">=3.11")
    assert metadata["License-Expression"] == "MIT" and "SIBO" in metadata["Summary"]
    assert metadata.get_payload().startswith("# SIBO")


def test_installed_alone_it_injects_trains_saves_loads_and_merges_from_any_folder(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for d in closure(NEEDED).values():
        for entry in {f.parts[0] for f in d.files if f.parts[0] not in ("..", "__pycache__")}:
            (site / entry).symlink_to(d.locate_file(entry))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", wheel, env=env)
    (tmp_path / "elsewhere").mkdir()
    out = run(python, "-c", SCRIPT, *NEEDED, *OTHERS, cwd=tmp_path / "elsewhere", env=env)
    where, importable = out.splitlines()
    assert Path(where) == site / "sibo.py" and set(importable.split()) == NEEDED


def test_with_the_lab_its_commands_run_from_any_folder(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    (tmp_path / "elsewhere").mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    out = run(sys.executable, "-m", "sibo_lab", "data", "list", cwd=tmp_path / "elsewhere", env=env)
    assert "glue/MNLI/dev_mismatched.tsv" in out
    where = run(sys.executable, "-c", "import sibo_lab; print(sibo_lab.__file__)", cwd=tmp_path / "elsewhere", env=env)
    assert Path(where.strip()).parent == tmp_path / "site" / "sibo_lab"
