"""What a training step takes on GPUs that need not be there: compiled ahead of time, counted, and estimated.

`python -m stickjax.plan` (`__main__.py`) compiles the step (`aot.py`) for a chip (`chips.py`), reads its collectives
(`hlo.py`), counts its work (`flops.py`), estimates its time (`estimate.py`), searches for changes under which it fits
(`search.py`) and prints a report (`report.py`).
"""
