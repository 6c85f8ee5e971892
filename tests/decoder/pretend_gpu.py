"""A GPU played by this process, as far as ``TensorRtEngine`` uses one: its memory is here, onnxruntime is its TensorRT.

It holds the engine to the order of CUDA's and TensorRT's calls and to the sizes of its buffers; whether a real one does
what is expected of it can't be seen here.
"""

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

STREAM = 7


class Status(enum.IntEnum):
    """What each function says first."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Cuda:
    """Stands in for ``cuda.bindings.runtime``.

    Attributes:
        room: bytes that the device has left.
        held: what was allocated and not freed yet, by address.
        graphs: that were made and not destroyed yet.
        recorded: what graphs were made of, and wasn't destroyed yet.
        streams: that were made and not destroyed yet.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)

    def __init__(self) -> None:
        self.room = 1 << 40
        self.held: dict[int, Any] = {}
        self.graphs: list[Any] = []
        self.recorded: list[Any] = []
        self.streams: list[int] = []
        self._recorded: list[Callable[[], None]] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """At once, or when the graph that is being recorded is launched."""
        if self._recorded is None:
            work()
        else:
            self._recorded.append(work)

    def of(self, address: int, size: int) -> int:
        """An address where so many bytes are allocated."""
        assert size <= ctypes.sizeof(self.held[address])
        return address

    def holds_nothing(self) -> bool:
        """Whether all that was taken was given back."""
        return not (self.held or self.graphs or self.recorded or self.streams)

    def cudaStreamCreate(self) -> tuple[Status, int]:
        self.streams.append(STREAM)
        return Status.cudaSuccess, STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams.remove(stream)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        assert stream == STREAM
        assert self._recorded is None
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        assert size > 0
        if sum(map(ctypes.sizeof, self.held.values())) + size > self.room:
            return Status.cudaErrorMemoryAllocation, 0
        buffer = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(buffer)] = buffer
        return Status.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[Status]:
        del self.held[address]
        return (Status.cudaSuccess,)

    cudaMallocHost, cudaFreeHost = cudaMalloc, cudaFree

    def cudaMemcpyAsync(self, there: int, source: int, size: int, kind: int, stream: int) -> tuple[Status]:
        assert kind
        assert stream == STREAM

        def copy() -> None:
            ctypes.memmove(self.of(there, size), self.of(source, size), size)

        self.do(copy)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:
        assert (stream, mode) == (STREAM, 2)
        self._recorded = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, Any]:
        assert stream == STREAM
        recorded, self._recorded = self._recorded, None
        self.recorded.append(recorded)
        return Status.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Status, Any]:
        assert len(graph) == 3
        assert graph in self.recorded
        self.graphs.append(graph)
        return Status.cudaSuccess, graph

    def cudaGraphDestroy(self, graph: Any) -> tuple[Status]:
        self.recorded.remove(graph)
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Status]:
        assert graph in self.graphs
        for work in graph:
            work()
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Status]:
        self.graphs.remove(graph)
        return (Status.cudaSuccess,)


class TensorRt:
    """Stands in for ``tensorrt``; an engine is an ONNX file."""

    __name__, __version__ = "tensorrt", "10.10"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)

    class ILogger:
        """To be subclassed."""

        Severity = SimpleNamespace(ERROR=1)

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def Runtime(self, logger: object) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda built: _Engine(built, self._cuda))


class _Engine:
    def __init__(self, built: bytes, cuda: Cuda) -> None:
        self.session = onnxruntime.InferenceSession(built, providers=["CPUExecutionProvider"])
        self.cuda = cuda

    def get_tensor_name(self, number: int) -> str:
        return str([*self.session.get_inputs(), *self.session.get_outputs()][number].name)

    def create_execution_context(self, strategy: int) -> "_Context":
        assert strategy == 2
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._sides: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._between = 0

    def set_input_shape(self, name: str, sides: tuple[int, ...]) -> bool:
        self._sides = sides
        return name == self._engine.get_tensor_name(0)

    def update_device_memory_size_for_shapes(self) -> int:
        return 8 * int(np.prod(self._sides))

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes() > 0
        self._between = self._engine.cuda.of(address, size)

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert self._between in self._engine.cuda.held
        self._engine.cuda.do(self._execute)
        return True

    def _execute(self) -> None:
        session, cuda = self._engine.session, self._engine.cuda
        given, wanted = (self._engine.get_tensor_name(number) for number in range(2))
        size = int(np.prod(self._sides))
        levels = ctypes.string_at(cuda.of(self._addresses[given], size), size)
        (pictures,) = session.run([wanted], {given: np.frombuffer(levels, np.int8).reshape(self._sides)})
        ctypes.memmove(cuda.of(self._addresses[wanted], pictures.nbytes), pictures.tobytes(), pictures.nbytes)
