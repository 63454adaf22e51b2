"""What is not to leave this machine does not: the hub's tokens stand nowhere, and --offline touches no network."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import train
from sibo_lab import cli, files
from sibo_lab.data import commands, download
from sibo_lab.training import run_folder

ROOT = Path(__file__).parent.parent
TOKEN = "hf_veryMuchASecret0123456789"


@pytest.fixture
def hub():
    """A hub on loopback that refuses everyone and repeats what it was told."""
    seen = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("authorization"))
            body = json.dumps({"error": f"Invalid token {seen[-1]}"}).encode()
            self.send_response(401)
            self.send_header("X-Error-Message", f"Invalid token {seen[-1]}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


def test_a_token_of_the_hub_reaches_the_hub_and_nothing_else(hub, tmp_path):
    address, seen = hub
    done = subprocess.run([sys.executable, ROOT / "train.py", "--backbone", "some/model", "--out", tmp_path / "run"],
                          capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env=os.environ | {"HF_TOKEN": TOKEN, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 2 and any(TOKEN in str(header) for header in seen)
    assert done.stderr.startswith("error: some/model: the hub could not be read")
    assert TOKEN not in done.stdout + done.stderr
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]


def test_what_looks_like_a_token_is_blotted_out_of_messages_and_of_the_recorded_command(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "one-of-another-form")
    assert cli.without_secrets(f"401 for {TOKEN}, one-of-another-form") == "401 for hf_…, …"
    monkeypatch.setattr(sys, "argv", ["train.py", "--backbone", f"https://user:{TOKEN}@host/model"])
    assert TOKEN not in run_folder.command()


def test_offline_touches_no_network(monkeypatch, tmp_path, capsys, tiny_llama):
    def never(*args, **kwargs):
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(subprocess, "run", lambda args, *rest, real=subprocess.run, **kwargs:
                        never() if "pip" in map(str, args) else real(args, *rest, **kwargs))
    monkeypatch.setenv("SIBO_CACHE", str(tmp_path / "empty"))

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, args)])
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # remembers what was there before --offline sets it
        try:
            cli.run(module.main, module.parser())
        except SystemExit:
            return capsys.readouterr().err.splitlines()[-1]
        return "done"

    assert "--offline" in run(train, "--offline", "--backbone", "smollm2-135m")
    assert run(train, "--offline", "--backbone", "some/model").startswith("error: some/model: the hub could not be")
    assert "--offline" in run(commands, "fetch", "mawps", "--offline", "--data-dir", tmp_path / "data")
    assert run(train, "--offline", "--backbone", tiny_llama, "--steps", 1, "--batch-size", 1, "--limit", 1, "--dtype",
               "float32", "--out", tmp_path / "run") == "done"


@pytest.mark.parametrize(("value", "is_offline"), [(None, False), ("0", False), ("1", True), ("true", True)])
def test_the_hubs_own_switch_counts_too(monkeypatch, value, is_offline, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if value:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert files.offline() == is_offline
    if is_offline:
        with pytest.raises(OSError, match="forbids downloads; download it by hand and put it at"):
            download.fetch(["glue/RTE/dev.tsv"], tmp_path)
