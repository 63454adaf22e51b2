"""sibo_lab/data/download.py, from a server on this machine that drops, lies, fails and recovers."""

import os
import random
import re
import time
from pathlib import Path

import local_server
import pytest
from local_server import ADDRESS, CONTENT, FILE, MEMBERS, SST2, SST2_ZIP, TSV, zipped

from sibo_lab.data import download, tasks

REAL = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")


@pytest.fixture
def server(monkeypatch):
    with local_server.running(monkeypatch) as server:
        yield server


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
    monkeypatch.setitem(download.sources(), "x", download.Source(None, blob, ""))
    assert download.state(tmp_path / "x", "x") == "ok"
    (tmp_path / "x").write_bytes(content + b"\n")
    assert download.state(tmp_path / "x", "x").startswith("wrong: expected git's SHA-1")


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


def test_a_dropped_download_resumes_where_it_stopped(server, tmp_path):
    server.moods = ["drop", "drop"]
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT}
    assert server.asked == [(ADDRESS, None), (ADDRESS, "bytes=150000-"), (ADDRESS, "bytes=225000-")]


def test_a_reset_connection_resumes_too(server, tmp_path):
    server.moods = ["reset"]
    get(server, tmp_path)
    assert here(tmp_path) == {FILE: CONTENT} and len(server.asked) == 2


def test_what_an_earlier_command_downloaded_is_not_asked_for_again(server, tmp_path):
    server.moods = ["drop"] * download.TRIES
    with pytest.raises(OSError, match="download failed .the connection ended after 281250 of 300000 bytes"):
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
def test_what_cannot_be_downloaded_is_named_with_its_address_and_the_place_for_a_copy(server, tmp_path, status, tries):
    server.moods = [status] * 9
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_bytes(b"[]")
    with pytest.raises(OSError, match=f"HTTP Error {status}") as error:
        get(server, tmp_path)
    assert one_line_naming(error, server.base + ADDRESS, tmp_path / FILE, "by hand") and len(server.asked) == tries
    assert here(tmp_path) == {FILE: b"[]"}  # what was there is still there


def test_offline_the_address_and_the_place_are_named_too(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="Connection refused") as error:
        get(server, tmp_path)
    assert one_line_naming(error, server.base + ADDRESS, tmp_path / FILE, "by hand") and not here(tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x", b"<html>Please log in</html>"])
def test_wrong_bytes_are_refused_at_once_and_nothing_of_them_stays(server, tmp_path, content):
    server.content[ADDRESS] = content
    with pytest.raises(ValueError, match="is wrong: expected") as error:
        get(server, tmp_path)
    assert one_line_naming(error, server.base + ADDRESS, tmp_path / FILE, FILE) and not here(tmp_path)
    assert len(server.asked) == 1


# -------------------------------------------------------------------------------------------------------- GLUE archives
def test_of_an_archive_only_the_wanted_members_stay(server, tmp_path):
    server.content[SST2_ZIP] = zipped(MEMBERS)
    get(server, tmp_path, *SST2)
    assert here(tmp_path) == dict.fromkeys(SST2, TSV.encode()) and len(server.asked) == 1
    get(server, tmp_path, *SST2)
    assert len(server.asked) == 1


def test_an_archive_put_there_by_hand_is_used_and_stays(server, tmp_path):
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
    (zipped(MEMBERS)[:-30], "expected a whole zip archive of glue/SST-2/train.tsv and"),
    (torn(zipped(MEMBERS)), "got a damaged one"),
    (b"<html>", "got a damaged one (File is not a zip file)"),
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
    with pytest.raises(ValueError, match="glue/RTE/train.tsv is wrong: expected 846226 bytes, got 1"):
        get(server, tmp_path, "glue/RTE/train.tsv", "glue/RTE/dev.tsv")
    assert not here(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- MRPC
def serve_mrpc(server, monkeypatch, source, ids, train, dev):
    for file, content in ((download.MRPC_IDS, ids), ("glue/MRPC/train.tsv", train), ("glue/MRPC/dev.tsv", dev)):
        local_server.expect(monkeypatch, file, content)
    server.content |= {download.address(download.MRPC_IDS): ids, download.address("glue/MRPC/dev.tsv"): source}


def test_mrpcs_dev_set_is_the_pairs_that_glue_names(server, tmp_path, monkeypatch):
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    a, b, c = "1\t1\t2\tA\tB", "0\t2\t1\tA\x85\tB", "1\t3\t4\tA\tB"
    train, dev = (("\n".join((head, *rows)) + "\n").encode() for rows in ([b], [a, c]))
    serve_mrpc(server, monkeypatch, "\r\n".join((head, a, b, c, "")).encode(), b"3\t4\n1\t2\n", train, dev)
    get(server, tmp_path, "glue/MRPC/train.tsv", "glue/MRPC/dev.tsv")
    assert here(tmp_path) == {"glue/MRPC/train.tsv": train, "glue/MRPC/dev.tsv": dev,
                              download.MRPC_IDS: b"3\t4\n1\t2\n"}


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
    unhashed = {file for file, source in download.sources().items() if source.sha1 is None}
    assert {FILES[file].name for file in unhashed} == {"sst2", "qqp", "mnli", "qnli"}
    assert set(download.sources()) == {*FILES, download.MRPC_IDS}


def test_no_two_files_share_a_hash():
    hashes = [source.sha1 for source in download.sources().values() if source.sha1]
    assert all(re.fullmatch("[0-9a-f]{40}", sha1) for sha1 in hashes) and len(set(hashes)) == len(hashes) == 38


@real
def test_the_hashes_are_those_of_the_published_files():
    there = [file for file, source in download.sources().items() if source.sha1 and (REAL / file).is_file()]
    assert len(there) >= 27 and all(download.state(REAL / file, file) == "ok" for file in there)


@real
def test_the_hashes_of_llm_adapters_are_those_of_its_commit():
    lines = (REAL / "llm_adapters/BLOBS.txt").read_text().splitlines()[1:]
    listed = {path: blob for blob, path in (line.split("  ") for line in lines)}
    ours = {file: source.sha1 for file, source in download.sources().items() if file.startswith("llm_adapters/")}
    assert len(ours) == 27
    assert all(listed[download.address(file).split("/", 4)[4]] == blob for file, blob in ours.items())


# ------------------------------------------------------------------------------------------------------- on disk
def test_a_downloaded_file_is_flushed_to_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    monkeypatch.setitem(download.sources(), "a", download.Source(None, None, ""))
    (tmp_path / "a.part").write_text("a")
    download._move(tmp_path / "a.part", tmp_path, ["a"])
    assert calls == ["fsync", "replace", "fsync"]
