"""Open Hugging Face folders with transformers, without jax: python tests/torch_logits.py FOLDER...

Each folder must contain a model and a file inputs.npz with three arrays: `tokens` [B,T]; `mask` [B,T], which is 0 for
padding on the left and 1 for tokens; and the number `steps` of new tokens. The program writes outputs.npz with three
arrays: the logits `logits` [B,T,V] of the model in float32; the logits `bfloat16` [B,T,V] of the model in bfloat16; and
`greedy` [B,T+steps], each row of `tokens` with the new tokens that `generate`, with its cache, chooses greedily. The
program also saves the model into the folder FOLDER-saved.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def answer(folder: Path) -> None:
    inputs = {name: torch.from_numpy(x) for name, x in np.load(folder / "inputs.npz").items()}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="float32", output_loading_info=True
    )
    assert not any(report.values()), f"{folder}: {report}"  # no tensor is missing, unknown or of another shape
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokens, mask = (inputs[name].long().to(model.device) for name in ("tokens", "mask"))
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
        options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
        greedy = model.generate(tokens, attention_mask=mask, max_new_tokens=int(inputs["steps"]), **options)
        model.save_pretrained(f"{folder}-saved")
        rounded = model.to(torch.bfloat16)(tokens, attention_mask=mask).logits.float()
    found = dict(logits=logits, greedy=greedy, bfloat16=rounded)
    np.savez(folder / "outputs.npz", **{name: x.cpu().numpy() for name, x in found.items()})


if __name__ == "__main__":
    torch.set_num_threads(2)
    for word in sys.argv[1:]:
        answer(Path(word))
