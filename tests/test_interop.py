"""Models in from other projects and out again: the same logits, the same tokens, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_tools import configured, train
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

from fastformer import interop, models
from fastformer.compress.teacher import open_teacher
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.data.tokenisers import BPETokeniser, ByteTokeniser, load_tokeniser
from fastformer.interop import families, gguf_file
from fastformer.train import imports, modes

WHY = "pip install torch==2.13.0 transformers"
TEXT = "def add(a, b):\n    return a + b  # naïve, 1234\n"
SIZES = {"model__layers": 2, "model__width": 32, "model__heads": 4, "model__ff_width": 64}
GPT2 = {
    "model__norm": "layer", "model__mlp": "gelu", "model__positions": "learned", "model__bias": True,
    "model__norm_epsilon": 1e-5,
}  # fmt: skip
KINDS = {
    "llama": {"model__kv_heads": 2, "model__rope_base": 1e5, "model__norm_epsilon": 1e-5},
    "untied": {"model__tied": False, "model__head_width": 16},
    "mistral": {"model__attention__name": "local", "model__attention__window": 8},
    "gpt2": GPT2,
}


def drawn(model):
    """Return parameters, every one away from its initial value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), whole(1, 2)))
    leaves, tree = jax.tree.flatten(shapes["params"])
    rng = np.random.default_rng(0)
    new = [(0.2 * rng.standard_normal(x.shape)).astype(np.float32) + (x.ndim == 1) for x in leaves]
    return nn.unbox(jax.tree.unflatten(tree, new))


def logits(model, params, tokens):
    return np.asarray(model.apply({"params": params}, jnp.asarray(tokens), whole(*np.shape(tokens)))[0])


def bpe():
    made = Tokenizer(token_models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT * 50], trainer)
    return BPETokeniser(made.to_str(), 0, 304)  # three tokens more than it needs, as models have


def made(folder, kind, tokeniser=None):
    tokeniser = tokeniser or ByteTokeniser()
    config = configured(folder, **SIZES | KINDS[kind])
    model = models.build(config, tokeniser.size, 64)
    return config, model, drawn(model), tokeniser


def written(folder, form, kind, tokeniser=None):
    config, model, params, tokeniser = made(folder, kind, tokeniser)
    interop.write(form, str(folder / "out"), model, lambda: params, tokeniser)
    return config, model, params, tokeniser


@pytest.mark.parametrize(
    "form, kind", [*[("huggingface", kind) for kind in KINDS], ("gguf", "llama"), ("gguf", "untied")]
)
def test_out_and_in_again(tmp_path, form, kind):
    config, model, params, tokeniser = written(tmp_path, form, kind, bpe())
    source = tmp_path / "out" / ("model-f16.gguf" if form == "gguf" else "")
    found = interop.read(str(source), configured(tmp_path, data__length=64))
    for field in ("layers", "heads", "width", "tied", "positions", "bias"):
        assert found.config.model[field] == config.model[field], field
    again = models.build(found.config, found.tokeniser.size, 64)
    assert again.config.norm_epsilon == (model.config.norm_epsilon or 1e-6)
    tokens = [found.tokeniser.encode(TEXT)]
    assert tokens == [tokeniser.encode(TEXT)] and found.tokeniser.decode(tokens[0]) == TEXT
    assert found.tokeniser.eod == tokeniser.eod and found.tokeniser.size == 304
    tolerance = 2e-2 if form == "gguf" else 1e-6  # of F16
    np.testing.assert_allclose(
        logits(again, found.params, tokens), logits(model, params, tokens), atol=tolerance, rtol=tolerance
    )


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_written(tmp_path, kind):
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    _, model, params, tokeniser = written(tmp_path, "huggingface", kind, bpe())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = text(TEXT, add_special_tokens=False)["input_ids"]
    assert tokens == tokeniser.encode(TEXT) and text.decode(tokens) == TEXT
    assert text.eos_token_id == tokeniser.eod
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(logits(model, params, [tokens]), want, atol=1e-3)


LLAMA_CPP = """
import json, sys, xllamacpp
path, prompt = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = path, 64, False, 1
asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
print("answer", json.dumps(xllamacpp.Server(params).handle_completions(asked)))
"""


@pytest.mark.oracle
@pytest.mark.parametrize("form", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_llama_cpp_reads_what_is_written(tmp_path, kind, form):
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    _, model, params, tokeniser = written(tmp_path, f"gguf:{form}".removesuffix(":f16"), kind, bpe())
    tokens = tokeniser.encode(TEXT)
    scores_TV = jax.nn.log_softmax(logits(model, params, [tokens])[0])
    # It keeps what is no whole character to itself: ask where the likeliest token is one, by a margin.
    ahead_T2 = jax.lax.top_k(scores_TV, 2)[0]
    end = next(
        t
        for t in range(5, len(tokens))
        if (ahead_T2[t, 0] > ahead_T2[t, 1] + 0.3)
        and tokeniser.decode([int(scores_TV[t].argmax())]).isascii()
        and tokeniser.encode(tokeniser.decode(tokens[: t + 1])) == tokens[: t + 1]
    )
    prompt = tokeniser.decode(tokens[: end + 1])
    command = [sys.executable, "-c", LLAMA_CPP, str(tmp_path / "out" / f"model-{form}.gguf"), prompt]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next(x for x in done.stdout.splitlines() if x.startswith("answer "))
    answer = json.loads(line.removeprefix("answer "))
    assert answer["usage"]["prompt_tokens"] == end + 1
    best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    want = scores_TV[end, np.array([x["id"] for x in best])]
    assert len(best) == 20
    np.testing.assert_allclose([x["logprob"] for x in best], want, atol=0.02 if form == "f16" else 0.3)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_what_transformers_writes_is_read(tmp_path, kind):
    """Sharded, too, and in bfloat16."""
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80}
    sizes = {"Llama": llama | {"num_key_value_heads": 2}, "GPT2": gpt2}[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=304, **sizes)
    torch.manual_seed(0)
    name = "LlamaForCausalLM" if kind == "Llama" else "GPT2LMHeadModel"
    theirs = getattr(transformers, name)(config).to(torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in" / "tokenizer.json").write_text(bpe().state()["model"])
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    found = interop.read(str(tmp_path / "in"), configured(tmp_path, data__length=64))
    tokens = [found.tokeniser.encode(TEXT)]
    with torch.no_grad():
        want = theirs.float()(torch.tensor(tokens)).logits.numpy()
    model = models.build(found.config, 304, 64)
    np.testing.assert_allclose(logits(model, found.params, tokens), want, atol=1e-3)


def test_a_bytes_tokeniser_is_the_same_there(tmp_path):
    written(tmp_path, "huggingface", "llama")
    theirs = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (
        theirs.encode(TEXT).ids == ByteTokeniser().encode(TEXT)
        and theirs.decode(theirs.encode(TEXT).ids) == TEXT
    )
    assert theirs.token_to_id("<|endoftext|>") == 256


@pytest.mark.parametrize("kind, bits", [("q8_0", 8.5), ("q4_0", 4.5)])
def test_gguf_holds_integers(tmp_path, kind, bits):
    _, model, params, _ = written(tmp_path, f"gguf:{kind}", "llama")
    reader = gguf.GGUFReader(tmp_path / "out" / f"model-{kind}.gguf")
    up = next(x for x in reader.tensors if x.name == "blk.1.ffn_up.weight")
    assert up.n_bytes * 8 / up.n_elements == bits
    want = np.asarray(params["layer_1"]["mlp"]["up"]["weight"]).T
    error = np.abs(gguf.dequantize(up.data, up.tensor_type) - want).max()
    assert 0 < error < np.abs(want).max() / (7 if kind == "q4_0" else 100)


def test_pairs_are_turned_and_back():
    x = np.arange(48.0).reshape(12, 4)
    turned = gguf_file.rotated(x, 2)
    np.testing.assert_array_equal(turned[:6, 0] / 4, [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(gguf_file.rotated(turned, 2, back=True), x)


@pytest.mark.parametrize("variant", ["softmax", "gated_delta"])
def test_stablehlo_runs_without_us(tmp_path, variant):
    config = configured(tmp_path, **SIZES, model__attention__name=variant)
    tokeniser = ByteTokeniser()
    model = models.build(config, tokeniser.size, 24)
    params = drawn(model)
    interop.write("stablehlo", str(tmp_path / "out"), model, lambda: params, tokeniser)
    (tmp_path / "fastformer.py").write_text("raise ImportError")
    command = [sys.executable, str(tmp_path / "out" / "run.py"), "ab"]
    alone = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr.decode()
    scores = jax.jit(lambda row: model.apply({"params": params}, row, whole(1, 24))[0])  # one program
    tokens = [tokeniser.eod, *b"ab"]
    while len(tokens) < 24:
        row = np.pad(np.asarray([tokens], np.int32), ((0, 0), (0, 24 - len(tokens))))
        if (new := int(scores(row)[0, len(tokens) - 1].argmax())) == tokeniser.eod:
            break
        tokens.append(new)
    assert done.stdout.decode().removesuffix("\n") == bytes(tokens[1:]).decode("utf-8", "replace")


def test_an_import_goes_where_a_run_does(tmp_path, capsys):
    tokeniser = bpe()
    written(tmp_path, "huggingface", "llama", tokeniser)
    own = {"data__length": 32, "train__steps": 1, "optimiser__warmup_steps": 1, "evaluate__every": 0}
    workdir = tmp_path / "imported"
    said = imports.make(configured(tmp_path, **own), workdir, str(tmp_path / "out"))
    assert "304 tokens" in said
    assert load_tokeniser(workdir).fingerprint == tokeniser.fingerprint
    config = modes.of_run(workdir, None, ())
    modes.evaluate(config, workdir, {})
    quality = json.loads(capsys.readouterr().out)
    assert quality["bits_per_byte"] > 0
    modes.generate(config, workdir, {"prompt": ["def"]})
    assert capsys.readouterr().out.startswith("def")
    with pytest.raises(UserError, match="holds an imported model; train elsewhere"):
        train(config, workdir)
    with pytest.raises(UserError, match="holds a run already"):
        imports.make(config, workdir, str(tmp_path / "out"))
    settings = {key: config.model[key] for key in ("norm_epsilon", "rope_base", "kv_heads", "head_width")}
    student = configured(
        tmp_path, **SIZES, **own, **{f"model__{k}": v for k, v in settings.items()},
        data__tokeniser=f"run:{workdir}", train__init=str(workdir), optimiser__learning_rate=1e-9,
    )  # fmt: skip
    train(student, tmp_path / "student")
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert result["quality"]["bits_per_byte"] == pytest.approx(quality["bits_per_byte"], rel=1e-4)
    imports.export(tmp_path / "student", "huggingface", str(tmp_path / "back"))
    assert open_teacher(str(workdir), 304, "float32").tokeniser.eod == 0
    again = interop.read(str(tmp_path / "back"), configured(tmp_path, **own))
    want = interop.read(str(tmp_path / "out"), configured(tmp_path, **own))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), again.params, want.params)


def test_no_text_spells_a_special_token():
    tokeniser = bpe()
    tokens = tokeniser.encode("<|endoftext|>")
    assert 0 not in tokens and tokeniser.decode(tokens) == "<|endoftext|>" and tokeniser.decode([0]) == ""


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model__attention__name": "gated_delta"}, "no format holds gated_delta"),
        ({"model__pattern": ("softmax", "local")}, "no format holds a pattern"),
        ({"model__qk_norm": True}, "config.model.qk_norm: the formats"),
        ({"model__short_conv": 4}, "config.model.short_conv: the formats"),
        ({"model__mlp": "gelu"}, "norm rms, mlp gelu"),
        ({"model__attention__learned_sinks": True}, "config.model.attention.learned_sinks"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, settings, message):
    model = models.build(configured(tmp_path, **SIZES | settings), 257, 16)
    with pytest.raises(UserError, match=message):
        families.family_of(model.config)


def test_what_is_refused_by_name(tmp_path):
    config, model, params, tokeniser = written(tmp_path, "huggingface", "llama", bpe())
    folder, fresh = tmp_path / "out", configured(tmp_path, data__length=64)

    def refused(match, source=folder, config=fresh):
        with pytest.raises(UserError, match=match) as error:
            interop.read(str(source), config)
        assert "\n" not in str(error.value)

    refused("there is no nowhere/at/all", "nowhere/at/all")
    refused(
        "data.length: 65 is not allowed; the model knows 64", config=configured(tmp_path, data__length=65)
    )
    with pytest.raises(UserError, match="is there already"):
        interop.write("huggingface", str(folder), model, lambda: params, tokeniser)
    with pytest.raises(UserError, match="did you mean gguf"):
        interop.write("ggfu", str(tmp_path / "new"), model, lambda: params, tokeniser)
    described = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("model_type", "t5", "its model_type is 't5'"),
        ("hidden_act", "relu", "its hidden_act is 'relu'"),
        ("attention_bias", True, "its attention_bias is True"),
        ("rope_parameters", {"rope_type": "llama3"}, "its rope_scaling is 'llama3'"),
        ("intermediate_size", 48, "gate_proj.weight is .* and its settings ask for"),
        ("num_hidden_layers", 3, "model.layers.2.* is not there"),
        ("hidden_size", None, "has no hidden_size"),
    ):
        changed = described | {key: value}
        changed = {k: v for k, v in changed.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(changed))
        refused(message)
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "tokenizer.json").write_text("{}")
    refused("is no byte-level or WordPiece tokeniser")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    refused("model.safetensors cannot be read")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin may run code")
    (tmp_path / "a.bin").write_bytes(b"")
    refused("other files may run code", tmp_path / "a.bin")
    (tmp_path / "a.gguf").write_bytes(b"GGUFnothing")
    refused("cannot be read as GGUF", tmp_path / "a.gguf")


def test_a_hub_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="some/model is no file .* give its directory"):
        interop.read("some/model", configured(tmp_path))
