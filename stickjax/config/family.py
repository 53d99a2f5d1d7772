"""What every model's config has in common, and the classes of config by the name of their family."""

from typing import ClassVar, Literal

from stickjax.config.fields import BYTES

# {family: the class of its config}; a class enters it when it is defined.
MODEL_CONFIGS: dict[str, type["FamilyConfig"]] = {}


class FamilyConfig:
    """The config of a family of models: a frozen dataclass whose field `family` has the family's name as its default.

    It has at least the fields `family`, V (the size of the vocabulary; None: the ids of the tokenizer), `dtype`,
    `param_dtype` and `implementation`.
    """

    family: str
    V: int | None
    reads: ClassVar[Literal["text", "pairs"]] = "text"  # what a batch is made of: see `stickjax.data.readers`
    remat: str = "none"  # what a layer computes again in the backward pass
    accumulates: ClassVar[bool] = True  # whether the loss of a batch is the sum over its microbatches

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        MODEL_CONFIGS[cls.family.default] = cls  # ty: still a dataclasses.Field here

    @property
    def vocabulary(self) -> int:
        """V; if V is None, the 257 ids of bytes and the end of text."""
        return BYTES if self.V is None else self.V

    @property
    def m_width(self) -> float:
        """The width multiplier of muP; 1: all parameters have one learning rate."""
        return 1.0

    def check_mesh(self, sizes: dict[str, int], T: int) -> None:
        """Raise ValueError for mesh axes that do not suit the model. By default only "data" may be above 1."""
        if other := [f"{axis}={n}" for axis, n in sizes.items() if axis != "data" and n > 1]:
            raise ValueError(
                f"{' and '.join(other)}: a model of family={self.family!r} lies whole on every device, "
                f"so the mesh can only divide the batch, by data"
            )
