# Both commands do all the set-up themselves: a virtual environment, what it needs, and then the work.
PYTHON ?= python3
ARGS ?=
DEMO := .venv
TEST := .venv-test

.PHONY: demo test check proto sums clean

demo: $(DEMO)/ready
	@$(DEMO)/bin/veilcam-bench demo $(ARGS)

test: $(TEST)/ready
	$(MAKE) check
	$(TEST)/bin/python -m pytest

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

$(DEMO)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "veilcam needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(DEMO) || { echo "no venv module: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(DEMO) (a minute)"
	@$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[decoder]'
	@touch $@

# torch is for tests only, and first: whatever needs it then takes the version that is there.
$(TEST)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "veilcam needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(TEST) || { echo "no venv module: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(TEST) (some minutes)"
	@$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.*'
	@$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[decoder,openvino,tensorrt-rtx,train,dev]'
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST) build dist demo-out
