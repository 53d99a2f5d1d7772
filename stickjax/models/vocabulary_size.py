"""Set the sizes V, V_target and classes of a model from its data, if they are None in the config."""

from collections.abc import Mapping

from stickjax.config import Config
from stickjax.data.examples import task_of
from stickjax.data.readers import READERS
from stickjax.parallel.mesh import mesh_sizes

SIZES = ("V", "V_target", "classes")


def with_vocabulary(config: Config, ids: Mapping[str, int] | None = None, devices=None) -> Config:
    """Set the vocabulary size `model.V` from the data, if it is None. Return the new config.

    V_target (the vocabulary size of the targets of translations) and `classes` (the number of labels) are also set, if
    the model config has these fields and they are None. A new V or V_target is the number of token ids, rounded up to a
    multiple of the size of the mesh axis "tensor".

    Args:
      config: the config of the experiment.
      ids: the sizes of the data, such as {"V": 257}. None: read them from the tokenizer or the examples. If `ids` is
        None and no size in the config is None, nothing is read or checked.
      devices: the devices of the mesh; None: all devices. They matter only if the size of a mesh axis is -1.

    Raises:
      ValueError: the tokenizer or the examples cannot be read; V or V_target is smaller than the number of token ids;
        or `classes` is not the number of labels.

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
            labels = ", ".join(map(repr, task_of(config).labels))
            hint = "; data.unlabelled=LABEL leaves out the rows of a label" if config.data.source == "labelled" else ""
            raise ValueError(
                f"classes={size} must be {needed}, the number of labels of {reader.source(config)}: {labels:.200}{hint}"
            )
        elif size < needed:
            raise ValueError(
                f"{name}={size} is smaller than the {needed} ids of {reader.source(config)}; set {name} to at least "
                f"{needed}, or leave it out"
            )
    return config.replace(changes) if changes else config


def with_sizes_of(config: Config, before: Config) -> Config:
    """Return `config` with the sizes V, V_target and classes from `before`, where they are None in `config`.

    `config` is the config of a run that continues, and `before` is the config of this run so far. V in `before` may
    have been rounded up for another mesh. It must be kept, because the parameters of the run have this size.
    """
    names = [name for name in SIZES if getattr(config.model, name, 0) is None]
    return config.replace({f"model.{name}": getattr(before.model, name, None) for name in names}) if names else config
