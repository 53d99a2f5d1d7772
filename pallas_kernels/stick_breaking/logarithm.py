"""Constants for arithmetic in logarithms, shared by the implementations."""

import math

import numpy as np

LOG2E = math.log2(math.e)
# The logit of a masked key, to base e or 2. exp(NOTHING) is zero. NOTHING - NOTHING is not NaN, unlike with infinity.
NOTHING = -1e30
# log2(1 + y) / y on [0, 1], highest power first, within 2.2e-7: seven multiply-adds instead of a special function.
LOG2P1 = (
    np.polynomial.Chebyshev.interpolate(lambda y: np.log1p(y) / np.maximum(y, 1e-300) / math.log(2), 7, [0, 1])
    .convert(kind=np.polynomial.Polynomial)
    .coef[::-1]
    .tolist()
)
