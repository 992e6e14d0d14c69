"""A new variant is one file and one row: laws, configuration, training and generation find it."""

from __future__ import annotations

import importlib
import json
import textwrap

import jax
import jax.numpy as jnp
import pytest
import test_laws
from tiny import tiny_config

from fastformer.attention import VARIANTS
from fastformer.core.errors import UserError
from fastformer.train import loop, setup
from fastformer.train.modes import MODES

FILE = '''
    """Linear attention with phi(x) = offset + x²."""

    import jax.numpy as jnp

    from fastformer.attention.linear import Kernel, average, dense_average
    from fastformer.core.errors import require
    from fastformer.core.layers import zero_padding


    def features(x, offset, seq):
        return offset + zero_padding(x, seq).astype(jnp.float32) ** 2


    def reference(q_BTHK, k_BSGK, v_BSGP, *, seq, offset, causal):
        q_BTHR, k_BSGR = (features(x, offset, seq) for x in (q_BTHK, k_BSGK))
        return dense_average(q_BTHR, k_BSGR, v_BSGP, seq, causal=causal)


    def forward(q_BTHK, k_BTGK, v_BTGP, *, seq, state=None, offset, causal):
        q_BTHR, k_BTGR = (features(x, offset, seq) for x in (q_BTHK, k_BTGK))
        return average(q_BTHR, k_BTGR, v_BTGP, seq, state, causal=causal)


    class Squares(Kernel):
        offset: float = 1.0

        def __post_init__(self):
            require(self.offset > 0, "offset", self.offset, "a number above 0")
            super().__post_init__()

        def mix(self, qkv, seqs, state):
            causal = not self.bidirectional_mode
            return forward(*qkv, seq=seqs[0], state=state, offset=self.offset, causal=causal)

        def refer(self, qkv, seqs):
            causal = not self.bidirectional_mode
            return reference(*qkv, seq=seqs[0], offset=self.offset, causal=causal)
'''


@pytest.fixture
def squares(tmp_path, monkeypatch):
    (tmp_path / "squares.py").write_text(textwrap.dedent(FILE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(VARIANTS, "squares", importlib.import_module("squares").Squares)
    return "squares"


def test_the_laws_hold_for_a_new_variant(squares):
    for mode in ("causal", "bidirectional"):
        test_laws.test_forward_is_reference(squares, mode, test_laws.TIME)
        test_laws.test_packed_rows_are_rows_alone(squares, mode)
    test_laws.test_causality_by_gradient(squares)
    test_laws.test_splits_fold_to_the_whole(squares)
    test_laws.test_nan_in_padding_goes_nowhere(squares)


def test_the_laws_catch_a_variant_that_is_wrong(squares, monkeypatch):
    module = importlib.import_module(squares)
    right = module.forward

    def wrong(q, k, v, *, seq, **options):
        return right(q, k, v, seq=seq._replace(segment_BT=jnp.minimum(seq.segment_BT, 1)), **options)

    monkeypatch.setattr(module, "forward", wrong)
    test_laws.compiled_gradients.cache_clear()
    with pytest.raises(AssertionError):
        test_laws.test_packed_rows_are_rows_alone(squares, "causal")
    test_laws.compiled_gradients.cache_clear()


def test_a_new_variant_trains_and_generates(squares, tmp_path, capsys):
    config = tiny_config(tmp_path)
    with config.unlocked():
        config.model.attention = {"name": squares, "offset": 0.5}
    loop.train(config, tmp_path / "run", jax.devices()[:1])
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    MODES["generate"](setup.read_config(tmp_path / "run"), tmp_path / "run", {"prompt": ["the "]})
    assert capsys.readouterr().out.splitlines()[-1].startswith("the ")


def test_a_new_variants_fields_are_checked(squares, tmp_path):
    config = tiny_config(tmp_path)
    with config.unlocked():
        config.model.attention = {"name": squares, "ofset": 0.5}
    with pytest.raises(UserError, match="did you mean offset"):
        setup.build_run(config, tmp_path / "run")
