"""Translation: its data, its rows, and a model that learns a small language."""

from __future__ import annotations

import io
import itertools
import json
import random
import struct
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import base
from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.data import DataConfig, libreoffice
from fastformer.data.pair_rows import pack
from fastformer.data.parallel import Record, read_catalogue, split_pairs
from fastformer.data.pipeline import open_corpus
from fastformer.data.splits import spread
from fastformer.tasks import build
from fastformer.tasks.translate import Translate, scores
from fastformer.train import loop, modes

DEVICES = jax.devices()[:1]
WORDS = {"cat": "Katze", "dog": "Hund", "sees": "sieht", "eats": "isst", "small": "kleine", "old": "alte"}


def write_mo(path, pairs):
    """Write a catalogue as msgfmt does."""
    texts = [[text.encode() for text in side] for side in zip(*sorted(({"": "header"} | pairs).items()))]
    place = 28 + 16 * len(texts[0])
    tables, body = [], b""
    for side in texts:
        for text in side:
            tables += [len(text), place + len(body)]
            body += text + b"\0"
    head = [0x950412DE, 0, len(texts[0]), 28, 28 + 8 * len(texts[0]), 0, place]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f"<{len(head) + len(tables)}I", *head, *tables) + body)


def write_deb(path, pages):
    """Write a package of help: ``{page: {id: inner html}}``."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for page, parts in pages.items():
            text = "".join(
                f'<p class="x" id="{name}" dir="auto">{inner}</p>\n' for name, inner in parts.items()
            )
            content = f"<html><p>no id</p>{text}</html>".encode()
            info = tarfile.TarInfo(f"./usr/share/libreoffice/help/xx/text/{page}.html")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, body in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode()
            + body
            + b"\n" * (len(body) % 2)
        )
    path.write_bytes(out)


def sentences(count):
    """Return pairs of a language with a word for a word, in another order."""
    rng = random.Random(0)
    nouns, verbs, kinds = (list(WORDS)[i : i + 2] for i in (0, 2, 4))
    every = list(itertools.product(kinds, nouns, verbs, kinds, nouns))
    rng.shuffle(every)
    return {" ".join(words): " ".join(WORDS[word] for word in words[::-1]) for words in every[:count]}


def configured(folder, **settings):
    items = list(sentences(32).items())
    for number in range(8):
        write_mo(folder / f"locale/{number}.mo", dict(items[4 * number : 4 * number + 4]))
    c = base.get_config()
    c.name = "small"
    c.task.name = "translate"
    c.data.source, c.data.directory = f"gettext:{folder}/locale/*.mo", str(folder / "prepared")
    c.data.tokeniser, c.data.vocabulary, c.data.length = "bpe", 290, 32
    c.model.name, c.model.encoder_layers = "encoder_decoder", 1
    c.model.layers, c.model.width, c.model.heads = 1, 32, 2
    c.train.steps, c.train.batch = 120, 8
    c.optimiser.learning_rate, c.optimiser.warmup_steps = 1e-2, 10
    c.evaluate.every, c.checkpoint.every = 0, 1000
    c.generate.tokens, c.generate.beams = 12, 3
    c.lock()
    for key, value in settings.items():
        configuration.set_key(c, key.replace("__", "."), value)
    return c


def opened(config):
    data = DataConfig(**{k: v for k, v in config.data.to_dict().items()})
    return build(config).open(data, None, config)


def test_a_sentence_is_in_one_split_only():
    records = [
        Record("a", "one", "eins"), Record("a", "two", "zwei"), Record("a", "same", "same"),
        Record("b", "one", "Eins"), Record("b", "three", "zwei"), Record("b", "four", "vier"),
        Record("b", "four", "Vier"), Record("b", "", "x"), Record("b", "zwei", "two"),
        Record("b", "five", "one"),
    ]  # fmt: skip
    found = split_pairs(records, {"a"})
    assert found == {"heldout": [("one", "eins"), ("two", "zwei")], "train": [("four", "vier")]}


def test_help_packages_are_read(tmp_path):
    english = {
        f"page{i}": {f"par_id{i}": f"Use the <b>file</b> {i} &amp; save", "hd_1": "Title"} for i in range(60)
    }
    german = {
        page: {name: inner.replace("Use", "Nutze") for name, inner in parts.items()}
        for page, parts in english.items()
    }
    german["page0"] = {"par_id9": "no partner"}
    folder = tmp_path / "libreoffice_help"
    folder.mkdir()
    write_deb(folder / "libreoffice-help-en-us_1_all.deb", english)
    data = DataConfig("libreoffice_help:de", str(tmp_path), "bytes", 300, 64)
    with pytest.raises(UserError, match="needs Debian's package libreoffice-help-de in .*--mode=prepare"):
        open_corpus(data, "pairs", None)
    write_deb(folder / "libreoffice-help-de_1_all.deb", german)
    corpus = open_corpus(data, "pairs", None)[0]
    pairs = [*corpus.records("train"), *corpus.records("heldout")]
    assert len(pairs) == 59 and ("Use the file 7 & save", "Nutze the file 7 & save") in pairs
    assert 0 < len(list(corpus.records("heldout"))) < 12
    assert len(list(corpus.documents("train"))) == 2 * len(list(corpus.records("train")))
    (folder / "libreoffice-help-fr_1_all.deb").write_bytes(b"!<arch>\n" + b"x" * 10)
    with pytest.raises(UserError, match="libreoffice-help-fr_1_all.deb cannot be read: it has no data.tar"):
        libreoffice.open_help("fr", tmp_path)
    member = b"data.tar.zst".ljust(48) + b"1".ljust(10) + b"`\n" + b"x"
    (folder / "libreoffice-help-fr_1_all.deb").write_bytes(b"!<arch>\n" + member)
    if sys.version_info < (3, 14):
        with pytest.raises(UserError, match="it is packed with zstd"):
            libreoffice.open_help("fr", tmp_path)


def test_packages_are_fetched_by_apt(tmp_path, monkeypatch):
    called = []

    def run(command, cwd, **_):
        called.append(command)
        write_deb(cwd / f"{command[-1]}_1_all.deb", {"page": {"hd_1": command[-1]}})
        return subprocess.CompletedProcess(
            command, int(command[-1].endswith("xx")), "", "E: no\nE: such package"
        )

    monkeypatch.setattr(libreoffice.subprocess, "run", run)
    monkeypatch.setattr(libreoffice.shutil, "which", lambda name: "apt-get")
    libreoffice.fetch("de", tmp_path)
    libreoffice.fetch("de", tmp_path)
    assert called == [["apt-get", "download", f"libreoffice-help-{name}"] for name in ("en-us", "de")]
    with pytest.raises(UserError, match="libreoffice-help-xx: E: such package"):
        libreoffice.fetch("xx", tmp_path)
    monkeypatch.setattr(libreoffice.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="where apt-get is; elsewhere put the .deb there"):
        libreoffice.fetch("fr", tmp_path)


def test_catalogues_are_read_and_mistakes_named(tmp_path):
    write_mo(tmp_path / "a.mo", {"ctx\x04Open": "Öffnen", "one\0many": "eins\0viele", "Close": "Schließen"})
    found = list(read_catalogue((tmp_path / "a.mo").read_bytes(), "a.mo"))
    assert sorted(found) == [("Close", "Schließen"), ("Open", "Öffnen")]
    with pytest.raises(UserError, match="a.mo is no gettext catalogue"):
        list(read_catalogue((tmp_path / "a.mo").read_bytes()[:-3], "a.mo"))
    (tmp_path / "b.mo").write_bytes(b"no catalogue at all")
    (tmp_path / "c" / "d.mo").mkdir(parents=True)
    wrong = {"a.mo": "1 catalogue", "c/**": "0 catalogue", "*.mo": "b.mo is no gettext catalogue"}
    for pattern, message in wrong.items():
        with pytest.raises(UserError, match=message):
            open_corpus(
                DataConfig(f"gettext:{tmp_path}/{pattern}", str(tmp_path), "bytes", 300, 8), "pairs", None
            )


def test_packing_fills_rows_in_order():
    assert pack([(3, 2), (4, 4), (2, 5), (8, 8), (1, 1)], 8) == [[0, 1], [2], [3], [4]]


@pytest.mark.parametrize("joined", [False, True])
def test_rows_hold_every_pair_once(tmp_path, joined):
    settings = {"model__name": "decoder", "model__encoder_layers": 0} if joined else {}
    data = opened(configured(tmp_path, **settings))
    eod, decode = data.tokeniser.eod, data.tokeniser.decode
    found = []
    for batch in data.heldout_batches(1):
        row = {name: x[0] for name, x in batch.items()}
        for number in range(1, int(row["segment_BT"].max()) + 1):
            here = row["segment_BT"] == number
            tokens, targets, weights = (row[f"{n}_BT"][here] for n in ("tokens", "targets", "weights"))
            assert row["position_BT"][here].tolist() == list(range(here.sum()))
            assert tokens[1:].tolist() == targets[:-1].tolist() and tokens[0] == targets[-1] == eod
            if joined:
                end = 1 + tokens[1:].tolist().index(eod)
                source, target = tokens[1:end], tokens[end + 1 :]
                assert weights.tolist() == [0.0] * end + [1.0] * (len(target) + 1)
                assert row["last_BT"][here].tolist() == [max(at, end) for at in range(here.sum())]
            else:
                source, target = row["source_tokens_BS"][row["source_segment_BS"] == number][1:-1], tokens[1:]
                assert weights.all()
            found.append((decode(source), decode(target)))
        assert not row["weights_BT"][row["segment_BT"] == 0].any()
    assert found == data.texts and len(found) > 3


def test_scores_are_sacrebleus():
    perfect = scores(["the cat sees a dog today"], ["the cat sees a dog today"])
    assert perfect == pytest.approx({"bleu": 100, "chrf": 100})
    assert scores(["a b c d e f"], ["the cat sees a dog today"])["bleu"] < 10


@pytest.mark.parametrize(
    "text, segmented",
    [
        ("ein Satz, ganz (mit Klammern)", "13a"),
        ("计算数字表达式的平方根。", "zh"),
        ("数式の平方根を計算します。", "char"),
    ],
)
def test_what_has_no_spaces_is_measured_by_character(text, segmented):
    found = scores([text.replace(text[0], "x")], [text])["bleu"]
    assert 50 < found < 100 if segmented != "13a" else found < 100
    signature = Translate().signatures(SimpleNamespace(texts=[("", text)]))["bleu"]
    assert f"tok:{segmented}" in signature


def test_some_sentences_stand_for_all():
    asked = []
    tokeniser = SimpleNamespace(
        eod=0, encode=lambda text: asked.append(text) or [1], decode=lambda ids: "a b c d"
    )
    texts = [(f"s{number}", "a b c d" if number % 3 == 0 else "no") for number in range(10)]
    data = SimpleNamespace(texts=texts, tokeniser=tokeniser)
    found = Translate(sentences=3).decoded(lambda rows: rows, data, 0)
    assert asked == ["s0", "s3", "s6"] and found["bleu"] == pytest.approx(100)


def test_sentences_are_spread_over_all():
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(3), 0) == spread(range(3), 5) == [0, 1, 2]
    assert spread([], 2) == []


def test_smoothing_is_for_training_alone(tmp_path):
    config = configured(tmp_path)
    task, data = build(config), opened(config)
    model = loop.setup.models.build(config, data.vocabulary, 32)
    batch = next(data.heldout_batches(2))
    key = jax.random.key(0)
    seq = loop.setup.tasks.task.Seq(batch["segment_BT"], batch["position_BT"])
    params = jax.jit(model.init)(key, batch["tokens_BT"], seq)["params"]
    losses = [jax.jit(lambda params, k=k: task.loss(model, params, batch, k)[0]) for k in (key, None)]
    zero = jax.tree.map(np.zeros_like, params)
    train, held = (loss(params) for loss in losses)
    assert float(train) != pytest.approx(float(held), rel=1e-4)
    # Where all tokens are equally likely, smoothing changes nothing.
    blind = [float(loss(zero)) for loss in losses]
    assert blind[0] == pytest.approx(blind[1], rel=1e-5)


def test_a_small_language_is_learnt_and_spoken(tmp_path, capsys):
    config = configured(tmp_path)
    loop.train(config, tmp_path / "run", DEVICES)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["quality"]["bleu"] > 60 > 20 > result["yardsticks"]["copied_source_bleu"]
    assert "version:" in result["signatures"]["bleu"] and result["signatures"]["chrf"]
    assert "\n=> " in result["samples"][0] and result["state_bytes"] > 0
    report = (tmp_path / "run/report.md").read_text()
    assert "held-out bleu" in report and "copied source chrf" in report and "nrefs:1" in report
    capsys.readouterr()
    modes.evaluate(config, tmp_path / "run", {})
    assert json.loads(capsys.readouterr().out)["bleu"] == result["quality"]["bleu"]
    lines = ["old dog sees small cat", "small cat eats old dog"]
    modes.generate(config, tmp_path / "run", {"source": lines})
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and "Hund" in out[0] and out[0] != out[1]
    with pytest.raises(UserError, match="--prompt: the task translate takes --source"):
        modes.generate(config, tmp_path / "run", {"prompt": ["x"]})
