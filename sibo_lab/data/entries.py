"""Files of rows, as people and publishers write them: JSON, JSON lines, CSV, Parquet, and gzip of the first three."""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path

from sibo_lab.files import one_line, parse_json, quoted, refuse_pointer

Entry = tuple[str, dict]  # its place, for errors, and its values
UNPACKED = 1 << 30  # bytes at most of a .gz: a thousandth of them may hold more than memory


def text(path: Path) -> str:
    """A file's text; ValueError names it, and the line that is not UTF-8."""
    refuse_pointer(path)
    packed = path.suffix == ".gz"
    try:
        with (gzip.open if packed else open)(path, "rb") as f:
            data = f.read(UNPACKED + 1 if packed else -1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: not a whole gzip file ({one_line(e)}); fetch or copy it again") from None
    if packed and len(data) > UNPACKED:
        raise ValueError(f"{path}: expected at most {UNPACKED:,} bytes once unpacked, got more; unpack it yourself")
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
    """The objects of a JSON list, or of JSON lines, whichever of the two the file is called; or its only one."""
    called_lines = path.name.removesuffix(".gz").endswith(".jsonl") and not re.match(r"\s*\[\s*\{", text)
    if called_lines or _begins_with_an_object(text):
        unit, found = "line", ((i, parse_json(line, path, i)) for i, line in lines(text) if line.strip())
    else:
        content = parse_json(text, path) if text.strip() else []
        unit, found = "entry", enumerate(content if isinstance(content, list) else [content], 1)
    for i, entry in found:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, {unit} {i}: expected an object in braces, got {type(entry).__name__}")
        yield f"{path}, {unit} {i}", entry


def _begins_with_an_object(text: str) -> bool:
    """Whether the first line is an object."""
    first = text.lstrip().partition("\n")[0]
    try:
        return first.startswith("{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, text: str) -> Iterator[Entry]:
    csv.field_size_limit(1 << 30)  # of a text, not of a number
    head = text.partition("\n")[0]
    comma = next((mark for mark in ",;\t" if mark in head), ",")  # semicolons: spreadsheets, in half of Europe
    rows, start = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=comma), 1
    try:
        # what has no name, such as an index, gets the one that pandas gives it
        names = [name or f"Unnamed: {i}" for i, name in enumerate(next(rows, []))]
        _require_different(f"{path}, line 1", names)
        for row in rows:
            place, start = f"{path}, line {start + 1}", rows.line_num
            if row and len(row) != len(names):
                raise ValueError(f"{place}: expected {len(names)} columns separated by {comma!r}, got {len(row)}")
            if row:
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as e:
        raise ValueError(f"{path}, line {rows.line_num}: not valid CSV ({one_line(e)})") from None


def _parquet(path: Path) -> Iterator[Entry]:
    refuse_pointer(path)
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: a .parquet file needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(path).read()
        rows = table.to_pylist()
    except (ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a whole Parquet file ({one_line(e)}); fetch or copy it again") from None
    _require_different(path, table.column_names)
    narrow = {column.name: column.type.to_pandas_dtype() for column in table.schema
              if str(column.type) in ("halffloat", "float")}
    for i, row in enumerate(rows, 1):  # float32's 3.8 is 3.8, not 3.799999952316284
        yield f"{path}, row {i}", row | {k: float(str(of(row[k]))) for k, of in narrow.items() if row[k] is not None}


def _require_different(place: object, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: expected columns of different names, got {listed(names)}")


def listed(names: Iterable[str]) -> str:
    return ", ".join(quoted(name)[1:-1] for name in islice(names, 20)) or "nothing"


def field(place: str, entry: dict, key: str, types: tuple = (str,)) -> str:
    """entry[key], of these types; a float in plain decimals, what else is no text as JSON writes it. ValueError for
    others, and for blanks."""
    if key not in entry:
        raise ValueError(f"{place}: expected the key {key!r}, got {listed(entry)}")
    if type(entry[key]) not in types:
        raise ValueError(f"{place}: {key!r}: expected {types[0].__name__}, got {type(entry[key]).__name__}")
    value = entry[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {key!r}: expected a finite number, got {value}")
    if not isinstance(value, str):
        value = format(Decimal(repr(value)), "f") if isinstance(value, float) else json.dumps(value)
    if not value.strip() or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{place}: {key!r}: expected text, got {'half a surrogate pair' if value.strip() else 'none'}")
    return value
