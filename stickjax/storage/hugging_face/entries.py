"""Read the entries of a config.json: check their types, and refuse entries that were not read."""

from typing import Any

from stickjax.config.rope import RopeScaling

# Entries that do not change the logits: they matter only in training, in generation or in transformers itself.
_NO_LOGITS = """
    model_type architectures auto_map transformers_version torch_dtype dtype name_or_path _name_or_path _commit_hash
    _attn_implementation _attn_implementation_autoset attn_implementation use_cache torchscript use_bfloat16
    tf_legacy_loss gradient_checkpointing chunk_size_feed_forward pretraining_tp unsloth_version unsloth_fixed
    return_dict output_hidden_states output_attentions output_router_logits is_decoder tie_encoder_decoder
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    finetuning_task task_specific_params id2label label2id num_labels problem_type
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    initializer_range attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop moe_pdrop
    router_jitter_noise max_position_embeddings n_positions block_size history_length n_ctx world_size
    is_llama_config transformers.js_config
"""
IGNORED = frozenset(_NO_LOGITS.split())
# {rope_type: {entry of rope_parameters: (field of RopeScaling, type of its value)}}
ROPE_ENTRIES = {
    "linear": {"factor": ("factor", float)},
    "llama3": {
        "factor": ("factor", float), "low_freq_factor": ("low_freq_factor", float),
        "high_freq_factor": ("high_freq_factor", float), "original_max_position_embeddings": ("original_T", int),
    },
}  # fmt: skip


class Entries:
    """Reads entries of a config.json, and finds entries that have a wrong type or that were not read.

    With get = Entries(tree), `get(name, type)` returns the entry `name` after a check of its type. At the end,
    `get.end()` raises ValueError if there are entries that were not read. An entry that is null counts as absent.

    `tree` is the content of config.json, or an object inside it. Messages begin with `where`, such as "rope_scaling: "
    for the object with this name.
    """

    def __init__(self, tree: dict, where: str = ""):
        self._tree, self._where, self._known = tree, where, set()

    def __call__(self, name: str, kind: type, default=...) -> Any:
        self._known.add(name)
        value = self._tree.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self._where}the entry {name} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self._where}{name}={value!r} must be of type {kind.__name__}")
        return value

    def only(self, known: dict) -> None:
        self._known |= known.keys()
        for name, wanted in known.items():
            if (value := self._tree.get(name)) is not None and value != wanted:
                raise ValueError(f"{self._where}{name}={value!r} is not supported; {name} must be {wanted!r}")

    def either(self, name: str, other: str, kind: type, default=...) -> Any:
        """Return the entry `name` or the entry `other`: two names of one entry. If both are absent, return `default`.

        Raise ValueError if both are present and their values differ, or if both are absent and there is no `default`.
        """
        found = {n: value for n in (name, other) if (value := self(n, kind, None)) is not None}
        if len(set(found.values())) > 1:
            both = f"{name}={found[name]!r} and {other}={found[other]!r}"
            raise ValueError(f"{both} are two names of one entry and must have the same value")
        return next(iter(found.values())) if found else self(name, kind, default)

    def end(self) -> None:
        """Raise ValueError if `tree` has entries that were not read and are not in the set IGNORED."""
        rest = sorted(n for n, x in self._tree.items() if x is not None and n not in self._known | IGNORED)
        if rest:
            unread = ", ".join(f"{name}={self._tree[name]!r:.60}" for name in rest[:8])
            raise ValueError(
                f"{self._where}{unread}: unknown, and may change what the model computes; delete "
                f"{'it' if len(rest) == 1 else 'them'} from config.json if that does not change the model"
            )

    def quotient(self, name: str, by: str) -> int:
        above, below = self(name, int), self(by, int)
        if below < 1 or above % below:
            raise ValueError(f"{name}={above} must be a multiple of {by}={below}")
        return above // below

    def rope(self, theta: float = 10_000.0) -> dict:
        """Return {field of ModelConfig: value} for the rotary positions: `rope_theta` and `rope_scaling`.

        The values come from the entries `rope_theta`, `rope_scaling` (transformers 4) and `rope_parameters`
        (transformers 5). `theta` is the base if the file has no `rope_theta`. Raise ValueError if two entries have
        different values, or if a value is not supported.
        """
        thetas, scalings = {self("rope_theta", float, None)} - {None}, []
        for name in ("rope_scaling", "rope_parameters"):
            if values := self(name, dict, {}):
                own, scaling = Entries(values, f"{name}: ")._scaling()
                thetas |= {own} - {None}
                scalings.append(scaling)
        if len(thetas) > 1:
            found = " and ".join(map(str, sorted(thetas)))
            raise ValueError(
                f"config.json and its entries rope_scaling and rope_parameters have different values of rope_theta: "
                f"{found}; delete the wrong one"
            )
        if len(set(scalings)) > 1:
            raise ValueError("rope_scaling and rope_parameters have different values; delete the wrong entry")
        return dict(rope_theta=thetas.pop() if thetas else theta, rope_scaling=(scalings or [RopeScaling()])[0])

    def _scaling(self) -> tuple[float | None, RopeScaling]:
        self.only({"partial_rotary_factor": 1})
        theta, kind = self("rope_theta", float, None), self.either("rope_type", "type", str, "default")
        if kind not in ("default", *ROPE_ENTRIES):
            known = ", ".join(map(repr, ("default", *ROPE_ENTRIES)))
            raise ValueError(f"{self._where}rope_type={kind!r} is not supported; rope_type must be one of {known}")
        if kind == "default":
            self.only({"factor": 1})
            scaling = RopeScaling()
        else:
            values = {ours: self(theirs, type_) for theirs, (ours, type_) in ROPE_ENTRIES[kind].items()}
            scaling = RopeScaling(kind, **values)
        self.end()
        return theta, scaling

    def layer_types(self) -> None:
        """Raise ValueError if `layer_types`, the list of the types of the layers, has a type that is not supported."""
        types = self("layer_types", list, [])
        if wrong := [kind for kind in types if kind not in ("full_attention", "attention")]:
            raise ValueError(f"layer_types has {wrong[0]!r}, which is not supported; all must be 'full_attention'")

    def unused(self, names: str) -> None:
        """Accept the entries `names`, which do not change the logits of this model type. Spaces separate the names."""
        self._known |= set(names.split())
