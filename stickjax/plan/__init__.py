"""Plans: the time and memory of a training step on GPUs that need not be present, without running the step.

`python -m stickjax.plan` (`__main__.py`) compiles the step (`aot.py`) for a chip (`chips.py`), reads its collectives
(`hlo.py`), counts its work (`flops.py`), estimates its time (`estimate.py`), searches for changes of the config that
make it fit (`search.py`) and prints a report (`report.py`).
"""
