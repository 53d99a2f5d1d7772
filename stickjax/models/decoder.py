"""The family of decoders: language models whose layers do not share parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from stickjax.config import ModelConfig
from stickjax.models import transformer
from stickjax.models.family import Family
from stickjax.models.parameters import leaves_of, parameter
from stickjax.models.router import ROUTER_LOSSES, updated_router_bias
from stickjax.models.transformer import Transformer
from stickjax.parallel.collectives import psum_over_batch
from stickjax.parallel.mesh import ROW_AXES

# The routers of a block, {prefix of the metric names: (module of `Block` with the router, config field of its experts)}
ROUTERS = {"": ("ffn", "experts"), "attention_": ("attention", "attention_experts")}


class Decoder(Family):
    """The methods of `Family` for decoders. The model itself is in `stickjax.models.transformer`."""

    config = ModelConfig

    def init(self, config: ModelConfig, key) -> Transformer:
        return transformer.init(config, key)

    def apply(self, model: Transformer, batch, key=None):
        return transformer.apply(model, batch, key)

    def score(self, model: Transformer, batch, key=None):
        output = model(batch["tokens"], batch.get("segment_ids"), key=key, targets=batch["targets"])
        return output.scores, output

    def loss(self, model: Transformer, batch, key):
        """Return the loss of a batch, and its metrics.

        The loss is the mean cross-entropy over the targets for which `loss_mask` is True, plus the weighted losses of
        the routers of all layers. With a `logits_z_weight` in the config, it also has this weight times the z-loss of
        the logits: the mean of log(sum_v exp(logits_v))^2 over the same targets. `batch` has `tokens`, `targets` and
        `loss_mask`, [B,T] each, and `segment_ids` [B,T] if a sequence contains several documents. `key` is a random key
        for a training step, or None for inference.

        The metrics are `loss` (the cross-entropy alone), `logits_z` (the z-loss of the logits, if it has a weight),
        every router loss as a mean over the layers, and `load`. The value of `load` is {kind of router: array [L,E]}.
        The array has the share of the (token, choice) pairs that chose each expert. The kind is "" for the routers of
        the feed-forward networks, and "attention_" for the routers of attention. The name of a router loss in the
        metrics begins with the kind.
        """
        scores, output = self.score(model, batch, key)
        mask = batch["loss_mask"].astype(jnp.float32)
        scale = batch.get("loss_scale", 1 / jnp.maximum(psum_over_batch(mask.sum()), 1))
        loss, share = psum_over_batch((scores.nll * mask).sum()) * scale, batch.get("share", 1.0)
        metrics, load = {"loss": loss}, {}
        if weight := model.config.logits_z_weight:
            metrics["logits_z"] = psum_over_batch((scores.log_z**2 * mask).sum()) * scale
            loss += weight * metrics["logits_z"]
        for (kind, (_, field)), stats in zip(ROUTERS.items(), (output.router, output.attention_router), strict=True):
            if stats is not None:
                mixture = getattr(model.config, field)
                losses = {name: getattr(stats, name) * share for name in ROUTER_LOSSES}
                loss += sum(getattr(mixture, ROUTER_LOSSES[name]) * value.sum() for name, value in losses.items())
                metrics |= {f"{kind}{name}": value.mean() for name, value in losses.items()}
                load[kind] = stats.load * share
        return loss, metrics | ({"load": load} if load else {})

    def scalars(self, model: Transformer, metrics):
        """Convert the metrics to scalars: replace `load`, the loads of all experts, by `load_max`.

        The load of an expert is its share of the (token, choice) pairs. `load_max` is the largest load of any expert in
        any layer, times the number of experts of the layer. It is 1 if all loads are equal. For the experts of
        attention, this scalar is called `attention_load_max`.
        """
        load = metrics.get("load", {})
        scalars = {name: value for name, value in metrics.items() if name != "load"}
        return scalars | {f"{kind}load_max": (x * _experts(model, kind, x)).max() for kind, x in load.items()}

    def gradient_free_update(self, model: Transformer, metrics, trainable: Callable[[str], bool]):
        """Update the selection biases of the routers, so that the loads of the experts become more equal.

        Return the model with the new biases. A router has a selection bias if the config of its experts has a
        `bias_rate` above 0. `metrics["load"]` has the loads of this step. A bias with the parameter name `name` changes
        only if `trainable(name)` is True.
        """
        if not any(mixture.bias_rate for mixture in model.config.mixtures().values()):
            return model
        model = jax.tree.map(lambda x: x, model)  # a copy: modules are changed by assignment
        for kind, load in metrics.get("load", {}).items():
            part, field = ROUTERS[kind]
            rate = getattr(model.config, field).bias_rate
            if rate and trainable(f"blocks.{part}.router.selection_bias"):
                router, experts = getattr(model.blocks, part).router, _experts(model, kind, load)
                bias = updated_router_bias(router.selection_bias[...], load, rate, experts)
                router.selection_bias = nnx.Param(bias)
        return model

    def parameter_counts(self, config: ModelConfig) -> tuple[int, int]:
        """Return (the number of all parameters, the number of active parameters).

        Active parameters are the parameters that one token uses: only k of the E experts count. The input embedding
        does not count.
        """
        shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
        total, idle = sum(x.size for x in jax.tree.leaves(shapes)), shapes.embed.size
        for part, k in (("ffn", config.experts.k), ("attention", config.N // config.K)):
            mixture = getattr(shapes.blocks, part)
            if (router := getattr(mixture, "router", None)) is not None:
                of_experts = [leaf for leaf in leaves_of(mixture) if parameter(leaf).axis("E") is not None]
                E = router.experts.count
                idle += sum(leaf.value.size for leaf in of_experts) * (E - k) // E
        return total, total - idle

    def flops_per_token(self, config: ModelConfig, T: int) -> float:
        """Return the number of floating-point operations of a training step per token, forward and backward together.

        T is the number of tokens of a sequence. Every active parameter takes 6 operations, and causal attention takes
        6 N H T operations per layer. The output matrix counts, even if it is the same matrix as the embedding.
        Operations that rematerialisation repeats count only once.
        """
        _, active = self.parameter_counts(config)
        if config.tied:
            active += config.vocabulary * config.D  # the embedding is also the output matrix
        return 6 * active + 6 * config.L * config.N * config.H * T

    def empty_cache(self, config: ModelConfig, batch: int, size: int):
        return transformer.empty_cache(config, batch, size)

    def cache_specs(self, cache: transformer.Cache) -> transformer.Cache:
        heads = PartitionSpec(None, ROW_AXES, None, "tensor")
        values = None if cache.value is None else heads
        return transformer.Cache(heads, values, PartitionSpec(ROW_AXES), PartitionSpec())

    def decode_step(self, model: Transformer, tokens, segment_ids, cache):
        return transformer.decode_step(model, tokens, segment_ids, cache)


def _experts(model: Transformer, kind: str, load: jax.Array) -> int | jax.Array:
    """Return the number of experts in each layer, without the pruned experts.

    `kind`: "" for the experts of the feed-forward networks, "attention_" for the experts of attention. `load`: the
    loads [L,E] of these experts. If the model is not pruned, the result is E. The layers of a pruned model may have
    different numbers of experts, so the result is then an array [L,1].
    """
    slot = getattr(model.blocks, ROUTERS[kind][0]).router.slot
    return load.shape[-1] if slot is None else (slot[...] >= 0).sum(-1, keepdims=True)
