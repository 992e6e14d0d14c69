"""What is decoded after the last step is refused before the first where learned positions are too few."""

from __future__ import annotations

import jax
import pytest
import test_translate
from test_code import MODULE
from test_translate import write_mo
from tiny import configured

from configs import base
from fastformer import models
from fastformer.core.errors import UserError
from fastformer.decode import GenerateConfig, check_rows, complete
from fastformer.train import loop

LENGTH = 16


def model_of(name):
    c = base.get_config()
    c.model.name, c.model.encoder_layers = name, 1 if name == "encoder_decoder" else 0
    c.model.layers, c.model.width, c.model.heads, c.model.positions = 1, 16, 2, "learned"
    return models.build(c, 5, LENGTH)


def options(tokens):
    return GenerateConfig(tokens, 0.0, 0, 1.0, 0, "")


@pytest.mark.parametrize(
    "name, prompt, tokens, message",
    [
        ("decoder", 10, 6, None),
        ("decoder", 10, 7, "config.generate.tokens: 7 more after a prompt of 10 .* give at most 6"),
        ("decoder", 16, 1, "config.data.length: 16 learned positions are too few for a prompt of 16"),
        ("encoder_decoder", 16, 16, None),
        ("encoder_decoder", 10, 17, "config.generate.tokens: 17 more are beyond .* give at most 16"),
        ("encoder_decoder", 17, 1, "for a prompt of 17 .* config.model.positions that are not learned"),
    ],
)
def test_positions_must_reach(name, prompt, tokens, message):
    rows = [[1], [1] * prompt]
    if not message:
        return check_rows(model_of(name), rows, options(tokens), LENGTH)
    with pytest.raises(UserError, match=message):
        check_rows(model_of(name), rows, options(tokens), LENGTH)


def test_no_batch_is_completed_before_all_are_checked():
    with pytest.raises(UserError, match="for a prompt of 16"):
        complete(model_of("decoder"), None, [[1]] * 40 + [[1] * 16], 4, options(1), LENGTH)


def text(folder):
    return configured(folder, task__continued=2)


def code(folder):
    (folder / "code").mkdir()
    for number in range(6):
        (folder / f"code/{number}.py").write_text(MODULE.replace("twice", f"twice{number}") * 3)
    settings = {"task__name": "code", "task__functions": 2, "data__source": f"files:{folder}/code/*.py"}
    return configured(folder, **settings)


def translate(folder):
    """The held-out catalogue's last message is too long; the report's samples are its first."""
    settings = {"model__name": "decoder", "model__encoder_layers": 0, "data__length": 64}
    config = test_translate.configured(folder, **settings)
    items = list(test_translate.sentences(32).items())
    for number in range(8):
        long = {"zzz" + "".join(map(str, range(100 * number, 100 * number + 100))): f"x{number}"}
        write_mo(folder / f"locale/{number}.mo", dict(items[4 * number : 4 * number + 4]) | long)
    return config


@pytest.mark.parametrize("config_of", [text, code, translate])
def test_every_prompt_is_checked_before_the_first_step(config_of, tmp_path, monkeypatch):
    config = config_of(tmp_path)
    config.model.positions = "learned"
    monkeypatch.setattr(loop, "compile_all", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError, match="learned positions are too few for a prompt of"):
        loop.train(config, tmp_path / "run", jax.devices()[:1])
