import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import InputError
from w2s_jax.models.load import load_classifier
from w2s_jax.models.reward import EncoderConfig, init_classifier
from w2s_jax.models.save import save_classifier

TINY = EncoderConfig(
    vocab_size=61, width=24, layers=2, heads=3, mlp_width=40, max_positions=20, labels=3, pad_id=1
)


@pytest.fixture(scope="module")
def classifier():
    """Every leaf drawn at random, so that a dropped bias or scale shows."""
    shapes = jax.eval_shape(partial(init_classifier, TINY), jax.random.key(0))
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


# A program: its operations one by one would each be compiled.
classify = jax.jit(lambda classifier, *batch: classifier(*batch))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (5, 11)).astype(np.int32)
    mask = np.arange(11) < np.array([11, 7, 1, 10, 3])[:, None]
    return jnp.asarray(tokens), jnp.asarray(mask)


def test_padding_is_not_seen(classifier, batch):
    tokens, mask = batch
    other = np.where(mask, tokens, 7)
    logits = classify(classifier, tokens, mask)
    np.testing.assert_allclose(logits, classify(classifier, other, mask), atol=1e-6)
    wider, wider_mask = (np.pad(x, ((0, 0), (0, 4))) for x in (tokens, mask))
    np.testing.assert_allclose(logits, classify(classifier, wider, wider_mask), atol=1e-5)


def test_saved_and_loaded_again_it_is_the_same(classifier, batch, tmp_path):
    save_classifier(classifier, tmp_path / "gold")
    loaded = load_classifier(tmp_path / "gold")
    assert (loaded.config.width, loaded.config.labels, loaded.config.pad_id) == (24, 3, 1)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, classifier.params)
    np.testing.assert_array_equal(classify(loaded, *batch), classify(classifier, *batch))


def test_bfloat16_is_kept_on_disk(classifier, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), classifier)
    save_classifier(half, tmp_path / "gold")
    assert json.loads((tmp_path / "gold" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_classifier(tmp_path / "gold", dtype="stored")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(loaded.params))
    wide = load_classifier(tmp_path / "gold", dtype=jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(wide.params))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "bert", "model_type 'bert' is not 'distilbert'"),
        ("activation", "relu", "activation 'relu' is not 'gelu'"),
        ("n_layers", 0, "config field n_layers is 0; it must be a positive whole number"),
        ("dropout", "a", "config field dropout is 'a'; it must be a number of at least 0"),
        ("id2label", ["a", "b"], "config field id2label is .*; it must be a mapping"),
        ("n_layers", 1, "no part of a DistilBert"),
        ("n_layers", 3, "layer.2.*is missing"),
        ("hidden_dim", 41, r"has shape .*, not .*41"),
    ],
)
def test_a_wrong_checkpoint_is_told_in_one_line(classifier, tmp_path, field, value, message):
    save_classifier(classifier, tmp_path / "gold")
    path = tmp_path / "gold" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=message):
        load_classifier(tmp_path / "gold")


@pytest.mark.parity
@pytest.mark.parametrize(("width", "heads", "mlp_width"), [(24, 3, 40), (32, 2, 64)])
def test_logits_equal_those_of_transformers(tmp_path, batch, width, heads, mlp_width):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=61, dim=width, n_layers=2, n_heads=heads, hidden_dim=mlp_width,
        max_position_embeddings=20, num_labels=3, initializer_range=0.3, pad_token_id=1,
    )  # fmt: skip
    theirs = transformers.DistilBertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_classifier(tmp_path / "theirs")
    tokens, mask = batch

    def reference(model):
        with torch.no_grad():
            ids, attention = (torch.tensor(np.asarray(x)).long() for x in (tokens, mask))
            return model(input_ids=ids, attention_mask=attention).logits.numpy()

    np.testing.assert_allclose(ours(tokens, mask), reference(theirs), atol=1e-4)
    save_classifier(ours, tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(reference(again.eval()), reference(theirs), atol=1e-5)
