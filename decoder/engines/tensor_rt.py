"""TensorRT on an NVIDIA GPU: ``tensorrt`` (10.10 and newer) or ``tensorrt-rtx``, the same code for both.

An engine is built on the machine that runs it, from the ONNX file, and kept in a cache by model, GPU, runtime, version
and precision. Precision is the file's: TensorRT takes types as they stand there, so the float16 form is written before
it is built. Device memory, streams and graphs go through NVIDIA's ``cuda-bindings``. Nothing of TensorRT's runtime is
made before a GPU was seen: without one, some of its versions end the process.
"""

import ctypes
import hashlib
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoder.engines import Engine, EngineError
from decoder.model import Model

log = logging.getLogger("veilcam.decode")

RUNTIMES = ("tensorrt", "tensorrt_rtx")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veilcam" / "engines"
MOST_AT_ONCE = 16
MOST_BLOCKS = 256
"""Down and across; 4096 pixels for blocks of 16."""
_USUAL_BLOCKS = (30, 40)
_MAGIC = b"VCTRT1\n"
_GRAPHS = 16
"""Sizes and batches at one time; each holds its own memory on the GPU."""


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for and runs on."""

    name: str
    capability: tuple[int, int]


def find_gpu() -> Gpu:
    """The first GPU, asked of its driver alone.

    Raises:
        EngineError: there is none, or no driver.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise EngineError("no NVIDIA GPU here (its driver, libcuda.so.1, isn't installed)") from None
    count, device, major, minor = (ctypes.c_int(0) for _ in range(4))
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise EngineError("no NVIDIA GPU here (the driver finds none)")
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Gpu(name.value.decode(), (major.value, minor.value))


def load_runtime() -> Any:
    """TensorRT's module, whichever is installed.

    Raises:
        ImportError: neither, or its libraries are missing.
    """
    problems = []
    for name in RUNTIMES:
        try:
            return import_module(name)
        except ImportError as error:  # also where the module is there and its libraries aren't
            problems.append(str(error))
    raise ImportError("; ".join(problems))


def halved(model: Model) -> Model:
    """The float16 form of a float32 file; what goes in and comes out keeps its type.

    Raises:
        ImportError: ``onnx`` isn't installed.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    network = convert_float_to_float16(onnx.load_from_string(model.content), keep_io_types=True)
    content = network.SerializeToString()
    told = model.told | {"precision": "float16", "of": model.of}
    return replace(model, id=hashlib.sha256(content).hexdigest()[:16], told=told, content=content)


def build(runtime: Any, model: Model, capability: str | None = None) -> bytes:
    """Build an engine; that needs no GPU if one is named.

    Args:
        runtime: of ``load_runtime``.
        model: float32, float16, or int8-symmetric.
        capability: as SM86, to build for (TensorRT-RTX); the GPU here if left out.

    Raises:
        EngineError: TensorRT can't parse or build it; with its own words.
    """
    heard = _Listener(runtime)
    builder = runtime.Builder(heard.logger)
    strongly_typed = 1 << int(runtime.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = runtime.OnnxParser(network, heard.logger)
    if not parser.parse(model.content):
        problems = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise EngineError(f"{model.path}: TensorRT can't parse it ({_first_lines(problems)})")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    least, usual = (1, model.rows, 1, 1), (1, model.rows, *_USUAL_BLOCKS)
    profile.set_shape(network.get_input(0).name, least, usual, (MOST_AT_ONCE, model.rows, MOST_BLOCKS, MOST_BLOCKS))
    config.add_optimization_profile(profile)
    if resize := getattr(runtime.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None):
        config.set_preview_feature(resize, True)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(runtime.ComputeCapability, capability), 0)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise EngineError(f"{model.path}: TensorRT can't build it ({_first_lines(heard.errors)})")
    return bytes(built)


def cached(folder: Path, key: str) -> bytes | None:
    """An engine from the cache; None if it isn't there or is damaged, which is said."""
    path = folder / key
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, digest = content[: len(_MAGIC)], content[len(_MAGIC) : len(_MAGIC) + 32]
    built = content[len(_MAGIC) + 32 :]
    if head == _MAGIC and hashlib.sha256(built).digest() == digest:
        return built
    log.warning("%s is damaged; the engine is built anew", path)
    return None


def keep(folder: Path, key: str, built: bytes) -> None:
    """Put an engine into the cache, whole or not at all. A disk that refuses only costs the next start its time."""
    path = folder / key
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_bytes(_MAGIC + hashlib.sha256(built).digest() + built)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        log.warning("%s: the engine can't be kept (%s); it is built anew at each start", folder, error.strerror)


def key_of(model: Model, gpu: Gpu, runtime: Any) -> str:
    """A name for an engine in the cache: another one for whatever would make another engine."""
    made_of = (model.id, model.precision, gpu.name, gpu.capability, runtime.__name__, runtime.__version__)
    shapes = (MOST_AT_ONCE, MOST_BLOCKS, _USUAL_BLOCKS)
    return hashlib.sha256(repr((made_of, shapes)).encode()).hexdigest()[:32]


class TensorRtEngine(Engine):
    """An engine on the first GPU. What it holds there it gives back when nobody holds it any more."""

    most_at_once, most_blocks = MOST_AT_ONCE, MOST_BLOCKS

    def __init__(self, name: str, model: Model, threads: int) -> None:
        super().__init__(name, model, threads)
        gpu, runtime = find_gpu(), load_runtime()
        self._cuda = import_module("cuda.bindings.runtime")
        form = self._form()
        self.precision = form.precision
        key = key_of(form, gpu, runtime)
        built = cached(CACHE, key)
        if built is None:
            log.info("%s: building in %s for %s, once", model.path.name, form.precision, gpu.name)
            built = build(runtime, form)
            keep(CACHE, key, built)
        self._heard = _Listener(runtime)
        self._runtime = runtime.Runtime(self._heard.logger)
        self._contexts = runtime.ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine = self._runtime.deserialize_cuda_engine(built)
        if self._engine is None:
            raise EngineError(f"{model.path}: TensorRT can't run it on {gpu.name} ({_first_lines(self._heard.errors)})")
        self._input, self._output = (self._engine.get_tensor_name(number) for number in range(2))
        self.device = f"{gpu.name}, {runtime.__name__} {runtime.__version__}"
        self._stream = self._call("cudaStreamCreate")
        self._shapes: OrderedDict[tuple[int, ...], _Shape] = OrderedDict()
        let_go = weakref.finalize(self, _let_go, self._cuda, self._stream, self._shapes)
        let_go.atexit = False  # a process that ends gives everything back, and the driver may be gone before this

    def _form(self) -> Model:
        """What is built: the file as it is."""
        return self.model

    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        shape = self._shape(measurements.shape)
        shape.sent[...] = measurements
        self._call("cudaGraphLaunch", shape.graph, self._stream)
        self._call("cudaStreamSynchronize", self._stream)
        return shape.received.copy()

    def _shape(self, sides: tuple[int, ...]) -> "_Shape":
        """Buffers and a graph for one size and batch: copy there, compute, copy back, as one launch."""
        if sides not in self._shapes:
            count, _, height, width = sides
            if len(self._shapes) >= _GRAPHS:
                self._shapes.popitem(last=False)[1].free(self._cuda)
            self._shapes[sides] = self._made(sides, (count, height * self.block, width * self.block))
        self._shapes.move_to_end(sides)
        return self._shapes[sides]

    def _made(self, sides: tuple[int, ...], picture: tuple[int, ...]) -> "_Shape":
        with ExitStack() as undone:  # so many pictures may be more than its memory holds
            shape = self._recorded(sides, picture, undone)
            undone.pop_all()
        return shape

    def _recorded(self, sides: tuple[int, ...], picture: tuple[int, ...], undone: ExitStack) -> "_Shape":
        def taken(take: str, free: str, size: int) -> int:
            address: int = self._call(take, size)
            undone.callback(self._call, free, address)
            return address

        sizes = [int(np.prod(sides)), int(np.prod(picture))]
        pinned = [taken("cudaMallocHost", "cudaFreeHost", size) for size in sizes]
        device = [taken("cudaMalloc", "cudaFree", size) for size in sizes]
        sent, received = (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            for size, address in zip(sizes, pinned, strict=True)
        )
        # A context for each, as a recorded graph holds on to its context's memory. That is given to it, as much as
        # these sides need: left alone, it would take what the largest batch of the largest pictures needs, by the sizes
        # of its layers some 13 GB in float32. How much it asks for, and that it then runs, was never seen on a GPU.
        context = self._engine.create_execution_context(self._contexts)
        if context is None:
            raise RuntimeError(f"TensorRT has no room for {sides} ({_first_lines(self._heard.errors)})")
        if not context.set_input_shape(self._input, sides):
            raise ValueError(f"measurements {sides}: TensorRT doesn't take them")
        between = max(1, context.update_device_memory_size_for_shapes())
        device.append(taken("cudaMalloc", "cudaFree", between))
        context.set_device_memory(device[-1], between)
        context.set_tensor_address(self._input, device[0])
        context.set_tensor_address(self._output, device[1])
        kinds = self._cuda.cudaMemcpyKind

        def enqueue() -> None:
            there, back = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
            self._call("cudaMemcpyAsync", device[0], pinned[0], sizes[0], there, self._stream)
            if not context.execute_async_v3(int(self._stream)):
                raise RuntimeError(f"TensorRT failed ({_first_lines(self._heard.errors)})")
            self._call("cudaMemcpyAsync", pinned[1], device[1], sizes[1], back, self._stream)

        enqueue()  # what is done once for a shape must not be recorded
        self._call("cudaStreamSynchronize", self._stream)
        self._call(
            "cudaStreamBeginCapture", self._stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        )
        enqueue()
        captured = self._call("cudaStreamEndCapture", self._stream)
        try:
            graph = self._call("cudaGraphInstantiate", captured, 0)
        finally:
            self._call("cudaGraphDestroy", captured)
        return _Shape(sent.view(np.int8).reshape(sides), received.reshape(picture), graph, context, pinned, device)

    def _call(self, function: str, *arguments: Any) -> Any:
        return _call(self._cuda, function, *arguments)


class TensorRtHalfEngine(TensorRtEngine):
    """In float16, from the float32 file."""

    def _form(self) -> Model:
        return halved(self.model)


@dataclass(frozen=True, eq=False)
class _Shape:
    sent: NDArray[np.int8]
    received: NDArray[np.uint8]
    graph: Any
    context: Any
    pinned: Sequence[int]
    device: Sequence[int]

    def free(self, cuda: Any) -> None:
        _call(cuda, "cudaGraphExecDestroy", self.graph)
        for address in self.pinned:
            _call(cuda, "cudaFreeHost", address)
        for address in self.device:
            _call(cuda, "cudaFree", address)


def _let_go(cuda: Any, stream: Any, shapes: OrderedDict[tuple[int, ...], _Shape]) -> None:
    """Free what an engine held. A device that is lost, as one that is rebuilt may be, has nothing left to free."""
    try:
        while shapes:
            shapes.popitem()[1].free(cuda)
        _call(cuda, "cudaStreamDestroy", stream)
    except RuntimeError as error:
        log.warning("an engine's memory on the GPU can't be freed: %s", error)


def _call(cuda: Any, function: str, *arguments: Any) -> Any:
    """A function of CUDA's runtime: its result, or its error raised."""
    status, *results = getattr(cuda, function)(*arguments)
    if int(status):
        raise RuntimeError(f"{function}: {status.name}")
    return results[0] if results else None


class _Listener:
    """TensorRT's logger: its errors are kept for the message that a person gets, the rest is left out."""

    def __init__(self, runtime: Any) -> None:
        errors: list[str] = []

        class Logger(runtime.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity <= runtime.ILogger.Severity.ERROR:
                    errors.append(message)

        self.errors, self.logger = errors, Logger()


def _first_lines(messages: Sequence[str]) -> str:
    return "; ".join(message.strip().splitlines()[0][:200] for message in messages[:2]) or "it doesn't say why"
