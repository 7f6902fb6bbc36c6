# make demo      a picture, a table of checks and a comparison of costs, into demo/
# make test      lint, types and a choice of tests, the packages' too, in minutes. Every case of some tests: ARGS="tests/ops",
#                ARGS="-k causal", and ARGS=--changed for what is not committed or not pushed
# make test-all  every case of every test, with other processors, sanitizers, the packages and compiled GPU kernels: hours. A stopped
#                run goes on; ARGS="bits ptx" for some parts, ARGS="--list"
# make cpus      the tests of accuracy in each instruction set of this processor, and as torch computes on others
# make lint      ruff, clang-format, mypy; `make format` mends what the first two find
# make lists     what is derived from the code: exports, docs/api.md, the site's navigation
# make bench     times, memory and errors of operators and tasks into benchmarks/results/; ARGS="--device cuda --quick"
# make hub       the repository for Hugging Face's kernel hub, into build/hub/, tried with the hub's own loader and checker
# make docs      the site, with its tables of stored rows, into site/; a warning or a page that lacks something is an error
# make gpu       on a machine with a GPU, torch, triton and pytest, whatever is installed: checks and measurements, nine minutes a call;
#                each call goes on; PARTS=verify, ARGS="--device cpu"
# make venv      .venv, which all of these use, with the versions of tools/lock.txt; WORKERS=2 processes for tests
# make lock      tools/lock.txt out of .venv: `make venv LOCK= VENV=.venv-next` takes the newest versions, `make test lock` keeps them
# Further tools are commands of Python: `.venv/bin/python -m tools` lists them.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
MODELS ?= transformers==5.23.* diffusers==0.42.*
# the versions of all other packages, as constraints: `make venv LOCK=` takes the newest, and `make lock` writes what .venv has
LOCK ?= tools/lock.txt

PY := $(VENV)/bin/python
CXX_SOURCES = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/cpu/*.cpp packages/vlattn-native/*/*/*.h packages/vlattn-native/*/*/*.cpp packages/vlattn-native/tests/*.cpp packages/ptx/*/*/*.h packages/ptx/*/*/*.cpp packages/ptx/tests/*.h packages/ptx/tests/*.cu tests/compiled/*.cu)
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.kernels
TESTED := $(VENV)/.tested
# Python compiles a module when it is first imported and keeps it, even if the variable below says otherwise. pip would compile all
# of them, which takes nearly as long as the rest of the install.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile $(addprefix --constraint=,$(LOCK))
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all suite packages cpus lint format lists bench hub docs gpu venv lock clean

demo: $(READY)
	@$(PY) -m vlattn_fast demo --out demo

# One thread a process: two processes of one thread finish sooner than one process of two, and sums keep their order.
# Threads that wait for work would take the processors from the threads that they wait for: tests have more threads than processors.
# torch.compile tries each instruction set of the processor with a compiler first; this one serves.
suite packages cpus test-all: export OMP_NUM_THREADS := 1
suite packages cpus test-all: export OMP_WAIT_POLICY := passive
suite packages cpus test-all: export TORCHINDUCTOR_VEC_ISA_OK := 1
# mypy takes one processor for more than a minute: it runs beside the tests, and then those of the packages do.
test: $(READY) $(TESTED)
	@$(MAKE) --no-print-directory --jobs=2 suite lint $(if $(ARGS),,packages)

suite: $(READY) $(TESTED)
	@$(PY) -m $(if $(filter --changed,$(ARGS)),tools.test_all --workers $(WORKERS),tests.helpers.process --numprocesses $(WORKERS) \
	  --dist worksteal) $(or $(ARGS),-p tests.helpers.chosen)

packages: $(READY) $(TESTED)
	@$(PY) -m tools.test_all --packages

test-all: $(READY) $(TESTED)
	@$(PY) -m tools.test_all --workers $(WORKERS) $(ARGS)

cpus: $(READY) $(TESTED)
	@$(PY) -m tools.cpus --workers $(WORKERS)

lint: $(TESTED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)
	@$(PY) -m mypy

format: $(TESTED)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_SOURCES)

lists: $(READY) $(TESTED)
	@$(PY) -m tools.lists

bench: $(READY) $(TESTED)
	@$(PY) -m vlattn_fast.benchmarks $(ARGS)

hub: $(TESTED)
	@$(PY) -m tools.environments hub
	@PYTHONPATH=$(VENV)/hub $(PY) -m vlattn_native.hub.build

# It needs what the tests need: tables read Triton's kernels, figures are drawn by models. --clean, since the cache does not see that
# a docstring or a stored row has changed.
docs: .venv-docs/.installed $(READY) $(TESTED)
	@$(PY) -m tools.pages build/docs
	@.venv-docs/bin/python -m zensical build --clean --strict >build/site.log 2>&1 || { cat build/site.log; exit 1; }
	@$(PY) -m tools.pages.check site build/docs build/site.log

# Only the extra's packages, since the pages read the package's source and do not import it. Needs Python 3.11 or newer.
.venv-docs/.installed: pyproject.toml
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*project['optional-dependencies']['docs'], sep='\n')" > .venv-docs/requirements.txt
	@.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --requirement .venv-docs/requirements.txt
	@touch $@

gpu:
	@$(PYTHON) -m tools.gpu.run $(PARTS) $(ARGS)

venv: $(READY) $(TESTED)

# `make` itself names torch and triton
lock: $(READY) $(TESTED)
	@$(PY) -m pip --disable-pip-version-check freeze --all --exclude-editable $(addprefix --exclude ,pip torch triton) >build/lock.txt
	@mv build/lock.txt tools/lock.txt

BUILD_CPU = mkdir -p build && PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py --quiet build_cpu --inplace >build/install.log 2>&1

# torch is installed first and by itself: with a range, pip would take the newest torch and its CUDA libraries.
# The library is compiled meanwhile, which needs no torch; the packages of this tree come last, when their dependencies are there. Both
# use the environment's cmake and ninja: with others the second build would begin anew. A stamp is written last; two makes take turns.
OF_PACKAGES := $(wildcard packages/*/pyproject.toml)
define INSTALL
set -e
if test -e $(INSTALLED) && test -z "$$(find pyproject.toml setup.py $(LOCK) $(OF_PACKAGES) -newer $(INSTALLED))"; then exit 0; fi
echo "installing into $(VENV), which takes minutes the first time"
test -x $(PY) || $(PYTHON) -m venv $(VENV)
$(PIP) "setuptools>=77" "cmake>=3.25" ninja
$(BUILD_CPU) & compiling=$$!
(while sleep 60; do echo "  installing; compiled: $$(grep -o "^.[0-9]*/[0-9]*." build/install.log | tail -n 1)"; done) & telling=$$!
trap "kill $$telling" EXIT
$(PY) -c "import torch; exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 9))" 2>/dev/null || $(PIP) "$(TORCH)"
$(PY) -m tools.requirements explain viz tables probe cli >build/requirements.txt
$(PIP) --requirement build/requirements.txt "$(firstword $(MODELS))"
wait $$compiling || true
$(IN_TREE) --editable . $(addprefix --editable ,$(filter %/vlattn-lab,$(PACKAGES)))
touch $(INSTALLED)
endef
export INSTALL
IN_TURN := $(if $(shell command -v flock),flock $(VENV)/.lock)
IN_TREE := PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) --no-build-isolation --no-deps
PACKAGES := $(wildcard packages/ptx packages/vlattn-lab packages/vlattn-native packages/vlattn-vllm)

$(INSTALLED): pyproject.toml setup.py $(LOCK) $(OF_PACKAGES)
	@mkdir -p $(VENV)
	@$(IN_TURN) sh -c "$$INSTALL"

# What tests need beside it. triton is installed without dependencies, and only on Linux.
define TEST_INSTALL
set -e
if [ $(TESTED) -nt $(INSTALLED) ]; then exit 0; fi
test "$$(uname -s)" != Linux || $(PY) -c "import triton" 2>/dev/null || $(PIP) --no-deps "$(TRITON)"
mkdir -p build
$(PY) -m tools.requirements all test >build/requirements.txt
$(PIP) --requirement build/requirements.txt $(foreach model,$(MODELS),"$(model)")
test -z "$(PACKAGES)" || $(IN_TREE) $(addprefix --editable ,$(PACKAGES))
touch $(TESTED)
endef
export TEST_INSTALL

$(TESTED): $(INSTALLED)
	@$(IN_TURN) sh -c "$$TEST_INSTALL"

# Without a compiler the package works without the library; a source that does not compile stops here. The environment's cmake and
# ninja continue the install's build, which the system's would begin anew.
define KERNELS
set -e
if ! { $(BUILD_CPU); } || grep -q "the build failed" build/install.log; then
  cat build/install.log
  exit 1
fi
touch $(READY)
endef
export KERNELS

$(READY): $(INSTALLED) CMakeLists.txt $(wildcard csrc/*.h csrc/cpu/*)
	@$(IN_TURN) sh -c "$$KERNELS"

clean:
	rm -rf build demo site .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache
