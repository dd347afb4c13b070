PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint bench figures numbers clean

demo: .venv/.run  ## restore the main model, measure it on the test pictures, draw the figures
	$(BIN)/python task1_smallnorb_cnn.py --load

test: lint  ## lint and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.run  ## how fast --train feeds its network, beside a bare model.fit
	$(BIN)/python tests/bench_feeding.py

figures: .venv/.run  ## every figure and result again from the saved models
	$(BIN)/python task1_smallnorb_cnn.py --load
	$(BIN)/python task2_diffusion.py --load
	$(BIN)/python tell_the_time.py --load
	$(BIN)/python fashion_cifar_mlp_cnn.py --load
	$(BIN)/python addnist_classifier.py --load
	$(BIN)/python voc_segmentation.py --load

numbers: .venv/.run  ## put the numbers of report/results/*.json into README.md and the reports
	$(BIN)/python report/numbers_in_texts.py

clean:
	rm -rf .venv runs

.venv/.run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: Python 3.11 to 3.13 is needed; choose one with make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.test: .venv/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
