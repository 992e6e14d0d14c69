"""Question answering: SQuAD's measures, the derived questions, and spans that lead back to text."""

from __future__ import annotations

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fastformer import models, tasks
from fastformer.core.errors import UserError
from fastformer.core.seq import Seq
from fastformer.data import DataConfig, stdlib
from fastformer.data.corpus import Corpus
from fastformer.data.doc_questions import Question, documented, open_questions, questions
from fastformer.data.question_rows import QuestionRows, answer, question_row
from fastformer.data.splits import SPLITS, split_of
from fastformer.data.tokenisers import BPETokeniser, ByteTokeniser
from fastformer.tasks import answer as answer_task
from fastformer.tasks import qa
from fastformer.tasks.squad import exact_match, f1, measured, most_similar_sentence, normalised
from fastformer.train import loop, modes

DEVICES = jax.devices()[:1]
NAMES = ["add", "open", "seek", "walk", "copy", "move"]


def module(number):
    """Return the source of a module whose functions say what they do."""
    return "\n".join(
        f'def {name}{number}(x):\n    """Do {name} number {number} – quickly.\n\n    Then rest."""\n'
        for name in NAMES
    )


def derived(number):
    """Return the questions about that module."""
    return list(questions(f"m{number}.py", documented(module(number))))


def test_what_is_held_out_is_nowhere_in_training(monkeypatch, tmp_path):
    paths = [f"m{number}.py" for number in range(200)]
    heldout = [path for path in paths if split_of(path) == "heldout"]
    assert 0 < len(heldout) < 100
    same = 'def same(x):\n    """Say the same. {}"""\n'
    texts = [(path, module(number) + same.format(path)) for number, path in enumerate(paths)]
    texts += [("again.py", module(paths.index(heldout[0])) + module(201))]
    monkeypatch.setattr(stdlib, "module_texts", lambda: texts)
    corpus = open_questions("", tmp_path)
    asked = {split: list(corpus.records(split)) for split in ("train", "heldout")}
    assert any("same()" in q.context for q in asked["heldout"])
    assert not any("same()" in q.context for q in asked["train"])
    assert any("add201()" in q.context for q in asked["train"])
    assert not any(f"add{paths.index(heldout[0])}()" in q.context for q in asked["train"])


def test_squads_measures():
    assert normalised("The  Cat, an old-one!") == "cat oldone"
    assert exact_match("the cat.", "Cat") == 1 and exact_match("", "") == 1 and exact_match("cat", "") == 0
    assert (
        f1("the black cat", "black dog") == pytest.approx(0.5) and f1("", "the") == 1 and f1("", "cat") == 0
    )
    assert measured(["a cat", "dog"], [("eel", "cat"), ("big dog",)]) == {
        "exact_match": 50,
        "f1": pytest.approx(250 / 3),
    }
    assert most_similar_sentence("What does add do?", "It moves on. To add is good. So.") == "To add is good."


def test_questions_are_derived_from_docstrings():
    found = [q for number in range(40) for q in derived(number)]
    assert found == [q for number in range(40) for q in derived(number)]
    answered = [q for q in found if q.start >= 0]
    assert 0.1 < 1 - len(answered) / len(found) < 0.35
    for q in answered:
        name = q.question.split()[2]
        assert q.context[q.start :].startswith(q.answer) and q.answer.endswith("quickly.")
        assert q.context[: q.start].endswith(f"{name}()\n")
    assert all(f"{q.question.split()[2]}()" not in q.context for q in found if q.start < 0)
    assert len(found) == 40 * 4  # of the second context, two functions are too few


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_spans_lead_back_to_the_answer(name):
    tokeniser = ByteTokeniser() if name == "bytes" else BPETokeniser.train([module(1)] * 3, 300)
    question = Question("What?", "ähm: Do add – quickly. More", "Do add – quickly.", 5)
    row = question_row(question, tokeniser, 64)
    assert answer(question, row["span_2"], tokeniser, 64) == "Do add – quickly."
    assert row["context_T"][row["span_2"]].all() and not row["context_T"][0]
    cut = question_row(question, tokeniser, 16)
    assert cut["span_2"].tolist() == [0, 0] and answer(question, [0, 0], tokeniser, 16) == ""


def test_to_be_trained_on_functions_are_put_together_anew():
    once, again = (list(questions("m.py", documented(module(1) + module(2)), rounds)) for rounds in (1, 3))
    assert again[: len(once)] == once and len(again) == 3 * len(once)
    assert len({q.context for q in again}) == 3 * len({q.context for q in once})
    for q in again:
        assert q.start < 0 or q.context[: q.start].endswith(f"{q.question.split()[2]}()\n")


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_words_of_the_question_are_marked_in_the_context(name):
    tokeniser = ByteTokeniser() if name == "bytes" else BPETokeniser.train([module(1)] * 3, 300)
    question = Question("What does add do?", "ähm: Do add1 – add, quickly.", "", -1)
    row = question_row(question, tokeniser, 64)
    begin = int(np.argmax(row["context_T"]))
    assert not row["types_T"][:begin].any() and np.array_equal(row["types_T"] > 0, row["context_T"] > 0)
    found = [int(t) for t, kind in zip(row["tokens_T"], row["types_T"]) if kind == 2]
    assert tokeniser.decode(found).replace(" ", "") == "Doadd"  # neither add1 nor a space of its own
    cut = question_row(question, tokeniser, begin + 3)
    assert np.array_equal(cut["types_T"], row["types_T"][: begin + 3])


def test_a_model_gets_the_kinds_of_tokens_that_it_has(corpus, tmp_path):
    batch = next(QuestionRows(corpus, ByteTokeniser(), 160, {}).train_iterator(4, 0))
    seq = Seq(batch["segment_BT"], batch["position_BT"])

    def loss(kinds, types_BT):
        config = configured().copy_and_resolve_references().unlock()
        config.model.token_types = kinds
        model = models.build(config, 257, 160, qa.QA().head)
        params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch["tokens_BT"], seq)["params"])
        return float(qa.QA().loss(model, params, batch | {"types_BT": types_BT})[0])

    types_BT = batch["types_BT"]
    assert types_BT.max() == 2
    assert loss(0, types_BT) == loss(0, 0 * types_BT)
    assert loss(2, types_BT) == loss(2, np.minimum(types_BT, 1)) != loss(2, 0 * types_BT)
    assert loss(3, types_BT) != loss(3, np.minimum(types_BT, 1))


def test_the_best_span_is_none_backwards_or_too_long():
    scores = jnp.zeros((1, 6, 2)).at[0, 4, 0].set(3.0).at[0, 2, 1].set(3.0).at[0, 5, 1].set(2.0)
    assert qa.best_span(scores, 6).tolist() == [[4, 5]]
    wide = jnp.zeros((1, 6, 2)).at[0, 1, 0].set(3.0).at[0, 5, 1].set(3.0)
    assert qa.best_span(wide, 5).tolist() == [[1, 5]] and qa.best_span(wide, 4).tolist() != [[1, 5]]
    nothing = jnp.zeros((1, 6, 2)).at[0, 0].set(2.0).at[0, 3, 1].set(3.0)
    assert qa.best_span(nothing, 6).tolist() == [[0, 0]]  # the first token begins no answer


@pytest.fixture
def corpus(monkeypatch):
    """Stand in for the docstrings of the running Python: modules that take no time to read."""
    found = {
        split: [q for number in numbers for q in derived(number)]
        for split, numbers in (("train", range(20)), ("heldout", range(20, 25)))
    }
    made = Corpus(
        "modules", "1", lambda split: (q.context for q in found[split]), lambda split: iter(found[split])
    )

    def open_corpus(data, kind, workdir):
        assert kind == "questions"
        tokeniser = BPETokeniser.train(made.documents("train"), 300)
        tokeniser.save(workdir)
        return made, tokeniser, workdir

    monkeypatch.setattr(qa, "open_corpus", open_corpus)
    return made


def configured():
    c = base.get_config()
    c.name, c.task.name = "qa", "qa"
    c.data.source, c.data.length = "python_questions", 160
    c.model.name, c.model.bidirectional = "encoder", True
    c.model.layers, c.model.width, c.model.heads = 1, 32, 2
    c.train.steps, c.train.batch, c.optimiser.warmup_steps = 40, 8, 4
    c.optimiser.learning_rate, c.evaluate.every, c.checkpoint.every = 1e-2, 20, 1000
    c.evaluate.rows = 8
    return c.lock()


def test_it_is_trained_evaluated_and_asked(corpus, tmp_path, capsys):
    config = configured()
    loop.train(config, tmp_path, DEVICES)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["quality"]) == {"exact_match", "f1", "nats_per_question"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    nats = [line["nats_per_question"] for line in lines if line["split"] == "heldout"]
    assert nats[-1] < 4.5  # of log(160) = 5.1 for no idea at all
    assert result["yardsticks"]["never_an_answer_exact_match"] == pytest.approx(
        100 * sum(q.start < 0 for q in corpus.records("heldout")) / 20
    )
    capsys.readouterr()
    modes.evaluate(config, tmp_path, {})
    assert json.loads(capsys.readouterr().out)["f1"] == pytest.approx(result["quality"]["f1"])
    asked = {"question": ["What does add7 do?", "What does x do?"], "context": ["add7()\nDo add.\n"]}
    modes.generate(config, tmp_path, asked)
    assert len(capsys.readouterr().out.splitlines()) == 2
    for wrong, message in (
        ({"question": ["x"]}, "--context: the task qa needs it"),
        ({"question": ["x"], "context": ["a", "b"]}, "--context: 2 for 1 questions"),
        ({"question": ["x"], "context": ["add " * 500]}, r"--context: \d+ tokens .* model reads"),
    ):
        with pytest.raises(UserError, match=message):
            modes.generate(config, tmp_path, wrong)


def test_answers_beyond_a_row_are_told(corpus):
    assert "; 0 + 0 of the first 80 + 20 lose" in QuestionRows(corpus, ByteTokeniser(), 400, {}).description
    data = QuestionRows(corpus, ByteTokeniser(), 100, {})
    spans = [data._row(split, i)["span_2"].any() for split in SPLITS for i in range(data.counts[split])[:200]]
    lost = re.search(r"; (\d+) \+ (\d+) of the first (\d+) \+ (\d+) lose", data.description).groups()
    asked = [q for split in SPLITS for q in list(corpus.records(split))[:200] if q.start >= 0]
    assert 0 < sum(map(int, lost[:2])) == len(asked) - sum(spans) and sum(map(int, lost[2:])) == len(spans)
    with pytest.raises(UserError, match="config.data.length: a row of 20 tokens holds no answer"):
        QuestionRows(corpus, ByteTokeniser(), 20, {})


def test_quality_reads_the_spans_as_text(corpus):
    tokeniser = ByteTokeniser()
    data = QuestionRows(corpus, tokeniser, 400, {})
    batch = next(data.heldout_batches(20))
    perfect = {"nats": 0.0, "targets": 20.0, "span_B2": batch["span_B2"]}
    assert qa.QA().quality(perfect, data, 0, 0) == {"exact_match": 100, "f1": 100, "nats_per_question": 0}
    wrong = perfect | {"span_B2": batch["span_B2"][::-1]}
    assert qa.QA().quality(wrong, data, 0, 0)["exact_match"] < 60


def test_answers_are_written_too(corpus, tmp_path, monkeypatch):
    tokeniser = ByteTokeniser()
    monkeypatch.setattr(answer_task, "open_corpus", lambda *_: (corpus, tokeniser, tmp_path))
    config = configured().copy_and_resolve_references().unlock()
    config.task.name, config.model.name, config.model.bidirectional = "answer", "decoder", False
    task = tasks.build(config)
    data = task.open(DataConfig(**(config.data.to_dict() | {"length": 400})), tmp_path, config)
    assert "% padding" in data.description and data.yardsticks()["never_an_answer_f1"] > 0
    batch = next(data.heldout_batches(2))
    counted = batch["targets_BT"][0][batch["weights_BT"][0] > 0].tolist()
    first = data.questions[0]
    assert bytes(token for token in counted if token < 256).decode().startswith(first.answer)

    def complete(rows):
        by_source = {f"{q.question}\n{q.context}": q.answer for q in data.questions}
        return [tokeniser.encode(by_source.get(tokeniser.decode(row), "")) for row in rows]

    assert task.decoded(complete, data, 0) == {"exact_match": 100, "f1": 100}
    assert task.decoded(lambda rows: [[] for _ in rows], data, 0)["f1"] < 50
    assert task.respond(complete, tokeniser, {"question": ["a?"], "context": ["b"]}, None, None) == [
        "(no answer)"
    ]
    assert first.answer in task.samples(complete, data, "")[0] or first.start < 0
