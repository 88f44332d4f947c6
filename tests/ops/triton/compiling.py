"""What a launch would compile to, for a card that is not here.

Triton's compiler and the assembler that comes with it need no GPU: the arguments of a launch say how it is specialized,
and a target which machine code to make.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
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
    loops: int
    spilled_in_loops: int
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
    registers, spilled, (loops, in_loops) = _assembled(made)
    return Compiled(
        ptx=made.asm["ptx"],
        registers=registers,
        spilled=spilled,
        loops=loops,
        spilled_in_loops=in_loops,
        shared=made.metadata.shared,
        cooperative=made.metadata.launch_cooperative_grid,
        warps=made.metadata.num_warps,
    )


def _assembled(made: Any) -> tuple[int, int, tuple[int, int]]:
    """Registers a thread, bytes of its stack; inner loops, and how many of their instructions are on that stack."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    assert registers is not None, usage
    assert stack is not None, usage
    return int(registers[1]), int(stack[1]), _spills_in_inner_loops(code)


def _output(*command: str | Path) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return finished.stdout + finished.stderr


def _spills_in_inner_loops(code: str) -> tuple[int, int]:
    """Loops that read data and have no loop inside, and loads and stores of the stack in them."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        label = re.match(r"\s*\.(L_x_\d+):", line)
        if label:
            labels[label[1]] = len(names)
        instruction = re.search(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if instruction:
            target = re.search(r"\.(L_x_\d+)", instruction[2]) if instruction[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
            names.append(instruction[1])
    inner = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
        and any(name.startswith(("LDG.", "LDGSTS")) and "STRONG" not in name for name in names[begin:end])
    ]
    return len(inner), sum(name.startswith(("LDL", "STL")) for begin, end in inner for name in names[begin:end])
