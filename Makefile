# make demo          train, evaluate and sample configs/tiny.py on the standard library's source (6 to 8 minutes, 2 cores)
# make demo-compare  also train its softmax + RoPE variant, and plot the length curves of both in one picture
# make test          run ruff and the test suite: every behaviour once
# make test-exhaustive  run more cases of the same behaviours, such as all calls of the kernels in interpreters
# make test-notebooks  run the long notebooks and pages of the documentation, which test-exhaustive runs too
# make test-all      test and test-exhaustive
# make test-large    test the conversion of a model of eight billion parameters (17 GB of disk, some minutes)
# make test-oldest   run the fast tests with the oldest allowed JAX
# make test-absent   compile the GPU kernels and steps on 8 and 64 GPUs without a GPU; needs the CUDA wheels (3.4 GB)
# make test-ptx      execute the PTX of the GPU kernels on the CPU; needs the CUDA wheels, no GPU
# make test-triton   run the Triton kernels in Triton's interpreter; needs the CUDA wheels, no GPU
# make test-torch    compare exported models in PyTorch with stickjax, also on tasks of lm-evaluation-harness; installs
#                    torch, its libraries and lm_eval (4 minutes)
# make test-install  install into fresh environments outside the checkout, plain and with each extra that needs no GPU
# make docs          build the documentation as HTML, in docs/_build/html; a warning is an error
# make lint          run ruff

.PHONY: demo demo-compare test test-exhaustive test-notebooks test-all test-large test-oldest test-absent test-ptx test-triton test-torch test-install
.PHONY: docs lint clean
SHELL := /bin/bash
RUN := .venv/bin/python
# pip does not compile the modules that it installs. Python compiles a module at its first import, and stores the result
# for later starts, unless PYTHONDONTWRITEBYTECODE is set, as in many containers. Then each start would compile all
# modules again: 7 seconds instead of 3.
PIP := pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

demo: .venv/.base
	$(RUN) -m stickjax.train configs/tiny.py
	$(RUN) -m stickjax.evaluate runs/tiny --max-tokens=65536
	$(RUN) -m stickjax.generate runs/tiny --prompt "def read_lines(path):" --max-new-tokens 200 --temperature 0.7 --seed 1

demo-compare: demo
	$(RUN) -m stickjax.train configs/tiny_softmax.py
	$(RUN) -m stickjax.evaluate runs/tiny runs/tiny_softmax --max-tokens=65536 --plot runs/compare.png

test: .venv/.test
	$(RUN) -m ruff check .
	$(RUN) -m pytest $(PARALLEL) --durations=10

test-exhaustive: .venv/.test
	$(RUN) -m pytest $(PARALLEL) -m exhaustive

test-notebooks: .venv/.test
	$(RUN) -m pytest -n 2 --dist worksteal -m exhaustive tests/test_notebook.py tests/test_docs.py

test-all: test test-exhaustive

test-large: .venv/.test
	$(RUN) -m pytest -m large tests/test_convert.py

# Most of the time goes into compilation, which uses one core, so two workers run. A test file stays on one worker,
# because its tests share fixtures.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# Test files that use many parts of JAX: types, compilation, checkpoints, meshes and several processes.
FAST := config data dispatch optim checkpoint moa sharding processes step train branches compiled
test-oldest: .venv-oldest/.test
	.venv-oldest/bin/python -m pytest $(PARALLEL) -m "not slow and not exhaustive" $(FAST:%=tests/test_%.py)
	.venv-oldest/bin/python -m pytest tests/test_lowering.py -k "lower and (packed or some-idle)"

test-absent: .venv-cuda/.test
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest $(PARALLEL) tests/test_absent_gpu.py tests/test_absent_triton.py tests/test_plan_absent.py tests/test_chosen_lowers.py \
	  --deselect tests/test_chosen_lowers.py::test_what_is_chosen_for_hopper_lowers  # needs no wheels; make test runs it

# Most of the time goes into compiling each call, so single tests, not whole files, are distributed over the workers.
test-ptx: .venv-cuda/.test
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -n 2 --dist worksteal -k ptx $(wildcard tests/test_ptx*.py) tests/test_kernels.py

# These tests need separate processes: Triton decides at its import whether to compile or to interpret.
test-triton: .venv-cuda/.test
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest $(PARALLEL) -k triton $(TRITON:%=tests/test_%.py)
TRITON := triton_call triton kernels expert_kernels

test-torch: .venv/.eval .venv-torch/.installed
	TORCH_PYTHON=$(CURDIR)/.venv-torch/bin/python $(RUN) -m pytest tests/test_remote_code.py tests/test_harness.py

test-install: .venv/bin/python
	.ci/test-install $(RUN)

docs: .venv/.docs
	$(RUN) -m sphinx --fail-on-warning --keep-going -q -j 2 -b html docs docs/_build/html
	@echo docs/_build/html/index.html

lint: .venv/.test
	$(RUN) -m ruff check .

clean:
	rm -rf .venv .venv-oldest .venv-cuda .venv-torch

# Make the environment $(1) with a Python of version 3.12 or newer. With pyenv, `python3` is the version of
# .python-version. Otherwise search for a Python by its name. $(2) is the name of another Python to try first, and
# $(3) the oldest version, such as 10 for 3.10, if it is not 3.12.
define make-venv
	@for python in $(2) python3 python3.14 python3.13 python3.12; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $(or $(3),12)))' 2>/dev/null; then \
	    $$python -m venv $(1) && exit 0; \
	  fi; \
	done; \
	if command -v uv >/dev/null; then uv venv --seed --python 3.12 $(1) && exit 0; fi; \
	echo "error: $(1) needs Python >= 3.$(or $(3),12) with venv, and no such Python was found" >&2; exit 1
endef

.venv/bin/python:
	$(call make-venv,.venv)

.venv/.base: .venv/bin/python pyproject.toml
	$(RUN) -m $(PIP) --editable .
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml
	$(RUN) -m $(PIP) --editable ".[test]"
	@touch $@ .venv/.base

.venv/.eval: .venv/bin/python pyproject.toml
	$(RUN) -m $(PIP) --editable ".[test,eval]"
	@touch $@ .venv/.base .venv/.test

.venv/.docs: .venv/bin/python pyproject.toml
	$(RUN) -m $(PIP) --editable ".[docs]"
	@touch $@ .venv/.base

.venv-oldest/bin/python:
	$(call make-venv,.venv-oldest)

.venv-oldest/.test: .venv-oldest/bin/python pyproject.toml
	.venv-oldest/bin/python -m $(PIP) --editable ".[test]" jax==0.11.2 jaxlib==0.11.2
	@touch $@

# This environment has no JAX, so it may have an older Python. pip takes a CPU build of torch, such as 2.13.0+cpu, if
# its configuration names a place that has one (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL). Python 3.11 is tried first,
# because such places have builds for it. Otherwise pip takes the build of the default index, which includes CUDA on
# Linux and needs several gigabytes.
.venv-torch/bin/python:
	$(call make-venv,.venv-torch,python3.11,10)

.venv-torch/.installed: .venv-torch/bin/python Makefile
	.venv-torch/bin/python -m $(PIP) \
	  torch==2.13.0 "transformers>=5.24,<6" "lm_eval[hf]>=0.4.13" einops triton==3.6.0
	.venv-torch/bin/python -m $(PIP) --no-deps \
	  flash-linear-attention==0.6.0 fla-core==0.6.0
	@touch $@

.venv-cuda/bin/python:
	$(call make-venv,.venv-cuda)

# The cuda13 extra includes Triton, which contains the disassembler that benchmarks/absent_gpu.py needs.
.venv-cuda/.test: .venv-cuda/bin/python pyproject.toml
	.venv-cuda/bin/python -m $(PIP) --editable ".[test,cuda13]"
	@touch $@
