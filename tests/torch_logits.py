"""Open Hugging Face folders with transformers, without jax: python tests/torch_logits.py FOLDER...

Each folder must contain a model and a file inputs.npz with three arrays: `tokens` [B,T]; `mask` [B,T], which is 0 for
padding on the left and 1 for tokens; and the number `steps` of new tokens. The program writes outputs.npz with three
arrays: the logits `logits` [B,T,V] of the model in float32; the logits `bfloat16` [B,T,V] of the model in bfloat16; and
`greedy` [B,T+steps], each row of `tokens` with the new tokens that `generate` chooses greedily. The program also saves
the model into the folder FOLDER-saved.

The package flash-linear-attention computes models of the type stickbreaking_attn. Its kernels need a GPU, so this
program replaces them by the reference attention of the package and by functions of PyTorch. For these models,
`generate` uses no cache.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def attend_by_reference(self, hidden_states, attention_mask=None, **_):
    """Compute what StickBreakingAttention.forward of flash-linear-attention computes on a GPU.

    Padding on the left must get no attention. So each sequence is computed alone, after its padding has been cut off.
    """
    from fla.ops.stickbreaking_attn.naive import naive_stickbreaking_attn

    def heads(project, norm, x):
        y = project(x).unflatten(-1, (-1, self.head_dim))
        return y if norm is None else torch.nn.functional.rms_norm(y, (self.head_dim,), norm.weight, norm.eps)

    query_norm, key_norm = (self.q_norm, self.k_norm) if self.qk_norm else (None, None)
    out = torch.zeros_like(hidden_states)
    for b, x in enumerate(hidden_states):
        first = 0 if attention_mask is None else int((attention_mask[b] == 0).sum())
        x = x[None, first:]
        query, key = heads(self.q_proj, query_norm, x), heads(self.k_proj, key_norm, x)
        value = heads(self.v_proj, None, x)
        attended, _ = naive_stickbreaking_attn(query, key, value, attend_current=self.attend_current)
        out[b, first:] = self.o_proj(attended.flatten(-2))[0]
    return out, None, None


def options_of(folder: Path) -> dict:
    """Return the options of from_pretrained that the model in `folder` needs to run without a GPU."""
    if json.loads((folder / "config.json").read_text())["model_type"] != "stickbreaking_attn":
        return {}
    from fla.layers import stickbreaking_attn
    from fla.modules import mlp

    mlp.swiglu = lambda gate, x: torch.nn.functional.silu(gate) * x
    stickbreaking_attn.StickBreakingAttention.forward = attend_by_reference
    return dict(fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False, use_cache=False)


def answer(folder: Path) -> None:
    inputs = {name: torch.from_numpy(x) for name, x in np.load(folder / "inputs.npz").items()}
    needed = options_of(folder)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="float32", output_loading_info=True, **needed
    )
    assert not any(report.values()), f"{folder}: {report}"  # no tensor is missing, unknown or of another shape
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokens, mask = (inputs[name].long().to(model.device) for name in ("tokens", "mask"))
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
        options = dict(do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=not needed)
        greedy = model.generate(tokens, attention_mask=mask, max_new_tokens=int(inputs["steps"]), **options)
        model.save_pretrained(f"{folder}-saved")
        rounded = model.to(torch.bfloat16)(tokens, attention_mask=mask).logits.float()
    found = dict(logits=logits, greedy=greedy, bfloat16=rounded)
    np.savez(folder / "outputs.npz", **{name: x.cpu().numpy() for name, x in found.items()})


if __name__ == "__main__":
    torch.set_num_threads(2)
    for word in sys.argv[1:]:
        answer(Path(word))
