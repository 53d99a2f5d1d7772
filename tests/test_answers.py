"""A classifier or a translation model answers new texts."""

import functools

import jax
import numpy as np
import pytest

from stickjax.config import Config, DataConfig, ModelConfig, OrderedMemoryConfig, SutConfig
from stickjax.config.latent_tree import TreeConfig
from stickjax.data.examples import examples_of, task_of
from stickjax.data.tasks import scan
from stickjax.evaluation import answers
from stickjax.evaluation.answers import induced_trees, predict
from stickjax.models.families import family_of
from stickjax.models.vocabulary_size import with_vocabulary

MODELS = {
    "logic": OrderedMemoryConfig(D=8, H=8, N=4),
    "listops": OrderedMemoryConfig(D=8, H=8, N=4, sentences=1),
    "scan": TreeConfig(H=8, N=2, depth=2),
}


@functools.cache
def made(source: str):
    split = "simple" if source == "scan" else None
    config = Config(
        MODELS[source], DataConfig(source=source, examples=300, T=4 if source == "scan" else 24, split=split)
    )
    config = with_vocabulary(config, task_of(config).ids)
    return jax.jit(functools.partial(family_of(config.model).init, config.model))(jax.random.key(0)), config


@pytest.mark.parametrize("source", MODELS)
def test_the_answers_are_those_of_the_batches_of_the_task(source, monkeypatch):
    """The answer for the text of a test example equals the prediction for the arrays of this example.

    The answer does not depend on the order of the texts or on their padding.
    """
    model, config = made(source)
    task, examples = task_of(config), examples_of(config, "test", T=None)
    rows = np.random.default_rng(1).permutation(len(examples))[:5]
    names, one = task.inputs, jax.jit(family_of(config.model).predict)
    right, trees, texts = [], [], []
    for i in rows:
        batch = {name: array[None] for name, array in examples[i].items() if name not in ("target", "label")}
        answer = np.asarray(one(model, batch))[0]
        right.append(task.decode["target"](answer) if source == "scan" else task.labels[answer])
        found = [own[0] for own in family_of(config.model).induced_trees(model, batch).values()]
        trees.append(tuple(found) if len(names) == 2 else found[0])
        text = tuple(task.decode[name](examples[i][name]) for name in names)
        texts.append(text if len(names) == 2 else text[0])
    assert predict(model, config, texts) == right
    assert induced_trees(model, config, texts) == trees
    monkeypatch.setattr(answers, "B", 5)
    assert predict(model, config, texts * 2 + texts[:2]) == right * 2 + right[:2]  # several batches
    assert predict(model, config, []) == []


def test_a_text_gets_the_brackets_of_its_grammar():
    """With encoder="tree", the answer for a text equals the prediction for its words and their brackets."""
    _, config = made("scan")
    config = config.replace({"model.encoder": "tree"})
    init = jax.jit(functools.partial(family_of(config.model).init, config.model))
    model, examples = init(jax.random.key(1)), examples_of(config, "test", T=None)
    batch = {name: np.stack([examples[i][name] for i in range(40, 44)]) for name in ("source", "brackets")}
    right = [scan.ACTIONS.decode(words) for words in np.asarray(jax.jit(family_of(config.model).predict)(model, batch))]
    assert predict(model, config, [examples.rows[i].command for i in range(40, 44)]) == right
    with pytest.raises(ValueError, match=r"texts\[0\]: the command is empty, or a word"):
        predict(model, config, ["jump and"])


@pytest.mark.parametrize(
    "source, texts, message",
    [
        ("logic", ["a"], r"texts\[0\] must be a tuple of two texts \(left, right\), not 'a'"),
        ("listops", ["1", ("1", "2")], r"texts\[1\] must be a string, not \('1', '2'\)"),
        ("listops", ["[MAX 1 2 ]", ""], r"texts\[1\] has no tokens: ''"),
        ("listops", ["[MAX 1 x ]"], r"texts\[0\]: 'x' is not one of the symbols 0 1 2"),
    ],
)  # fmt: skip
def test_a_wrong_text_is_named(source, texts, message):
    model, config = made(source)
    with pytest.raises(ValueError, match=message):
        predict(model, config, texts)


def test_models_that_cannot_answer():
    with pytest.raises(ValueError, match="reads text, not examples"):
        predict(None, Config(ModelConfig()), ["a"])
    config = Config(SutConfig(V=12, L=2, D=8, classes=7), DataConfig(source="logic", examples=100))
    with pytest.raises(ValueError, match="family='sut' induces no trees"):
        model = jax.eval_shape(functools.partial(family_of(config.model).init, config.model), jax.random.key(0))
        induced_trees(model, config, [("a", "b")])
