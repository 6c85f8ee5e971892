"""Where training runs and in which precision: found out, said aloud, never assumed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from train.checkpoint import processor

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Device:
    """A processor or GPU that trains.

    Attributes:
        torch: as torch names it.
        half: convolutions run in bfloat16; only where the hardware has it (AMX or a GPU), elsewhere it is slower.
        told: its name, for logs and reports.
    """

    torch: torch.device
    half: bool
    told: str

    def precision(self) -> AbstractContextManager[None]:
        """What a forward pass runs under."""
        return torch.autocast(self.torch.type, torch.bfloat16, enabled=self.half)

    def placed(self, module: Module) -> Module:
        """The module in the device's memory, in the layout that its convolutions like best."""
        return cast(Module, module.to(self.torch, memory_format=torch.channels_last))  # type: ignore[call-overload]

    def graphed(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The module with all its kernels launched as one, by CUDA graphs; on a CPU as it is.

        For inputs of one shape, and one call a step before gradients are taken: the next call writes over what this
        one gave. Recorded in a second or two, where ``torch.compile`` took over a minute for the deepest network here.
        """
        return Graphed(module, self) if self.torch.type == "cuda" else module


class Graphed:
    """A module, recorded forward and backward when it is first called, in the mode that it is in then."""

    def __init__(self, module: nn.Module, device: Device) -> None:
        self._module, self._device = module, device
        self._recorded: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._recorded is None:
            self._recorded = self._record(x)
        return self._recorded(x)

    def _record(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        sample = x.detach().clone().requires_grad_(x.requires_grad)
        # Recording runs the module a few times, which moves the statistics of batch normalisation.
        before = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        with torch.autocast(self._device.torch.type, torch.bfloat16, enabled=self._device.half, cache_enabled=False):
            recorded = torch.cuda.make_graphed_callables(self._module, (sample,), allow_unused_input=True)
        for name, buffer in self._module.named_buffers():
            buffer.copy_(before[name])
        return cast(Callable[[Tensor], Tensor], recorded)


@contextmanager
def exactly() -> Iterator[None]:
    """Float32 in full, for what is measured: a GPU else rounds to TensorFloat-32 on the way to its products."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def find_device() -> Device:
    """The GPU if there is one, else the processor."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        told = f"{torch.cuda.get_device_name()}, {'bfloat16' if half else 'float32'}"
        return Device(torch.device("cuda"), half, told)
    flags = Path("/proc/cpuinfo")
    half = flags.exists() and "amx_bf16" in flags.read_text()
    return Device(torch.device("cpu"), half, f"{processor()}, {'bfloat16 (AMX)' if half else 'float32'}")
