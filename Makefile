# What the README names: `make demo` and `make test`. Each sets up what it needs, once.
#
#   PYTHON        the Python 3.11 or newer that environments are made with
#   TORCH_INDEX   another place to take torch from; the CPU build is a tenth of the size:
#                 make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   RAY           the version that `make ray` tests with
#   FUZZ_SECONDS  for each target of `make fuzz`
#   TAG           what `make release-check` checks
#   CONSTRAINTS   the versions to install; empty for the newest that pyproject.toml allows

PYTHON ?= python3
TORCH_INDEX ?=
CONSTRAINTS ?= constraints-dev.txt
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 300
TAG ?= HEAD
RAY ?= 2.40.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
MERGEKIT := .venv-mergekit
MERGEKIT_READY := $(MERGEKIT)/ready

# Byte-compiling 1.5 GB of packages takes longer than installing them; modules are compiled when first imported instead.
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet --no-compile
# Files in the order of tests/conftest.py: the longest first.
IN_PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
TORCH_OPTION = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CONSTRAINTS_OPTION = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-moe demo-tokenizers test test-quick check format site chart families families-page parity gpu memory fencing soak ray fuzz container package release-check bench clean clean-venv

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 18

setup: $(READY)  ## make the virtual environment .venv, which all other targets use

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mergekit-ray needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...")'
	@echo "Setting up $(VENV) (once; one to five minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) $(CONSTRAINTS_OPTION) $(TORCH_OPTION) --editable '.[dev,demo]'
	@touch $@

demo: $(READY)  ## merge two fine-tunes of a real model from S3 to S3 through Ray, then talk to the result
	@PYTHONPATH=tests $(BIN)/python -m demo.run

demo-moe: $(READY)  ## merge four fine-tunes of a real model into a Mixtral, and see which experts its prompts reach
	@PYTHONPATH=tests $(BIN)/python -m demo.moe

demo-tokenizers: $(READY)  ## merge two fine-tunes that added tokens of their own chat formats, then talk to the result in both
	@PYTHONPATH=tests $(BIN)/python -m demo.tokenizers

test: $(READY)  ## unit and integration tests (real S3 server, real Ray)
	$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

test-quick: $(READY)  ## the unit tests of methods, evaluation, planning, config, core and worker (two minutes)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not slow and not s3 and not ray' \
		$(addprefix tests/unit/,methods evaluation planning config core worker) $(PYTEST_ARGS)

check: $(READY)  ## style, types and layering
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PATH=$(BIN):$$PATH $(BIN)/lint-imports
	@SKIP=ruff,ruff-format,mypy,import-linter $(BIN)/pre-commit run --all-files

format: $(READY)  ## format the code as `check` expects
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

site: $(READY)  ## build the documentation as a site, in site/
	$(BIN)/python -m sphinx -q --fresh-env --write-all --fail-on-warning --keep-going docs site

chart: $(READY)  ## regenerate the chart's page and schema, and deploy/
	$(BIN)/python -m helm.list_methods
	$(BIN)/python -m helm.document_values
	$(BIN)/python -m helm.render_deploy

families: $(READY)  ## merge every family that transformers knows, small, and compare with docs/families.md (minutes)
	PYTHONPATH=tests $(BIN)/python -m support.sweep.run --check

families-page: $(READY)  ## write docs/families.md anew
	PYTHONPATH=tests $(BIN)/python -m support.sweep.run

# mergekit is LGPL and pins much: it lives apart, is only ever run as a program, and its environment is made only for this.
$(MERGEKIT_READY): tests/parity/requirements.txt
	@echo "Setting up $(MERGEKIT) (once; one to five minutes)"
	@test -x $(MERGEKIT)/bin/python || $(PYTHON) -m venv $(MERGEKIT)
	@$(MERGEKIT)/bin/python $(PIP_INSTALL) $(TORCH_OPTION) --requirement tests/parity/requirements.txt
	@touch $@

parity: $(READY) $(MERGEKIT_READY)  ## compare our results with mergekit's, tensor by tensor
	MERGEKIT_PYTHON=$(CURDIR)/$(MERGEKIT)/bin/python $(BIN)/python -m pytest -m parity tests/parity $(PYTEST_ARGS)

gpu: $(READY)  ## tests on a CUDA device (needs one, and a torch with CUDA)
	MERGEKIT_RAY_REQUIRE_GPU=1 $(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

memory: $(READY)  ## compare the memory that workers use with what plans ask for, by method (20 minutes on an idle machine, 16 GB)
	$(BIN)/python -m pytest -m memory tests/integration/failures/test_memory_budget.py $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.memory

fencing: $(READY)  ## two drivers on one output, stopped before each of their changes: every interleaving (hours)
	MERGEKIT_RAY_ALL_INTERLEAVINGS=1 $(BIN)/python -m pytest tests/integration/failures/test_fencing.py $(PYTEST_ARGS)

soak: $(READY)  ## 300 merges while the store fails, and 300 pairs of drivers that are stopped and killed (an hour)
	MERGEKIT_RAY_SLOW_LINK=1 $(BIN)/python -m pytest tests/integration/ray/test_slow_link.py $(PYTEST_ARGS)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.soak --schedules 300 --duels 300

ray: $(READY)  ## test executors and jobs with another version of Ray: the oldest supported, or RAY=2.50.0
	@test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	@# Everything else is that of .venv.
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > .venv-ray/packages
	@cp .venv-ray/packages "$$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/others.pth"
	@.venv-ray/bin/python $(PIP_INSTALL) --no-deps "ray==$(RAY)" --editable .
	PATH=$(CURDIR)/.venv-ray/bin:$(CURDIR)/$(BIN):$$PATH .venv-ray/bin/python -m pytest -m ray \
		tests/integration/ray/test_executors.py tests/integration/ray/test_ray_job.py $(PYTEST_ARGS)

fuzz: $(READY)  ## five minutes of coverage-guided fuzzing of each reader of files (atheris; Linux)
	@$(BIN)/python $(PIP_INSTALL) atheris
	for target in header index adapter pickle archive recipe; do \
		PYTHONPATH=tests $(BIN)/python -m fuzz.readers $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

container: $(READY)  ## build the container image with podman and try it (minutes, 6 GB of disk)
	$(BIN)/python -m pytest -m container tests/container $(PYTEST_ARGS)

package: $(READY)  ## build wheel and sdist in dist/, and try each in an empty environment
	PATH=$(CURDIR)/$(BIN):$$PATH PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) release/package.sh $(TORCH_OPTION)

release-check: $(READY)  ## build a release in a clean clone and install each part: TAG=v..., or the last commit
	PATH=$(CURDIR)/$(BIN):$$PATH PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) release/check.sh $(TAG) $(TORCH_OPTION)

bench: $(READY) $(MERGEKIT_READY)  ## time mergekit and mergekit-ray side by side on a 1.1B model (13 GB of disk, 30 minutes)
	$(BIN)/python -m benchmarks.side_by_side --mergekit-python $(MERGEKIT)/bin/python

clean:  ## delete caches, and the models that demo and bench made
	rm -rf .demo .bench .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

clean-venv:  ## delete the virtual environments
	rm -rf $(VENV) $(MERGEKIT)
