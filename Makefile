# `make demo` and `make test` create the virtual environment and install what they need when it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver the pinned version comes first: an index that offers CPU builds of it gives one, and nothing
# that is installed later replaces it.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)
# Modules are compiled when they are first imported: compiling all of them takes longer than installing them.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet
ROOMS := rtpurbo_hf modeling kernels training
CHECKED := $(ROOMS) tests
BENCH ?= kernels --output build/bench
# Where it is set, every process would compile all of torch and transformers again: fifteen seconds each.
export PYTHONDONTWRITEBYTECODE :=

.NOTPARALLEL:
.PHONY: help demo test test-lowest sanitize lint format typecheck bench clean results results-kernels results-model results-training \
	results-smollm2-8k results-even results-recipes results-heads results-stage2 results-gemma3-32k results-gemma3-index results-ablation results-sparse-prefill

help:
	@echo "make demo       adapt SmolLM2-135M to RTPurbo on this machine, report in build/demo (STAGES=1,2: stage 2 as well)"
	@echo "make test       lint, type checks and all tests"
	@echo "make test-lowest   what depends on transformers, on the lowest version that setup.cfg declares"
	@echo "make sanitize   memory and race checker over the kernels of the selection (needs an NVIDIA GPU, CUDA's compute-sanitizer)"
	@echo "make lint       ruff: rules and formatting"
	@echo "make format     let ruff format the code"
	@echo "make typecheck  mypy"
	@echo "make bench      kernels against their peers, to build/bench (needs an NVIDIA GPU)"
	@echo "make results    every file of results/ again, to $(RESULTS) (an 80 GB NVIDIA GPU); docs/results.md lists the parts"
	@echo "make clean      remove build output and caches; the virtual environment and downloads stay"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)'"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@echo "Creating the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras; a change of setup.cfg installs again, which is quick when nothing is missing.
$(VENV)/.installed-%: setup.cfg | $(BIN)/python
	@echo "Installing $(TORCH), then this checkout (editable) with its [$*] extra, into $(VENV)"
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/rtpurbo adapt smollm2-135m --output build/demo --preset demo$(if $(STAGES), --stages $(STAGES))

test: lint typecheck
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile

# The contract with transformers, with the oldest release that is declared laid over the same environment.
LOWEST := transformers==5.17.0 huggingface_hub<2
# what huggingface_hub 1.x needs and later releases do not
LOWEST_NEEDS := httpx
CONTRACT := tests/test_config.py tests/test_families.py tests/test_generate.py tests/test_checkpoint.py

$(VENV)-lowest/.installed: Makefile $(VENV)/.installed-test
	@echo "Installing $(LOWEST) into $(VENV)-lowest"
	@$(PIP) --no-deps --upgrade --target $(VENV)-lowest/site-packages $(foreach package,$(LOWEST),"$(package)")
	@$(PIP) --upgrade --target $(VENV)-lowest/site-packages $(LOWEST_NEEDS)
	@touch $@

test-lowest: $(VENV)-lowest/.installed
	PYTHONPATH="$(abspath $(VENV)-lowest/site-packages)" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n 2 --dist loadfile $(CONTRACT)

# Other tests that launch kernels at small sizes: SANITIZED="tests/kernels/test_sink_window.py".
SANITIZED ?= tests/kernels/test_score_select.py -k "(promises and (1000 or padded or int8 or shared)) or below or planted"
SANITIZER ?= compute-sanitizer
SANITIZE := $(SANITIZER) --error-exitcode 1 --target-processes all

sanitize: $(VENV)/.installed-test
	$(SANITIZE) --tool memcheck $(BIN)/python -m pytest -x -p no:cacheprovider $(SANITIZED)
	$(SANITIZE) --tool racecheck $(BIN)/python -m pytest -x -p no:cacheprovider $(SANITIZED)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# mypy sees one package: the rooms are linked into place, as setup.cfg's package_dir maps them.
typecheck: $(VENV)/.installed-test
	@rm -rf build/typecheck && mkdir -p build/typecheck/rtpurbo_hf
	@ln -s "$(CURDIR)"/rtpurbo_hf/* "$(CURDIR)"/modeling "$(CURDIR)"/kernels "$(CURDIR)"/training build/typecheck/rtpurbo_hf/
	cd build/typecheck && "$(abspath $(BIN))"/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p rtpurbo_hf

bench: $(VENV)/.installed-demo
	$(BIN)/rtpurbo bench $(BENCH)

# The commands behind results/; docs/results.md says which file each of them makes. With an environment of your own:
# make results RTPURBO="python -m rtpurbo_hf.cli"
RESULTS ?= build/results
RTPURBO ?= $(BIN)/rtpurbo
TOOL := $(if $(filter $(BIN)/rtpurbo,$(RTPURBO)),$(VENV)/.installed-demo)
TEXTS := --data $(RESULTS)/texts/bible.jsonl --data $(RESULTS)/texts/anarchism.jsonl --data $(RESULTS)/texts/python.jsonl
LONG_TEXTS := $(subst /texts/,/long-texts/,$(TEXTS))
SMOLLM2 := smollm2-135m --preset default --context 8192 --window 2048 --learning-rate 3e-3 --steps 400 --train-blocks 48
SMOLLM2_STAGE2 := --stages 1,2 --stage2-blocks 300 --stage2-steps 100 --accumulation 4 --stage2-schedule cosine --label-rows 600 --no-checkpointing
SMOLLM2_LONG := --stages 1,2 --stage2-blocks 540 --stage2-steps 240 --accumulation 4 --stage2-schedule cosine --label-rows 150 --no-checkpointing --lora-rank 8
SCORE := --head-rule score --top-p 0.88
GEMMA3 := gemma3-270m --preset default --context 32768 --window 8192
# its heads have 256 dimensions, SmolLM2's 64
GEMMA3_INDEX := --index-dim 64 --index-rotary-dim 32
GEMMA3_LONG := --steps 1000 --train-blocks 60
GEMMA3_SHORT := --steps 300 --train-blocks 24
GEMMA3_STAGE2 := --stages 1,2 --stage2-blocks 80 --stage2-steps 40 --accumulation 2 --stage2-schedule cosine --label-rows 600 --checkpointing
TOGETHER := --compare base --suite ruler,ppl,passkey,sparsity --device cuda --batch-tokens 196608
ABLATION := --suite ppl,passkey,sparsity --lengths 8192 --preset default --learning-rate 3e-3 --steps 200 --train-blocks 24 --blocks 8 --rows 512 --samples 6 $(TEXTS) --device cuda
# the texts that the recipe of stage 2 was chosen by: nothing is trained on them
CHOOSING := --compare base --suite ruler,ppl,passkey,sparsity --device cuda --batch-tokens 196608 --variants headwise,sparse --lengths 8192 --blocks 32 --samples 72 --data $(RESULTS)/other-texts/jargon.jsonl --unseen --seed 1
MANY := --lengths 8192 --blocks 54 --samples 480 $(TEXTS)
GEMMA3_EVAL := --lengths 32768 --blocks 12 --samples 6 $(LONG_TEXTS)
INDEX_EVAL := --compare base --suite ppl,passkey,sparsity --variants sparse --device cuda $(GEMMA3_EVAL)
STAGE2_EVAL := --compare base --suite ppl,passkey,sparsity --device cuda --variants headwise,sparse --lengths 8192 --blocks 24 --samples 12 $(TEXTS)

results: results-kernels results-model results-training results-smollm2-8k results-even results-recipes results-heads results-stage2 results-gemma3-32k \
	results-gemma3-index results-ablation results-sparse-prefill

# From Debian packages and Python's sources: a machine that lacks them takes the folders of one that has them.
$(RESULTS)/texts: | $(TOOL)
	$(RTPURBO) corpus --chars 80000 --output $@

$(RESULTS)/long-texts: | $(TOOL)
	$(RTPURBO) corpus --chars 280000 --output $@

$(RESULTS)/other-texts: | $(TOOL)
	$(RTPURBO) corpus --chars 80000 --sources jargon --output $@

$(RESULTS)/topics: | $(TOOL)
	$(RTPURBO) corpus --chars 30000 --sources python-topics --output $@

results-kernels: $(TOOL)
	$(RTPURBO) bench kernels --preset paper --name kernels-h100 --output $(RESULTS)
	$(RTPURBO) bench kernels --preset full --only decode --name decode-geometries-h100 --output $(RESULTS)

results-model: $(TOOL)
	$(RTPURBO) bench model --preset paper --name model-h100 --output $(RESULTS)

results-training: $(TOOL)
	$(RTPURBO) bench training --preset paper --name training-h100 --output $(RESULTS)

results-smollm2-8k: $(TOOL) | $(RESULTS)/texts $(RESULTS)/topics
	$(RTPURBO) adapt $(SMOLLM2) $(SCORE) $(SMOLLM2_LONG) --stage2-learning-rate 6e-4 $(TEXTS) --device cuda --output $(RESULTS)/smollm2-8k
	$(RTPURBO) eval $(RESULTS)/smollm2-8k/model $(TOGETHER) --variants headwise,sparse,sparse_prefill --emulated oracle,topk:equal --lengths 4096,8192 --blocks 32 --samples 24 $(TEXTS) --output $(RESULTS)/smollm2-8k-stage2
	$(RTPURBO) eval $(RESULTS)/smollm2-8k/model $(TOGETHER) --variants headwise,sparse --emulated sparse:p=0.95,oracle $(MANY) --output $(RESULTS)/smollm2-8k-samples
	$(RTPURBO) eval $(RESULTS)/smollm2-8k/model $(TOGETHER) --variants headwise,sparse --lengths 6144 --blocks 24 --samples 96 --data $(RESULTS)/topics/python-topics.jsonl --unseen --seed 2 --output $(RESULTS)/smollm2-8k-other-texts

# the default head rule, which takes 28 heads, and a shorter stage 2
results-even: $(TOOL) | $(RESULTS)/texts
	$(RTPURBO) adapt $(SMOLLM2) --head-rule even $(SMOLLM2_STAGE2) --stage2-learning-rate 3e-4 --lora-rank 8 $(TEXTS) --device cuda --output $(RESULTS)/smollm2-8k-even
	$(RTPURBO) eval $(RESULTS)/smollm2-8k-even/adapter $(TOGETHER) --variants headwise,sparse,sparse_prefill --emulated streaming,oracle,topk:equal --lengths 4096,8192 --blocks 32 --samples 24 $(TEXTS) --output $(RESULTS)/smollm2-8k-even-stage1
	$(RTPURBO) eval $(RESULTS)/smollm2-8k-even/model $(TOGETHER) --variants headwise,sparse,sparse_prefill --emulated oracle,topk:equal --lengths 4096,8192 --blocks 32 --samples 24 $(TEXTS) --output $(RESULTS)/smollm2-8k-even-stage2
	$(RTPURBO) eval results/adapters/smollm2-135m-8k-even --base smollm2-135m --suite ppl,passkey --variants dense,sparse,sparse:kv=int8,sparse:kv=fp8 --lengths 8192 --blocks 32 --samples 24 $(TEXTS) --device cuda --output $(RESULTS)/smollm2-8k-kv8

# recipes of stage 2 side by side, after results-smollm2-8k and results-even: on the texts to choose by, then on the test texts
results-recipes: $(TOOL) | $(RESULTS)/texts $(RESULTS)/other-texts
	$(RTPURBO) adapt $(SMOLLM2) --head-rule even $(SMOLLM2_LONG) --stage2-learning-rate 3e-4 $(TEXTS) --device cuda --output $(RESULTS)/recipe-even
	$(RTPURBO) adapt $(SMOLLM2) $(SCORE) $(SMOLLM2_LONG) --stage2-learning-rate 3e-4 $(TEXTS) --device cuda --output $(RESULTS)/recipe-score
	$(RTPURBO) adapt $(SMOLLM2) --head-rule score --ratio 0.3 --top-p 0.86 $(SMOLLM2_LONG) --stage2-learning-rate 3e-4 $(TEXTS) --device cuda --output $(RESULTS)/recipe-ratio
	$(RTPURBO) eval $(RESULTS)/smollm2-8k-even/model $(CHOOSING) --output $(RESULTS)/smollm2-8k-even-validation
	$(RTPURBO) eval $(RESULTS)/recipe-even/model $(CHOOSING) --output $(RESULTS)/recipe-even-validation
	$(RTPURBO) eval $(RESULTS)/recipe-score/model $(CHOOSING) --output $(RESULTS)/recipe-score-validation
	$(RTPURBO) eval $(RESULTS)/recipe-ratio/model $(CHOOSING) --output $(RESULTS)/recipe-ratio-validation
	$(RTPURBO) eval $(RESULTS)/smollm2-8k/model $(CHOOSING) --output $(RESULTS)/smollm2-8k-validation
	$(RTPURBO) eval $(RESULTS)/smollm2-8k-even/model $(TOGETHER) --variants sparse $(MANY) --output $(RESULTS)/smollm2-8k-even-samples
	$(RTPURBO) eval $(RESULTS)/recipe-even/model $(TOGETHER) --variants sparse $(MANY) --output $(RESULTS)/recipe-even-samples

results-heads: $(TOOL) | $(RESULTS)/texts
	$(RTPURBO) adapt $(SMOLLM2) --head-rule score $(TEXTS) --device cuda --output $(RESULTS)/smollm2-8k-score
	$(RTPURBO) eval $(RESULTS)/smollm2-8k-score/adapter $(TOGETHER) --variants headwise,sparse,sparse_prefill --emulated streaming,oracle,topk:equal --lengths 8192 --blocks 32 --samples 24 $(TEXTS) --output $(RESULTS)/smollm2-8k-score-stage1

# stage 2 with other settings: both head rules, all weights at several learning rates
results-stage2: $(TOOL) | $(RESULTS)/texts
	$(RTPURBO) adapt $(SMOLLM2) --head-rule score $(SMOLLM2_STAGE2) --stage2-learning-rate 1e-5 $(TEXTS) --device cuda --output $(RESULTS)/stage2-score-1e-5
	$(RTPURBO) eval $(RESULTS)/stage2-score-1e-5/model $(STAGE2_EVAL) --output $(RESULTS)/stage2-score-1e-5-eval
	$(RTPURBO) adapt $(SMOLLM2) --head-rule score $(SMOLLM2_STAGE2) --stage2-learning-rate 4e-5 $(TEXTS) --device cuda --output $(RESULTS)/stage2-score-4e-5
	$(RTPURBO) eval $(RESULTS)/stage2-score-4e-5/model $(STAGE2_EVAL) --output $(RESULTS)/stage2-score-4e-5-eval
	$(RTPURBO) adapt $(SMOLLM2) --head-rule even $(SMOLLM2_STAGE2) --stage2-learning-rate 2e-5 $(TEXTS) --device cuda --output $(RESULTS)/stage2-even-2e-5
	$(RTPURBO) eval $(RESULTS)/stage2-even-2e-5/model $(STAGE2_EVAL) --output $(RESULTS)/stage2-even-2e-5-eval

results-gemma3-32k: $(TOOL) | $(RESULTS)/long-texts
	$(RTPURBO) adapt $(GEMMA3) $(GEMMA3_LONG) $(GEMMA3_INDEX) $(GEMMA3_STAGE2) --stage2-learning-rate 3e-4 --lora-rank 8 $(LONG_TEXTS) --device cuda --output $(RESULTS)/gemma3-32k
	$(RTPURBO) eval $(RESULTS)/gemma3-32k/adapter $(TOGETHER) --variants sparse,sparse:p=0.88,sparse_prefill --emulated sparse:p=0.95,sparse:p=0.85,sparse:floor=256,oracle $(GEMMA3_EVAL) --output $(RESULTS)/gemma3-32k-stage1
	$(RTPURBO) eval $(RESULTS)/gemma3-32k/model $(TOGETHER) --variants sparse,sparse:p=0.88,sparse_prefill --emulated sparse:p=0.95,sparse:p=0.85,sparse:floor=256,oracle $(GEMMA3_EVAL) --output $(RESULTS)/gemma3-32k-unrefreshed
	$(RTPURBO) adapt $(GEMMA3) $(GEMMA3_LONG) $(GEMMA3_INDEX) $(GEMMA3_STAGE2) --refresh-steps 500 --stage2-learning-rate 3e-4 --lora-rank 8 $(LONG_TEXTS) --device cuda --output $(RESULTS)/gemma3-32k-refresh
	$(RTPURBO) eval $(RESULTS)/gemma3-32k-refresh/model $(TOGETHER) --variants sparse,sparse:p=0.88,sparse_prefill --emulated sparse:p=0.95,sparse:p=0.85,sparse:floor=256,oracle --lengths 32768 --blocks 12 --samples 48 $(LONG_TEXTS) --output $(RESULTS)/gemma3-32k-stage2
	$(RTPURBO) eval $(RESULTS)/gemma3-32k/model --suite passkey --variants sparse $(GEMMA3_EVAL) --device cpu --dtype float32 --output $(RESULTS)/gemma3-32k-questions
	$(RTPURBO) eval $(RESULTS)/gemma3-32k-refresh/model --suite passkey --variants sparse $(GEMMA3_EVAL) --device cpu --dtype float32 --output $(RESULTS)/gemma3-32k-refresh-questions

# stage 1 with other sizes of the index, and with an index key for each KV head
results-gemma3-index: $(TOOL) | $(RESULTS)/long-texts
	$(RTPURBO) adapt $(GEMMA3) $(GEMMA3_SHORT) $(LONG_TEXTS) --device cuda --output $(RESULTS)/gemma3-index/32-300
	$(RTPURBO) adapt $(GEMMA3) $(GEMMA3_LONG) $(LONG_TEXTS) --device cuda --output $(RESULTS)/gemma3-index/32-1000
	$(RTPURBO) adapt $(GEMMA3) $(GEMMA3_SHORT) $(GEMMA3_INDEX) $(LONG_TEXTS) --device cuda --output $(RESULTS)/gemma3-index/64-300
	$(RTPURBO) adapt $(GEMMA3) $(GEMMA3_LONG) $(GEMMA3_INDEX) --learning-rate 3e-3 $(LONG_TEXTS) --device cuda --output $(RESULTS)/gemma3-index/64-1000-3e-3
	$(RTPURBO) adapt $(GEMMA3) $(GEMMA3_LONG) --index-dim 128 --index-rotary-dim 64 $(LONG_TEXTS) --device cuda --output $(RESULTS)/gemma3-index/128-1000
	$(RTPURBO) eval $(RESULTS)/gemma3-index/32-300/adapter $(INDEX_EVAL) --output $(RESULTS)/gemma3-index/32-300-eval
	$(RTPURBO) eval $(RESULTS)/gemma3-index/32-1000/adapter $(INDEX_EVAL) --output $(RESULTS)/gemma3-index/32-1000-eval
	$(RTPURBO) eval $(RESULTS)/gemma3-index/64-300/adapter $(INDEX_EVAL) --output $(RESULTS)/gemma3-index/64-300-eval
	$(RTPURBO) eval $(RESULTS)/gemma3-index/64-1000-3e-3/adapter $(INDEX_EVAL) --output $(RESULTS)/gemma3-index/64-1000-3e-3-eval
	$(RTPURBO) eval $(RESULTS)/gemma3-index/128-1000/adapter $(INDEX_EVAL) --output $(RESULTS)/gemma3-index/128-1000-eval
	$(RTPURBO) eval gemma3-270m --ablate sharing --suite ppl,passkey,sparsity --preset default $(GEMMA3_LONG) $(GEMMA3_INDEX) $(GEMMA3_EVAL) --device cuda --output $(RESULTS)/gemma3-sharing

results-sparse-prefill: $(TOOL) | $(RESULTS)/texts
	$(RTPURBO) eval results/adapters/smollm2-135m-8k --base smollm2-135m --suite ppl,passkey,sparsity --variants sparse,sparse_prefill --reference sparse --lengths 4096 --blocks 6 --samples 4 --rows 256 --device cpu --output $(RESULTS)/sparse-prefill
	$(RTPURBO) eval results/adapters/smollm2-135m-8k-even --base smollm2-135m --reference sparse --suite ruler,ppl,passkey,sparsity --variants sparse,sparse_prefill --lengths 8192 --blocks 32 --samples 24 $(TEXTS) --device cuda --output $(RESULTS)/sparse-prefill-8k

results-ablation: $(TOOL) | $(RESULTS)/texts
	$(RTPURBO) eval smollm2-135m --ablate split,floor,selector,p,block,ratio,sharing,init $(ABLATION) --output $(RESULTS)/ablation
	$(RTPURBO) eval smollm2-135m --ablate heads,ratio,sharing,init $(ABLATION) --output $(RESULTS)/ablation-heads

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +
