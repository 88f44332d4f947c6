"""What a launch would compile to, for a card that is not here.

Triton's compiler and the assembler that comes with it need no GPU: the arguments of a launch say how it is specialized,
and a target which machine code to make.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Machine code for one launch, and what the assembler says of it."""

    ptx: str
    registers: int
    spilled: int
    shared: int
    cooperative: bool
    warps: int


def compile_launch(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], capability: int) -> Compiled:
    """Compile as Triton does when a launch comes, with memory aligned to 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _assembled(made, capability)
    return Compiled(
        ptx=made.asm["ptx"],
        registers=registers,
        spilled=spilled,
        shared=made.metadata.shared,
        cooperative=made.metadata.launch_cooperative_grid,
        warps=made.metadata.num_warps,
    )


def _assembled(made: Any, capability: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as the machine code says."""
    import tempfile

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60)
    text = usage.stdout + usage.stderr
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers is not None, text
    assert stack is not None, text
    return int(registers[1]), int(stack[1])
