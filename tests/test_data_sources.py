"""Sources of text: splits that share nothing, nothing read twice or by TensorFlow, errors in one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from data_tools import make, message, run_python, start_python, write_books
from ml_collections import ConfigDict

from configs import base
from fastformer.core import config as core_config
from fastformer.core.errors import UserError
from fastformer.data import DataConfig, open_data, stdlib, user_files
from fastformer.data.sources import SOURCES
from fastformer.data.splits import split_of


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


# The corpora ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def python_code(root):
    config = make("python_code", root, length=128)
    return config, open_data(config, None)


def test_python_code_does_not_leak(python_code, root):
    config, _ = python_code
    corpus = SOURCES["python_code"].opens["text"]("", root)
    train, heldout = list(corpus.documents("train")), list(corpus.documents("heldout"))
    assert len(train) > 300 and len(heldout) > 10
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train) and len(set(heldout)) == len(heldout)
    assert sorted(train + heldout) == sorted(text for _, text in stdlib.code())
    share = sum(map(len, heldout)) / sum(map(len, train + heldout))
    assert 0.03 < share < 0.08


def test_python_code_holds_no_tests_and_all_else():
    names = [name for name, _ in stdlib.code()]
    assert "json/decoder.py" in names and "dataclasses.py" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages"}
    assert names == sorted(names)
    assert not any("\r" in text or not text.strip() for _, text in stdlib.code())


def test_python_docs_are_prose_and_share_no_docstring(root, monkeypatch):
    # A few modules are enough, and the whole takes long.
    few = tuple(pair for pair in stdlib.module_texts() if pair[0].startswith(("json/", "a", "concurrent/")))
    monkeypatch.setattr(stdlib, "module_texts", lambda: few)
    documents = dict(stdlib.docs())
    assert "topics/while" in documents and "json/__init__.py" in documents
    assert "JSON (JavaScript Object Notation)" in documents["json/__init__.py"]
    assert "import" not in documents["json/decoder.py"].split()
    data = open_data(make("python_docs", root), None)
    assert data.heldout_targets > 1000
    assert len({split_of(name) for name in documents}) == 2


def test_a_docstring_in_two_modules_counts_once(monkeypatch):
    twice = (("a.py", '"""Both."""\n'), ("b.py", '"""Both."""\ndef f():\n    """Alone."""\n'))
    monkeypatch.setattr(stdlib, "module_texts", lambda: twice)
    documents = {name: text for name, text in stdlib.docs() if not name.startswith("topics/")}
    assert documents == {"a.py": "Both.\n", "b.py": "Alone.\n"}


def test_what_is_prepared_is_not_built_again(python_code, root, monkeypatch):
    config, data = python_code

    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr("fastformer.data.builders.prepare", refuse)
    again = open_data(config, None)
    assert again.description == data.description


def test_the_second_of_two_builds_gives_way(tmp_path, monkeypatch):
    from fastformer.data import builders

    class Slow:
        def __init__(self, data_dir, file_format):
            self.homes = [Path(data_dir), tmp_path / "tfds"]

        def download_and_prepare(self):  # meanwhile another process ends the same work
            for home in self.homes:
                place = home / "python_code" / stdlib.VERSION
                place.mkdir(parents=True)
                (place / "dataset_info.json").write_text(home.name)

    monkeypatch.setitem(builders.BUILDERS, "python_code", Slow)
    place = builders.prepare("python_code", tmp_path / "tfds")
    assert (place / "dataset_info.json").read_text() == "tfds"
    assert [path.name for path in tmp_path.iterdir()] == ["tfds"]


def test_the_fingerprint_follows_the_text(monkeypatch):
    before = stdlib.fingerprint()
    (name, text), *others = stdlib.module_texts()
    monkeypatch.setattr(stdlib, "module_texts", lambda: ((name, text + "#"), *others))
    assert stdlib.fingerprint() != before


@pytest.fixture
def books(tmp_path):
    return write_books(tmp_path / "books")


# Files ---------------------------------------------------------------------------------------


def test_files_split_by_file_and_duplicates_count_once(books, tmp_path):
    corpus = user_files.open_files(f"{books}/*.txt", tmp_path)
    train, heldout = list(corpus.documents("train")), list(corpus.documents("heldout"))
    assert train and heldout and len(train + heldout) == 20
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_files_have_one_on_each_side(count, tmp_path):
    names = [f"{number}.txt" for number in range(count)]
    heldout = user_files.hold_out(names)
    assert 1 <= len(heldout) < count
    held = [name for name in (f"x{number}" for number in range(500)) if split_of(name) == "heldout"]
    assert len(user_files.hold_out(held[:count])) == count - 1


def test_one_file_holds_its_end_out_at_a_line_break(tmp_path):
    text = "".join(f"line {number} é\n" for number in range(1000))
    (tmp_path / "one.txt").write_text(text)
    corpus = user_files.open_files(str(tmp_path / "one.txt"), tmp_path)
    train, heldout = next(corpus.documents("train")), next(corpus.documents("heldout"))
    assert train + heldout == text and train.endswith("\n")
    assert 0.04 < len(heldout) / len(text) < 0.06
    data = open_data(make(f"files:{tmp_path}/one.txt", tmp_path / "cache"), None)
    assert "last 5 % is held out" in data.description


def test_gz_and_folders_of_any_depth(books, tmp_path):
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    for path in sorted(books.glob("*.txt")):
        (deep / f"{path.stem}.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    plain = user_files.open_files(f"{books}/*.txt", tmp_path)
    packed = user_files.open_files(f"{tmp_path}/deep/**/*.gz", tmp_path)

    def texts(corpus):
        return sorted(text for split in ("train", "heldout") for text in corpus.documents(split))

    assert texts(plain) == texts(packed)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_utf8_names_file_and_byte(packed, tmp_path):
    path = tmp_path / ("bad.txt.gz" if packed else "bad.txt")
    content = "é fine so far ".encode() + b"\xff not here"
    path.write_bytes(gzip.compress(content) if packed else content)
    (tmp_path / "good.txt").write_text("good\n")
    with pytest.raises(UserError) as excinfo:
        open_data(make(f"files:{tmp_path}/*.txt*", tmp_path / "cache"), None)
    text = message(excinfo)
    assert path.name in text and f"offset {content.index(0xFF)}" in text and "0xff" in text


@pytest.mark.parametrize(
    "content, expected", [(None, "no file matches"), (b"", "all are empty"), (b"x", "too short")]
)
def test_missing_or_empty_files(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=expected) as excinfo:
        open_data(make(f"files:{tmp_path}/*.txt", tmp_path / "cache"), None)
    assert message(excinfo).startswith("config.data.source: ")


def test_a_damaged_gz_is_a_users_mistake(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
    with pytest.raises(UserError, match="a.gz") as excinfo:
        open_data(make(f"files:{tmp_path}/*.gz", tmp_path / "cache"), None)
    message(excinfo)


# The config section --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("source", "pyhton_code", "did you mean python_code"),
        ("source", "http://a", "allowed: python_code, python_docs, files:, tfds:"),
        ("source", "files:", "files:books/"),
        ("source", "python_code:x", "unknown"),
        ("tokeniser", "bpee", "did you mean bpe"),
        ("vocabulary", 256, "257"),
        ("length", 0, "from 1 to 2^30"),
    ],
)
def test_bad_values_are_one_line_with_the_fields_path(key, value, expected):
    section = ConfigDict(base.get_config().to_dict())
    section.data.tokeniser = "bpe"
    setattr(section.data, key, value)
    with pytest.raises(UserError) as excinfo:
        core_config.section(DataConfig, section, "data")
    text = message(excinfo)
    assert text.startswith(f"config.data.{key}: ") and expected in text


def test_directory_is_the_configs_then_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFORMER_DATA", str(tmp_path / "e"))
    assert make("python_code", "").root() == tmp_path / "e"
    assert make("python_code", tmp_path / "c").root() == tmp_path / "c"
    monkeypatch.delenv("FASTFORMER_DATA")
    assert make("python_code", "").root() == Path.home() / ".cache" / "fastformer"


# TFDS ----------------------------------------------------------------------------------------

BUILD = """
import sys
import tensorflow_datasets as tfds

class TinyTales(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {"title": tfds.features.Text(), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in sys.argv[2].split(",")}

    def _generate_examples(self, split):
        for number in range(60):
            text = "the same in both" if number == 0 else f"{split} tale {number} \\u00e9\\n"
            yield number, {"title": f"title {number}", "text": text}

TinyTales(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.mark.parametrize("splits, held", [("train,test,validation", "validation"), ("train,test", "test")])
def test_tfds_is_read_as_prepared(splits, held, tmp_path):
    run_python(BUILD, str(tmp_path), splits)
    data = open_data(make("tfds:tiny_tales", tmp_path, length=32), None)
    corpus = SOURCES["tfds:"].opens["text"]("tiny_tales", tmp_path)
    train, heldout = list(corpus.documents("train")), list(corpus.documents("heldout"))
    tales = [f"{held} tale {number} é\n" for number in range(1, 60)]
    assert sorted(heldout) == sorted([*tales, "the same in both"])
    assert sorted(train) == sorted(f"train tale {number} é\n" for number in range(1, 60))
    assert f"split {held} held out" in data.description and "1.2.0" in data.description


def test_tfds_without_a_held_out_split_and_in_another_place(tmp_path, monkeypatch):
    run_python(BUILD, str(tmp_path / "there"), "train")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    corpus = SOURCES["tfds:"].opens["text"]("tiny_tales", tmp_path / "here")
    train, heldout = list(corpus.documents("train")), list(corpus.documents("heldout"))
    assert (len(train), len(heldout)) == (57, 3) and not set(train) & set(heldout)
    assert "last 5 %" in corpus.title
    info = next((tmp_path / "there").rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="stored as tfrecord.*--file_format=array_record") as excinfo:
        open_data(make("tfds:tiny_tales", tmp_path / "here"), None)
    message(excinfo)


def test_tfds_that_is_not_there_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError) as excinfo:
        open_data(make("tfds:lm1b", tmp_path), None)
    text = message(excinfo)
    assert text.startswith("config.data.source: tfds:lm1b is not prepared in ")
    assert f"tfds build lm1b --file_format=array_record --data_dir={tmp_path}" in text


PREPARE = """
import sys
from fastformer.data import DataConfig, open_data, stdlib
few = tuple(pair for pair in stdlib.module_texts() if pair[0].startswith(("json/", "a", "concurrent/", "e")))
stdlib.module_texts = lambda: few
for tokeniser in ("bytes", "bpe"):
    data = open_data(DataConfig("python_code", sys.argv[1], tokeniser, 300, 32), None)
    next(data.train_iterator(2, 0))
"""


def test_tensorflow_is_never_imported_and_the_terminal_stays_quiet(tmp_path):
    checks = """
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
import jax
assert not jax._src.xla_bridge._backends, "a backend was started"
"""
    assert run_python(PREPARE + checks, str(tmp_path)) == ("", "")


def test_two_processes_prepare_at_once(tmp_path):
    show = "print(data.description, data.heldout_bytes, next(data.train_iterator(2, 0)))"
    both = [start_python(PREPARE + show, str(tmp_path)) for _ in range(2)]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0] == said[1] and said[0][0]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
