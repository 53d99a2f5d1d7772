"""The registry of model families: {name: `Family` object}. The field `family` of a config has this name."""

import pkgutil

from stickjax.config.family import FamilyConfig
from stickjax.config.fields import one_of, same_definition
from stickjax.models.family import Family
from stickjax.models.parameters import PARAMETERS

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Register a model family, so that all commands can use its configs and its models.

    `family.parameters` describes the parameters of the family's module classes: their axes, partition and muP label.
    Its rows are added to the table of parameters in `stickjax.models.parameters`. The same family class may be
    registered again, for example when a notebook cell runs twice. The newer definition then replaces the older one.

    Raises:
      ValueError: another family class is registered under the same name, or the table already has different rows for
        one of the module classes in `family.parameters`.
    """
    name = family.config.family
    if (known := FAMILIES.get(name)) is not None and not same_definition(type(known), type(family)):
        raise ValueError(f"family={name!r} is registered already, by {type(known).__name__}; choose another name")
    others = PARAMETERS if known is None else {k: v for k, v in PARAMETERS.items() if k not in known.parameters}
    for module, rows in family.parameters.items():
        if others.get(module, rows) != rows:
            raise ValueError(
                f"family={name!r}: the table of parameters already has other rows for a module class with the "
                f"name {module}; rename your class"
            )
    PARAMETERS.update({module: dict(rows) for module, rows in family.parameters.items()})
    FAMILIES[name] = family


def family_of(config: FamilyConfig) -> Family:
    """Return the `Family` object for a model config: the object that is registered under the name `config.family`.

    Raises ValueError if no family is registered under this name.

    >>> from stickjax.config import ModelConfig, SutConfig
    >>> family_of(ModelConfig()).parameter_counts(ModelConfig.powermoe_3b())[0]
    3298788864
    >>> family_of(SutConfig()).parameter_counts(SutConfig(D=8, H=4, F=16))
    (6856, 2352)
    """
    one_of("family", config.family, tuple(FAMILIES))
    return FAMILIES[config.family]


# The families of this project, each as "module:class".
for _name in (
    "stickjax.models.decoder:Decoder",
    "stickjax.models.universal:Universal",
    "stickjax.models.ordered_memory:OrderedMemory",
    "stickjax.models.latent_tree:LatentTree",
):
    register(pkgutil.resolve_name(_name)())
