"""GGUF: what is written is what llama.cpp and the package gguf read, and comes back."""

from __future__ import annotations

import json
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest
from compress_tools import configured
from interop_tools import TEXT, bpe, logits, written

from fastformer import interop
from fastformer.interop import gguf_file

LLAMA_CPP = """
import json, sys, xllamacpp
path, prompt = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = path, 64, False, 1
asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
print("answer", json.dumps(xllamacpp.Server(params).handle_completions(asked)))
"""


def asked_llama_cpp(path, prompt):
    command = [sys.executable, "-c", LLAMA_CPP, str(path), prompt]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("answer "))


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
    answer = asked_llama_cpp(tmp_path / "out" / f"model-{form}.gguf", prompt)
    assert answer["usage"]["prompt_tokens"] == end + 1
    best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    want = scores_TV[end, np.array([x["id"] for x in best])]
    assert len(best) == 20
    np.testing.assert_allclose([x["logprob"] for x in best], want, atol=0.02 if form == "f16" else 0.3)


@pytest.mark.oracle
def test_bytes_go_into_gguf_and_come_back(tmp_path):
    _, model, params, tokeniser = written(tmp_path, "gguf", "llama")
    path = tmp_path / "out" / "model-f16.gguf"
    found = interop.read(str(path), configured(tmp_path, data__length=64)).tokeniser
    assert found.encode(TEXT) == tokeniser.encode(TEXT) and found.decode(found.encode(TEXT)) == TEXT
    assert (found.eod, found.size) == (tokeniser.eod, tokeniser.size)
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    assert asked_llama_cpp(path, TEXT)["usage"]["prompt_tokens"] == len(TEXT.encode())


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
