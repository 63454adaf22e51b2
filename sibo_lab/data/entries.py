"""Files of rows, as people and publishers write them: JSON, JSON lines, CSV, Parquet, and gzip of the first three."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from sibo_lab.files import one_line, parse_json, quoted

Entry = tuple[str, dict]  # its place, for errors, and its values


def text(path: Path) -> str:
    """A file's text; ValueError names it, and the line that is not UTF-8."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{path}: not a whole gzip file ({one_line(e)}); fetch or copy it again") from None
    try:
        return data.decode("utf-8-sig")  # MRPC, and files written on Windows, begin with a BOM
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8 text, got byte 0x{e.object[e.start]:02x}") from None


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines and their numbers; only a line feed, with or without a carriage return, ends one."""
    for i, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        yield i, line.removesuffix("\r")


def read(path: Path) -> Iterator[Entry]:
    """The rows of a file, as its ending says; ValueError names the line or entry that is malformed."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        return _parquet(path)
    return _csv(path, text(path)) if kind == "csv" else in_json(path, text(path))


def in_json(path: Path, text: str) -> Iterator[Entry]:
    """The objects of a JSON list, or of JSON lines, which some call .json too."""
    if path.name.removesuffix(".gz").endswith(".jsonl") or _begins_with_an_object(text):
        entries = [(f"{path}, line {i}", parse_json(line, path, i)) for i, line in lines(text) if line.strip()]
    elif isinstance(content := parse_json(text, path), list):
        entries = [(f"{path}, entry {i}", entry) for i, entry in enumerate(content, 1)]
    else:
        raise ValueError(f"{path}, line 1: expected a JSON list of objects, got {type(content).__name__}")
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected an object in braces, got {type(entry).__name__}")
        yield place, entry


def _begins_with_an_object(text: str) -> bool:
    """Whether the first of several lines is an object."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, text: str) -> Iterator[Entry]:
    csv.field_size_limit(1 << 30)  # of a text, not of a number
    rows, start = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        # what has no name, such as an index, gets the one that pandas gives it
        names = [name or f"Unnamed: {i}" for i, name in enumerate(next(rows, []))]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}, line 1: expected columns of different names, got {listed(names)}")
        for row in rows:
            place, start = f"{path}, line {start + 1}", rows.line_num
            if row and len(row) != len(names):
                raise ValueError(f"{place}: expected {len(names)} columns separated by commas, got {len(row)}")
            if row:
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as e:
        raise ValueError(f"{path}, line {rows.line_num}: not valid CSV ({one_line(e)})") from None


def _parquet(path: Path) -> Iterator[Entry]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: a .parquet file needs pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a whole Parquet file ({one_line(e)}); fetch or copy it again") from None
    for i, row in enumerate(rows, 1):
        yield f"{path}, row {i}", row


def listed(names: Iterable[str]) -> str:
    return ", ".join(quoted(name)[1:-1] for name in islice(names, 20)) or "nothing"


def field(place: str, entry: dict, key: str, types: tuple = (str,)) -> str:
    """entry[key], of these types; what is no text as JSON writes it. ValueError for others, and for blanks."""
    if key not in entry:
        raise ValueError(f"{place}: expected the key {key!r}, got {listed(entry)}")
    if type(entry[key]) not in types:
        raise ValueError(f"{place}: {key!r}: expected {types[0].__name__}, got {type(entry[key]).__name__}")
    value = entry[key] if isinstance(entry[key], str) else json.dumps(entry[key])
    if not value.strip() or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{place}: {key!r}: expected text, got {'half a surrogate pair' if value.strip() else 'none'}")
    return value
