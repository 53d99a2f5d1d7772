"""The compiled evaluation of a language model: the loss of the targets in windows of text."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from stickjax.models.families import family_of
from stickjax.models.parameters import specs
from stickjax.parallel.collectives import psum_over_batch, sums_of_all_rows
from stickjax.parallel.mesh import batch_spec, mesh_of, row_parts, rows_of_process, shard_batch


def total_sums(model: nnx.Module, windows: np.ndarray, target_mask: np.ndarray, B: int) -> dict[str, float]:
    """Predict each token of n texts from the previous tokens, and return sums over all texts.

    If the model is sharded on a mesh, all its devices compute each batch together. Every process must make the same
    call.

    Args:
      model: the module with the parameters.
      windows: token ids [n,T+1]. In each row, the first T tokens are inputs, and the last T tokens are targets.
      target_mask: [n,T], True for the targets that count, and False for padding.
      B: the number of texts in one call of the model. A mesh divides these texts into parts, so B is rounded up until
        all parts have the same size.

    Returns:
      The dictionary that `target_sums` returns for a batch, with every value summed over all batches.

    >>> from stickjax.config import ModelConfig
    >>> from stickjax.models.transformer import init
    >>> model = init(ModelConfig(V=16, D=8, L=1, N=2, K=1, H=4, F=16), jax.random.key(0))
    >>> windows = np.ones((3, 5), np.int32)
    >>> total_sums(model, windows, np.zeros((3, 4), bool), B=2)  # no target counts
    {'nll': 0.0}
    """
    mesh = mesh_of(model)
    batches = _batches(mesh, windows, target_mask, B)
    parts = [jax.device_get(target_sums(model, batch, mesh)) for batch in batches]
    return {name: sum(float(part[name]) for part in parts) for name in parts[0]}


def row_scores(
    model: nnx.Module, windows: np.ndarray, target_mask: np.ndarray, B: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predict each token of n texts from the previous tokens, and return the scores of every text.

    The arguments are the same as in `total_sums`.

    Returns:
      nll: [n], the sum of the negative log-likelihoods of the text's targets that count, in nats.
      greedy: [n], True if each of these targets is the most likely token.

    >>> from stickjax.config import ModelConfig
    >>> from stickjax.models.transformer import init
    >>> model = init(ModelConfig(V=16, D=8, L=1, N=2, K=1, H=4, F=16), jax.random.key(0))
    >>> nll, greedy = row_scores(model, np.ones((3, 5), np.int32), np.zeros((3, 4), bool), B=2)  # no target counts
    >>> nll.tolist(), greedy.tolist()
    ([0.0, 0.0, 0.0], [True, True, True])
    """
    mesh = mesh_of(model)
    batches = _batches(mesh, windows, target_mask, B)
    parts = [jax.device_get(_row_scores(model, batch, mesh)) for batch in batches]
    nll, misses = (np.concatenate(rows)[: len(windows)] for rows in zip(*parts, strict=True))
    return nll, misses == 0


def _batches(mesh: Mesh | None, windows: np.ndarray, target_mask: np.ndarray, B: int) -> Iterator[dict]:
    """Divide the n texts of `total_sums` into batches of B texts, and shard every batch over the mesh.

    Padding fills up the last batch, and `mask` is False there. B is rounded up as in `total_sums`.
    """
    rows = row_parts(mesh)
    pieces = 1 if mesh is None or mesh.shape["context"] == 1 else 2 * mesh.shape["context"]
    B = -(-B // rows) * rows
    padding = ((0, -len(windows) % B), (0, -target_mask.shape[1] % pieces))
    windows, target_mask = np.pad(windows, padding), np.pad(target_mask, padding)
    index, count = rows_of_process(mesh)
    for start in range(0, len(windows), B):
        own = slice(start + index * B // count, start + (index + 1) * B // count)
        batch = {"tokens": windows[own, :-1], "targets": windows[own, 1:], "mask": target_mask[own]}
        yield shard_batch(mesh, batch)


@functools.partial(jax.jit, static_argnames="mesh")
def target_sums(model: nnx.Module, batch: dict[str, jax.Array], mesh: Mesh | None = None) -> dict[str, jax.Array]:
    """Predict each target of a batch of texts, and return sums over the batch.

    Args:
      model: the module with the parameters, sharded on `mesh`.
      batch: the arrays [B,T] `tokens` (token ids), `targets` (for each token, the next one) and `mask` (True for the
        targets that count), sharded by `shard_batch`.
      mesh: the mesh; None: a single device.

    Returns:
      {"nll": the sum of the negative log-likelihoods of the targets, in nats}. For a model that halts tokens, such
      as a Universal Transformer, also "depth": the sum of the depths of the input tokens whose targets count. The depth
      of a token is the expected number of blocks that are applied to it, given its halting probabilities.
    """

    def sums(model, batch):
        scores, output = family_of(model.config).score(model, {name: batch[name] for name in ("tokens", "targets")})
        by_token = {"nll": scores.nll}
        if (depth := getattr(output, "depth", None)) is not None:
            by_token["depth"] = depth
        return psum_over_batch({name: jnp.where(batch["mask"], x, 0).sum() for name, x in by_token.items()})

    if mesh is None:
        return sums(model, batch)
    inputs = specs(model), jax.tree.map(batch_spec, batch)
    return jax.shard_map(sums, mesh=mesh, in_specs=inputs, out_specs=PartitionSpec(), check_vma=False)(model, batch)


@functools.partial(jax.jit, static_argnames="mesh")
def _row_scores(
    model: nnx.Module, batch: dict[str, jax.Array], mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Predict each target of a batch of B texts. Return (nll [B], misses [B]). The arguments are as in `target_sums`.

    `nll`: for each text, the sum of the negative log-likelihoods of its targets that count, in nats. `misses`: how many
    of these targets are not the most likely token. Every device gets the numbers of all texts.
    """

    def sums(model, batch):
        scores, _ = family_of(model.config).score(model, {name: batch[name] for name in ("tokens", "targets")})
        by_token = scores.nll, (~scores.is_most_likely).astype(jnp.int32)
        return tuple(sums_of_all_rows(jnp.where(batch["mask"], x, 0)) for x in by_token)

    if mesh is None:
        return sums(model, batch)
    inputs = specs(model), jax.tree.map(batch_spec, batch)
    return jax.shard_map(sums, mesh=mesh, in_specs=inputs, out_specs=PartitionSpec(), check_vma=False)(model, batch)
