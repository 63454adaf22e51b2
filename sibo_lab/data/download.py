"""Download the benchmarks' files: resumed where they stopped, checked, installed whole or not at all. The official code
leaves that to its users, which stays possible: every error names the address and the place for a copy."""

import hashlib
import http.client
import io
import shutil
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from sibo_lab import files

TRIES = 4
LARGEST = 1 << 30  # bytes of an archive's member of unknown size; GLUE's are below a tenth
MRPC, MRPC_IDS = "glue/MRPC/msr_paraphrase_train.txt", "glue/MRPC/dev_ids.tsv"


class Source(NamedTuple):
    size: int | None
    sha1: str | None  # git's
    address: str


@cache
def sources() -> dict[str, Source]:
    """sources.txt, by the files' names in tasks.TASKS."""
    lines = Path(__file__).with_name("sources.txt").read_text("utf-8").splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: Source(None if size == "-" else int(size), None if sha1 == "-" else sha1, url)
            for name, size, sha1, url in rows}


def address(name: str) -> str:
    """Where a file, or the archive that holds it, is published, without https://."""
    if name not in sources():
        raise ValueError(f"{name}: expected a file of sources.txt, got one without an address; add a line for it there")
    return sources()[name].address


def state(path: Path, name: str) -> str:
    """"missing", "ok", "hash unknown", or what is wrong with the file at `path`."""
    if not path.is_file():
        return "missing"
    expected, size = sources()[name], path.stat().st_size
    if expected.sha1 is None:
        return "hash unknown"
    if expected.size not in (None, size):
        return f"wrong: expected {expected.size} bytes, got {size}"
    with open(path, "rb") as f:
        sha1 = hashlib.file_digest(f, lambda: hashlib.sha1(b"blob %d\0" % size)).hexdigest()
    return "ok" if sha1 == expected.sha1 else f"wrong: expected git's SHA-1 {expected.sha1}, got {sha1}"


def _place(name: str, data_dir: Path) -> Path:
    """The place for what is at a file's address: the file, its archive, or MRPC's source."""
    url = address(name)
    if url.endswith(".zip"):
        return data_dir / "glue" / Path(url).name
    return data_dir / (MRPC if url.endswith(Path(MRPC).name) else name)


def missing(names: Iterable[str], data_dir: Path) -> list[str]:
    """A line for each address of a missing file, with the place for a copy."""
    lost = [name for name in names if not (data_dir / name).is_file()]
    lost += [MRPC_IDS] * any(name.startswith("glue/MRPC/") for name in lost)
    places = {_place(name, data_dir): address(name) for name in lost}
    return [f"missing: {place}, a copy of https://{url}" for place, url in places.items() if not place.is_file()]


def fetch(names: Iterable[str], data_dir: Path, base: str = "https://", wait: float = 1.0) -> None:
    """Downloads the files of these names that are missing or wrong in `data_dir`, unless their archive, or MRPC's
    source, is in its place already. `base` precedes every address; `wait`: seconds before the second try, then doubled.
    ValueError for wrong bytes, OSError if a download fails; what was in the file's place stays."""
    wanted = {}  # names by address
    for name in names:
        if state(data_dir / name, name) not in ("ok", "hash unknown"):
            wanted.setdefault(address(name), []).append(name)
    for url, some in wanted.items():
        place, install = _place(some[0], data_dir), _unzip if url.endswith(".zip") else _move
        if place == data_dir / MRPC:
            fetch([MRPC_IDS], data_dir, base, wait)
            install = _split_mrpc
        install = partial(install, data_dir=data_dir, names=some)
        if place.is_file() and place != data_dir / some[0]:
            try:
                install(place)
            except ValueError as e:
                raise ValueError(f"{place}: {e}; delete it to download it from {base + url}") from None
        else:
            _download(base + url, place, install, wait)


def _download(url: str, place: Path, install: Callable[[Path], None], wait: float) -> None:
    """Downloads into a .part file beside `place`, resuming one that is there, and installs that."""
    by_hand = f"download it by hand and put it at {place}"
    if files.offline():
        raise OSError(f"{url}: --offline (HF_HUB_OFFLINE) forbids downloads; {by_hand}")
    part = place.with_name(place.name + ".part")
    resumed = part.is_file()
    for i in range(TRIES):
        try:
            _receive(url, part)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            code = getattr(e, "code", None)  # of HTTP; None: the connection failed
            if i == TRIES - 1 or code and code < 500 and code not in (408, 416, 429):
                why = e if code else getattr(e, "reason", e)
                raise OSError(f"{url}: download failed ({why}); try again later, or {by_hand}") from None
            if code == 416:  # nothing comes after these bytes: they are of another file
                part.unlink()
            time.sleep(wait * 2**i)
    try:
        install(part)
    except ValueError as e:
        part.unlink()
        if not resumed:
            raise ValueError(f"{url}: {e}; {by_hand}") from None
        _download(url, place, install, wait)  # from the start: what was resumed may be of another file
    part.unlink(missing_ok=True)


def _receive(url: str, part: Path) -> None:
    """One request for what `part` lacks; ConnectionError if it ends too early."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206:  # the server ignores ranges and sends everything
            have = 0
        total = None if answer.length is None else have + answer.length
        part.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True)
        with open(part, "ab" if have else "wb") as f, bar:
            while piece := answer.read(1 << 16):
                bar.update(f.write(piece))
    if total not in (None, found := part.stat().st_size):
        raise ConnectionError(f"the connection ended after {found} of {total} bytes")


def _move(part: Path, data_dir: Path, names: list[str]) -> None:
    with open(part, "rb") as f:
        _write(f, data_dir, names[0])


def _unzip(archive: Path, data_dir: Path, names: list[str]) -> None:
    """Takes out nothing but the files of these names; archives hold glue/CoLA/train.tsv as CoLA/train.tsv."""
    try:
        with zipfile.ZipFile(archive) as z:
            files.check_archive(z)
            for name in names:
                info = z.getinfo(name.removeprefix("glue/"))
                if info.file_size > (most := sources()[name].size or LARGEST):
                    raise ValueError(f"{name} is wrong: expected at most {most} bytes, got {info.file_size}")
                with z.open(info) as member:
                    _write(member, data_dir, name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as e:
        raise ValueError(f"expected a whole zip archive of {' and '.join(names)}, got a damaged one "
                         f"({files.one_line(e) or 'it ends too early'})") from None


def _split_mrpc(source: Path, data_dir: Path, names: list[str]) -> None:
    """GLUE's rule: the pairs of ids in dev_ids.tsv are the dev set, in the source's order; the rest trains."""
    dev = set((data_dir / MRPC_IDS).read_bytes().split(b"\n"))
    header, *rows = source.read_bytes().replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
    for name in names:
        kept = [row for row in rows if (b"\t".join(row.split(b"\t")[1:3]) in dev) == name.endswith("dev.tsv")]
        _write(io.BytesIO(b"\n".join([header, *kept, b""])), data_dir, name)


def _write(source: IO[bytes], data_dir: Path, name: str) -> None:
    def fill(draft):
        with open(draft, "wb") as f:
            shutil.copyfileobj(source, f)
        if (found := state(draft, name)) not in ("ok", "hash unknown"):
            raise ValueError(f"{name} is {found}")

    files.write(data_dir / name, fill)
