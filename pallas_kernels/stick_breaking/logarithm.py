"""Constants that all implementations use to compute log(beta) and log(1 - beta), where beta = sigmoid(logit)."""

import math

import numpy as np

LOG2E = math.log2(math.e)
# The logit of a masked key. exp(NOTHING) and 2^NOTHING are zero. NOTHING - NOTHING is 0, where inf - inf would be NaN.
NOTHING = -1e30
# The coefficients of a polynomial for log2(1 + y) / y on [0, 1], highest power first, with an error of at most 2.2e-7.
# So log2(1 + y) takes seven multiply-adds instead of a special function.
LOG2P1 = (
    np.polynomial.Chebyshev.interpolate(lambda y: np.log1p(y) / np.maximum(y, 1e-300) / math.log(2), 7, [0, 1])
    .convert(kind=np.polynomial.Polynomial)
    .coef[::-1]
    .tolist()
)
