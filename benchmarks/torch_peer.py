"""Measure a training step of Hugging Face's GraniteMoe model in torch, with the sizes of configs/tiny.py.

python -m benchmarks.torch_peer [--rounds 20]

The program prints tokens/s. It needs torch and transformers, but not stickjax. With --serve, it makes one step for
each line of standard input and prints the loss. `benchmarks.train` uses --serve, so that this model and the JAX models
can take turns.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import transformers

TINY = dict(V=257, D=128, L=4, N=4, K=4, H=32, F=192, E=8, k=2, B=16, T=256)


def stepper(V, D, L, N, K, H, F, E, k, B, T):
    """Return a function that makes one training step (forward, backward, clipping, AdamW) and returns the loss.

    The arguments are the sizes of the model and of the batch: vocabulary V, model width D, L layers, N query heads, K
    key heads, head width H, expert width F, E experts, k experts per token, B sequences of T tokens.
    """
    torch.manual_seed(0)
    config = transformers.GraniteMoeConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
        num_key_value_heads=K, num_local_experts=E, num_experts_per_tok=k, max_position_embeddings=T,
        tie_word_embeddings=True, use_cache=False, output_router_logits=True, router_aux_loss_coef=0.01,
        embedding_multiplier=12.0, residual_multiplier=0.5, attention_multiplier=H**-0.5, logits_scaling=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = transformers.GraniteMoeForCausalLM(config).float().train()
    # `foreach` updates many parameters in one call, which is faster.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    tokens = torch.randint(0, V, (B, T))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_peer", description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="make one step for each line of standard input")
    parser.add_argument("--rounds", type=int, default=20, help="number of measured steps (default 20)")
    parser.add_argument("--shape", type=json.loads, default=TINY, help="sizes by letter, as JSON")
    arguments = parser.parse_args()
    step = stepper(**arguments.shape)
    versions = f"torch {torch.__version__}; transformers {transformers.__version__}; {torch.get_num_threads()} threads"
    print(versions, flush=True)
    if arguments.serve:
        for _ in sys.stdin:
            print(step(), flush=True)
        return
    step(), step()
    times = []
    for _ in range(arguments.rounds):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    tokens = arguments.shape["B"] * arguments.shape["T"]
    median, best = statistics.median(times), min(times)
    print(f"{tokens / median:,.0f} tokens/s, median step {1e3 * median:.0f} ms, best {1e3 * best:.0f} ms")


if __name__ == "__main__":
    main()
