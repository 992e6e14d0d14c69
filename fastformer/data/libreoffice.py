"""LibreOffice's help in two languages, from Debian's packages (MPL-2.0): paragraphs of one id are pairs.

The packages are fetched by apt where there is one; elsewhere they can be put beside the prepared data.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fastformer.core.errors import UserError
from fastformer.data.atomic import atomic, make_directory
from fastformer.data.corpus import Corpus
from fastformer.data.parallel import Record, corpus_of

FIELD = "config.data.source"
ENGLISH = "en-us"
SEGMENT = re.compile(r'<(p|h\d)\b[^>]*?\bid="((?:par|hd|tit|bm|N)[^"]*)"[^>]*>(.*?)</\1>', re.DOTALL)
TAG = re.compile(r"<[^>]*>")
PAGE = re.compile(r"help/[^/]+/(text/.*)\.html$")


def open_help(language: str, root: Path) -> Corpus:
    """Return the corpus of pairs (English, ``language``), split by the page that they stand on.

    Args:
      language: as in the package's name: ``de``, ``fr``, ``zh-cn``.

    Raises:
      UserError: the packages are not there.
    """
    path = _folder(root) / f"en-{language}.jsonl"
    if not path.exists():
        pages = {name: segments(_package(name, language, root)) for name in (ENGLISH, language)}
        with atomic(path) as file:
            for record in _aligned(pages[ENGLISH], pages[language]):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    data = path.read_bytes()
    records = [Record(*json.loads(line)) for line in data.splitlines()]
    return corpus_of(f"LibreOffice help en-{language}", hashlib.sha256(data).hexdigest(), records)


def fetch(language: str, root: Path) -> None:
    """Download the packages of English and ``language`` with apt, unless they are there.

    Raises:
      UserError: there is no apt, or it knows no such package.
    """
    for name in (ENGLISH, language):
        if _found(name, root):
            continue
        if not shutil.which("apt-get"):
            raise UserError(_how(name, language, root))
        command = ["apt-get", "download", f"libreoffice-help-{name}"]
        done = subprocess.run(command, cwd=_folder(root), capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{FIELD}: {' '.join(command)}: {reason}")


def segments(package: Path) -> dict[tuple[str, str], str]:
    """Return ``{(page, id): text}`` of every paragraph and heading of a help package.

    Raises:
      UserError: it is no such package.
    """
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(deb_data(package.read_bytes()))) as archive:
            for member in archive:
                page = PAGE.search(member.name)
                if page and member.isfile():
                    text = archive.extractfile(member).read().decode("utf-8", "replace")
                    for _, name, inner in SEGMENT.findall(text):
                        found[page[1], name] = " ".join(html.unescape(TAG.sub("", inner)).split())
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{FIELD}: {package} cannot be read: {error}; fetch Debian's again") from error
    if not found:
        raise UserError(f"{FIELD}: {package} holds no pages of help")
    return found


def deb_data(package: bytes) -> bytes:
    """Return the archive ``data.tar.*`` of a .deb, which is an ar archive.

    Raises:
      ValueError: there is none.
    """
    if not package.startswith(b"!<arch>\n"):
        raise ValueError("it is no .deb")
    place = 8
    while place + 60 <= len(package):
        name, size = package[place : place + 16].strip(), int(package[place + 48 : place + 58])
        if name.startswith(b"data.tar.zst") and sys.version_info < (3, 14):
            raise ValueError("it is packed with zstd, as Ubuntu's are, which Python reads from 3.14 on")
        if name.startswith(b"data.tar"):
            return package[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError("it has no data.tar")


def _aligned(source: dict[tuple[str, str], str], target: dict[tuple[str, str], str]) -> Iterator[Record]:
    for key in sorted(source.keys() & target.keys()):
        yield Record(key[0], source[key], target[key])


def _folder(root: Path) -> Path:
    return make_directory(root / "libreoffice_help", "config.data.directory")


def _found(name: str, root: Path) -> list[Path]:
    return sorted(_folder(root).glob(f"libreoffice-help-{name}_*.deb"))


def _package(name: str, language: str, root: Path) -> Path:
    found = _found(name, root)
    if not found:
        raise UserError(_how(name, language, root))
    return found[-1]


def _how(name: str, language: str, root: Path) -> str:
    return (
        f"{FIELD}: libreoffice_help:{language} needs Debian's package libreoffice-help-{name} in "
        f"{_folder(root)}: launch.py --mode=prepare with the same --config fetches it where apt-get is; "
        "elsewhere put the .deb there"
    )
