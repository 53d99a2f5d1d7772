"""Change the modules of a trained model: add, freeze and prune modules, and report which text uses which modules.

A module is an expert of a feed-forward network ("ffn") or of the attention heads ("attention"), as in ModuleFormer
(Shen et al., arXiv 2306.04640). `change.py` makes larger and smaller models from a trained one. `tune.py` freezes
parameters, and trains a model so that it uses few modules. `usage.py` counts how often a text uses each module. The
command `python -m stickjax.surgery` (`__main__.py`) does all of this with run folders.
"""

from stickjax.surgery.change import extend, merged, prune
from stickjax.surgery.tune import TRAINABLE, concentrate, freeze, frozen
from stickjax.surgery.usage import mutual_information, report, use

__all__ = [
    "TRAINABLE", "concentrate", "extend", "freeze", "frozen", "merged", "mutual_information", "prune", "report", "use"
]  # fmt: skip
