"""The config of a decoder of stickjax, for transformers. The model is in `modeling_stickjax.py` beside this file."""

from types import SimpleNamespace

from transformers import PretrainedConfig


class StickjaxConfig(PretrainedConfig):
    """The config.json of the exported folder.

    `model` is the config of the decoder: {field of `stickjax.ModelConfig`: value}.
    """

    model_type = "stickjax"

    def __init__(self, model: dict | None = None, **entries):
        super().__init__(**entries)
        self.model = model or {}

    @property
    def fields(self) -> SimpleNamespace:
        """The entry `model`, with its fields as attributes, such as `fields.experts.E`."""
        return SimpleNamespace(**{n: SimpleNamespace(**x) if isinstance(x, dict) else x for n, x in self.model.items()})

    # The sizes of the model, under the names that transformers uses.
    vocab_size = property(lambda self: self.model["V"])
    hidden_size = property(lambda self: self.model["D"])
    num_hidden_layers = property(lambda self: self.model["L"])
    num_attention_heads = property(lambda self: self.model["N"])
    num_key_value_heads = property(lambda self: self.model["K"])
    head_dim = property(lambda self: self.model["H"])
