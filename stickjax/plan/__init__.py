"""Plan the time and memory of a training step on GPUs that need not be present, without running the step.

`python -m stickjax.plan` (`__main__.py`) compiles the step for a GPU model (`aot.py`). It reads the collectives of the
compiled step (`hlo.py`), counts its floating-point operations and memory traffic (`flops.py`), and estimates its time
(`estimate.py`). It searches for changes of the config that make the step fit into memory (`search.py`) and prints a
report (`report.py`).
"""
