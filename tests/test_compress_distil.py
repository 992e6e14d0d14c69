"""Distillation: what is compared, that the teacher stands still, and what does not go together."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_tools import DEVICES, LENGTH, VOCABULARY, batch, configured, initial, made, plain_place, train
from safetensors.numpy import load_file

from fastformer import compress, models, tasks
from fastformer.compress.divergence import DIVERGENCES, of_hidden, of_logits, of_relations
from fastformer.core.errors import UserError
from fastformer.core.trees import paths
from fastformer.data.tokenisers import load_tokeniser
from fastformer.models import Head
from fastformer.train import loop, modes
from fastformer.train.checkpoint import Checkpoints

BIGGER = {"model__layers": 2, "model__width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distil")


@pytest.fixture(scope="module")
def teacher(folder):
    """Return the workdir of a teacher deeper and wider than the student."""
    settings = {"train__steps": 2, "optimiser__warmup_steps": 1}
    return str(train(configured(folder, **BIGGER, **settings), folder / "teacher"))


def learning(folder, teacher, **settings):
    """Return ``(loss as a function of the student's weights, the weights, the float model, frozen)``."""
    config = configured(folder, "distil", distil__teacher=teacher, **settings)
    compression, model, plain, _ = made(config)
    frozen = compression.frozen(model, load_tokeniser(teacher), plain_place)
    loss = compression.loss(tasks.Text().loss)

    def of(params, frozen):
        nats, targets = loss(model, params, {**batch(), **frozen}, None)
        return nats / targets

    return jax.jit(of), initial(model), plain, frozen


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_as_defined(rng, name):
    student, teacher = (rng.normal(size=(2, 3, 7)).astype(np.float32) for _ in range(2))
    temperature = 2.0
    p, q = (
        np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (teacher, student)
    )
    m = (p + q) / 2
    wanted = {
        "forward": np.sum(p * np.log(p / q), -1),
        "reverse": np.sum(q * np.log(q / p), -1),
        "jensen_shannon": np.sum(p * np.log(p / m) + q * np.log(q / m), -1) / 2,
    }[name]
    np.testing.assert_allclose(of_logits(name, student, teacher, temperature), 4 * wanted, rtol=1e-4)
    np.testing.assert_allclose(of_logits(name, teacher, teacher, temperature), 0, atol=1e-5)


def test_relations_do_not_depend_on_heads_width_or_other_segments(rng):
    x = rng.normal(size=(1, 6, 4, 4)).astype(np.float32)
    segment = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    other = rng.normal(size=(1, 6, 2, 16)).astype(np.float32)
    np.testing.assert_allclose(of_relations(x.reshape(1, 6, 2, 8), x, 2, segment), 0, atol=1e-6)
    far = of_relations(x, other, 2, segment)
    changed = np.concatenate([x[:, :3], 9 * x[:, 3:]], axis=1)
    np.testing.assert_allclose(of_relations(changed, other, 2, segment)[:, :3], far[:, :3], rtol=1e-5)
    assert np.all(np.asarray(far[:, :5]) > 1e-4) and np.all(np.isfinite(far))
    # One relation by hand: the second token of the second segment, the second of two heads.
    rows = [np.asarray(v).reshape(6, 2, -1)[3:5, 1] for v in (x, other)]
    scores = [r @ r[1] / np.sqrt(r.shape[1]) for r in rows]
    student, teacher = (np.exp(s) / np.exp(s).sum() for s in scores)
    first = [np.asarray(v).reshape(6, 2, -1)[3:5, 0] for v in (x, other)]
    s0, t0 = (np.exp(r @ r[1] / np.sqrt(r.shape[1])) for r in first)
    s0, t0 = s0 / s0.sum(), t0 / t0.sum()
    wanted = (np.sum(teacher * np.log(teacher / student)) + np.sum(t0 * np.log(t0 / s0))) / 2
    np.testing.assert_allclose(far[0, 4], wanted, rtol=1e-4)


def test_hidden_error_is_relative(rng):
    x, y = (rng.normal(size=(1, 3, 8)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(of_hidden(x, y), ((x - y) ** 2).mean(-1) / (y**2).mean(-1), rtol=1e-4)


def test_the_mixture(folder, teacher):
    found = []
    for weight in (0.25, 1.0):
        of, params, plain, frozen = learning(folder, teacher, distil__weight=weight)
        found.append(float(of(params, frozen)))
    nats, targets = jax.jit(lambda params: tasks.Text().loss(plain, params, batch()))(params)
    assert found[0] == pytest.approx(0.75 * float(nats / targets) + 0.25 * found[1], rel=1e-5)
    assert 1e-3 < found[1] < float(nats / targets) / 2


def test_a_teacher_is_no_distance_from_itself_and_is_not_trained(folder, teacher):
    of, _, _, frozen = learning(folder, teacher, distil__weight=1.0, **BIGGER)
    themselves = frozen["distil"]
    assert float(of(themselves, frozen)) == pytest.approx(0, abs=1e-5)
    of, params, _, frozen = learning(folder, teacher, distil__weight=1.0)
    gradients = jax.grad(of)(params, frozen)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradients))
    other = jax.tree.map(lambda x: x * 1.5, frozen)
    assert float(of(params, other)) != pytest.approx(float(of(params, frozen)))


def test_inner_states_are_learned_through_maps(folder, teacher):
    settings = {"distil__weight": 0.0, "distil__hidden": 1.0, "distil__relations": 1.0}
    of, params, _, frozen = learning(folder, teacher, **settings)
    assert params["distil"]["layer_0"]["weight"].shape == (16, 32)
    base, *_ = learning(folder, teacher, distil__weight=0.0)
    without = {name: value for name, value in params.items() if name != "distil"}
    assert float(of(params, frozen)) > float(base(without, frozen)) + 0.1
    gradients = paths(jax.grad(of)(params, frozen))
    assert float(jnp.abs(gradients["distil/layer_0/weight"]).max()) > 0


def test_a_distilled_run_holds_no_teacher(folder, teacher, tmp_path, capsys):
    settings = {"distil__teacher": teacher, "distil__hidden": 0.1, "train__steps": 4, "evaluate__every": 0}
    config = configured(folder, "distil", **settings)
    train(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    stored = load_file(tmp_path / "weights.safetensors")
    plain = initial(models.build(config, 257, LENGTH))
    assert set(stored) == set(paths(plain))
    checkpoints = Checkpoints(tmp_path, keep=1, read_only=True)
    arrays = checkpoints._meta(4)["arrays"]
    checkpoints.close()
    assert "params/distil/layer_0/weight" in arrays
    # The teacher's matrices have its width; the student's have it in the maps alone.
    wide = [path for path, (shape, *_) in arrays.items() if 32 in shape]
    assert wide and all("distil/layer_0" in path for path in wide)
    capsys.readouterr()
    modes.evaluate(config, tmp_path, ())
    found = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert found == pytest.approx(result["quality"]["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"distil__teacher": ""}, "distil.teacher: '' is not allowed; it must be the workdir of"),
        ({"distil__teacher": "nowhere"}, "distil.teacher: nowhere holds no config.json; there is no such"),
        ({"distil__divergence": "kl"}, "distil.divergence: 'kl' is unknown"),
        ({"distil__temperature": 0.0}, "distil.temperature: 0.0 is not allowed"),
        ({"distil__weight": 1.5}, "distil.weight: 1.5 is not allowed"),
        ({"distil__relations": 1.0, "distil__relation_heads": 5}, "distil.relation_heads: 5 does not divide"),
        (
            {"distil__relations": 1.0, "model__attention__name": "rg_lru"},
            "distil.relations: the last layer",
        ),
        ({"data__tokeniser": "bpe", "data__vocabulary": 300}, "distil.teacher: .* has another tokeniser"),
        ({"distil__hidden": 1.0, "model__scan": True}, "distil.hidden: it reads the blocks of a decoder"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes(folder, teacher, tmp_path, settings, message):
    config = configured(folder, "distil", **{"distil__teacher": teacher} | settings)
    with pytest.raises(UserError, match=f"config.compress.{message}") as error:
        loop.train(config, tmp_path, DEVICES)
    assert "\n" not in str(error.value)


def test_an_unfinished_teacher_is_told(folder, teacher, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = configured(folder, "distil", distil__teacher=str(tmp_path))
    with pytest.raises(UserError, match=re.escape("holds no weights.safetensors; train it to its end")):
        compress.build(config).check()


def test_chunks_of_the_loss_are_refused(folder, teacher, tmp_path):
    config = configured(folder, "distil", distil__teacher=teacher, model__loss_chunk=4)
    with pytest.raises(UserError, match="config.model.loss_chunk: distillation compares all logits"):
        loop.train(config, tmp_path, DEVICES)


@pytest.mark.parametrize("head", [Head(0), Head(2, pooled=False)])
def test_tasks_without_tokens_or_classes_are_refused(tmp_path, head):
    config = configured(tmp_path, "distil", distil__teacher="x", model__name="encoder")
    compression, model = compress.build(config), models.build(config, VOCABULARY, LENGTH, head)
    with pytest.raises(UserError, match="config.task.name: distillation compares tokens or classes"):
        compression.model(model)


@pytest.mark.parametrize("task, model", [("digits", "encoder"), ("recall", "decoder")])
def test_other_tasks_and_scanned_teachers(tmp_path, task, model):
    settings = {
        "task__name": task, "model__name": model, "model__bidirectional": model == "encoder",
        "data__source": "digits" if task == "digits" else "synthetic", "train__steps": 2,
        "evaluate__every": 0, "data__length": 64, "optimiser__warmup_steps": 1,
    }  # fmt: skip
    teacher = train(configured(tmp_path, model__layers=2, model__scan=True, **settings), tmp_path / "teacher")
    student = configured(tmp_path, "distil", distil__teacher=str(teacher), distil__weight=1.0, **settings)
    train(student, tmp_path / "student")
    losses = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 5 for line in losses if line["split"] == "train")
