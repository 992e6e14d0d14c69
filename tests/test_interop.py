"""Models in from other projects and out again: the same logits, the same tokens, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compress_tools import configured, train
from interop_tools import KINDS, SIZES, TEXT, WHY, bpe, drawn, logits, written
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from fastformer import interop, models
from fastformer.compress.teacher import open_teacher
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.data.tokenisers import ByteTokeniser, load_tokeniser
from fastformer.decode import complete
from fastformer.interop import families
from fastformer.train import evaluate, imports, modes


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


def test_an_import_goes_where_a_run_does(tmp_path, capsys, monkeypatch):
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
    ends = []
    monkeypatch.setattr(evaluate, "complete", lambda *args: ends.append(args[3]) or complete(*args))
    modes.generate(config, workdir, {"prompt": ["def"]})
    assert capsys.readouterr().out.startswith("def")
    assert ends == [tokeniser.eod] == [0]  # which is not the last token
    with pytest.raises(UserError, match="holds an imported model; train elsewhere"):
        train(config, workdir)
    with pytest.raises(UserError, match="distil is part of training, and an import is not trained"):
        imports.make(configured(tmp_path, "distil", **own), tmp_path / "new", str(tmp_path / "out"))
    with pytest.raises(UserError, match="'quantize' is unknown; did you mean quantise"):
        imports.make(configured(tmp_path, "quantize", **own), tmp_path / "new", str(tmp_path / "out"))
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
        ({"model__prefix_lm": True}, "config.model.prefix_lm: the formats"),
        ({"model__short_conv": 4}, "config.model.short_conv: the formats"),
        ({"model__mlp": "gelu"}, "norm rms, mlp gelu"),
        ({"model__attention__learned_sinks": True}, "config.model.attention.learned_sinks"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, settings, message):
    model = models.build(configured(tmp_path, **SIZES | settings), 257, 16)
    with pytest.raises(UserError, match=message):
        families.family_of(model.config)


LAYER, NORM, EMBEDDING = "model.layers.0.", "model.norm.weight", "model.embed_tokens.weight"
GATE, BIAS = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}self_attn.q_proj.bias"


@pytest.fixture
def directory(tmp_path):
    written(tmp_path, "huggingface", "llama", bpe())
    return tmp_path / "out"


def refused(match, source, folder=None, **settings):
    config = configured(folder or Path(source).parent, **{"data__length": 64} | settings)
    with pytest.raises(UserError, match=match) as error:
        interop.read(str(source), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model_type", "t5", "its model_type is 't5'"),
        ("hidden_act", "relu", "its hidden_act is 'relu'"),
        ("attention_bias", True, "its attention_bias is True"),
        ("rope_parameters", {"rope_type": "llama3"}, "its rope_scaling is 'llama3'"),
        ("intermediate_size", 48, "gate_proj.weight is .* and its settings ask for"),
        ("num_hidden_layers", 3, "model.layers.2.* is not there"),
        ("num_hidden_layers", 1, "there is model.layers.1.* and 8 more, for which its"),
        ("hidden_size", None, "has no hidden_size"),
        ("hidden_size", 32.0, "its settings make config.model.width 32.0"),
        ("num_attention_heads", "a", "its settings make config.model.heads 'a'"),
        ("rms_norm_eps", "x", "holds no settings of a llama"),
        ("rope_parameters", "linear", "holds no settings of a llama"),
        ("max_position_embeddings", "9", "positions reach '9' tokens"),
        ("model_type", ["llama"], "its model_type is"),
    ],
)
def test_settings_that_are_refused(directory, key, value, message):
    changed = json.loads((directory / "config.json").read_text()) | {key: value}
    changed = {k: v for k, v in changed.items() if v is not None}
    (directory / "config.json").write_text(json.dumps(changed))
    refused(message, directory)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (EMBEDDING, lambda x: None, "has no model.embed_tokens.weight"),
        (GATE, lambda x: None, "gate_proj.weight is not there"),
        (GATE, lambda x: x.T, r"gate_proj.weight is \(32, 64\), and its settings ask for \(64, 32\)"),
        (GATE, lambda x: x.ravel(), r"gate_proj.weight is \(2048,\)"),
        (NORM, lambda x: x.reshape(4, 8), r"model.norm.weight is \(4, 8\)"),
        (NORM, lambda x: np.nan * x, "model.norm.weight has entries that are not finite"),
        (BIAS, lambda x: np.zeros(32, np.float32), "there is .*q_proj.bias, for which its settings"),
    ],
)
def test_weights_that_are_refused(directory, name, change, message):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    changed = tensors | {name: change(tensors.get(name))}
    save_file({k: np.ascontiguousarray(v) for k, v in changed.items() if v is not None}, file)
    refused(message, directory)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "is no index of safetensors"),
        ("tokenizer.json", b"\xff", "tokenizer.json cannot be read"),
        ("tokenizer.json", b"{}", "is no byte-level or WordPiece tokeniser"),
        ("config.json", b"[" * 100_000, "config.json cannot be read"),
        ("model.safetensors", b"not tensors", "model.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_refused(directory, name, content, message):
    (directory / name).write_bytes(content)
    refused(message, directory)


def test_what_is_no_model_is_refused(directory, tmp_path):
    refused("there is no nowhere/at/all", "nowhere/at/all", tmp_path)
    refused("data.length: 65 is not allowed; the model knows 64", directory, data__length=65)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin may run code", directory)
    (tmp_path / "a.bin").write_bytes(b"")
    refused("other files may run code", tmp_path / "a.bin")
    (tmp_path / "a.gguf").write_bytes(b"GGUFnothing")
    refused("cannot be read as GGUF", tmp_path / "a.gguf")


def test_outputs_that_are_refused(tmp_path):
    _, model, params, tokeniser = written(tmp_path, "huggingface", "llama", bpe())
    with pytest.raises(UserError, match="is there already"):
        interop.write("huggingface", str(tmp_path / "out"), model, lambda: params, tokeniser)
    with pytest.raises(UserError, match="did you mean gguf"):
        interop.write("ggfu", str(tmp_path / "new"), model, lambda: params, tokeniser)


def test_a_hub_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="some/model is no file .* give its directory"):
        interop.read("some/model", configured(tmp_path))
