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
	@echo "make serve PORT=8080                  a page to try it out on your photos, and the function over HTTP"
	@echo "make train DEFECT=crack DATA=folder SETS=a,b   train a network from outlines, in out/train"
	@echo "make train DEFECT=crack CLICKS=clicks.csv VAL_CLICKS=val.csv   from your own clicks"
	@echo "make evaluate DATA=folder             the table of all measures on val photos, in out/evaluate.html"
	@echo "make loop DATA=folder                 what a few finished photos of a campaign bring: docs/loop.md, hours on a CPU"
	@echo "make bench                            speed, against a plain port and the machine's peak, in out/bench.png"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "Python 3.11 or 3.12 is needed, not '$(PYTHON)': name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --constraint constraints.txt --editable '.[runtime,runtime-cpu,serve,train,feedback,cvat,bulk,bench,dev]'
	@touch $@

demo: install
	@$(VENV)/python -m defectcam demo "$(IMAGE)" $(if $(ITERATIONS),--iterations $(ITERATIONS))

# One thread each: processes with a thread for every core would wait for one another. Three on two cores, since many tests wait.
test: install
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 3 --dist loadfile

serve: install
	$(VENV)/python -m defectcam serve --port $(PORT) $(ARGS)

train: install
	$(VENV)/python -m defectcam train --defect "$(DEFECT)" --out "out/train/$(DEFECT)" $(ARGS) \
		$(if $(CLICKS),--clicks $(CLICKS) --val-clicks $(VAL_CLICKS),--data $(DATA) --sets $(SETS))

evaluate: install
	$(VENV)/python -m defectcam evaluate --data $(DATA) $(ARGS)

# Weights that never saw the campaigns are made first. What is done is not done again.
LOOP := out/loop
STEPS := --encoder efficientnet-lite0 --encoder-weights imagenet --crop-px 160 --batch 8 --lr 1e-3 --steps 1300 --val-every 650 --val-photos 10
CRACK := --defect crack --data $(DATA) --sets deepcrack,uav75
RUST := --defect rust --data $(DATA) --sets steelbridge440
SPALLING := --defect spalling --data $(DATA) --sets phinet_labelled
OTHERS := steelbridge440,cis_corrosion,deepcrack,uav75,uav_kaggle315
loop: install
	$(VENV)/python -m defectcam train $(CRACK) --none-sets steelbridge440,cis_corrosion --scales 0.5,2 $(STEPS) --out $(LOOP)/train/crack
	test -e $(LOOP)/weights-crack/manifest.json || $(VENV)/python -m defectcam calibrate $(CRACK) --photos 20 \
		--healthy-sets steelbridge440,cis_corrosion --network $(LOOP)/train/crack --out $(LOOP)/weights-crack
	$(VENV)/python -m defectcam replay --defect crack --data $(DATA) --sets uav75 --out $(LOOP)/weights-crack
	$(VENV)/python -m defectcam train $(RUST) --none-sets deepcrack,uav75 --scales 0.25,2 $(STEPS) --out $(LOOP)/train/rust
	test -e $(LOOP)/weights-rust/manifest.json || $(VENV)/python -m defectcam calibrate $(RUST) --photos 20 \
		--healthy-sets deepcrack,uav75 --network $(LOOP)/train/rust --out $(LOOP)/weights-rust
	$(VENV)/python -m defectcam replay --defect rust --data $(DATA) --sets steelbridge440 --out $(LOOP)/weights-rust
	$(VENV)/python -m defectcam train $(SPALLING) --none-sets $(OTHERS) --scales 0.35,4 $(STEPS) --out $(LOOP)/train/spalling
	test -e $(LOOP)/weights-spalling/manifest.json || $(VENV)/python -m defectcam calibrate $(SPALLING) --photos 30 \
		--healthy-sets $(OTHERS) --network $(LOOP)/train/spalling --out $(LOOP)/weights-spalling
	$(VENV)/python -m defectcam replay $(SPALLING) --out $(LOOP)/weights-spalling
	$(VENV)/python -m defectcam loop --defect crack --weights $(LOOP)/weights-crack --data $(DATA) --campaign uav_kaggle315 \
		--old-sets deepcrack,uav75 --all-weights weights --out $(LOOP) $(ARGS)
	$(VENV)/python -m defectcam loop --defect rust --weights $(LOOP)/weights-rust --data $(DATA) --campaign cis_corrosion \
		--judged 40 --old-sets steelbridge440 --all-weights weights --out $(LOOP) $(ARGS)
	$(VENV)/python -m defectcam loop --defect spalling --weights $(LOOP)/weights-spalling --data $(DATA) --campaign mdmcs18 \
		--photos 1,5 --clicked= --proposed= --judged 40 --old-sets phinet_labelled --out $(LOOP) $(ARGS)
	cp $(LOOP)/loop.md $(LOOP)/loop.png docs/

bench: install
	$(VENV)/python -m benchmarks.bench $(ARGS)
