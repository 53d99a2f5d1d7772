"""The registry of model families. A config names its family in `model.family`."""

import pkgutil

from stickjax.config.family import FamilyConfig
from stickjax.config.fields import one_of, same_definition
from stickjax.models.family import Family
from stickjax.models.parameters import PARAMETERS

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to all commands: its config, its model and its parameters.

    A file that is run again may register its family again: the newer one is used.

    Raises:
      ValueError: the name of the family is taken, or a module of that name is already registered with different
        parameters.
    """
    name = family.config.family
    if (known := FAMILIES.get(name)) is not None and not same_definition(type(known), type(family)):
        raise ValueError(f"family={name!r} is registered already, by {type(known).__name__}")
    others = PARAMETERS if known is None else {k: v for k, v in PARAMETERS.items() if k not in known.parameters}
    for module, rows in family.parameters.items():
        if others.get(module, rows) != rows:
            raise ValueError(f"family={name!r}: a module {module} is registered already, with other parameters")
    PARAMETERS.update({module: dict(rows) for module, rows in family.parameters.items()})
    FAMILIES[name] = family


def family_of(config: FamilyConfig) -> Family:
    """Return the family of a model config. Raises ValueError if the family is not registered.

    >>> from stickjax.config import ModelConfig, SutConfig
    >>> family_of(ModelConfig()).parameter_counts(ModelConfig.powermoe_3b())[0]
    3298788864
    >>> family_of(SutConfig()).parameter_counts(SutConfig(D=8, H=4, F=16))
    (6856, 2352)
    """
    one_of("family", config.family, tuple(FAMILIES))
    return FAMILIES[config.family]


# The families of this project, one line each: "module:class".
for _name in (
    "stickjax.models.decoder:Decoder",
    "stickjax.models.universal:Universal",
):
    register(pkgutil.resolve_name(_name)())
