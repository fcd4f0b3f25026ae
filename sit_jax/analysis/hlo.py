"""Parses the text of a compiled program for its collectives and memory traffic, with loop trip counts.

The compiler's `cost_analysis` counts a loop body once, and thus misses most of a transformer with looped blocks.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
# These rename or rearrange buffers, or call other computations, which are counted separately; no data are moved.
_FREE = frozenset(
    {
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "constant",
        "after-all",
        "while",
        "conditional",
        "call",
        "async-start",
    }
)
# Custom calls that only rename buffers.
_FREE_CALLS = ('custom_call_target="ConcatBitcast"',)
# Asynchronous instructions whose result contains their operands in addition to the output.
_WITH_OPERANDS = frozenset({"copy-start", "all-gather-start", "collective-permute-start"})
# The second half of an asynchronous pair; the first half is counted.
_SECOND_HALF = re.compile(r"-(done|update)$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over groups of one size.

    Attributes:
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `collective-permute`.
        group: Number of devices in each group.
        runs: Number of executions per step.
        bytes: Bytes of its result (of its operand for reduce-scatter) on each device, per step.
    """

    kind: str
    group: int
    runs: int
    bytes: int

    @property
    def sent(self) -> float:
        """Minimum number of bytes that each device sends, by the bandwidth-optimal algorithm."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


class Traffic(NamedTuple):
    """Data transfers of a step.

    Attributes:
        collectives: Between devices.
        memory_bytes: Transfers between a device and its main memory: operands read and results written by every kernel.
    """

    collectives: tuple[Collective, ...]
    memory_bytes: int


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


def read_traffic(text: str, devices: int) -> Traffic:
    """Returns the traffic of a compiled program.

    Args:
        text: `compiled.as_text()`.
        devices: Number of devices that run the program.
    """
    computations, entry = _parse(text)
    found: dict[tuple[str, int], list[int]] = {}
    memory = 0
    for name, times in _calls(computations, entry):
        types = {i.name: i.type for i in computations[name]}
        for instruction in computations[name]:
            opcode = instruction.opcode
            if opcode in _FREE or _SECOND_HALF.search(opcode):
                continue
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                size = _payload(instruction, types, kind)
                entry_of = found.setdefault((kind, _group_size(instruction.attributes, kind, devices)), [0, 0])
                entry_of[0] += times
                entry_of[1] += times * size
            memory += times * _moved(instruction, types, computations)
    collectives = tuple(
        Collective(kind, group, count, size) for (kind, group), (count, size) in sorted(found.items()) if group > 1
    )
    return Traffic(collectives, memory)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _COMPUTATION.match(line)
            if head:
                current = head[2]
                computations[current] = []
                entry = current if head[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and current:
            inner, attributes = _split_operands(match[5])
            operands = tuple(re.findall(r"%([\w.\-]+)", inner)) or tuple(re.findall(r"\b([a-z][\w\-]*\.\d+)\b", inner))
            if match[4] in ("constant", "parameter"):
                attributes = inner  # A literal value or a number: no operands.
            computations[current].append(
                _Instruction(match[2], match[3], match[4], operands, attributes, bool(match[1]))
            )
    return computations, entry


def _split_operands(rest: str) -> tuple[str, str]:
    """Returns the operands of an instruction, and the text after its closing bracket."""
    depth = 1
    for position, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return rest[:position], rest[position + 1 :]
    return rest, ""


def _calls(computations: dict[str, list[_Instruction]], entry: str, times: int = 1) -> Iterator[tuple[str, int]]:
    """Yields each computation that is run separately (not within a kernel), and its number of executions."""
    yield entry, times
    for instruction in computations[entry]:
        if instruction.opcode == "while":
            body, condition = _attribute(instruction, "body"), _attribute(instruction, "condition")
            count = _trip_count(instruction.attributes, computations.get(condition, []))
            yield from _calls(computations, body, times * count)
        elif instruction.opcode in ("call", "async-start", "conditional"):
            names = [_attribute(instruction, key) for key in ("to_apply", "calls", "true_computation")]
            for name in names:
                if name in computations:
                    yield from _calls(computations, name, times)


def _attribute(instruction: _Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


def _trip_count(attributes: str, condition: list[_Instruction]) -> int:
    """Returns the trip count of a loop: the compiler's annotation, or a counter's bound; 1 if it depends on data."""
    noted = re.search(r"known_trip_count[^\d]*(\d+)", attributes)
    if noted:
        return int(noted[1])
    root = next((i for i in condition if i.is_root), None)
    bounds = [int(i.attributes) for i in condition if i.opcode == "constant" and re.fullmatch(r"\d+", i.attributes)]
    counts = root is not None and (root.opcode == "compare" or "compare" in root.name) and len(bounds) == 1
    return max(1, bounds[0]) if counts else 1


def _arrays(type_text: str) -> list[tuple[int, bool]]:
    """Returns (bytes, whether it is in main memory) of each array of a type; space 1 is the chip's fast memory."""
    found = []
    for name, shape, layout in _ARRAY.findall(type_text):
        bits = _BITS.get(name) or int((re.findall(r"\d+", name) or ["0"])[0])
        elements = math.prod(int(n) for n in shape.split(",") if n)
        found.append((elements * bits // 8, not re.search(r"S\([1-9]", layout or "")))
    return found


def _size(type_text: str) -> int:
    return sum(size for size, main in _arrays(type_text) if main)


def _moved(instruction: _Instruction, types: dict[str, str], computations: dict[str, list[_Instruction]]) -> int:
    """Returns the bytes of main memory that one kernel reads and writes; for a slice, only those of the slice."""
    operands = [types.get(name, "") for name in instruction.operands]
    match instruction.opcode:
        case "dynamic-slice" | "slice" | "gather":
            return 2 * _size(instruction.type)
        case "slice-start":  # Its result is (operand, slice, context). Either may be in the chip's own memory.
            arrays = _arrays(instruction.type)
            (_, operand_in_main), (size, slice_in_main) = arrays[:2]
            return size * (operand_in_main + slice_in_main)
        case "dynamic-update-slice":
            return 2 * (_size(operands[1]) if len(operands) > 1 else 0)
        case opcode if opcode in _WITH_OPERANDS:
            return _size(instruction.type)
        case "custom-call" if any(call in instruction.attributes for call in _FREE_CALLS):
            return 0
        case "fusion":
            body = computations.get(_attribute(instruction, "calls"), [])
            return _moved_by_fusion(instruction, operands, body)
    return _size(instruction.type) + sum(_size(operand) for operand in operands)


def _moved_by_fusion(instruction: _Instruction, operands: list[str], body: list[_Instruction]) -> int:
    inside = {i.name: i for i in body}
    parameters = {int(i.attributes): i for i in body if i.opcode == "parameter"}
    moved, updated = 0, 0
    for index, operand in enumerate(operands):
        parameter = parameters.get(index)
        users = [i for i in body if parameter and parameter.name in i.operands]
        if users and all(_touches_a_slice(i, parameter.name) for i in users if parameter):
            for user in users:
                if user.opcode == "dynamic-update-slice":
                    part = inside.get(user.operands[1])
                    updated += _whole(part.type) if part else 0
                else:
                    moved += _whole(user.type)
        else:
            moved += _size(operand)
    # A result that is updated in place uses the memory of its operand.
    return moved + (2 * updated if updated else _size(instruction.type))


def _touches_a_slice(user: _Instruction, name: str) -> bool:
    return user.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice") and user.operands[0] == name


def _whole(type_text: str) -> int:
    return sum(size for size, _ in _arrays(type_text))


def _payload(instruction: _Instruction, types: dict[str, str], kind: str) -> int:
    operands = sum(_whole(types.get(name, "")) for name in instruction.operands)
    if kind == "reduce-scatter" or (instruction.opcode.endswith("-start") and kind != "all-gather"):
        return operands
    if instruction.opcode.endswith("-start"):
        return max(0, _whole(instruction.type) - operands)
    return _whole(instruction.type)


def _group_size(attributes: str, kind: str, devices: int) -> int:
    """Returns the number of devices in a group.

    The notations are `{{0,1},{2,3}}`, `[4,2]<=[8]`, `mesh['a'=4,'b'=2] {'b'}`, and the last one with an order of
    devices, `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}`.
    """
    if kind == "collective-permute":
        return 2
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(groups[1].split(",")) if groups and groups[1] else devices
