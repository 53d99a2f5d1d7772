"""The twin of tiny.py: the same parameters and data, with softmax attention and rotary positions.

python -m stickjax.train configs/tiny_softmax.py

It trains about as long as tiny.py. Expect a held-out loss of about 2.26 bits per byte at length T, and more than 4 bits
per byte at length 8 T.
"""

import dataclasses
import runpy
from pathlib import Path

from stickjax import Config


def get_config() -> Config:
    config = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"]()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="softmax"))
