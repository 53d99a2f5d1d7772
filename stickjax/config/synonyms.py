"""Suggest the right option or config field for a wrong word, such as data.B for "batch_size".

If the name of an option or field is almost equal to the word, this name is suggested. Otherwise, if other programs use
the word for a setting that exists here under another name (SYNONYMS), the name here is suggested. Otherwise the
names whose last part is the word are suggested, such as train.steps for "steps". Otherwise a similar name is suggested,
if there is one.
"""

import difflib
from collections.abc import Callable, Iterable

# {config field or option: names of the same setting in other programs}
SYNONYMS = {
    "data.path": "data dataset data_path data_dir train_file train_data input",
    "data.T": "seq_len seq_length sequence_length context_length ctx_len max_seq_len max_length block_size",
    "data.B": "batch batch_size bs global_batch_size train_batch_size per_device_train_batch_size",
    "optim.peak_lr": "lr learning_rate max_lr peak_learning_rate eta rate",
    "optim.end_ratio": "min_lr end_lr final_lr",
    "optim.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type",
    "optim.warmup_tokens": "warmup warmup_steps warmup_ratio warmup_iters",
    "optim.decay_tokens": "decay_steps cooldown cooldown_steps",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.weight_decay": "wd",
    "optim.clip": "grad_clip gradient_clip gradient_clipping max_grad_norm clip_grad clip_norm",
    "optim.trainable": "freeze frozen",
    "train.steps": "epochs num_epochs num_train_epochs max_steps num_steps total_steps iterations iters max_iters",
    "train.accumulate": "gradient_accumulation_steps gradient_accumulation grad_accum accum accumulation_steps",
    "train.seed": "random_seed",
    "train.log_every": "log_interval logging_steps log_steps",
    "train.checkpoint_every": "save_every save_steps save_interval checkpoint_interval ckpt_every checkpoint_steps",
    "train.eval_every": "eval_interval eval_steps val_interval validate_every val_check_interval",
    "train.compilation_cache": "compile_cache compilation_cache_dir jax_compilation_cache_dir cache_dir",
    "train.keep": "save_total_limit keep_checkpoints max_to_keep",
    "model.V": "vocab vocab_size vocabulary",
    "model.D": "dim width hidden_size d_model n_embd embed_dim hidden_dim",
    "model.L": "layers num_layers n_layer n_layers depth num_hidden_layers",
    "model.N": "heads num_heads n_head n_heads num_attention_heads",
    "model.K": "kv_heads num_kv_heads n_kv_heads num_key_value_heads",
    "model.H": "head_dim head_size",
    "model.F": "ffn intermediate_size d_ff mlp_dim ffn_dim",
    "model.experts.E": "experts num_experts n_experts num_local_experts",
    "model.experts.k": "top_k topk num_experts_per_tok experts_per_token",
    "model.dtype": "precision amp bf16 fp16 mixed_precision",
    "model.tied": "tie tie_word_embeddings",
    "model.remat": "gradient_checkpointing activation_checkpointing recompute",
    "mesh.data": "devices num_devices gpus num_gpus dp data_parallel world_size",
    "mesh.tensor": "tp tensor_parallel model_parallel",
    "--run": "out output output_dir out_dir save_dir run_dir logdir name resume",
    "--from": "resume_from resume_from_checkpoint checkpoint ckpt",
    "--init-from": "load pretrained init finetune model_name_or_path",
    "CONFIG": "config config_file model preset",
}
_MEANT = {word: name for name, words in SYNONYMS.items() for word in words.split()}


def suggestion(word: str, names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """Return the text ' (did you mean X?)' for a word that is not one of `names`, or '' if there is no suggestion.

    `show` is a function that converts a name to its text in the suggestion.

    >>> suggestion("--batch-size", ["data.B", "data.T"]), suggestion("steps", ["train.steps", "train.seed"])
    (" (did you mean 'data.B'?)", " (did you mean 'train.steps'?)")
    """
    names = list(names)
    by_end: dict[str, list[str]] = {}
    for name in names:
        by_end.setdefault(_plain(name), []).append(name)
    plain = _plain(word)
    if same := [name for name in names if name.lower() == word.lower()]:
        found = same
    elif near := difflib.get_close_matches(word, names, n=1, cutoff=0.9):
        found = near
    elif (meant := _MEANT.get(plain)) in names:
        found = [meant]
    elif not (found := by_end.get(plain, [])):
        begun = [end for end in by_end if len(plain) > 2 and end.startswith(plain)]
        near = begun[:1] or difflib.get_close_matches(word, names, n=1, cutoff=0.7)
        near = near or difflib.get_close_matches(plain, by_end, n=1)
        found = by_end.get(near[0], near) if near else []
    return f" (did you mean {' or '.join(map(show, found))}?)" if found else ""


def _plain(name: str) -> str:
    """Return the last part of a name in lower case: "batch_size" for "--Batch-Size", "b" for "data.B"."""
    return name.rpartition(".")[2].lstrip("-").replace("-", "_").lower()
