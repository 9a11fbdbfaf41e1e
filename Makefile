# make demo: install into .venv, build the extension, run the main job.   make test: the same set-up, then the tests.
# make test-kernels, make test-profiling: the two further tiers of tests.   make test-all: all of them, the slow ones too.
# make bench: every benchmark that the machine can run, and the tables made anew.   make docs: the site, in build/site.
#
# TORCH_BUILD chooses the torch build and TORCH_INDEX the package index that holds it, for example
#   make demo TORCH_BUILD=+cpu TORCH_INDEX=<index>
# Without them pip takes its default build of the version in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
TORCH_BUILD ?=
TORCH_INDEX ?=
DEMO ?= demo
DEVICE ?= cpu

BIN := $(VENV)/bin
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_STAMP := $(VENV)/.torch-$(TORCH_VERSION)$(TORCH_BUILD)
SOURCES := $(wildcard csrc/*/* csrc/*/*/*) setup.py pyproject.toml constraints.txt

# The CUDA object takes minutes and loads only where torch has CUDA: a CPU build of torch goes without, unless ADVKD_CUDA says so.
SKIP_CUDA = $(if $(ADVKD_CUDA),,$(shell $(BIN)/python -c 'import torch; print("" if torch.version.cuda else "ADVKD_CUDA=0")'))

# The oldest torch that pyproject.toml allows, and the one that machines with a GPU are often given.
TORCHES := 2.10.0 2.11.0

.PHONY: install demo test test-kernels test-profiling lint test-all test-matrix test-torch docs rehearse bench audit clean
.PRECIOUS: build/%/.ready

install: $(VENV)/.installed

# The stamp's name holds the build that was asked for: another one installs anew.
$(TORCH_STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed (PYTHON=python3.12)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: 'python3 -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@command -v $${CXX:-g++} > /dev/null || { echo "make: a C++ compiler is needed; on Debian and Ubuntu: apt install g++"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch==$(TORCH_VERSION)$(TORCH_BUILD)"
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.installed: $(TORCH_STAMP) $(SOURCES)
	ADVKD_CPU=1 $(SKIP_CUDA) $(BIN)/pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: install
	$(BIN)/advkd demo --out $(DEMO) --device $(DEVICE)

# Tests whose numbers depend on the processor's instructions: those that test-kernels runs once more without vector instructions
# in torch, and all of them. A set that the processor lacks falls back to its best.
SCHEDULES := tests/system/test_schedulers.py tests/ops/test_sampler_step.py tests/ops/test_gradient_penalty.py
NUMERIC := $(SCHEDULES) $(foreach op,conv_block student_forward norm_act interpolate mask_mul penalty_reduce conv_bias_act_mask \
	image_gradient philox,tests/ops/test_$(op).py) $(foreach part,samplers student fused_student critic_update teacher metrics, \
	tests/system/test_$(part).py)
SINGLE := OMP_NUM_THREADS=1
MATRIX := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx512 \
	ADVKD_ISA=baseline ADVKD_ISA=avx2 ADVKD_ISA=avx512 ADVKD_ISA=avx512bf16 OMP_NUM_THREADS=2

# Without their compiled files, each process of the tests would compile the modules anew.
unexport PYTHONDONTWRITEBYTECODE

# A worker more than there are cores, as some tests wait; one that has no tests left takes over some of another's.
WORKERS ?= $(shell expr $$(nproc) + 1)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: install
	$(PYTEST) --ignore tests/profiling -m "not slow and (core or not kernels)"

# The tests that make test leaves out, so that none runs twice.
test-kernels: install
	$(PYTEST) --ignore tests/profiling -m "kernels and not slow and not core"
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(SCHEDULES)

test-profiling: install lint
	$(PYTEST) tests/profiling

lint: install
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

test-matrix: install
	for set in $(MATRIX); do echo "$$set"; \
		env $(SINGLE) $$set $(BIN)/python -m pytest -q -n0 $(NUMERIC) || failed="$$failed $$set"; done; \
	env ATEN_CPU_CAPABILITY=default ADVKD_ISA=baseline OMP_NUM_THREADS=2 ADVKD_SHARE=1 $(BIN)/python -m pytest -q -n0 $(NUMERIC) || \
		failed="$$failed all"; test -z "$$failed" || { echo "make: these failed:$$failed"; exit 1; }

test-all: install lint
	$(PYTEST) -m "slow or not slow"
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(SCHEDULES)

# Both objects built and the ops tested with each of TORCHES and its own Triton. Needs nvcc; takes 7 GB a torch, and half an hour.
test-torch: $(TORCHES:%=test-torch-%)

test-torch-%: build/torch-%/.ready
	cd $(<D)/tree && ../venv/bin/python -m pytest -n auto --dist worksteal tests/ops tests/kernels

# Strictly: a warning or a dead link is an error. 'python -m http.server --directory build/site' shows it.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file docs/mkdocs.yml

# A rehearsal of a quarter of an hour on a GPU, without one: packages as on a machine that cannot fetch any.
rehearse: build/rehearsal-2.11.0/.ready
	$(<D)/venv/bin/pip uninstall --quiet --yes diffusers nvtx
	cd $(<D)/tree && ../venv/bin/python -m profiling.gpu.rehearsal --out ../results

# A copy of the tree with an environment of its own; the version of torch, which sets those of Triton and setuptools, is the last
# word of the folder.
build/%/.ready: $(SOURCES) $(shell git ls-files '*.py' 2> /dev/null)
	rm -rf $(@D)/tree && mkdir -p $(@D)/tree
	git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -c | tar -x -C $(@D)/tree
	$(PYTHON) -m venv $(@D)/venv
	grep -vE '^(torch|setuptools)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/venv/bin/pip install --quiet --constraint $(@D)/constraints.txt "setuptools>=77" wheel \
		"torch==$(lastword $(subst -, ,$*))$(TORCH_BUILD)"
	cd $(@D)/tree && ADVKD_CPU=1 ADVKD_CUDA=1 ../venv/bin/pip install --quiet --no-build-isolation \
		--constraint ../constraints.txt --editable '.[test]'
	@touch $@

# Everything that this machine can measure, on a clean tree: hours on two cores. DEVICE=cuda for the GPU's benchmarks too.
BENCHMARKS := $(addprefix cases.,student sampler_step gradient_penalty norm_act teacher distillation recording sampling neighbours) trace.demo \
	$(if $(shell command -v valgrind),limits.instruction_counts) $(if $(shell command -v nvcc),limits.ahead)
BY_DEVICE := billion trace.nsys trace.ncu trace.compare roofline

bench: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench,profile]'
	for name in $(BENCHMARKS); do $(BIN)/python -m profiling.$$name || failed="$$failed $$name"; done; \
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m profiling.gpu --full --minutes 60 --device cuda || failed="$$failed gpu";) \
	for device in cpu $(filter cuda,$(DEVICE)); do for name in $(BY_DEVICE); do \
		$(BIN)/python -m profiling.$$name --device $$device || failed="$$failed $$name"; done; done; \
	for name in tables pictures; do $(BIN)/python -m profiling.$$name || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "make: these failed:$$failed"; exit 1; }

# The pinned versions against the published advisories; one that cannot be looked up is a failure.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet "pip-audit>=2.7,<3"
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info advkd/*.so
