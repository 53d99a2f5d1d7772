"""Constants with which the implementations compute log(beta) and log(1 - beta), where beta = sigmoid(logit)."""

import math

import numpy as np

LOG2E = math.log2(math.e)
# The logit of a key that a query does not see. exp(NOTHING) and 2^NOTHING are zero. NOTHING - NOTHING is 0. With an
# infinite logit, the difference would be NaN.
NOTHING = -1e30
# The coefficients of a polynomial for log2(1 + y) / y on [0, 1], highest power first. Its relative error is at most
# 2.2e-7. With this polynomial, log2(1 + y) takes seven multiply-adds and a product, instead of a special function of
# the GPU.
LOG2P1 = (
    np.polynomial.Chebyshev.interpolate(lambda y: np.log1p(y) / np.maximum(y, 1e-300) / math.log(2), 7, [0, 1])
    .convert(kind=np.polynomial.Polynomial)
    .coef[::-1]
    .tolist()
)
