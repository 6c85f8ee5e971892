"""Where training runs and in which precision: found out, said aloud, never assumed."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn

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

    def compiled(self, module: Module, graph: bool = True) -> Module:
        """The module with its small kernels fused, and as one CUDA graph; on a CPU as it is.

        Args:
            module: to compile.
            graph: not where a step calls the module several times before its gradients are taken.
        """
        if self.torch.type != "cuda":
            return module
        return cast(Module, torch.compile(module, mode="reduce-overhead" if graph else "default"))


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
