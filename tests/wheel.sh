#!/bin/sh
# Build the wheel, install it alone into an empty environment, and run the camera's command there: the base install is
# the camera and must not need torch, onnx or onnxruntime.
set -eu
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --wheel --outdir "$work" . > "$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$work"/*.whl
cd "$work"
"$work/venv/bin/veilcam-encode" --help > /dev/null
"$work/venv/bin/veilcam-encode" 'pattern:64x64#3' --out "$work/pattern.messages" --as-fast-as-possible
for module in torch onnx onnxruntime; do
    if "$work/venv/bin/python" -c "import $module" 2> /dev/null; then
        echo "$module got into the base install" >&2
        exit 1
    fi
done
for command in veilcam-decode veilcam-train veilcam-bench; do
    if "$work/venv/bin/$command" 2> "$work/told"; then
        echo "$command runs without its extra" >&2
        exit 1
    fi
    grep -q "pip install 'veilcam\[" "$work/told" || { echo "$command doesn't name its extra:" >&2; cat "$work/told" >&2; exit 1; }
done
echo "the wheel installs alone and its camera runs"
