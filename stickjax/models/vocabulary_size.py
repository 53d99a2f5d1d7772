"""Set the sizes of a model that follow from its data, if the config leaves them None: V, V_target and classes."""

from collections.abc import Mapping

from stickjax.config import Config
from stickjax.data.readers import READERS
from stickjax.parallel.mesh import mesh_sizes

SIZES = ("V", "V_target", "classes")


def with_vocabulary(config: Config, ids: Mapping[str, int] | None = None, devices=None) -> Config:
    """Return the config with `model.V` set, the vocabulary size, and for some families `V_target` and `classes`.

    A size that is None is set from the data. V and V_target are then rounded up to a multiple of the size of the mesh
    axis "tensor". Sizes for which the model config has no field are ignored.

    Args:
      config: the config of the experiment.
      ids: the sizes of the data, such as {"V": 257}. None: if a size is None, read them from the tokenizer or the
        examples.
      devices: the devices of the mesh, which matter if the size of an axis is -1; None: all devices.

    Raises:
      ValueError: the tokenizer or the examples cannot be read, V or V_target is smaller than the number of ids; or
        `classes` is set, and is not the number of labels.

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
    """Return the config of a run that continues, with each of V, V_target and classes that is None taken from `before`.

    `before` is the config of the run so far. Its V may have been rounded up for another mesh, so it must be kept.
    """
    names = [name for name in SIZES if getattr(config.model, name, 0) is None]
    return config.replace({f"model.{name}": getattr(before.model, name, None) for name in names}) if names else config
