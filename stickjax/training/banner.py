"""Make the lines that a training run prints before its first step: the banner."""

import math
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from pallas_kernels.dispatch import Choice
from stickjax.config import Config
from stickjax.data.batches import TrainingData
from stickjax.models.families import family_of
from stickjax.parallel.mesh import AXES


def banner(config: Config, data: TrainingData, mesh: Mesh | None = None) -> str:
    """Return the first lines that a training run prints: parameter counts, data, number of steps and devices.

    `data` is the training data that the run has loaded. `mesh` is the mesh of the run; None: the run uses one device.
    """
    m, d, family = config.model, config.data, family_of(config.model)
    (total, active), flops = family.parameter_counts(m), family.flops_per_token(m, d.T)
    parts = {axis: 1 for axis in AXES} if mesh is None else mesh.shape
    divided = ", ".join(f"{axis}={size}" for axis, size in parts.items() if size > 1)
    rows = [
        f"parameters {total:,} ({active:,} active per token, without the embedding), {flops:,.0f} FLOP per token",
        f"data {data.summary}",
        *([f"V={m.V}, more than the {data.ids['V']} ids of the text"] if m.V != data.ids["V"] else []),
        f"{config.train.steps} steps of B={d.B} x T={d.T} on {math.prod(parts.values())} x "
        f"{jax.devices()[0].device_kind}{f' ({divided})' if divided else ''}",
    ]
    return "\n".join(rows)


def kernels(choices: Iterable[Choice]) -> str:
    """Return the lines of the banner that say which kernels a training step uses.

    A line names an op, such as attention, the implementation that was chosen for the op, and the reason. `choices` are
    the choices of implementations that `dispatch.recorded` collected while JAX traced the step.
    """
    return "\n".join(map(str, choices)) or "the step has neither an attention kernel nor an expert kernel"
