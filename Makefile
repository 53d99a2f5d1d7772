# make demo          train, evaluate and sample configs/tiny.py on the standard library's source (about 3 minutes, 2 cores)
# make demo-compare  the same for its softmax + RoPE twin, and both length curves in one picture
# make test          the whole test suite
# make test-large    the conversion of a model of eight billion parameters; 17 GB of disk, some minutes
# make test-oldest   the fast tests against the oldest JAX allowed, optimised as users compile
# make test-absent   GPU kernels and steps on 8 and 64 GPUs compiled for GPUs that are not there; needs the CUDA wheels (3.4 GB), no GPU
# make test-ptx      the PTX that the GPU kernels compile to, executed on the CPU; the same environment
# make test-triton   the Triton kernels in Triton's interpreter; the same environment
# make test-install  install into fresh environments outside the checkout, plain and with each extra that needs no GPU
# make docs          the documentation as HTML, in docs/_build/html; a warning is an error
# make lint          ruff

.PHONY: demo demo-compare test test-large test-oldest test-absent test-ptx test-triton test-install docs lint clean
SHELL := /bin/bash
RUN := .venv/bin/python

demo: .venv/.base
	$(RUN) -m stickjax.train configs/tiny.py
	$(RUN) -m stickjax.evaluate runs/tiny --max-tokens=65536
	$(RUN) -m stickjax.generate runs/tiny --prompt "def read_lines(path):" --max-new-tokens 200 --temperature 0.7 --seed 1

demo-compare: demo
	$(RUN) -m stickjax.train configs/tiny_softmax.py
	$(RUN) -m stickjax.evaluate runs/tiny runs/tiny_softmax --max-tokens=65536 --plot runs/compare.png

test: .venv/.test
	$(RUN) -m ruff check .
	$(RUN) -m pytest $(PARALLEL)

test-large: .venv/.test
	$(RUN) -m pytest -m large tests/test_convert.py

# Most of the time goes into compiling, which one core does at a time. The files of a worker share its fixtures.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# The fast ones: compiling every case of the ops takes longer than all of these.
FAST := config data dispatch transformations optim checkpoint models moa sharding processes step train readme
test-oldest: .venv-oldest/.test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv-oldest/bin/python -m pytest $(PARALLEL) -m "not slow" $(FAST:%=tests/test_%.py)
	.venv-oldest/bin/python -m pytest tests/test_lowering.py -k "lower and (packed or some-idle)"

test-absent: .venv-cuda/.test
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest tests/test_absent_gpu.py tests/test_absent_triton.py tests/test_plan_absent.py tests/test_chosen_lowers.py \
	  --deselect tests/test_chosen_lowers.py::test_what_is_chosen_for_hopper_lowers  # needs no wheels: in make test

# Most of the time goes into compiling each call, wherever it stands.
test-ptx: .venv-cuda/.test
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -n 2 --dist worksteal -k ptx $(wildcard tests/test_ptx*.py) tests/test_kernels.py

# In processes of their own: Triton settles when it is imported whether to compile or to interpret.
test-triton: .venv-cuda/.test
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest $(PARALLEL) -k triton $(TRITON:%=tests/test_%.py)
TRITON := triton_call triton kernels expert_kernels

test-install: .venv/bin/python
	.ci/test-install $(RUN)

docs: .venv/.docs
	$(RUN) -m sphinx --fail-on-warning --keep-going -q -j 2 -b html docs docs/_build/html
	@echo docs/_build/html/index.html

lint: .venv/.test
	$(RUN) -m ruff check .

clean:
	rm -rf .venv .venv-oldest .venv-cuda

# A Python of 3.12 or newer: .python-version lets pyenv choose one behind `python3`; otherwise look for it by name.
define make-venv
	@for python in python3 python3.14 python3.13 python3.12; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    $$python -m venv $(1) && exit 0; \
	  fi; \
	done; \
	if command -v uv >/dev/null; then uv venv --seed --python 3.12 $(1) && exit 0; fi; \
	echo "error: stickjax needs Python >= 3.12 with venv, and neither python3 nor python3.12 to python3.14 is one" >&2; exit 1
endef

.venv/bin/python:
	$(call make-venv,.venv)

.venv/.base: .venv/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@ .venv/.base

.venv/.docs: .venv/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@ .venv/.base

.venv-oldest/bin/python:
	$(call make-venv,.venv-oldest)

.venv-oldest/.test: .venv-oldest/bin/python pyproject.toml
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" jax==0.11.2 jaxlib==0.11.2
	@touch $@

.venv-cuda/bin/python:
	$(call make-venv,.venv-cuda)

# The cuda13 extra includes Triton, whose disassembler the compile needs.
.venv-cuda/.test: .venv-cuda/bin/python pyproject.toml
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test,cuda13]"
	@touch $@
