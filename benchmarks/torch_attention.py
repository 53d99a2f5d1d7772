"""Compute causal softmax attention in torch, for the comparison in `benchmarks.long`.

The program first prints one line with the version of torch. Then it computes attention once for each line of standard
input, and prints a line when the result is there.
"""

import argparse
import json
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention


def stepper(B: int, T: int, S: int, N: int, H: int, backward: bool):
    """Return a function that computes the attention of T queries to S keys, and their gradients if `backward`.

    With T = S, the attention is causal. With T = 1, the query sees all keys. There are N heads of width H.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, N, length, H, requires_grad=backward) for length in (T, S, S))
    d_out = torch.randn(B, N, T, H)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = scaled_dot_product_attention(q, k, v, is_causal=T == S)
            if backward:
                torch.autograd.grad(out, (q, k, v), d_out)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", required=True, help="compute once for each line of input")
    parser.add_argument("--shape", type=json.loads, required=True, help="the arguments of `stepper`, as JSON")
    arguments = parser.parse_args()
    step = stepper(**arguments.shape)
    print(f"torch {torch.__version__}; {torch.get_num_threads()} threads", flush=True)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


if __name__ == "__main__":
    main()
