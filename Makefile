# Every target sets up what it needs; `make install` alone builds .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv/bin
IMAGE ?= docs/sample.jpg
ITERATIONS ?=
PORT ?= 8080
DEFECT ?= crack
DATA ?= ../shared/data
SETS ?= deepcrack,uav75
# Your own clicks instead of DATA and SETS: CSV files with image, x, y, defect.
CLICKS ?=
VAL_CLICKS ?=
# Further options of `defectcam train --help`; weights/README.md has those of the shipped weights.
ARGS ?=

.PHONY: help install demo test serve train evaluate loop bench
help:
	@echo "make install                          build .venv with exact versions"
	@echo "make demo IMAGE=photo ITERATIONS=0,2,8  proposals for one photo, as JSON and picture, in out/demo"
	@echo "make test                             all tests"
	@echo "make serve PORT=8080                  the function over HTTP, without Nuclio"
	@echo "make train DEFECT=crack DATA=folder SETS=a,b   train a network from outlines, in out/train"
	@echo "make train DEFECT=crack CLICKS=clicks.csv VAL_CLICKS=val.csv   from your own clicks"
	@echo "make evaluate DATA=folder             the table of all measures on val photos, in out/evaluate.html"
	@echo "make loop DATA=folder                 two rounds with simulated annotators: docs/loop.md, hours on a CPU"
	@echo "make bench                            speed, against a plain port and the machine's peak, in out/bench.png"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "Python 3.11 or 3.12 is needed, not '$(PYTHON)': name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --constraint constraints.txt --editable '.[runtime,runtime-cpu,train,feedback,cvat,bulk,bench,dev]'
	@touch $@

demo: install
	@$(VENV)/python -m defectcam demo "$(IMAGE)" $(if $(ITERATIONS),--iterations $(ITERATIONS))

# One thread each: two processes with a thread for every core would wait for one another.
test: install
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 2 --dist loadfile

serve: install
	$(VENV)/python -m defectcam serve --port $(PORT)

train: install
	$(VENV)/python -m defectcam train --defect "$(DEFECT)" --out "out/train/$(DEFECT)" $(ARGS) \
		$(if $(CLICKS),--clicks $(CLICKS) --val-clicks $(VAL_CLICKS),--data $(DATA) --sets $(SETS))

evaluate: install
	$(VENV)/python -m defectcam evaluate --data $(DATA) $(ARGS)

loop: install
	$(VENV)/python -m defectcam loop --data $(DATA) --sets deepcrack --none-sets phinet_labelled,cis_corrosion \
		--out out/loop $(ARGS)
	cp out/loop/loop.md out/loop/loop.json out/loop/loop.png docs/

bench: install
	$(VENV)/python -m benchmarks.bench $(ARGS)
