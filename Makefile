# Everything a newcomer needs: `make quickstart` runs the main job, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-fast test-all check lint wheel clean

quickstart: .venv/installed  ## distil a streaming generator of moving digits and measure it
	$(BIN)/self-forcing run quickstart

test: .venv/installed  ## every test that CI runs, two at a time, the slowest of them by name, and how fast the rollout is
	$(BIN)/python -m pytest -m "not by_hand" -n 2 --dist loadgroup --no-loadscope-reorder --durations=25
	$(BIN)/python -m tests.benchmarks --fast

test-fast: .venv/installed  ## the tests that take seconds, two at a time
	$(BIN)/python -m pytest -m "not slow and not by_hand" -n 2 --dist loadfile

test-all: .venv/installed  ## also those that take long and repeat a path that others take
	$(BIN)/python -m pytest --durations=25

lint: .venv/installed  ## style, types, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test wheel  ## what CI would like to know

wheel: .venv/installed  ## the built wheel installs and runs in an environment of its own
	rm -rf dist build/wheel && $(BIN)/python -m build --wheel --outdir dist . >/dev/null
	$(PYTHON) -m venv --clear build/wheel
	echo "$(CURDIR)/$$(echo .venv/lib/python3.*/site-packages)" > $$(echo build/wheel/lib/python3.*/site-packages)/dependencies.pth
	build/wheel/bin/pip install -q --no-deps --no-index dist/*.whl
	cd build && wheel/bin/self-forcing --help && wheel/bin/self-forcing prepare quickstart --root wheel/run --data.source_settings.videos 40 --data.source_settings.held_out_videos 40

# The marker is there only while the environment is whole, so one that was killed half-way is made anew.
.venv/installed: pyproject.toml constraints.txt
	test -f $@ && $(BIN)/python -m pip --version >/dev/null || $(PYTHON) -m venv --clear .venv
	rm -f $@
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist outputs
