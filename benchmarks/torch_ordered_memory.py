"""Make training steps of the original Ordered Memory in torch, for the comparison in `benchmarks.ordered_memory`.

The original code is read from .peers/Ordered-Memory, a clone of the repository yikangshen/Ordered-Memory. The program
first prints one line with the version of torch. Then it makes one step for each line of standard input. After each step
it prints two numbers: the loss, and the growth of the peak memory of the process since the import of torch, in bytes.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

ORIGINAL = Path(__file__).parents[1] / ".peers" / "Ordered-Memory" / "ordered_memory.py"


class Pairs(nn.Module):
    """A classifier of sentence pairs: an embedding, the original encoder, and two linear layers on top.

    V is the number of token ids, D the width of the embedding, H the width of the encoder and N its number of memory
    slots.
    """

    def __init__(self, encoder: type, V: int, D: int, H: int, N: int, classes: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=0)
        self.encoder = encoder(D, H, N, dropout=dropout, dropoutm=dropout)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(4 * H, 4 * H), nn.ELU(), nn.Dropout(dropout), nn.Linear(4 * H, classes)
        )

    def forward(self, tokens):
        u, v = self.encoder(self.embed(tokens), tokens != 0).chunk(2)
        return self.head(torch.cat([u, v, u * v, (u - v).abs()], -1))


def stepper(B: int, T: int, classes: int, **sizes):
    """Return a function that makes one training step (forward, backward, clipping, Adam) and returns the loss.

    Every step uses the same B random pairs of sentences of T tokens, with `classes` different labels. `sizes`: the
    arguments V, D, H, N and dropout of `Pairs`.
    """
    spec = importlib.util.spec_from_file_location("ordered_memory", ORIGINAL)
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    torch.manual_seed(0)
    model = Pairs(original.OrderedMemory, classes=classes, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.999), eps=1e-9)
    tokens = torch.randint(1, sizes["V"], (T, 2 * B))
    labels = torch.randint(0, classes, (B,))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def peak_memory() -> int:
    """Return the largest memory that this process has used, in bytes. This works on Linux only.

    `resource.getrusage` does not help here: its peak includes the process that started this one.
    """
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torch_ordered_memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--serve", action="store_true", help="make one step for each line of standard input")
    parser.add_argument(
        "--shape", type=json.loads, required=True, help="B, T, V, D, H, N, classes and dropout, as JSON"
    )
    arguments = parser.parse_args()
    before = peak_memory()
    step = stepper(**arguments.shape)
    print(f"torch {torch.__version__}; {torch.get_num_threads()} threads", flush=True)
    for _ in sys.stdin:
        loss = step()
        print(loss, peak_memory() - before, flush=True)


if __name__ == "__main__":
    main()
