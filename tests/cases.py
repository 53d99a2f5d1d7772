"""Named calls of stick-breaking attention and of the expert ops, for the tests of the implementations of these ops.

The tests run every call with every implementation in the dictionaries STICK_IMPLEMENTATIONS (attention) and
EXPERT_IMPLEMENTATIONS (experts). To test a new implementation, add it to one of them.
"""

from benchmarks.kernel_cases import DECODED, KERNEL_CASES, KERNEL_EXPERTS, ODD, Experts, Stick, documents, dtype_of

# The calls for the GPU kernels are in benchmarks/kernel_cases.py, because the GPU benchmark runs them too.
__all__ = ["DECODED", "KERNEL_CASES", "KERNEL_EXPERTS", "ODD", "Experts", "Stick", "documents", "dtype_of"]

STICK_IMPLEMENTATIONS = {
    "xla": {"implementation": "xla"},
    "xla-loop": {"implementation": "xla", "tiles": (16, 24)},
    "xla-skip": {"implementation": "xla", "tiles": (24, 16), "skip_below": -100.0},
}
EXPERT_IMPLEMENTATIONS = ("xla", "reference")
# "plain" and "saturated", for example, share one compiled program: they have the same shapes and static options.
STICK = {
    "plain": Stick(T=70, B=2),
    "one-token": Stick(T=1),
    "odd-63": Stick(T=63),
    "odd-100": Stick(T=100, H=16),
    "above-short": Stick(T=513, K=1),
    "grouped-heads": Stick(B=2, N=6, K=2),
    "one-key-head": Stick(N=4, K=1),
    "wide-values": Stick(H=8, Hv=20),
    "narrow-values": Stick(N=4, K=2, H=8, Hv=3),
    "cache": Stick(T=9, S=40),
    "more-queries": Stick(T=40, S=9),
    "offset": Stick(T=20, S=40, offset=7),
    "far-offset": Stick(T=20, S=40, offset=90),
    "negative-offset": Stick(T=70, S=40, offset=-66),
    "before-all-keys": Stick(T=10, S=40, offset=-50),
    "offsets": Stick(T=20, S=60, B=3, offset=(40, 0, -7)),
    "decode": Stick(T=1, S=100, B=4, N=4, K=2, offset=(99, 31, 1, 0)),
    "no-queries": Stick(T=0, S=10),
    "no-keys": Stick(T=10, S=0),
    "packed": Stick(T=70, segments=(30, 1, 2, 37)),
    "padded": Stick(T=70, segments=(-3, 30, 20, -17)),
    "all-padding": Stick(T=70, segments=(-70,)),
    "key-segments": Stick(T=20, S=50, B=2, segments=(12, 6, -2), key_segments=(30, 10, -10), offset=30),
    "no-window": Stick(T=40, window=0),
    "window": Stick(T=100, window=11),
    "wide-window": Stick(T=40, window=90),
    "current": Stick(T=40, attend_current=True),
    "current-only": Stick(T=40, attend_current=True, window=0),
    "everything": Stick(
        T=50,
        S=90,
        B=2,
        N=4,
        K=2,
        Hv=12,
        segments=(30, 15, -5),
        key_segments=(60, 20, -10),
        offset=(40, 17),
        window=33,
        attend_current=True,
    ),  # fmt: skip
    "saturated": Stick(T=70, B=2, std=12.0, shift=-6.0),
    "very-saturated": Stick(T=70, B=2, std=80.0),
    "all-far": Stick(T=70, B=2, shift=-80.0),
    "all-near": Stick(T=70, B=2, shift=80.0),
}


# The cases that "xla-skip" runs. It differs from "xla-loop" in when heads and rows stop, not in the masks.
SKIP_CASES = "plain", "grouped-heads", "offsets", "no-keys", "padded", "everything", "saturated", "very-saturated"

EXPERTS = {
    "plain": Experts(),
    "odd": Experts(T=41, D=7, F=5),
    "one-token": Experts(T=1, E=8),
    "no-tokens": Experts(T=0),
    "few-rows": Experts(T=9, E=16),
    "all-chosen": Experts(k=5),
    "one-expert": Experts(k=1, E=1),
    "many-experts": Experts(T=30, E=128, D=4, F=6),
    "empty-experts": Experts(T=40, E=9, used=3),
    "skewed": Experts(T=150, E=8, share=0.6),
    "one-takes-all": Experts(T=150, E=8, share=1.0),
    "some-idle": Experts(T=60, share=0.3, idle=0.5),
    "all-idle": Experts(idle=1.0),
}
