"""BERTs in and out again, their word pieces, and sentences compared by their vectors."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_interop import drawn
from test_qa import corpus as _corpus  # noqa: F401
from test_qa import module
from tiny import tiny_config
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as token_models

from fastformer import interop, models, tasks
from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.data.corpus import Corpus
from fastformer.data.doc_questions import documented, questions
from fastformer.data.tokenisers import WordPieceTokeniser, load_tokeniser
from fastformer.interop import bert, huggingface
from fastformer.models import Head
from fastformer.tasks import similarity
from fastformer.train import imports, modes, setup

WHY = "pip install torch==2.13.0 transformers"
LENGTH, SIZE = 24, 160
TEXT = "Does add7 move, or Öpen? [MASK]"
BERT = {
    "model.name": "encoder", "model.bidirectional": True, "model.layers": 2, "model.width": 32,
    "model.heads": 4, "model.ff_width": 48, "model.norm": "layer", "model.norm_epsilon": 1e-12,
    "model.norm_placement": "post", "model.embedding_norm": True, "model.token_types": 2,
    "model.mlp": "gelu_erf", "model.positions": "learned", "model.bias": True, "data.length": LENGTH,
    "task.name": "similarity", "data.source": "python_questions",
}  # fmt: skip


def configured(folder, **settings):
    config = tiny_config(folder).copy_and_resolve_references().unlock()
    for key, value in (BERT | {k.replace("__", "."): v for k, v in settings.items()}).items():
        configuration.set_key(config, key, value)
    return config.lock()


def pieces():
    made = Tokenizer(token_models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE - 4, special_tokens=special, show_progress=False)
    made.train_from_iterator([module(1), TEXT], trainer)
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return WordPieceTokeniser(made.to_str(), SIZE)


def written(folder, **settings):
    """A directory with a BERT, as ours was written."""
    config, tokeniser = configured(folder, **settings), pieces()
    model = models.build(config, tokeniser.size, LENGTH)
    params = drawn(model)
    interop.write("huggingface", str(folder / "out"), model, lambda: params, tokeniser)
    return config, model, params, tokeniser


@pytest.fixture
def corpus(monkeypatch):
    """Stand in for the docstrings of the running Python."""
    found = {
        split: [q for number in numbers for q in questions(f"m{number}.py", documented(module(number)))]
        for split, numbers in (("train", range(20)), ("heldout", range(20, 23)))
    }
    made = Corpus("modules", "1", lambda split: iter(()), lambda split: iter(found[split]))
    monkeypatch.setattr(
        similarity, "open_corpus", lambda data, kind, workdir: (made, load_tokeniser(workdir), workdir)
    )
    return made


def test_word_pieces():
    tokeniser = pieces()
    tokens = tokeniser.encode(TEXT)
    assert len(tokens) > 8 and tokeniser.decode(tokens).startswith("does add7 move , or open ?")
    assert tokeniser.mark(0) not in tokens  # no text spells a special token
    assert tokeniser.alone(TEXT, 100) == [3, *tokens, 4] and tokeniser.alone(TEXT, 5) == [3, *tokens[:3], 4]
    assert tokeniser.eod == 4 and tokeniser.mark(1) == 1 and tokeniser.size == SIZE
    with pytest.raises(UserError, match=r"has no \[unused2\]"):
        tokeniser.mark(2)
    other = Tokenizer(token_models.WordPiece({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]")).to_str()
    with pytest.raises(UserError, match=r"it has no \[SEP\]"):
        huggingface.from_library(other, None, 4, "tokenizer.json")


def test_post_norm_is_what_it_says(tmp_path):
    """The paper's equations, written out: LayerNorm(x + f(x)) after each of two branches."""
    config = configured(tmp_path, model__layers=1)
    model = models.build(config, SIZE, LENGTH, Head(0, pooled=False))
    params = drawn(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SIZE, (2, 9)), jnp.int32)
    types = (jnp.arange(9) > 4).astype(jnp.int32)[None].repeat(2, 0)
    got = model.apply({"params": params}, tokens, whole(2, 9), types_BT=types)[0]

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    p = jax.tree.map(np.asarray, params)
    x = p["embedding"][tokens] + p["positions"][:9] + p["types"][types]
    x, layer = norm(x, p["embedding_norm"]), p["layer_0"]
    q, k, v = (
        np.einsum("btd,dhk->bhtk", x, layer["mixer"][n]["weight"]) + layer["mixer"][n]["bias"][:, None]
        for n in ("query", "key", "value")
    )
    weights = np.asarray(jax.nn.softmax(np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(8), axis=-1))
    out = layer["mixer"]["out"]
    mixed = np.einsum("bhts,bhsk,hkd->btd", weights, v, out["weight"]) + out["bias"]
    x = norm(x + mixed, layer["mixer_norm"])
    h = x @ layer["mlp"]["up"]["weight"] + layer["mlp"]["up"]["bias"]
    h = h * np.asarray(jax.scipy.stats.norm.cdf(h))
    x = norm(x + h @ layer["mlp"]["down"]["weight"] + layer["mlp"]["down"]["bias"], layer["mlp_norm"])
    np.testing.assert_allclose(got, x, atol=2e-4)
    assert "norm" not in params


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_what_transformers_writes_is_read_and_back(tmp_path, kind):
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    settings = transformers.BertConfig(vocab_size=SIZE, max_position_embeddings=40, **sizes)
    theirs = getattr(transformers, kind)(settings).eval()
    for x in theirs.parameters():
        torch.nn.init.normal_(x, 1.0 if x.ndim == 1 else 0.0, 0.2)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in" / "tokenizer.json").write_text(pieces().state()["model"])
    found = interop.read(str(tmp_path / "in"), configured(tmp_path))
    model = models.build(found.config, SIZE, LENGTH, Head(0, pooled=False))
    tokens = [found.tokeniser.alone(TEXT, LENGTH)]
    types = [[int(place > 3) for place in range(len(tokens[0]))]]
    got = model.apply({"params": found.params}, jnp.asarray(tokens), whole(1, len(tokens[0])),
                      types_BT=jnp.asarray(types))[0]  # fmt: skip

    def hidden(bert_model):
        with torch.no_grad():
            return bert_model(torch.tensor(tokens), token_type_ids=torch.tensor(types))[0].numpy()

    want = hidden(theirs if kind == "BertModel" else theirs.bert)
    np.testing.assert_allclose(got, want, atol=1e-3)
    interop.write("huggingface", str(tmp_path / "out"), model, lambda: found.params, found.tokeniser)
    again = transformers.BertModel.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(hidden(again), want, atol=1e-3)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert text(TEXT.replace("[MASK]", ""), add_special_tokens=False)["input_ids"] == found.tokeniser.encode(
        TEXT.replace("[MASK]", "")
    )


def test_it_is_imported_evaluated_asked_and_made_small(tmp_path, capsys, corpus):
    _, _, params, tokeniser = written(tmp_path)
    said = imports.make(configured(tmp_path), tmp_path / "float", str(tmp_path / "out"))
    assert (
        f"{SIZE} tokens" in said and load_tokeniser(tmp_path / "float").fingerprint == tokeniser.fingerprint
    )
    small = {"compress__methods": ("quantise",), "compress__quantise__rules": ("embedding=int8",)}
    imports.make(configured(tmp_path, **small), tmp_path / "int8", str(tmp_path / "out"))
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < 0.5 * sizes[0]
    found, cosines = [], []
    for name in ("float", "int8"):
        config = modes.of_run(tmp_path / name, None, ())
        modes.evaluate(config, tmp_path / name, {})
        found.append(json.loads(capsys.readouterr().out))
        modes.generate(config, tmp_path / name, {"sentence": ["Do add.", "Do open.", "Walk!"]})
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and lines[0].endswith("  Do add.  |  Do open.")
        cosines.append([float(line.split()[0]) for line in lines])
    assert found[0]["mean_reciprocal_rank"] > 0.1 < found[0]["shared_words_mean_reciprocal_rank"]
    for key in ("cosine_of_pairs", "cosine_of_others", "mean_reciprocal_rank"):
        assert found[0][key] == pytest.approx(found[1][key], abs=0.1), key
    assert found[0]["cosine_of_pairs"] != found[1]["cosine_of_pairs"] and np.allclose(*cosines, atol=0.05)
    with pytest.raises(UserError, match="one is compared with nothing"):
        modes.generate(config, tmp_path / "int8", {"sentence": ["Alone."]})
    with pytest.raises(UserError, match="--sentence: one of 1002 tokens, but the model reads"):
        modes.generate(config, tmp_path / "int8", {"sentence": ["Do.", "! " * 1000]})


def test_what_is_refused(tmp_path, corpus):
    config, model, params, tokeniser = written(tmp_path)

    def refused(match, **settings):
        with pytest.raises(UserError, match=match) as error:
            imports.make(configured(tmp_path, **settings), tmp_path / "new", str(tmp_path / "out"))
        assert "\n" not in str(error.value)

    refused("reviews ends in a head", task__name="reviews", data__source="tfds:imdb_reviews")
    refused("the task text trains no encoder", task__name="text", data__source="python_docs")
    refused("data.length: 25 is not allowed; the model knows 24", data__length=25)
    with pytest.raises(UserError, match="gguf holds a decoder of text"):
        interop.write("gguf", str(tmp_path / "gguf"), model, lambda: params, tokeniser)
    with pytest.raises(UserError, match="config.model.norm_placement: pre, and a BERT has post"):
        bert.family_of(models.build(configured(tmp_path, model__norm_placement="pre"), SIZE, 8).config)
    with pytest.raises(UserError, match="the task qa needs the text back"):
        tasks.check_tokens(tasks.qa.QA(), tokeniser)
    path = tmp_path / "out" / "config.json"
    described = json.loads(path.read_text())
    for key, value, message in (
        ("hidden_act", "relu", "its hidden_act is 'relu'"),
        ("position_embedding_type", "relative_key", "its position_embedding_type is 'relative_key'"),
        ("is_decoder", True, "its is_decoder is True"),
    ):
        path.write_text(json.dumps(described | {key: value}))
        refused(message)


def test_ranks():
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]])
    found = similarity.ranked(scores)
    assert found["found_first"] == pytest.approx(1 / 3)
    assert found["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 1.5 + 1 / 3) / 3)


def test_the_loss_falls_where_pairs_are_alike():
    task = similarity.Similarity()
    vectors, ones = jnp.eye(3, 4), jnp.ones(3)
    alike, count = task._nats(vectors, vectors, ones)
    assert count == 3 and alike < 1e-3 < task._nats(vectors, jnp.roll(vectors, 1, axis=0), ones)[0]
    padded = task._nats(vectors, vectors, jnp.asarray([1.0, 1.0, 0.0]))
    assert padded[1] == 2 and padded[0] <= alike


def test_masked_words_of_an_imported_encoder(tmp_path, capsys):
    """Its embedding is the head, as in training from the start."""
    written(tmp_path)
    source = tiny_config(tmp_path).data.source
    config = configured(tmp_path, task__name="mlm", data__source=source)
    imports.make(config, tmp_path / "mlm", str(tmp_path / "out"))
    config = modes.of_run(tmp_path / "mlm", None, ())
    modes.evaluate(config, tmp_path / "mlm", {})
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    run = setup.build_run(config, tmp_path / "mlm")
    batch = next(run.data.heldout_batches(4))
    assert np.any(batch["tokens_BT"] == run.data.tokeniser.mark(0))
