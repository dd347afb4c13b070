PYTHON ?= python3
BIN = .venv/bin
SCRIPTS = $(patsubst %.py,%,$(filter-out app.py,$(wildcard *.py)))
PORT ?= 7860

.PHONY: demo app test lint bench figures numbers reports submission clean

demo: .venv/.run  ## restore every model, measure it on the samples, show the numbers and figures; needs no network
	$(BIN)/python report/demo.py

app: .venv/.app  ## the saved models in a browser, http://localhost:7860 or another PORT
	$(BIN)/python app.py --port $(PORT)

test: lint  ## lint and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.run  ## speed and memory of every script: report/results/bench.json
	$(BIN)/python tests/bench.py
	KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=2 $(BIN)/python tests/bench.py \
	  --model fashion_cifar_mlp_cnn --devices 2

figures: .venv/.run  ## every figure again from the saved models and the full datasets
	set -e; for script in $(SCRIPTS); do $(BIN)/python $$script.py --load; done

numbers: .venv/.run  ## put the measured numbers into README.md and the index of the saved models
	$(BIN)/python report/numbers_and_tables.py

reports: .venv/.test  ## the reports, report/*.pdf and their Markdown, from their sources in report/*/ and the measured numbers
	$(BIN)/python report/build_reports.py

submission: .venv/.test  ## what a brief asks to hand in, as a zip in dist/: make submission BRIEF=pegasus NAME=abcd12
	$(BIN)/python report/make_submission.py "$(BRIEF)" "$(NAME)"

clean:
	rm -rf .venv runs dist

.venv/.run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: Python 3.11 to 3.13 is needed; choose one with make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.test: .venv/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/.app: .venv/.run requirements-app.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-app.txt
	touch $@
