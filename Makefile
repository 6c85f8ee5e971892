# Both commands do all the set-up themselves: a virtual environment, what it needs, and then the work.
PYTHON ?= python3
ARGS ?=
DEMO := .venv
TEST := .venv-test
TOOLS := .venv-tools

.PHONY: demo test check proto sums lock licences audit clean

demo: $(DEMO)/ready
	@$(DEMO)/bin/veilcam-bench demo $(ARGS)

# Three at once, also on two cores: a third of the time a test waits for a server, a camera or a clock.
test: $(TEST)/ready
	$(MAKE) check
	$(TEST)/bin/python -m pytest -n 3 --dist loadfile

# Lint, types, generated code, and the wheel in an empty environment.
check: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/python -m tests.generated_code
	sh tests/wheel.sh $(TEST)/bin/python

# Generated with an older compiler than the newest, so that the code runs with a wide range of protobuf versions.
proto: $(TEST)/ready
	PATH="$(CURDIR)/$(TEST)/bin:$$PATH" python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
		protos/v1/veilcam.proto

# What shipped reconstructors are checked by before they are loaded: to be made anew when they change.
sums:
	cd decoder/reconstructors && sha256sum *.onnx > SHA256SUMS
	cd decoder/reconstructors/light && sha256sum *.onnx > SHA256SUMS
	cd decoder/reconstructors/strong && sha256sum *.onnx > SHA256SUMS

$(DEMO)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "veilcam needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(DEMO) || { echo "no venv module: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(DEMO) (a minute)"
	@$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[decoder]'
	@touch $@

# Versions and hashes of all that tests and the container install, for every Python and platform; needs the network.
# torch isn't among them: its wheels, with CUDA or for the CPU alone, come from indices with hashes of their own.
LOCK = $(TOOLS)/bin/uv pip compile pyproject.toml -q --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command "make lock"
lock: $(TOOLS)/ready
	$(LOCK) --extra decoder --extra openvino --extra tensorrt-rtx --extra train --extra dev \
		--override requirements/without-torch.txt -o requirements/test.txt
	$(LOCK) --extra decoder --extra openvino --constraint requirements/test.txt -o requirements/service.txt

# docs/licences.md: of each package of the locks, as it says itself.
licences: $(TEST)/ready $(TOOLS)/ready
	$(TOOLS)/bin/pip-licenses --python $(TEST)/bin/python --format json --with-system --output-file $(TOOLS)/licences.json
	$(TEST)/bin/python -m tests.licences $(TOOLS)/licences.json

# Whether anything in the locks has known holes. It asks pypi.org about each version: where that can't be asked, it says
# so and passes; where it can, a package that isn't known there fails it as a hole does.
audit: $(TOOLS)/ready
	@if $(TOOLS)/bin/python -c 'import urllib.request as u; u.urlopen("https://pypi.org/pypi/pip/24.0/json", timeout=10)' 2> /dev/null; \
	then for lock in service test; do $(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements/$$lock.txt || exit 1; done; \
	else echo "not audited: pypi.org tells nothing of versions here"; fi

$(TOOLS)/ready: Makefile
	@$(PYTHON) -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check 'uv==0.*' 'pip-licenses==5.*' 'pip-audit==2.*'
	@touch $@

# torch is for tests only, and first. What else there is comes from the lock, by its hashes.
$(TEST)/ready: pyproject.toml requirements/test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "veilcam needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(TEST) || { echo "no venv module: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(TEST) (some minutes)"
	@$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.*'
	@$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/test.txt
	@$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST) $(TOOLS) build dist demo-out
