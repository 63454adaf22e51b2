"""Where the benchmarks' files come from, and how they get here: resumed where they stopped, checked, whole or not.

The addresses are those that LLM-Adapters, GSM8K, FLAN and GLUE publish, each repository at one commit. git names a file
by the SHA-1 of "blob <size>\0" and its bytes, so one number checks both; where none is known (SST-2, QQP, MNLI, QNLI)
the archive's checksums are, and data.py counts the examples. The official code has no such thing: its users download by
hand, which remains possible: every error names the address and the place."""

import hashlib
import http.client
import io
import os
import shutil
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO

from tqdm import tqdm

from sibo_lab import files

TRIES = 4
LARGEST = 1 << 30  # bytes of a member of an archive whose size is not known; GLUE's are below a tenth of it
GITHUB, GLUE = "raw.githubusercontent.com/", "dl.fbaipublicfiles.com/glue/data/"
LLM_ADAPTERS = GITHUB + "AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/"
MRPC, MRPC_IDS = "glue/MRPC/msr_paraphrase_train.txt", "glue/MRPC/dev_ids.tsv"
ADDRESSES = {  # by the beginning of a file's name: a folder, or what several files are taken out of
    "llm_adapters/ft-training_set/": LLM_ADAPTERS + "ft-training_set/",
    "llm_adapters/": LLM_ADAPTERS + "dataset/",
    "raw/gsm8k/": GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/",
    "raw/": GITHUB + "google-research/FLAN/e9e4ec6e2701182c7a91af176f705310da541277/flan/v2/cot_data/",
    MRPC_IDS: GITHUB + "F0restL1n/BERT/0d0288be08079531c7b3a85af3d532f9adb0f13a/glue_data/MRPC/dev_ids.tsv",
    "glue/MRPC/": "dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt",
    "glue/QQP/": GLUE + "QQP-clean.zip", "glue/QNLI/": GLUE + "QNLIv2.zip", "glue/CoLA/": GLUE + "CoLA.zip",
    "glue/SST-2/": GLUE + "SST-2.zip", "glue/STS-B/": GLUE + "STS-B.zip", "glue/MNLI/": GLUE + "MNLI.zip",
    "glue/RTE/": GLUE + "RTE.zip",
}
BLOBS = {  # git blob SHA-1, and bytes where they are known; GLUE publishes neither: taken from a copy of its files
    "llm_adapters/AQuA/test.json": ("731fbb456f7a93bb4121125de09c4adcf42e5dab", 152063),
    "llm_adapters/ARC-Challenge/test.json": ("9540685439144200b5a7e48dab9ca4655be2af09", None),
    "llm_adapters/ARC-Challenge/train.json": ("d7e080b04bff9fd16dd85455fb04481807a088d8", None),
    "llm_adapters/ARC-Easy/test.json": ("6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f", 1157216),
    "llm_adapters/ARC-Easy/train.json": ("488a8e5e5bbbd7a630ebbfe07a1fd91b7d9d8c9b", 1092324),
    "llm_adapters/AddSub/test.json": ("f3996cdf4159b4e1e4b6768865a4db72105f4e2f", 170411),
    "llm_adapters/MultiArith/test.json": ("08e996c6cd8c633cc977f5c50709a8bbfc8fadff", 275458),
    "llm_adapters/SVAMP/test.json": ("98b8f1872db596f8aaff2c95d1d698a9fa13b94f", 459713),
    "llm_adapters/SingleEq/test.json": ("cce7a868400323e30e2094a15d482c1aa743dbb0", 212001),
    "llm_adapters/boolq/test.json": ("6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3", 899151),
    "llm_adapters/boolq/train.json": ("87a7beee26b49f81c450641ef2ff84f55611321f", 2599507),
    "llm_adapters/gsm8k/test.json": ("57a7a08e10e12e975e1f972d2b8125c0d4c722b1", 824475),
    "llm_adapters/hellaswag/test.json": ("183c4920415f83ba4b793c4873a33e7e10bd1be5", None),
    "llm_adapters/hellaswag/train.json": ("ca68dc85fc2a2f73c9b1b8b0823cc41a8f669718", None),
    "llm_adapters/mawps/test.json": ("eca473c5b5d398acbae0b84ede833bbbccd63add", 60202),
    "llm_adapters/mawps/trainset.json": ("30ce34399859c115cb391ac96fd009f71f5ba98f", 833527),
    "llm_adapters/openbookqa/test.json": ("a6e69676104bcb77237388c3b5a3f0dcbb81d1e2", 202545),
    "llm_adapters/openbookqa/train.json": ("75bcd5eb9f5e77a3796c05e6bb38f169d19563fc", 1987446),
    "llm_adapters/piqa/test.json": ("f7a1c260692ef31796d4763cb6334f316a754fed", 913157),
    "llm_adapters/piqa/train.json": ("44326ba946f8bd645bfa7a189e619d29b5bc17e5", None),
    "llm_adapters/social_i_qa/test.json": ("eadf221799ca394367b144c0f86ee0436db409d2", 843748),
    "llm_adapters/social_i_qa/train.json": ("bd524129d80efdfabc8476bbedc4f41b400cfda0", None),
    "llm_adapters/winogrande/test.json": ("21257263593dd4d00546e1918c88ca0f357b08ad", 497409),
    "llm_adapters/winogrande/train.json": ("0b56375ac6b4464fa97abfb72812f15c772ba305", None),
    "llm_adapters/ft-training_set/math_10k.json": ("27dba77d6ed80aa118d78fbafa5cecd651f6d463", None),
    "llm_adapters/ft-training_set/commonsense_170k.json": ("529e426b33d4cdb1d0c4a275a1a7245ad081fd91", None),
    "raw/gsm8k/train.jsonl": ("7d97154b91aef28d01c3301741c81ce90039a4b1", 4166206),
    "raw/aqua_train.tsv": ("f3f97ded8ba3b10b0e2a053bd2a14e1679bd25b9", 869494),
    "glue/CoLA/train.tsv": ("f450b31cce0cc7792bed5aeef6faded331a6b6d0", 428590),
    "glue/CoLA/dev.tsv": ("f0472d159cfe97644ce3cb9f58c25fc236ec0cb3", 53717),
    "glue/MRPC/train.tsv": ("da9362aaa52139f0707e5ea03c6a27a6151529e1", 941471),
    "glue/MRPC/dev.tsv": ("435bde0d09c7162493322c948bdb1dcea0de7457", 105616),
    MRPC_IDS: ("44bf80696afcc6ee06d1f1f643386eeeb0e9702e", 6222),
    "glue/RTE/train.tsv": ("a0595a437bbda94ac819a87074225fa1270f1ee1", 846226),
    "glue/RTE/dev.tsv": ("78e67cc19ff513f0db8a632a0402f1cfbbbf076b", 90343),
    "glue/STS-B/train.tsv": ("1e74300b4df8a1e52f9af38c7581eca02e94bc82", 984099),
    "glue/STS-B/dev.tsv": ("3dd61800960f9de3715ee9ec21221cb6b2c5ce8f", 276928),
}


def address(file: str) -> str:
    """Where a file (named as in data.TASKS), or what it is taken out of, is published: a URL without "https://"."""
    start = next(start for start in ADDRESSES if file.startswith(start))
    there = ADDRESSES[start]
    return there + file.removeprefix(start) if there.endswith("/") else there


def state(path: Path, file: str) -> str:
    """"missing", "ok", "hash not known" or what is wrong with the file at `path`, which is to be `file`."""
    if not path.is_file():
        return "missing"
    if file not in BLOBS:
        return "hash not known"
    (blob, size), found = BLOBS[file], path.stat().st_size
    if size not in (None, found):
        return f"wrong: {found} bytes, expected {size}"
    with open(path, "rb") as f:
        hashed = hashlib.file_digest(f, lambda: hashlib.sha1(b"blob %d\0" % found)).hexdigest()
    return "ok" if hashed == blob else f"wrong: blob SHA-1 {hashed}, expected {blob}"


def brought(file: str, data_dir: Path) -> Path:
    """Where a user puts a copy of what stands at a file's address: an archive and MRPC's source stay what they are."""
    there = address(file)
    if there.endswith(".zip"):
        return data_dir / "glue" / there.rpartition("/")[2]
    return data_dir / (MRPC if there == ADDRESSES["glue/MRPC/"] else file)


def missing(files: Iterable[str], data_dir: Path) -> list[str]:
    """A line for each address that those of `files` which are not there come from, and where a copy of it goes."""
    lost = [file for file in files if not (data_dir / file).is_file()]
    lost += [MRPC_IDS] if any(file.startswith("glue/MRPC/") for file in lost) else []
    return [f"missing: {place}, a copy of https://{there}" for place, there in
            {brought(file, data_dir): address(file) for file in lost}.items() if not place.is_file()]


def fetch(files: Iterable[str], data_dir: Path, base: str = "https://", wait: float = 1.0) -> None:
    """Brings those of `files` (named as in data.TASKS) that are missing or wrong into `data_dir`, with a bar on stderr.

    An archive, or MRPC's source, that a user put where the errors say is used instead of the network. `base` is what
    stands before the addresses, such as a mirror's; `wait`: seconds before the second try, doubled for each further.
    ValueError: what came is wrong; OSError: it could not be fetched. Both name the address and the place for a copy
    brought by hand, and leave alone whatever stood there."""
    wanted: dict[str, list[str]] = {}
    for file in files:
        if state(data_dir / file, file) not in ("ok", "hash not known"):
            wanted.setdefault(address(file), []).append(file)
    for there, some in wanted.items():
        place, install = brought(some[0], data_dir), _unzip if there.endswith(".zip") else _move
        if there == ADDRESSES["glue/MRPC/"]:
            fetch([MRPC_IDS], data_dir, base, wait)
            install = _split_mrpc
        install = partial(install, data_dir=data_dir, names=some)
        if place.is_file() and place != data_dir / some[0]:
            try:
                install(place)
            except ValueError as e:
                raise ValueError(f"{place}: {e}; delete it, and it is fetched from {base + there}") from None
        else:
            _bring(base + there, place, install, wait)


def _bring(url: str, place: Path, install: Callable[[Path], None], wait: float) -> None:
    """Downloads into a .part file beside `place`, going on where an earlier try stopped, and installs that."""
    if files.offline():
        raise OSError(f"{url}: --offline (HF_HUB_OFFLINE) forbids to fetch it; bring it by hand and put it at {place}")
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
                raise OSError(f"{url}: could not be fetched ({why}); try again later, or bring it by hand and put it "
                              f"at {place}") from None
            if code == 416:  # there is nothing after what we have, so that is no part of it
                part.unlink()
            time.sleep(wait * 2**i)
    try:
        install(part)
    except ValueError as e:
        part.unlink()
        if not resumed:
            raise ValueError(f"{url}: found other bytes than expected ({e}); bring it by hand and put it at "
                             f"{place}") from None
        _bring(url, place, install, wait)  # the .part may have been of another file: once more, from the start
    part.unlink(missing_ok=True)


def _receive(url: str, part: Path) -> None:
    """One request for what `part` lacks; ConnectionError where it ends too early."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206:  # it ignores ranges, and sends everything
            have = 0
        total = None if answer.length is None else have + answer.length
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if have else "wb") as f, tqdm(desc=part.stem, initial=have, total=total, unit="B",
                                                           unit_scale=True) as bar:
            while piece := answer.read(1 << 16):
                bar.update(f.write(piece))
    if total not in (None, found := part.stat().st_size):
        raise ConnectionError(f"the connection ended after {found} of {total} bytes")


def _move(part: Path, data_dir: Path, names: list[str]) -> None:
    _check(part, names[0])
    files.flush(part)
    os.replace(part, data_dir / names[0])
    files.flush((data_dir / names[0]).parent)


def _unzip(archive: Path, data_dir: Path, names: list[str]) -> None:
    """GLUE's archives hold CoLA/train.tsv for our glue/CoLA/train.tsv; nothing else is taken out of them."""
    try:
        with zipfile.ZipFile(archive) as z:
            files.check_archive(z)
            for file in names:
                info = z.getinfo(file.removeprefix("glue/"))
                if info.file_size > (most := BLOBS.get(file, (None, LARGEST))[1] or LARGEST):
                    raise ValueError(f"{file} is wrong: {info.file_size} bytes, expected {most}")
                with z.open(info) as member:
                    _write(member, data_dir, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as e:
        why = files.one_line(e) or "it ends too early"
        raise ValueError(f"not a whole zip archive of {' and '.join(names)}: {why}") from None


def _split_mrpc(source: Path, data_dir: Path, names: list[str]) -> None:
    """GLUE's rule: the pairs of ids that dev_ids.tsv names are the dev set, in the source's order, the rest trains."""
    dev = set((data_dir / MRPC_IDS).read_bytes().split(b"\n"))
    header, *rows = source.read_bytes().replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
    for file in names:
        kept = [row for row in rows if (b"\t".join(row.split(b"\t")[1:3]) in dev) == file.endswith("dev.tsv")]
        _write(io.BytesIO(b"\n".join([header, *kept, b""])), data_dir, file)


def _write(source: IO[bytes], data_dir: Path, file: str) -> None:
    def fill(draft: Path) -> None:
        with open(draft, "wb") as f:
            shutil.copyfileobj(source, f)
        _check(draft, file)

    files.write(data_dir / file, fill)


def _check(draft: Path, file: str) -> None:
    if (said := state(draft, file)) not in ("ok", "hash not known"):
        raise ValueError(f"{file} is {said}")
