"""Compiles Triton kernels for an H200 on a machine without one.

What a launch would compile is compiled, through Triton's own compiler down to machine
code; nothing runs. Triton brings the assembler along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TARGET = GPUTarget("cuda", 90, 32)
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
}
SHARED_BYTES = 232_448
"""Shared memory that one program may take on this chip."""


@dataclass(kw_only=True)
class Kernel:
    """Stands where a kernel stands: a launch compiles it and notes what it takes."""

    kernel: Any
    registers: list[int] = field(default_factory=list)
    stack: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)

    def __getitem__(self, grid: object) -> Any:
        return self._compile

    def _compile(self, *args: Any, **named: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False))
        options = {name: value for name, value in named.items() if name not in names}
        values |= {name: value for name, value in named.items() if name in names}
        signature, constants, hints = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            if isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
                hints[(place,)] = [["tt.divisibility", 16]]
            elif name in named or value == 1:
                signature[name] = "constexpr"
                constants[(place,)] = value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if value >= 2**31 else "i32"
                if value % 16 == 0:
                    hints[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, hints)
        done = triton.compile(source, target=_TARGET, options=options)
        registers, stack = _resources(done.asm["cubin"])
        self.registers.append(registers)
        self.stack.append(stack)
        self.shared.append(done.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Ask the tool that comes with Triton for registers and stack bytes a thread."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run(
            [tool, "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])
