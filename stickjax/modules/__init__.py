"""Modules of a trained mixture: add them, prune them, see which sources of text use them.

A module is an expert, of a feed-forward network ("ffn") or of attention heads ("attention"), after ModuleFormer (Shen
et al., arXiv 2306.04640). `change.py` makes larger and smaller models of a trained one, `usage.py` counts what a text
uses, `python -m stickjax.modules` (`__main__.py`) does both to run folders. What learns is `optim.learn`, a line of
patterns; `kinds.py` says where a model keeps its modules.
"""

from stickjax.modules.change import LEARN, extend, merged, prune
from stickjax.modules.usage import mutual_information, report, use

__all__ = ["LEARN", "extend", "merged", "mutual_information", "prune", "report", "use"]
