"""A server on this machine that drops, lies, fails and recovers, for the tests of downloads."""

import hashlib
import io
import random
import re
import socket
import struct
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sibo_lab.data import download

FILE = "llm_adapters/boolq/test.json"
ADDRESS = ("raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/"
           "dataset/boolq/test.json")
CONTENT = random.Random(0).randbytes(300_000)
SST2, SST2_ZIP = ("glue/SST-2/train.tsv", "glue/SST-2/dev.tsv"), "dl.fbaipublicfiles.com/glue/data/SST-2.zip"
TSV = "sentence\tlabel\na fine film \t1\ndull \t0\n"
MEMBERS = {"SST-2/train.tsv": TSV, "SST-2/dev.tsv": TSV, "SST-2/test.tsv": "index\tsentence\n", "SST-2/original/x": ""}


class Server(ThreadingHTTPServer):
    """Serves `content` by path. Each request takes the next of `moods`, if any is left: a status to answer with, "drop"
    or "reset" (half of what was asked for, then the end), or "no ranges" (all of it, whatever was asked for)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.moods, self.asked = {}, [], []  # asked: (path, Range header)
        self.base = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, asked = self.path[1:], self.headers["Range"]
        self.server.asked.append((path, asked))
        mood = self.server.moods.pop(0) if self.server.moods else None
        content = self.server.content.get(path)
        start = 0 if mood == "no ranges" or not asked else int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if content is None or isinstance(mood, int):
            return self.send_error(mood or 404)
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:(start + len(content)) // 2] if mood in ("drop", "reset") else content[start:])
        if mood == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_):
        pass


@contextmanager
def running(monkeypatch):
    """A Server that serves CONTENT at FILE's address, with CONTENT as what FILE is expected to hold."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    expect(monkeypatch, FILE, CONTENT)
    with Server() as server:
        server.content[ADDRESS] = CONTENT
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def expect(monkeypatch, file, content):
    """From now on, `file` is expected to hold these bytes."""
    source = download.Source(len(content), git_hash(content), download.address(file))
    monkeypatch.setitem(download.sources(), file, source)


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in members.items():
            z.writestr(name, text)
    return file.getvalue()
