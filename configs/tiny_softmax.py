"""The config tiny.py with softmax attention and rotary positions instead of stick-breaking attention, for comparison.

python -m stickjax.train configs/tiny_softmax.py
python -m stickjax.evaluate runs/tiny_softmax

The sizes of the model and the data are the same as in tiny.py, and training takes about as long. The second command
should print a held-out loss of about 2.26 bits per byte with contexts of T tokens, the length in training. With
contexts of 8 T tokens, the loss should be more than 4 bits per byte.
"""

import dataclasses
import runpy
from pathlib import Path

from stickjax import Config


def get_config() -> Config:
    config = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"]()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="softmax"))
