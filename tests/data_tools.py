"""What the tests of the data floor share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from fastformer.data import DataConfig


def write_books(folder: Path) -> Path:
    """Write twenty small files of different words and one more of the same text; return ``folder``."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        words = rng.integers(97, 123, (200, 5)).astype(np.uint8)
        text = "\n".join(bytes(word).decode() for word in words)
        (folder / f"{number:02d}.txt").write_text(f"book {number} – é\n{text}\n")
    (folder / "copy.txt").write_text((folder / "03.txt").read_text())
    return folder


def make(source, directory, tokeniser="bytes", vocabulary=300, length=64):
    return DataConfig(source, str(directory), tokeniser, vocabulary, length)


def message(excinfo) -> str:
    text = str(excinfo.value)
    assert "\n" not in text
    return text


def start_python(code: str, *arguments: str) -> subprocess.Popen:
    """Start ``code`` in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    home = Path(__file__).parent.parent
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home)


def run_python(code: str, *arguments: str) -> tuple[str, str]:
    """Run ``code`` in a process of its own and return what it prints and complains."""
    process = start_python(code, *arguments)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out, err
