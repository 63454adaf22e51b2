"""fetch.py and the commands of data.py: from a server on this machine that drops, lies, fails and recovers."""

import hashlib
import io
import json
import os
import random
import re
import socket
import struct
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sibo_lab.data import commands, download, tasks

REAL = Path(__file__).parent.parent.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")
FILE = "llm_adapters/boolq/test.json"
ADDRESS = ("raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/"
           "dataset/boolq/test.json")
CONTENT = random.Random(0).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves `content` by path. Each request takes the next of `moods`, if any is left: a status to answer with, "drop"
    and "reset" (half of what was asked for, then the end), "no ranges" (all of it, whatever was asked for)."""

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


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        server.content[ADDRESS] = CONTENT
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """FILE is to have the bytes CONTENT."""
    monkeypatch.setitem(download.BLOBS, FILE, (git_hash(CONTENT), len(CONTENT)))


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def get(server, folder, *files):
    download.fetch(files or [FILE], folder, server.base, wait=0)


def here(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line_naming(error, *parts):
    assert "\n" not in str(error.value) and all(str(part) in str(error.value) for part in parts)
    return True


# ---------------------------------------------------------------------------------------------------------- plain files
@pytest.mark.parametrize(("content", "blob"), [  # as `git hash-object` has them
    (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"), (b"hello world\n", "3b18e512dba79e4c8300dd08aeb37f8e728b8dad")])
def test_a_file_is_known_by_the_hash_that_git_gives_it(tmp_path, monkeypatch, content, blob):
    (tmp_path / "x").write_bytes(content)
    monkeypatch.setitem(download.BLOBS, "x", (blob, None))
    assert download.state(tmp_path / "x", "x") == "ok"
    (tmp_path / "x").write_bytes(content + b"\n")
    assert download.state(tmp_path / "x", "x").startswith("wrong: blob SHA-1")


def test_a_file_comes_from_its_address_whole_and_alone(server, tmp_path):
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT} and server.asked == [(ADDRESS, None)]


def test_a_right_file_is_not_fetched_again_and_a_wrong_one_is(server, tmp_path):
    get(server, tmp_path)
    get(server, tmp_path)
    assert len(server.asked) == 1
    (tmp_path / FILE).write_bytes(b"[]")
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT}


def test_a_dropped_connection_goes_on_where_it_stopped(server, tmp_path):
    server.moods = ["drop", "drop"]
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT}
    assert server.asked == [(ADDRESS, None), (ADDRESS, "bytes=150000-"), (ADDRESS, "bytes=225000-")]


def test_a_connection_that_is_reset_goes_on_too(server, tmp_path):
    server.moods = ["reset"]
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT} and len(server.asked) == 2


def test_what_an_earlier_command_left_is_not_asked_for_again(server, tmp_path):
    server.moods = ["drop"] * download.TRIES
    with pytest.raises(OSError, match="could not be fetched .the connection ended after 281250 of 300000 bytes"):
        get(server, tmp_path)
    assert here(tmp_path) == {FILE + ".part": CONTENT[:281250]}
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT} and server.asked[-1] == (ADDRESS, "bytes=281250-")


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, tmp_path):
    server.moods = ["drop", "no ranges"]
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT}


@pytest.mark.parametrize("left", [b"of another version", CONTENT + b"more"])
def test_what_was_left_of_another_file_is_thrown_away(server, tmp_path, left):
    part = tmp_path / (FILE + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT}


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    server.moods = [503, 429, 500]
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT} and len(server.asked) == 4


def test_each_further_try_waits_twice_as_long(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.moods = [503] * 3
    download.fetch([FILE], tmp_path, server.base)
    assert waits == [1, 2, 4]


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (503, download.TRIES)])
def test_what_cannot_be_fetched_is_named_with_its_address_and_its_place(server, tmp_path, status, tries):
    server.moods = [status] * 9
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_bytes(b"[]")
    with pytest.raises(OSError, match=f"HTTP Error {status}") as error:
        get(server, tmp_path)
    assert one_line_naming(error, server.base + ADDRESS, tmp_path / FILE, "by hand") and len(server.asked) == tries
    assert here(tmp_path) == {FILE: b"[]"}  # what stood there stands there


def test_offline_the_address_and_the_place_are_named_too(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="Connection refused") as error:
        get(server, tmp_path)
    assert one_line_naming(error, server.base + ADDRESS, tmp_path / FILE, "by hand") and not here(tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x", b"<html>Please log in</html>"])
def test_wrong_bytes_are_refused_at_once_and_nothing_stays(server, tmp_path, content):
    server.content[ADDRESS] = content
    with pytest.raises(ValueError, match="other bytes than expected .*wrong: ") as error:
        get(server, tmp_path)
    assert one_line_naming(error, server.base + ADDRESS, tmp_path / FILE, FILE) and not here(tmp_path)
    assert len(server.asked) == 1


# -------------------------------------------------------------------------------------------------------- GLUE archives
SST2, SST2_ZIP = ("glue/SST-2/train.tsv", "glue/SST-2/dev.tsv"), "dl.fbaipublicfiles.com/glue/data/SST-2.zip"
TSV = "sentence\tlabel\na fine film \t1\ndull \t0\n"
MEMBERS = {"SST-2/train.tsv": TSV, "SST-2/dev.tsv": TSV, "SST-2/test.tsv": "index\tsentence\n", "SST-2/original/x": ""}


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in members.items():
            z.writestr(name, text)
    return file.getvalue()


def test_of_an_archive_only_the_wanted_members_stay(server, tmp_path):
    server.content[SST2_ZIP] = zipped(MEMBERS)
    get(server, tmp_path, *SST2)
    assert here(tmp_path) == dict.fromkeys(SST2, TSV.encode()) and len(server.asked) == 1
    get(server, tmp_path, *SST2)
    assert len(server.asked) == 1


def test_an_archive_brought_by_hand_is_used_and_left(server, tmp_path):
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue/SST-2.zip").write_bytes(zipped(MEMBERS))
    get(server, tmp_path, *SST2)
    assert here(tmp_path).keys() == {*SST2, "glue/SST-2.zip"} and not server.asked


def torn(archive):
    at = archive.index(b"dev.tsv") + len("dev.tsv") + 3
    return archive[:at] + bytes([archive[at] ^ 255]) + archive[at + 1:]


@pytest.mark.parametrize(("archive", "says"), [
    (zipped(MEMBERS | {"../../escaped": "x"}), "its member '../../escaped' leads out of its folder"),
    (zipped(MEMBERS | {"/etc/escaped": "x"}), "its member '/etc/escaped' leads out of its folder"),
    (zipped({"SST-2/train.tsv": TSV}), "There is no item named 'SST-2/dev.tsv'"),
    (zipped(MEMBERS)[:-30], "not a whole zip archive"),
    (torn(zipped(MEMBERS)), "not a whole zip archive"),
    (b"<html>", "not a whole zip archive"),
])
def test_an_archive_that_escapes_lacks_a_file_or_is_torn_is_refused(server, tmp_path, archive, says):
    server.content[SST2_ZIP] = archive
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        get(server, tmp_path / "data", *SST2)
    assert one_line_naming(error, server.base + SST2_ZIP, tmp_path / "data/glue/SST-2.zip")
    assert here(tmp_path).keys() <= {"data/glue/SST-2/train.tsv"}  # a member that was whole may stay
    (tmp_path / "data/glue/SST-2.zip").write_bytes(archive)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        get(server, tmp_path / "data", *SST2)
    assert one_line_naming(error, tmp_path / "data/glue/SST-2.zip", "delete it")


def test_a_member_with_other_bytes_than_the_known_is_refused(server, tmp_path):
    server.content["dl.fbaipublicfiles.com/glue/data/RTE.zip"] = zipped({"RTE/train.tsv": "x", "RTE/dev.tsv": "x"})
    with pytest.raises(ValueError, match="glue/RTE/train.tsv is wrong: 1 bytes, expected 846226"):
        get(server, tmp_path, "glue/RTE/train.tsv", "glue/RTE/dev.tsv")
    assert not here(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- MRPC
def serve_mrpc(server, monkeypatch, source, ids, train, dev):
    for file, content in ((download.MRPC_IDS, ids), ("glue/MRPC/train.tsv", train), ("glue/MRPC/dev.tsv", dev)):
        monkeypatch.setitem(download.BLOBS, file, (git_hash(content), len(content)))
    server.content |= {download.address(download.MRPC_IDS): ids, download.address("glue/MRPC/dev.tsv"): source}


def test_mrpcs_dev_set_is_the_pairs_that_glue_names(server, tmp_path, monkeypatch):
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    a, b, c = "1\t1\t2\tA\tB", "0\t2\t1\tA\x85\tB", "1\t3\t4\tA\tB"
    train, dev = (("\n".join((head, *rows)) + "\n").encode() for rows in ([b], [a, c]))
    serve_mrpc(server, monkeypatch, "\r\n".join((head, a, b, c, "")).encode(), b"3\t4\n1\t2\n", train, dev)
    get(server, tmp_path, "glue/MRPC/train.tsv", "glue/MRPC/dev.tsv")
    assert here(tmp_path) == {"glue/MRPC/train.tsv": train, "glue/MRPC/dev.tsv": dev, download.MRPC_IDS: b"3\t4\n1\t2\n"}


@real
def test_the_real_mrpc_comes_out_to_the_byte(server, tmp_path, monkeypatch):
    ids, train, dev = ((REAL / "glue/MRPC" / name).read_bytes() for name in ("dev_ids.tsv", "train.tsv", "dev.tsv"))
    rows = train.splitlines(True)[1:], dev.splitlines(True)[1:]
    order = [0] * len(rows[0]) + [1] * len(rows[1])  # where each row of the source goes
    random.Random(0).shuffle(order)
    streams = [iter(part) for part in rows]
    source = b"".join([train.splitlines(True)[0], *(next(streams[i]) for i in order)])
    assert len(source) == 1_047_044
    serve_mrpc(server, monkeypatch, source, ids, train, dev)
    get(server, tmp_path, "glue/MRPC/train.tsv", "glue/MRPC/dev.tsv")
    assert here(tmp_path)["glue/MRPC/train.tsv"] == train and here(tmp_path)["glue/MRPC/dev.tsv"] == dev


# ------------------------------------------------------------------------------------------------------------ the table
FILES = {file: task for task in tasks.TASKS.values() for file in task.train + task.test}


def test_every_file_of_every_task_has_an_address_and_all_but_four_tasks_a_hash():
    assert all(re.fullmatch(r"[a-z.]+/\S+\.(jsonl?|tsv|txt|zip)", download.address(file)) for file in FILES)
    assert {FILES[file].name for file in FILES if file not in download.BLOBS} == {"sst2", "qqp", "mnli", "qnli"}
    assert set(download.BLOBS) - {download.MRPC_IDS} <= set(FILES)


def test_no_two_files_share_a_hash():
    assert len({blob for blob, _ in download.BLOBS.values()}) == len(download.BLOBS)


@real
def test_the_hashes_are_those_of_the_published_files(monkeypatch):
    monkeypatch.undo()  # FILE's own hash again
    there = [file for file in download.BLOBS if (REAL / file).is_file()]
    assert len(there) >= 27 and all(download.state(REAL / file, file) == "ok" for file in there)


@real
def test_the_hashes_of_llm_adapters_are_those_of_its_commit(monkeypatch):
    monkeypatch.undo()
    lines = (REAL / "llm_adapters/BLOBS.txt").read_text().splitlines()[1:]
    listed = {path: blob for blob, path in (line.split("  ") for line in lines)}
    ours = {file: blob for file, (blob, _) in download.BLOBS.items() if file.startswith("llm_adapters/")}
    assert len(ours) == 26
    assert all(listed[download.address(file).split("/", 4)[4]] == blob for file, blob in ours.items())


# --------------------------------------------------------------------------------------------------------- the commands
def command(*args):
    commands.main(commands.parser().parse_args(list(map(str, args))))


@pytest.fixture
def local(server, monkeypatch):
    """The commands fetch from the server on this machine."""
    monkeypatch.setattr(download, "fetch", partial(download.fetch, base=server.base, wait=0))
    return server


def test_list_has_a_line_for_every_file_and_says_how_it_is(tmp_path, capsys):
    for file, content in ((FILE, CONTENT), ("llm_adapters/SVAMP/test.json", b"[]"), (SST2[1], TSV.encode())):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(content)
    command("list", "--data-dir", tmp_path)
    lines = {tuple(line.split()[:3]): re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[1:]}
    assert {name for name, *_ in lines} == set(tasks.TASKS)
    assert lines["boolq", "commonsense", "test"] == ["boolq", "commonsense", "test", "3270", FILE, "ok"]
    assert lines["boolq", "commonsense", "train"][3:] == ["9427", FILE.replace("test", "train"), "missing"]
    assert lines["svamp", "arithmetic", "test"][-1] == "wrong: 2 bytes, expected 459713"
    assert lines["sst2", "glue", "test"][-1] == "hash not known"
    assert lines["math-mix", "arithmetic", "test"][3:5] == ["120", "held out of train"]


def test_fetched_files_without_a_known_hash_are_counted(local, tmp_path, capsys):
    local.content[SST2_ZIP] = zipped(MEMBERS)
    command("fetch", "sst2", "--data-dir", tmp_path)
    out, err = capsys.readouterr()
    assert f"warning: {tmp_path / SST2[0]} holds 2 examples, published are 67349" in err
    assert out.count("\n") == 3 and out.count("hash not known") == 2
    local.content[SST2_ZIP] = zipped(MEMBERS | {"SST-2/dev.tsv": "a\tb\n"})
    with pytest.raises(ValueError, match="dev.tsv, line 1: the header has no column 'label'"):
        command("fetch", "sst2", "--data-dir", tmp_path / "other")


def test_groups_are_all_tasks_of_a_kind():
    assert {t.name for t in commands.chosen(["glue"])} == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}
    assert [t.name for t in commands.chosen(["rte", "arithmetic", "rte", "gsm8k"])][:2] == ["rte", "gsm8k"]
    assert {t.name for t in commands.chosen(["all"])} == set(tasks.TASKS) - {"word-problems"}
    assert {t.name for t in commands.chosen(["commonsense"])} >= {"boolq", "commonsense170k"}


@pytest.mark.parametrize(("name", "says"), [
    ("word-problems", "no published file"), ("mine.json", "no published file"), ("gsm9k", "did you mean gsm8k")])
def test_only_published_files_are_fetched(name, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        command("fetch", name, "--data-dir", tmp_path)


@real
def test_overlap_finds_the_test_questions_that_stand_in_the_mawps_training_set(capsys):
    command("overlap", "--train", "mawps", "--data-dir", REAL)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    found = {name: (int(in_it), int(questions)) for name, questions, in_it, _ in lines}
    assert found == {"multiarith": (490, 600), "addsub": (327, 395), "singleeq": (436, 508), "mawps": (28, 238),
                     "svamp": (0, 1000), "gsm8k": (0, 1319), "aqua": (0, 254)}


def test_overlap_names_sets_that_are_missing_and_refuses_those_without_a_file(tmp_path, capsys):
    (tmp_path / tasks.MAWPS).parent.mkdir(parents=True)
    (tmp_path / tasks.MAWPS).write_text(json.dumps([{"original_text": "q", "equation": "X=1", "ans": 1.0}]))
    command("overlap", "--train", "mawps", "--test", "svamp,mawps", "--data-dir", tmp_path)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["svamp", "missing"], ["mawps", "missing"]]
    for options in (["--train", "mawps", "--test", "math-mix"], ["--train", "word-problems"]):
        with pytest.raises(ValueError, match="--test: found .*expected tasks with a test file"):
            command("overlap", *options, "--data-dir", tmp_path)


def test_a_fetched_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    monkeypatch.setattr(download, "BLOBS", {})
    (tmp_path / "a.part").write_text("a")
    download._move(tmp_path / "a.part", tmp_path, ["a"])
    assert calls == ["fsync", "replace", "fsync"]
