"""The config of scaled rotary positions, for contexts that are longer than the contexts of the first training."""

from dataclasses import dataclass
from typing import Literal

from stickjax.config.fields import check_fields, field


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies f_i = theta^(-2i/H) are made smaller, so that the model reads longer contexts.

    theta is `ModelConfig.rope_theta`, and H is the width of a head. Without scaling, a pair i of channels is rotated by
    position * f_i. With scaling, it is rotated by position * f_i * (s_i + (1 - s_i) / factor). The share s_i, between 0
    and 1, depends on `kind`:

    "none": s_i = 1, no scaling.
    "linear": s_i = 0. All frequencies are divided by `factor`.
    "llama3": s_i = clip((n_i - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1), where
      n_i = original_T * f_i / (2 pi) is the number of turns of pair i in `original_T` tokens. The frequencies of fast
      pairs do not change, and the frequencies of slow pairs are divided by `factor`.

    >>> RopeScaling("linear", factor=2.0).factor
    2.0
    """

    kind: Literal["none", "linear", "llama3"] = field(
        "none", "none; linear: scales all frequencies; llama3: scales low frequencies"
    )
    factor: float = field(1.0, "divisor of the scaled frequencies", at_least=1)
    low_freq_factor: float = field(
        1.0, "a pair with fewer turns than this in original_T tokens is fully scaled (llama3)", above=0
    )
    high_freq_factor: float = field(
        4.0, "a pair with more turns than this in original_T tokens is not scaled (llama3)", above=0
    )
    original_T: int = field(8192, "number of tokens of the sequences before the scaling (llama3)", at_least=1)

    def __post_init__(self):
        check_fields(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )
