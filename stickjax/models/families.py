"""The families of models by their name, which a config has in `model.family`."""

from stickjax.config.family import FamilyConfig
from stickjax.models.decoder import Decoder
from stickjax.models.family import Family
from stickjax.models.parameters import PARAMETERS
from stickjax.models.universal import Universal

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to all commands: its config, its model and its parameters.

    Raises:
      ValueError: its name is taken, or one of its modules has the name of another module with other parameters.
    """
    name = family.config.family
    if type(FAMILIES.get(name, family)) is not type(family):
        raise ValueError(f"family={name!r} is registered already, by {type(FAMILIES[name]).__name__}")
    for module, rows in family.parameters.items():
        if PARAMETERS.setdefault(module, dict(rows)) != dict(rows):
            raise ValueError(f"family={name!r}: a module {module} with other parameters is registered already")
    FAMILIES[name] = family


def family_of(config: FamilyConfig) -> Family:
    """The family of a model's config.

    >>> from stickjax.config import ModelConfig, SutConfig
    >>> family_of(ModelConfig()).parameter_counts(ModelConfig.powermoe_3b())[0]
    3298788864
    >>> family_of(SutConfig()).parameter_counts(SutConfig(D=8, H=4, F=16))
    (6856, 2352)
    """
    return FAMILIES[config.family]


for _family in (Decoder(), Universal()):
    register(_family)
