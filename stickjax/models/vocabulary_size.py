"""The vocabulary size V of a model. If the config does not set V, it follows from the tokenizer."""

from stickjax.config import Config
from stickjax.data.readers import READERS
from stickjax.parallel.mesh import mesh_sizes


def with_vocabulary(config: Config, ids: int | None = None, devices=None) -> Config:
    """Return the config with the vocabulary size `model.V` set.

    If V is None, it becomes the number of ids, rounded up to a multiple of the size of the mesh axis "tensor".

    Args:
      config: the config of the experiment.
      ids: the number of token ids. None: if V is None, read the tokenizer and use its number of ids.
      devices: the devices of the mesh, which matter if the size of an axis is -1; None: all devices.

    Raises:
      ValueError: the tokenizer cannot be read, or V is smaller than the number of ids.

    >>> with_vocabulary(Config()).model.V, with_vocabulary(Config().replace({"model.V": 512})).model.V
    (257, 512)
    """
    V, reader = config.model.V, READERS[config.model.reads]
    if ids is None:
        if V is not None:
            return config
        ids = reader.ids(config)
    if V is None:
        tensor = mesh_sizes(config, devices)["tensor"]
        return config.replace({"model.V": -(-ids // tensor) * tensor})
    if V < ids:
        raise ValueError(
            f"V={V} is smaller than the {ids} ids of {reader.source(config)}; set V to at least {ids}, or leave it out"
        )
    return config
