"""hub.py: huggingface_hub's real client against a hub on this machine, and what is refused before there is one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import hub_server
import huggingface_hub.constants
import pytest

import eval as evaluation
import model
import sibo
from sibo_lab import cli
from sibo_lab.publish import hub
from sibo_lab.training import recipes

ROOT = Path(__file__).parents[2]
TOKEN = "hf_veryMuchASecret0123456789"
LOGIN = "of-a-login.and/another+form"  # nothing that looks like a token, and not in the environment


@pytest.fixture
def server(monkeypatch):
    with hub_server.running() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.base)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield running


@pytest.fixture(autouse=True)
def login(monkeypatch, tmp_path):
    """The file that `hf auth login` writes, and no other token of this machine's."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(LOGIN)
    return tmp_path / "token"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    """A run's folder, without the training."""
    folder = tmp_path_factory.mktemp("run")
    sibo.save(sibo.inject(model.from_pretrained(tiny_llama), "lora", 0.0, rank=4), folder)
    config = recipes.run_of("lora", backbone=str(tiny_llama), rank=4, dtype="float32").config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def command(capsys):
    def run(*args):
        """(exit code, lines of stdout, last line of stderr) of eval.py."""
        code = 0
        try:
            cli.run(evaluation.main, evaluation.parser(), list(map(str, args)))
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert LOGIN not in out + err and TOKEN not in out + err
        return code, out.splitlines(), (err.splitlines() or [""])[-1]

    return run


def in_folder(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_an_export_arrives_byte_for_byte_and_the_token_only_in_its_header(run, tmp_path):
    """As a user does it: a process of its own, the token in its environment."""
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN_PATH"} | {
        "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    with hub_server.running() as server:
        done = subprocess.run(
            [sys.executable, ROOT / "eval.py", run, "--export", "hf", tmp_path / "hf", "--push", "me/my-model"],
            capture_output=True, text=True, timeout=300, env=env | {"HF_ENDPOINT": server.base})
    assert done.returncode == 0, done.stderr
    files = in_folder(tmp_path / "hf")
    assert server.repositories == {"me/my-model": files} and {"README.md", "model.safetensors"} < files.keys()
    assert list(map(len, server.objects.values())) == [len(files["model.safetensors"])]
    assert not {"private", "visibility"} & server.created[0].keys()  # the hub's default
    assert done.stdout.splitlines() == [f"{tmp_path / 'hf'}/", f"{server.base}/me/my-model"]
    assert b"DIR = 'me/my-model'" in files["README.md"]
    assert {token for _, _, token, _ in server.asked} == {f"Bearer {TOKEN}", None}  # None: of what anybody may ask
    assert all(token is None for _, path, token, _ in server.asked if path.startswith("/lfs/"))
    assert not any(TOKEN in path or TOKEN.encode() in body for _, path, _, body in server.asked)
    assert TOKEN not in done.stdout + done.stderr
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]


def test_a_login_serves_as_well_and_a_second_upload_replaces_the_first(server, run, tmp_path, command):
    server.repositories["me/m"] = {"README.md": b"old", ".gitattributes": b"x", "adapter_config.json": b"old"}
    assert command(run, "--export", "peft", tmp_path / "out", "--push", "me/m")[0] == 0
    assert server.repositories["me/m"] == in_folder(tmp_path / "out") | {".gitattributes": b"x"}
    assert {token for _, path, token, _ in server.asked if "/me/m/" in path} == {f"Bearer {LOGIN}"}


@pytest.mark.parametrize(("fails", "status"), [
    ("/repos/create", 401), ("/repos/create", 403), ("/tree/", 403), ("/preupload/", 404), ("/objects/batch", 403),
    ("/lfs/", 403), ("/commit/", 403)])
def test_what_the_hub_refuses_is_one_line_without_the_token_that_it_repeats(fails, status, server, tmp_path, capsys):
    server.fails[fails] = status
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"123")
    with pytest.raises(SystemExit) as e:
        cli.run(lambda args: hub.push(tmp_path / "out", "me/m"), cli.Parser("x.py"), [])
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert e.value.code == 2 and line.startswith("error: --push me/m: the upload failed (")
    assert str(status) in line and "refused Bearer …" in line and "is whole: `hf upload me/m" in line
    assert LOGIN not in out + err and "Traceback" not in err


def test_a_repository_with_files_that_would_be_loaded_too_is_left_as_it_is(server, run, tmp_path, command):
    server.repositories["me/m"] = dict(before := {"adapter_config.json": b"old", "plot.png": b"x"})
    code, out, line = command(run, "--export", "hf", tmp_path / "hf", "--push", "me/m")
    assert (code, out) == (2, [f"{tmp_path / 'hf'}/"]) and server.repositories["me/m"] == before
    assert "got one with 'adapter_config.json', which would be loaded with these" in line


def test_a_hub_out_of_reach_is_one_line_and_the_export_is_there(server, run, tmp_path, command, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]  # nobody answers there
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    code, out, line = command(run, "--export", "peft", tmp_path / "out", "--push", "me/m")
    assert (code, out) == (2, [f"{tmp_path / 'out'}/"]) and (tmp_path / "out" / "README.md").exists()
    assert line.startswith("error: --push me/m: the upload failed (")


@pytest.mark.parametrize(("args", "says"), [
    (("my-model",), "--push: expected ORG/NAME, of letters, digits, -, _ and ., got 'my-model'"),
    (("me/my/model",), "--push: expected ORG/NAME"), (("me/a--b",), "--push: expected ORG/NAME"),
    (("https://huggingface.co/me/m",), "--push: expected ORG/NAME"), (("",), "--push: expected ORG/NAME"),
    ((f"me/{TOKEN} x",), "got 'me/hf_… x'"),
    (("me/m", "--offline"), "--push me/m: expected a network, got --offline or HF_HUB_OFFLINE, which forbids it")])
def test_what_cannot_be_uploaded_is_refused_before_anything_is_read(args, says, command, tmp_path):
    code, out, line = command("no-such-run", "--export", "hf", tmp_path / "hf", "--push", *args)
    assert (code, out) == (2, []) and says in line and not (tmp_path / "hf").exists()


def test_without_a_token_it_says_how_to_get_one(command, tmp_path, login):
    login.unlink()
    code, _, line = command("no-such-run", "--export", "hf", tmp_path / "hf", "--push", "me/m")
    assert code == 2 and line == ("error: --push me/m: expected a token of the hub that may write, got none; run "
                                  "`hf auth login`, or set HF_TOKEN")


@pytest.mark.parametrize("args", [("run",), ("--table", "."), ("--backbone", "minilm")])
def test_only_an_export_is_uploaded(args, command):
    code, _, line = command(*args, "--push", "me/m")
    assert code == 2 and "--push me/m: expected --export hf or peft" in line


def test_without_the_hubs_library_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="--push: needs huggingface_hub: pip install huggingface_hub"):
        hub.require("me/m")
