"""A hub on this machine, as far as an upload needs one: https://huggingface.co's API, with LFS for what is large."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Holds `repositories`, {name: {path: bytes}}; notes in `asked` each request: (method, path, authorization, body).
    `fails`: {a part of a path: status to answer with}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.objects, self.asked, self.fails, self.created = {}, {}, [], {}, []
        self.base = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization")
        hub.asked.append((self.command, path, token, body))
        for part, status in hub.fails.items():
            if part in path:
                said = f"refused {token}"
                return self.answer({"error": said}, status, X_Error_Message=said)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.created.append(asked)
            there = name in hub.repositories
            hub.repositories.setdefault(name, {})
            return self.answer({"url": f"{hub.base}/{name}"}, 409 if there else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": [{"message": f"seen {token}"}]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tree|preupload|commit)/main/?", path):
            return getattr(self, match[2])(match[1], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            return self.answer({"transfer": "basic", "objects": [
                o | {"actions": {"upload": {"href": f"{hub.base}/lfs/{o['oid']}"}}} for o in objects]})
        if self.command == "PUT" and path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            hub.objects[path.removeprefix("/lfs/")] = body
            return self.answer({})
        return self.answer({"error": "no such thing"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def tree(self, name, body):
        self.answer([{"type": "file", "path": p, "size": len(b), "oid": "0" * 40}
                     for p, b in self.server.repositories[name].items()])

    def preupload(self, name, body):
        self.answer({"files": [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False} for f in json.loads(body)["files"]]})

    def commit(self, name, body):
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self.answer({"commitUrl": f"{self.server.base}/{name}/commit/1", "commitOid": "1" * 40})

    def log_message(self, *_):
        pass


@contextmanager
def running():
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield hub
        hub.shutdown()
