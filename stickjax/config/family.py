"""The base class of all model configs, and the table {name of a model family: its config class}."""

import dataclasses
from typing import ClassVar, Literal

from stickjax.config.fields import BYTES, same_definition

# {name of a family: the class of its config}. The definition of a subclass of `FamilyConfig` adds an entry.
MODEL_CONFIGS: dict[str, type["FamilyConfig"]] = {}


class FamilyConfig:
    """The base class for the config of a model family, such as the decoder.

    A model family defines its config as a subclass, which must be a frozen dataclass. The fields of the subclass become
    the section `model` of a config. The subclass needs at least these fields: `family`, whose default is the name of
    the family; V, the vocabulary size (None: the number of ids of the tokenizer); `dtype`; `param_dtype`; and
    `implementation`. A translation model also needs V_target, the vocabulary size of the targets (None: the number of
    target ids of the data). A classifier also needs `classes`, the number of labels (None: the number of labels of the
    data).
    """

    family: str
    V: int | None
    # the kind of training data, see `stickjax.data.readers`
    reads: ClassVar[Literal["text", "pairs", "sentences", "translation"]] = "text"
    remat: str = "none"  # what the backward pass recomputes in a layer
    can_change_experts: ClassVar[bool] = False  # whether `stickjax.surgery` can add and prune its experts
    # whether train.accumulate > 1 works: the loss of a batch must be the sum of the losses of its microbatches
    accumulates: ClassVar[bool] = True
    # In training, the texts of examples are padded to a multiple of this number of tokens.
    padded_to: ClassVar[int] = 8

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if (family := cls.__dict__.get("family")) is None:
            return  # a class without its own name inherits the family of its base class
        name = family.default if isinstance(family, dataclasses.Field) else family
        if not isinstance(name, str):
            raise TypeError(f"the default of {cls.__name__}.family must be a string, the name of the model family")
        if not same_definition(MODEL_CONFIGS.get(name, cls), cls):
            raise TypeError(
                f"{cls.__name__}.family={name!r} is already the name of the family of {MODEL_CONFIGS[name].__name__}; "
                "choose another name"
            )
        MODEL_CONFIGS[name] = cls

    @property
    def vocabulary(self) -> int:
        """The vocabulary size: V, or 257 if V is None, for the byte tokenizer (256 bytes and the end-of-text token).

        A training run first replaces V=None by the number of ids of its tokenizer (see
        `stickjax.models.vocabulary_size.with_vocabulary`).
        """
        return BYTES if self.V is None else self.V

    @property
    def m_width(self) -> float:
        """The muP width multiplier. With the default 1, all parameters have the same learning rate."""
        return 1.0

    def check_mesh(self, sizes: dict[str, int], T: int) -> None:
        """Raise ValueError if the model cannot be trained on the mesh with sequences of T tokens.

        `sizes` is {name of a mesh axis: its number of devices}. In this base class, only the axis "data" may have more
        than one device. A family that can divide its parameters or sequences overrides this method.
        """
        if other := [f"{axis}={n}" for axis, n in sizes.items() if axis != "data" and n > 1]:
            raise ValueError(
                f"{' and '.join(other)} must be 1: a model of family={self.family!r} supports data parallelism only"
            )
