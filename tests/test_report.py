"""What is reported of a run: costs against hand counts, tables, claims, the report, the benchmark."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from configs import base
from fastformer import models
from fastformer.attention import VARIANTS
from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.report import benchmark, claims, cost, plots, tables, torch_peer
from fastformer.report.run_report import write_report

A = jax.ShapeDtypeStruct((3, 4), jnp.float32)
B = jax.ShapeDtypeStruct((4, 5), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
AB = 2 * 3 * 4 * 5  # of A @ B
SS = 2 * 4 * 4 * 4  # of SQUARE @ SQUARE


def scanned(x, w, turns=7):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=turns)[0]


def test_flops_of_a_product_in_every_wrapping():
    assert cost.flops(jnp.matmul, A, B) == AB
    assert cost.flops(jax.jit(jax.jit(jnp.matmul)), A, B) == AB
    assert cost.flops(jax.checkpoint(jnp.matmul), A, B) == AB
    assert (
        cost.flops(jax.vmap(jnp.matmul), *(jax.ShapeDtypeStruct((6, *x.shape), x.dtype) for x in (A, B)))
        == 6 * AB
    )


def test_flops_of_a_batched_einsum():
    q = jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.float32)
    assert cost.flops(lambda q: jnp.einsum("BTHK,BSHK->BHTS", q, q), q) == 2 * (2 * 3) * 5 * 5 * 8


def test_flops_multiply_out_scans_within_scans():
    assert cost.flops(scanned, SQUARE, SQUARE) == 7 * SS
    nested = lambda x, w: jax.lax.scan(lambda x, _: (scanned(x, w), None), x, length=3)[0]  # noqa: E731
    assert cost.flops(nested, SQUARE, SQUARE) == 21 * SS


def test_flops_of_gradients_count_what_is_computed():
    loss = lambda a, b: jnp.sum((a @ b) ** 2)  # noqa: E731
    assert cost.flops(jax.value_and_grad(loss, (0, 1)), A, B) == 3 * AB
    assert cost.flops(jax.value_and_grad(loss), A, B) == 2 * AB
    # The product itself is not needed for the gradient of its sum.
    assert cost.flops(jax.grad(lambda a, b: jnp.sum(a @ b)), A, B) == AB
    assert (
        cost.flops(jax.grad(lambda x, w: jnp.sum(scanned(x, w) ** 2), (0, 1)), SQUARE, SQUARE) == 3 * 7 * SS
    )


def test_flops_of_a_checkpoint_count_its_second_forward_pass():
    two = lambda a, w: jnp.sum(jnp.sin(jnp.sin(a @ w) @ w))  # noqa: E731
    plain = cost.flops(jax.value_and_grad(two, (0, 1)), SQUARE, SQUARE)
    again = cost.flops(jax.value_and_grad(jax.checkpoint(two), (0, 1)), SQUARE, SQUARE)
    assert plain == 6 * SS
    assert again == 8 * SS


def test_flops_of_custom_gradients():
    @jax.custom_vjp
    def double(a):
        return a @ a

    double.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a @ a @ a,))
    assert cost.flops(double, SQUARE) == SS
    assert cost.flops(jax.value_and_grad(lambda a: jnp.sum(double(a))), SQUARE) == 4 * SS


def test_flops_of_branches_devices_convolutions_and_loops():
    branch = lambda a, p: jax.lax.cond(p, lambda: a @ a @ a, lambda: a @ a)  # noqa: E731
    assert cost.flops(branch, SQUARE, True) == 2 * SS
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert cost.flops(split, x, SQUARE) == 2 * 8 * 4 * 4
    image, kernel = jax.ShapeDtypeStruct((2, 3, 9), jnp.float32), jax.ShapeDtypeStruct((5, 3, 4), jnp.float32)
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "VALID")  # noqa: E731
    assert cost.flops(convolve, image, kernel) == 2 * (2 * 5 * 6) * (3 * 4)
    with pytest.raises(ValueError, match="while loop"):
        cost.flops(lambda a: jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a @ a, a), SQUARE)
    assert (
        cost.flops(lambda a: jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a + 1, a) @ a, SQUARE) == SS
    )


def small_config(**model):
    c = base.get_config()
    c.model.layers, c.model.width, c.model.heads = 2, 32, 2
    for key, value in model.items():
        c.model[key] = value
    return c


def test_state_bytes_and_flops_of_a_model():
    c = small_config(ff_width=64, mlp="gelu")
    model = models.build(c, 257, 64)
    # Linear attention keeps the same state at any length, softmax one key and value a token.
    slot = 2 * 2 * 32 * 4  # layers, key and value, D, bytes of a float
    grown = cost.state_bytes(model, 128) - cost.state_bytes(model, 64)
    assert 64 * slot <= grown <= 64 * (slot + 2 * 8)  # and two indices a layer
    c.model.attention = {"name": "linear"}
    linear = models.build(c, 257, 64)
    assert cost.state_bytes(linear, 64) == cost.state_bytes(linear, 4096)

    tokens = jnp.zeros((1, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, whole(1, 64))
    dense = 64 * 2 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + 257 * 32)
    scores = 2 * 2 * 2 * 64 * 64 * 32  # layers, two products, D
    counted = cost.flops(lambda p: model.apply(p, tokens, whole(1, 64))[0], params)
    assert dense + scores // 2 <= counted <= dense + scores
    assert cost.parameters(params) == 2 * (4 * 32 * 32 + 2 * 32 * 64) + 257 * 32 + 5 * 32


def test_numbers_in_tables():
    assert tables.mean_std([1.91, 1.93, 1.92]) == "1.920 ± 0.010"
    assert tables.mean_std([9000.0, 9200.0]) == "9,100 ± 141"
    assert tables.mean_std([4096, 4096]) == "4,096"
    assert tables.mean_std([]) == tables.number(None) == tables.nbytes(None) == "not run"
    assert tables.number(1.85) == "1.850" and tables.number(12345.6) == "12,346"
    assert (
        tables.nbytes(526_336) == "526 kB"
        and tables.nbytes(999) == "999 B"
        and tables.count(10.4e9) == "10.4 G"
    )
    assert tables.seconds(200) == "3 min 20 s" and tables.seconds(59.96) == "60 s"
    assert tables.table(("a", "b"), [("x", "10")]) == "| a |  b |\n|---|---:|\n| x | 10 |"


def claim(**changes):
    return {"text": "a is better", "metric": "quality.bits_per_byte", "lower": "a", "higher": "b"} | changes


@pytest.mark.parametrize(
    "changes, outcome",
    [
        ({}, "holds"),
        ({"by": 0.1}, "FAILS"),
        ({"lower": "b", "higher": "a"}, "FAILS"),
        ({"lower": "b", "higher": "a", "by": -0.1}, "holds"),
        ({"lower": "a", "higher": "a"}, "FAILS"),
        ({"times": 1.02}, "holds"),
        ({"times": 1.1}, "FAILS"),
        ({"higher": 2.0}, "holds"),
        ({"higher": 1.9}, "FAILS"),
        ({"higher": "c"}, "not run"),
    ],
)
def test_claims_hold_or_fail(changes, outcome):
    (parsed,) = claims.parse([claim(**changes)], ("a", "b", "c"), "config.py")
    assert claims.check(parsed, {"a": [1.9, 1.92], "b": [1.95], "c": []}).outcome == outcome


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lower": "sotfmax"}, "CLAIMS[0].lower: 'sotfmax' is unknown; did you mean softmax?"),
        ({"metric": "state_byte"}, "CLAIMS[0].metric: 'state_byte' is unknown; did you mean state_bytes?"),
        ({"metric": 3}, "CLAIMS[0].metric: 3 is unknown"),
        ({"lowest": "a"}, "CLAIMS[0].lowest: no such key; did you mean lower?"),
        ({"by": "much"}, "CLAIMS[0].by: 'much' is not allowed"),
        ({"times": 0}, "CLAIMS[0].times: 0 is not allowed"),
    ],
)
def test_claims_that_cannot_be_say_what_is_allowed(changes, words):
    with pytest.raises(UserError) as error:
        claims.parse([claim(lower="softmax", higher="softmax") | changes], ("softmax",), "config.py")
    assert words in str(error.value)
    with pytest.raises(UserError, match="metric: is missing"):
        claims.parse([{"text": "a", "lower": "softmax", "higher": 1}], ("softmax",), "config.py")


def write_run(workdir, finished):
    c = base.get_config()
    c.name = "tried"
    workdir.mkdir()
    (workdir / "config.json").write_text(configuration.to_json(c))
    lines = [{"step": s, "split": "train", "loss": 5.0 / s**0.3} for s in range(10, 500, 10)]
    lines += [
        {"step": s, "split": "heldout", "loss": 5.1 / s**0.3, "bits_per_byte": 7 / s**0.3} for s in (250, 490)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "name": "tried", "step": 1000, "quality": {"bits_per_byte": 1.8125, "perplexity": 3.5},
        "yardsticks": {"gzip_bits_per_byte": 1.911, "xz_bits_per_byte": 1.654}, "samples": ["x = ```\n"],
        "parameters": 851_968, "bytes_on_disk": 3_407_872, "train_tokens_per_second": 9123.4,
        "decode_tokens_per_second": 812.3, "state_bytes": 2_097_152, "flops_per_token": 6_123_456,
        "peak_memory_bytes": 812_345_678, "wall_seconds": 262.3, "config_sha256": configuration.sha256(c),
        "versions": {"jax": "0.10.2"}, "device": "1 x cpu", "commit": "c0ffee",
        "command": "python launch.py --x=1",
    }  # fmt: skip
    if finished:
        (workdir / "result.json").write_text(json.dumps(result))
    return c


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_the_report_of_a_finished_run(tmp_path):
    c = write_run(tmp_path / "run", finished=True)
    text = write_report(tmp_path / "run").read_text()
    facts = "1.812", "1.911", "1.654", "851,968", "9,123", "812", "2.1 MB", "6.12 M", "4 min 22 s", "1 x cpu"
    for fact in (*facts, "jax 0.10.2", "`c0ffee`", "python launch.py --x=1", configuration.sha256(c)):
        assert fact in text, fact
    assert "not run" not in text
    assert "````text\nx = ```\n\n````" in text  # the fence is longer than any within
    assert text.index("bits per byte") < text.index("gzip -9") < text.index("perplexity")
    assert '"learning_rate": 0.003' in text.partition("<details>")[2]
    assert is_picture(tmp_path / "run/loss.png")


def test_the_report_of_an_interrupted_run(tmp_path):
    write_run(tmp_path / "run", finished=False)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "split": "tr')  # killed while it wrote
    text = write_report(tmp_path / "run").read_text()
    assert "**Not finished**: step 490 of 1,000" in text
    assert is_picture(tmp_path / "run/loss.png")
    (tmp_path / "run/metrics.jsonl").unlink()
    assert "no step yet" in write_report(tmp_path / "run").read_text()
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)


def test_smoothing_is_a_centred_mean():
    values = np.arange(300.0)
    assert np.allclose(plots.smooth(values), values)  # of a straight line: itself
    assert plots.smooth([0.0] * 50 + [10.0] + [0.0] * 50).max() == pytest.approx(10 / 3)
    assert len(plots.smooth([])) == 0


def benchmark_config(**changes):
    c = small_config()
    c.benchmark.lengths, c.benchmark.repeats = (16, 32), 1
    for key, value in changes.items():
        c.benchmark[key] = value
    return c


def test_the_benchmark_measures_every_variant(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch_peer, "available", lambda: (None, "torch is not installed"))
    rows = benchmark.run_benchmark(benchmark_config(variants=("linear",)), tmp_path)
    assert {row["direction"] for row in rows} == {"causal"}
    assert [(row["variant"], row["length"]) for row in rows] == [
        ("softmax", 16), ("linear", 16), ("softmax", 32), ("linear", 32),
    ]  # fmt: skip
    assert rows[0]["forward_ratio"] == 1 and rows[1]["forward_ratio"] > 0
    assert all(row["forward_backward_peak_bytes"] > row["forward_peak_bytes"] > 0 for row in rows)
    assert (
        rows[1]["state_bytes"] == rows[3]["state_bytes"] and rows[0]["state_bytes"] < rows[2]["state_bytes"]
    )
    assert [json.loads(line) for line in (tmp_path / "benchmark.jsonl").read_text().splitlines()] == rows
    assert "not run: torch is not installed" in (tmp_path / "benchmark.md").read_text()
    assert "linear" in capsys.readouterr().out
    assert is_picture(tmp_path / "benchmark.png")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"variants": ("sofmax",)},
            "config.benchmark.variants[0]: 'sofmax' is unknown; did you mean softmax?",
        ),
        ({"lengths": (16, 0)}, "config.benchmark.lengths: (16, 0) is not allowed"),
        ({"lengths": ()}, "config.benchmark.lengths: () is not allowed"),
        ({"repeats": 0}, "config.benchmark.repeats: 0 is not allowed"),
    ],
)
def test_a_benchmark_that_cannot_be_says_so(changes, words, tmp_path):
    with pytest.raises(UserError) as error:
        benchmark.run_benchmark(benchmark_config(**changes), tmp_path)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_benchmark_has_every_row_in_a_direction_that_it_can(bidirectional):
    c = benchmark_config()
    c.model.bidirectional, c.model.short_conv = bidirectional, -1
    model = configuration.section(models.ModelConfig, c, "model")
    for name, row in VARIANTS.items():
        both_ways = benchmark._mixer(model, name, 16).bidirectional_mode
        assert both_ways == (row.bidirectional if bidirectional else not row.causal), name


def test_the_benchmark_gives_each_variant_its_own_options():
    c = benchmark_config()
    c.model.attention = {"name": "local", "window": 8}
    model = configuration.section(models.ModelConfig, c, "model")
    assert benchmark._mixer(model, "local", 32).window == 8
    assert not hasattr(benchmark._mixer(model, "linear", 32), "window")
    with pytest.raises(UserError, match="config.benchmark.variants: linear cannot be: .*alibi"):
        c.model.positions = "alibi"
        benchmark._mixer(configuration.section(models.ModelConfig, c, "model"), "linear", 32)


def test_a_benchmark_of_all_variants_leaves_out_those_that_cannot():
    config = benchmark_config()
    config.model.positions = "alibi"
    model = configuration.section(models.ModelConfig, config, "model")
    options = configuration.section(benchmark.BenchmarkConfig, config, "benchmark")
    variants, unable = benchmark._variants(options, model)
    assert variants[0] == "softmax" and "alibi" in unable["linear"]
    assert {*variants, *unable} == {*benchmark.VARIANTS} and not {*variants} & {*unable}


def test_torch_is_found_or_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(torch_peer.importlib.util, "find_spec", lambda name: None)
    assert torch_peer.available() == (None, "torch is not installed")


def test_the_torch_layer_is_causal_attention():
    torch = pytest.importorskip("torch")
    forward, both = torch_peer.layer(torch, (1, 16, 8), (2, 1, 4), "float32")
    forward(), both()
