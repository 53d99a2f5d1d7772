"""The latent-tree model: it computes the same numbers as the original code, and its parts have the right properties."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close
from flax import nnx
from jax.sharding import PartitionSpec

from stickjax import Config, DataConfig
from stickjax.config.latent_tree import TreeConfig
from stickjax.data.tasks.encoding import closing_brackets
from stickjax.evaluation.tree_plots import plot_derivation
from stickjax.evaluation.trees import bracketed, from_brackets, leaves
from stickjax.models.families import family_of
from stickjax.models.latent_tree import apply, decode, init, loss, sentence_log_likelihood
from stickjax.models.latent_tree.brackets import joins_of
from stickjax.models.latent_tree.chart import in_order
from stickjax.models.latent_tree.parts import dropped
from stickjax.models.latent_tree.trees import derivation_tree
from stickjax.models.latent_tree.viterbi import viterbi
from stickjax.models.layers import random_bytes
from stickjax.models.parameters import label, leaves_of, map_leaves, partition, shardings
from stickjax.parallel.mesh import AXES, shard_batch
from stickjax.training.gradients import mesh_gradients

HERE = Path(__file__).parent
run = jax.jit(apply)


def drawn(config, scale=0.3):
    """Return a model whose parameters are all random, also the ones that training starts at zero.

    NumPy draws them with standard deviation `scale`, so that nothing is compiled. Scales of norms have the mean 1.
    """
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(leaf.names[-1] == "scale", scale, leaf.value.shape), leaf.value.dtype)

    return map_leaves(draw, jax.eval_shape(partial(init, config), jax.random.key(0)))


def in_float64(config):
    """Set the computation and the parameters of a config to float64, which users cannot choose. Return the config."""
    for name in ("dtype", "param_dtype"):
        object.__setattr__(config, name, "float64")
    return config


@cache
def original(early_root):
    """Return (model with the weights of the original code, the stored arrays: weights, inputs and outputs).

    `early_root` is a field of TreeConfig.
    """
    with np.load(HERE / "oracles" / "latent_tree" / "scan_model.npz", allow_pickle=False) as arrays:
        a = dict(arrays)
    p = {key.removeprefix("param/"): a[key] for key in a if key.startswith("param/")}
    config = in_float64(TreeConfig(V=17, V_target=10, H=8, depth=4, early_root=early_root))
    model = jax.eval_shape(partial(init, config), jax.random.key(0))
    encoder, decoder, H = model.encoder, model.decoder, 8
    rnn, om, expand = "encoder.rnn_encode.rnn.", "encoder.OM_forward.", "decoder.expand."
    both = lambda name: np.stack([p[rnn + name], p[rnn + name + "_reverse"]])  # noqa: E731
    linear = lambda module, weight, bias, name: {  # noqa: E731
        (module, weight): p[name + ".weight"].T, (module, bias): p[name + ".bias"]
    }  # fmt: skip
    norm = lambda module, name: {(module, "scale"): p[name + ".weight"], (module, "bias"): p[name + ".bias"]}  # noqa: E731
    cell, cell_bias = p[om + "cell.input_t.4.weight"].T, p[om + "cell.input_t.4.bias"]

    def gates(x):
        """Return the outputs of the cell as [.., 4, H]: three gates and a vector."""
        of_gates, vector = x[..., : 3 * H].reshape(-1, H, 3), x[..., 3 * H :].reshape(-1, 1, H)
        return np.concatenate([of_gates.swapaxes(1, 2), vector], 1)

    distribution, attention = encoder.memory.distribution, decoder.attention
    weights = {
        (encoder, "embed"): p["encoder.embedding.weight"][:, :H],
        (encoder, "values"): p["encoder.embedding.weight"][:, H:],
        (encoder.gru, "input"): both("weight_ih_l0").swapaxes(1, 2),
        (encoder.gru, "input_bias"): both("bias_ih_l0"),
        (encoder.gru, "recurrent"): both("weight_hh_l0").swapaxes(1, 2),
        (encoder.gru, "recurrent_bias"): both("bias_hh_l0"),
        **linear(encoder.memory, "w_project", "project_bias", om + "input_projection.0"),
        **linear(encoder.memory, "w_in", "in_bias", om + "cell.input_t.1"),
        (encoder.memory, "w_out"): gates(cell),
        (encoder.memory, "out_bias"): gates(cell_bias)[0],
        **norm(encoder.memory.norm, om + "activation.0"),
        **linear(distribution, "query", "query_bias", om + "distribution.query.1"),
        **norm(distribution.query_norm, om + "distribution.query.2"),
        **linear(distribution, "key", "key_bias", om + "distribution.key.1"),
        **norm(distribution.key_norm, om + "distribution.key.2"),
        **linear(distribution, "weight", "bias", om + "distribution.beta.2"),
        **linear(decoder, "root", "root_bias", expand + "in_transform.0"),
        **linear(decoder, "w_in", "in_bias", expand + "cell.output_t.0"),
        **linear(decoder, "w_out", "out_bias", expand + "cell.output_t.3"),
        **linear(decoder, "leaf", "leaf_bias", expand + "leaf_transform.1"),
        (decoder, "unembed"): p[expand + "_output_transform.weight"],
        **norm(decoder.norm, "decoder.activation.0"),
        **linear(attention, "query", "query_bias", expand + "attn.query_t.1"),
        **norm(attention.query_norm, expand + "attn.query_t.2"),  # the original divides by sqrt(H) in float32
        **linear(attention, "key", "key_bias", expand + "attn.key_t.1"),
        **norm(attention.key_norm, expand + "attn.key_t.2"),
    }
    assert len(weights) == len(list(leaves_of(model)))
    for (module, leaf), value in weights.items():
        assert getattr(module, leaf).shape == value.shape, leaf
        rounded = H**0.5 / p[expand + "attn.factor"] if module is attention.query_norm else 1
        setattr(module, leaf, nnx.Param(jnp.asarray(value * rounded)))
    return model, a


def test_the_numbers_of_the_original(x64):
    """In float64, the scores of nodes and sentences equal the stored scores of the original code.

    The original code takes the root vector at the second-to-last word, so early_root is True. The original code scored
    the sentences one by one. Here the sentences are one batch, because padding has no effect.
    """
    model, a = original(early_root=True)
    source, target = (
        jnp.stack([jnp.pad(ids, (0, max(map(len, texts)) - len(ids))) for ids in texts])
        for texts in ([jnp.asarray(a[f"{name}/{i}"]) for i in range(5)] for name in ("source", "target"))
    )
    logits = run(model, {"source": source}).logits
    values = sentence_log_likelihood(logits, target)
    for i in range(5):
        assert_close(logits[i, in_order(4)], a[f"node_word_log_prob/{i}"], 1e-10)
        np.testing.assert_allclose(values[i], a[f"log_likelihood/{i}"], rtol=1e-10)
    np.testing.assert_array_equal(a["param/decoder.order"], in_order(4))
    right, _ = original(early_root=False)
    early, late = (jax.jit(lambda m: m.encoder({"source": source}).root)(m) for m in (model, right))
    assert np.abs(early - late).max(1).min() > 0.01


# A level of the tree takes XLA three seconds, so the trees are shallow: the numbers of the original are at depth 4.
SIZES = dict(V=9, V_target=6, H=16, N=2, depth=2, attention_dropout=0.1)
ENCODERS = ("ordered_memory", "tree", "gru")


def sentences(B=4, S=6, T=4, seed=0):
    """Return a random batch with the arrays `source`, `brackets` and `target`.

    The first source has S words, and the first target T words. The last source and target have one word.
    """
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((B, size), np.int32) for name, size in (("source", S), ("target", T), ("brackets", S))}
    for b in range(B):
        s, t = (size if b == 0 else 1 if b == B - 1 else int(rng.integers(2, size)) for size in (S, T))
        batch["source"][b, :s] = rng.integers(1, 9, s)
        batch["target"][b, :t] = rng.integers(1, 6, t)
        open_parts = 0
        for i in range(s):
            open_parts += 1
            closed = open_parts - 1 if i == s - 1 else int(rng.integers(0, open_parts))
            batch["brackets"][b, i] = closed
            open_parts -= closed
    return {name: jnp.asarray(x) for name, x in batch.items()}


# Most tests are in float64 and have batches of the same shapes, so that they share compiled functions.


def exact(encoder="ordered_memory"):
    """Return a random model in float64."""
    return drawn(in_float64(TreeConfig(**SIZES, encoder=encoder)))


@jax.jit
def values_of(model, batch):
    logits = apply(model, batch).logits
    return logits, sentence_log_likelihood(logits, batch["target"])


def mean_of(model, batch):
    return jax.grad(lambda m: loss(m, batch, None), has_aux=True)(model)


mean_gradients = jax.jit(mean_of)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_sentence_does_not_depend_on_its_batch(encoder, x64):
    """Other sentences and padding change neither the score of a sentence nor the scores of its nodes."""
    model, batch = exact(encoder), sentences()
    logits, values = values_of(model, batch)
    others = values_of(model, {name: x.at[0].set(jnp.roll(x[0], 1)) for name, x in batch.items()})
    for before, after in zip((logits, values), others, strict=True):
        np.testing.assert_array_equal(before[1:], after[1:])
    s, t = ((batch[name][1] != 0).sum() for name in ("source", "target"))
    alone = {name: x[1:2, : t if name == "target" else s] for name, x in batch.items()}
    assert s < 6 and t < 4
    own_logits, own = values_of(model, alone)
    assert_close(own_logits[0], logits[1], 1e-12)
    np.testing.assert_allclose(own[0], values[1], rtol=1e-12)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_are_those_of_finite_differences(encoder, x64):
    """The gradient of each array of parameters agrees with finite differences.

    Each array also has a muP label and a partition. No array has the gradient 0, except a bias that is added to all
    scores of a softmax. The embedding of padding has the gradient 0.
    """
    model, batch, rng, step = exact(encoder), sentences(), np.random.default_rng(1), 1e-5
    gradient, metrics = mean_gradients(model, batch)
    value = lambda m: -(np.asarray(values_of(m, batch)[1]) / (batch["target"] != 0).sum(1)).mean()  # noqa: E731
    np.testing.assert_allclose(value(model), metrics["loss"], rtol=1e-12)
    leaves, structure = jax.tree.flatten(model)
    for i, (leaf, found) in enumerate(zip(leaves_of(model), jax.tree.leaves(gradient), strict=True)):
        direction = rng.normal(size=leaf.value.shape)
        moved = [
            value(structure.unflatten([*leaves[:i], np.asarray(leaf.value) + s * direction, *leaves[i + 1 :]]))
            for s in (step, -step)
        ]
        expected = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(np.vdot(found, direction), expected, rtol=1e-6, atol=1e-9, err_msg=leaf.name)
        assert np.abs(found).max() > 1e-7 or leaf.name == "encoder.memory.distribution.bias", leaf.name
        assert label(leaf) in ("matrix", "vector", "embedding") and partition(leaf) == PartitionSpec()
    assert not gradient.encoder.embed[0].any()


def test_dropout_follows_the_key():
    model, batch = drawn(TreeConfig(**SIZES, encoder="gru")), sentences()
    one, same, other = (run(model, batch, jax.random.key(i)).logits for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert jnp.isfinite(one).all() and jnp.abs(one - other).max((1, 2)).min() > 0.01


def test_the_nodes_share_one_formula(x64):
    """The scores of every node equal the formulas in the docstrings of the model, computed for one node at a time."""
    model, batch = exact(), sentences()
    e, d = jax.jit(lambda m: m.encoder(batch))(model), model.decoder
    logits, _ = values_of(model, batch)

    def norm(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5)

    def act(x):
        return np.tanh(norm(x) * d.norm.scale[...] + d.norm.bias[...])

    def attend(x, keys, values, mask):
        a = d.attention
        q = norm(x @ a.query[...] + a.query_bias[...]) * a.query_norm.scale[...] + a.query_norm.bias[...]
        k = [norm(y @ a.key[...] + a.key_bias[...]) * a.key_norm.scale[...] + a.key_norm.bias[...] for y in keys[mask]]
        s = np.array([q @ one for one in k]) / np.sqrt(16)
        gate = 1 / (1 + np.exp(-(np.log(np.exp(s).sum()) - 2 * s.max() + np.log(1000))))
        return np.exp(s) / np.exp(s).sum() * gate @ values[mask]

    def log_softmax(x):
        return x - np.log(np.exp(x).sum())

    table = np.stack([np.tanh(norm(row)) for row in np.asarray(d.unembed[...])])
    for b in (0, 1):
        bank = np.asarray(e.bank[b]), np.asarray(e.bank[b]), np.asarray(e.bank_mask[b])
        words = (
            np.asarray(e.keys[b]),
            np.stack([np.tanh(norm(v)) for v in np.asarray(e.values[b])]),
            np.asarray(e.mask[b]),
        )

        def visit(node, x, context, shared, b=b, bank=bank, words=words):
            leaf = log_softmax(np.concatenate([x, context]) @ d.leaf[...] + d.leaf_bias[...]) + shared
            expected = log_softmax(table @ attend(x, *words)) + leaf[0]
            np.testing.assert_allclose(logits[b, node], expected, rtol=1e-9)
            if node < 3:
                hidden = np.maximum(np.concatenate([x, context]) @ d.w_in[...] + d.in_bias[...], 0)
                out = (hidden @ d.w_out[...] + d.out_bias[...]).reshape(4, 16)
                for j in (0, 1):
                    gate = 1 / (1 + np.exp(-out[j]))
                    child = gate * act(out[2 + j]) + (1 - gate) * x
                    visit(2 * node + 1 + j, child, attend(child, *bank), leaf[1] / 2)

        root = np.asarray(e.root[b])
        visit(0, act(root @ d.root[...] + d.root_bias[...]), root, 0.0)


def test_the_tree_of_an_encoder_with_brackets():
    """The joins that `joins_of` computes from the closing brackets of a text build the tree of the text.

    A join makes one subtree of two subtrees.
    """
    for text in ("a", "(a b)", "((a b) (c d))", "(a (b (c d)))", "(((a b) c) (d e))"):
        spaced = text.replace("(", "( ").replace(")", " )")
        tree, words = from_brackets(spaced.split())
        n, S = len(words), 6
        padded = jnp.zeros((1, S), int).at[0, :n].set(closing_brackets(spaced)).at[0, n:].set(3)
        pairs, is_join = joins_of(padded, jnp.arange(S)[None] < n)
        parts = dict(enumerate(range(n)))
        for k, (left, right) in enumerate(pairs[0].tolist()):
            if is_join[0, k]:
                parts[S + k] = (parts.pop(left), parts.pop(right))
        assert list(parts.values()) == [tree] and bracketed(tree, words) == text
    with pytest.raises(ValueError, match="needs the array 'brackets'"):
        apply(drawn(TreeConfig(**SIZES, encoder="tree")), {"source": jnp.ones((1, 2), int)})


def is_binary(tree) -> bool:
    return isinstance(tree, int) or (len(tree) == 2 and all(map(is_binary, tree)))


def test_the_trees_of_a_batch(x64):
    """The leaves of a derivation tree are its words. The leaves of an induced tree are the words of its source."""
    model, batch = exact(), sentences()
    found, family = decode(model, batch), family_of(model.config)
    np.testing.assert_array_equal(family.predict(model, batch), found.words)
    for nodes, length in zip(found.nodes, found.lengths.tolist(), strict=True):
        tree = derivation_tree(nodes.tolist())
        assert leaves(tree) == list(range(length)) and is_binary(tree)
    induced = family.induced_trees(model, batch)["source"]
    assert [leaves(tree) for tree in induced] == [list(range(n)) for n in (batch["source"] != 0).sum(1).tolist()]
    assert all(map(is_binary, induced))
    assert family.induced_trees(exact("gru"), batch) is None


def test_the_probability_of_the_best_tree_is_below_that_of_its_sentence(x64):
    model, batch = exact(), sentences()
    found = decode(model, batch)
    assert found.words.shape == (4, 4)
    values = sentence_log_likelihood(values_of(model, batch)[0], found.words)
    assert (found.scores <= values + 1e-12).all()
    assert (found.lengths > 0).all() and ((found.words != 0).sum(1) == found.lengths).all()


def test_a_target_that_does_not_fit():
    model, batch = drawn(TreeConfig(**SIZES)), sentences(T=5)
    message = "a target of T=5 words does not fit in a tree of depth=2, which has at most 2\\^2=4 leaves; "
    message += "raise model.depth, or lower data.T"
    with pytest.raises(ValueError, match=message):
        loss(model, batch, None)
    with pytest.raises(ValueError, match=message):
        TreeConfig(**SIZES).check_mesh({"data": 1}, 5)
    with pytest.raises(ValueError, match="data parallelism only"):
        TreeConfig(**SIZES).check_mesh({"data": 1, "tensor": 2}, 4)
    with pytest.raises(ValueError, match="H=7 must be even"):
        TreeConfig(H=7)


def test_sentences_without_words_do_not_count(x64):
    """Sentences without target words, or without any words, change no loss and make no gradient infinite."""
    model, batch = exact(), sentences()
    batch = {name: x.at[3].set(0) for name, x in batch.items()} | {"target": batch["target"].at[2:].set(0)}
    gradient, metrics = mean_gradients(model, batch)
    values = values_of(model, batch)[1][:2] / (batch["target"][:2] != 0).sum(1)
    np.testing.assert_allclose(metrics["loss"], -values.mean(), rtol=1e-12)
    map_leaves(lambda leaf: np.testing.assert_(np.isfinite(leaf.value).all(), leaf.name), gradient)


def test_one_and_two_devices_have_the_same_loss_and_gradients(x64):
    model, batch = exact("gru"), sentences()
    batch["target"] = batch["target"].at[3].set(0)  # the devices have different numbers of sentences
    expected, metrics = mean_gradients(model, batch)
    mesh = jax.make_mesh((2, 1, 1, 1, 1), AXES, devices=jax.devices()[:2])
    placed = jax.device_put(model, shardings(mesh, model))
    step = jax.jit(mesh_gradients(mesh, lambda model, batch, key: mean_of(model, batch)))
    found, found_metrics = step(placed, shard_batch(mesh, batch), jax.random.key(0))
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-12, err_msg=name)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), found, expected)


def test_dropout_keeps_the_mean():
    x, key = jnp.ones((200, 499)), jax.random.key(0)
    for rate in (0.1, 0.6):
        y = dropped(x, rate, random_bytes(key, *x.shape))
        np.testing.assert_allclose((y == 0).mean(), round(256 * rate) / 256, atol=5e-3)
        np.testing.assert_allclose(y.mean(), 1, atol=1e-2)
    assert dropped(x, 0.1, None) is x


def test_a_few_sentences_are_learnt(x64):
    """After 100 training steps on four pairs, the model decodes the pairs exactly, in float32 and in bfloat16."""
    model, batch, optimizer = exact(), sentences(), optax.adam(2e-2)

    @jax.jit
    def learn(model, state, gradients):
        updates, state = optimizer.update(gradients, state, model)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(gradients)])
        return optax.apply_updates(model, updates), state, finite.all()

    state, history = optimizer.init(model), []
    for _ in range(100):
        gradients, metrics = mean_gradients(model, batch)
        model, state, finite = learn(model, state, gradients)
        history.append(float(metrics["loss"]))
        assert finite
    assert history[-1] < 0.3 < 1 < history[0]
    model = jax.tree.map(lambda x: np.asarray(x, np.float32), model)
    for dtype in ("float32", "bfloat16"):
        for part in (m for _, m in nnx.iter_modules(model) if hasattr(m, "config")):
            part.config = TreeConfig(**SIZES, dtype=dtype)
        logits = run(model, batch).logits
        assert logits.dtype == jnp.float32, dtype
        words = viterbi(logits, limit=4).words
        np.testing.assert_array_equal(words, batch["target"], err_msg=dtype)


def test_the_size_of_the_original():
    config = TreeConfig(V=17, V_target=10)
    family = family_of(config)
    assert family.parameter_counts(config) == (772_995, 772_995 - 2 * 17 * 128)
    batch = family.example_batch(Config(config, DataConfig(T=48, B=4)))
    assert {name: x.shape for name, x in batch.items()} == {"source": (4, 48), "target": (4, 48)}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_counted_operations(encoder):
    """`flops_per_token` differs by at most 10% from 3 times the operations of a forward pass per token.

    `flops` counts the operations of the forward pass.
    """
    config = TreeConfig(V=9, V_target=6, H=64, N=3, depth=5, encoder=encoder)
    T, B = 8, 2
    batch = {name: jnp.ones((B, T), int) for name in ("source", "target", "brackets")}
    model = jax.eval_shape(partial(init, config), jax.random.key(0))
    counted = flops(jax.make_jaxpr(lambda m: apply(m, batch).logits)(model).jaxpr)
    np.testing.assert_allclose(family_of(config).flops_per_token(config, T) * T * B / 3, counted, rtol=0.1)


def flops(jaxpr) -> float:
    """Return the number of operations of all matrix products in a jaxpr. A product in a scan counts once per step."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
            total += 2 * np.prod(eqn.outvars[0].aval.shape) * size
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += eqn.params.get("length", 1) * flops(inner)
    return total


def test_the_picture_of_a_tree(tmp_path):
    attention = np.random.default_rng(0).dirichlet(np.ones(3), 31)
    for more in ({}, dict(source=["walk", "_left$", "twice"], attention=attention)):
        plot_derivation([7, 8, 4, 2], ["a", "$b", "_c", "d$"], tmp_path / "tree.png", **more)
        assert (tmp_path / "tree.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="there are 2 leaves but 1 words"):
        plot_derivation([1, 2], ["a"], tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
