# make demo   the main job on the embedded model: calibrate, convert, verify, draw
# make test   lint, types, size budget, tests
# make bench  speed and memory beside cp;  make quality  picture quality of every recipe
PYTHON ?= python3
VENV ?= .venv
OUT := demo/flux-digits-svdquant-w4a4
BIN := $(VENV)/bin

.PHONY: demo test bench quality clean

demo: $(VENV)/.installed
	$(BIN)/dqconvert flux-digits --scheme svdquant-w4a4 \
	    --calib converter/data/flux-digits/prompts.txt -o $(OUT) --overwrite
	$(BIN)/dqconvert verify $(OUT) --against flux-digits
	$(BIN)/python tools/pictures.py $(OUT) -o demo/digits.png

test: $(VENV)/.installed
	tools/check

bench: $(VENV)/.installed
	$(BIN)/python tools/bench.py

quality: $(VENV)/.installed
	$(BIN)/python tools/quality.py --untouched

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo bench build *.egg-info
