"""Round lengths of texts up to a few lengths, so that JAX compiles a model for few shapes."""


def padded_length(n: int) -> int:
    """Round a length `n` up, so that JAX compiles the model for a few lengths only.

    Up to 512, the result is a multiple of 64. Above 512, it is a power of two or one of three lengths between two
    powers of two: 640, 768, 896, 1024, 1280, 1536, 1792, 2048, and so on.

    >>> [padded_length(n) for n in (1, 65, 600, 1025)]
    [64, 128, 640, 1280]
    """
    step = max(64, 1 << n.bit_length() >> 3)
    return -(-n // step) * step
