"""The sizes of a model that follow from its data, if the config does not set them: V, V_target and classes."""

from collections.abc import Mapping

from stickjax.config import Config
from stickjax.data.readers import READERS
from stickjax.parallel.mesh import mesh_sizes

SIZES = ("V", "V_target", "classes")


def with_vocabulary(config: Config, ids: Mapping[str, int] | None = None, devices=None) -> Config:
    """Return the config with the vocabulary size `model.V` set, and for some families also V_target and classes.

    A size that is None becomes the size of the data. V and V_target are rounded up to a multiple of the size of the
    mesh axis "tensor". Sizes that the model config does not have are left out.

    Args:
      config: the config of the experiment.
      ids: the sizes of the data, such as {"V": 257}. None: if a size is None, read them from the tokenizer or the
        examples.
      devices: the devices of the mesh, which matter if the size of an axis is -1; None: all devices.

    Raises:
      ValueError: the tokenizer or the examples cannot be read, V or V_target is smaller than the number of ids, or
        classes is not the number of labels.

    >>> with_vocabulary(Config()).model.V, with_vocabulary(Config().replace({"model.V": 512})).model.V
    (257, 512)
    """
    given = {name: getattr(config.model, name) for name in SIZES if hasattr(config.model, name)}
    reader = READERS[config.model.reads]
    if ids is None:
        if None not in given.values():
            return config
        ids = reader.ids(config)
    changes = {}
    for name in (name for name in SIZES if name in given and name in ids):
        size, needed = given[name], ids[name]
        if size is None:
            tensor = 1 if name == "classes" else mesh_sizes(config, devices)["tensor"]
            changes[f"model.{name}"] = -(-needed // tensor) * tensor
        elif name == "classes" and size != needed:
            raise ValueError(f"classes={size} must be {needed}, the number of labels of {reader.source(config)}")
        elif size < needed:
            raise ValueError(
                f"{name}={size} is smaller than the {needed} ids of {reader.source(config)}; set {name} to at least "
                f"{needed}, or leave it out"
            )
    return config.replace(changes) if changes else config


def with_sizes_of(config: Config, before: Config) -> Config:
    """Return the config of a resumed run, in which sizes that are None are the sizes of the run before.

    `before` is the config of the run before. Its V may have been rounded up for another mesh.
    """
    names = [name for name in SIZES if getattr(config.model, name, 0) is None]
    return config.replace({f"model.{name}": getattr(before.model, name, None) for name in names}) if names else config
