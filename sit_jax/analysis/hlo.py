"""Reads the collectives and the memory traffic of a compiled program from its text, with loop trip counts.

The compiler's `cost_analysis` has no collectives, and it counts the body of a loop once, which misses all micro-batches
but one of a step with gradient accumulation. Without loops, its `bytes accessed` is `memory_bytes` to 0.02% (on CPU).
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
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"while", "conditional", "call", "async-start"}
# A custom call that only renames buffers.
_FREE_CALL = 'custom_call_target="ConcatBitcast"'
# Asynchronous instructions whose result contains their operands in addition to the output.
_WITH_OPERANDS = ("copy-start", "all-gather-start", "collective-permute-start")
# The second half of an asynchronous pair; the first half is counted.
_SECOND_HALF = ("-done", "-update")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind (of `COLLECTIVES`) over groups of `group` devices.

    `bytes` are those of the results (of the operands for reduce-scatter) of all `runs` of a step, on each device.
    """

    kind: str
    group: int
    runs: int
    bytes: int

    @property
    def sent(self) -> float:
        """Minimum number of bytes that each device sends, by the bandwidth-optimal algorithm."""
        others = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)


class Traffic(NamedTuple):
    """Data transfers of a step; `memory_bytes` are read and written by every kernel in a device's main memory."""

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
    """Returns the traffic of a program from `compiled.as_text()`, which runs on this number of devices."""
    computations, entry = _parse(text)
    found: dict[tuple[str, int], tuple[int, int]] = {}
    memory = 0
    for name, times in _calls(computations, entry):
        types = {i.name: i.type for i in computations[name]}
        for instruction in computations[name]:
            if instruction.opcode in _FREE or instruction.opcode.endswith(_SECOND_HALF):
                continue
            operands = [types.get(operand, "") for operand in instruction.operands]
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                key = kind, _group_size(instruction.attributes, kind, devices)
                runs, size = found.get(key, (0, 0))
                found[key] = runs + times, size + times * _payload(instruction, operands, kind)
            memory += times * _moved(instruction, operands, computations)
    return Traffic(tuple(Collective(*key, *found[key]) for key in sorted(found) if key[1] > 1), memory)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            inner, attributes = _split_operands(match[5])
            operands = tuple(re.findall(r"%([\w.\-]+)", inner))
            if match[4] in ("constant", "parameter"):
                attributes = inner  # A literal value or a number: no operands.
            current.append(_Instruction(match[2], match[3], match[4], operands, attributes, bool(match[1])))
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
            condition = computations.get(_called(instruction, "condition"), [])
            count = _trip_count(instruction.attributes, condition)
            yield from _calls(computations, _called(instruction, "body"), times * count)
        elif instruction.opcode in ("call", "async-start", "conditional"):
            for key in ("to_apply", "calls", "true_computation"):
                if (name := _called(instruction, key)) in computations:
                    yield from _calls(computations, name, times)


def _called(instruction: _Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


def _trip_count(attributes: str, condition: list[_Instruction]) -> int:
    """Returns the trip count of a loop: the compiler's annotation, or a counter's bound; 1 if it depends on data."""
    if noted := re.search(r"known_trip_count[^\d]*(\d+)", attributes):
        return int(noted[1])
    bounds = [int(i.attributes) for i in condition if i.opcode == "constant" and i.attributes.isdigit()]
    compares = any(i.is_root and (i.opcode == "compare" or "compare" in i.name) for i in condition)
    return max(1, bounds[0]) if compares and len(bounds) == 1 else 1


def _arrays(type_text: str) -> list[tuple[int, bool]]:
    """Returns (bytes, whether it is in main memory) of each array of a type; space 1 is the chip's fast memory."""
    found = []
    for name, shape, layout in _ARRAY.findall(type_text):
        bits = _BITS.get(name) or int((re.findall(r"\d+", name) or ["0"])[0])
        elements = math.prod(int(n) for n in shape.split(",") if n)
        found.append((elements * bits // 8, not re.search(r"S\([1-9]", layout)))
    return found


def _size(*types: str, anywhere: bool = False) -> int:
    """Returns the bytes of the arrays that are in main memory, or of all."""
    return sum(size for text in types for size, in_main in _arrays(text) if in_main or anywhere)


def _moved(instruction: _Instruction, operands: list[str], computations: dict[str, list[_Instruction]]) -> int:
    """Returns the bytes of main memory that one kernel reads and writes; for a slice, only those of the slice."""
    match instruction.opcode:
        case opcode if opcode in _SLICES:
            return 2 * _size(instruction.type)
        case "slice-start":  # Its result is (operand, slice, context). Either may be in the chip's own memory.
            (_, operand_in_main), (size, slice_in_main) = _arrays(instruction.type)[:2]
            return size * (operand_in_main + slice_in_main)
        case "dynamic-update-slice":
            return 2 * _size(operands[1])
        case opcode if opcode in _WITH_OPERANDS:
            return _size(instruction.type)
        case "custom-call" if _FREE_CALL in instruction.attributes:
            return 0
        case "fusion":
            return _moved_by_fusion(instruction, operands, computations[_called(instruction, "calls")])
    return _size(instruction.type, *operands)


def _moved_by_fusion(instruction: _Instruction, operands: list[str], body: list[_Instruction]) -> int:
    types = {i.name: i.type for i in body}
    parameters = {int(i.attributes): i.name for i in body if i.opcode == "parameter"}
    moved, updated = 0, 0
    for index, operand in enumerate(operands):
        users = [i for i in body if parameters[index] in i.operands]
        if not users or not all(_touches_a_slice(user, parameters[index]) for user in users):
            moved += _size(operand)
            continue
        updates = [user for user in users if user.opcode == "dynamic-update-slice"]
        updated += _size(*(types[user.operands[1]] for user in updates), anywhere=True)
        moved += _size(*(user.type for user in users if user not in updates), anywhere=True)
    # A result that is updated in place uses the memory of its operand.
    return moved + (2 * updated or _size(instruction.type))


def _touches_a_slice(user: _Instruction, name: str) -> bool:
    return user.opcode in (*_SLICES, "dynamic-update-slice") and user.operands[0] == name


def _payload(instruction: _Instruction, operands: list[str], kind: str) -> int:
    """Returns the bytes of a collective's result on each device; of its operands for reduce-scatter."""
    starts = instruction.opcode.endswith("-start")
    if kind == "reduce-scatter" or (starts and kind != "all-gather"):
        return _size(*operands, anywhere=True)
    return _size(instruction.type, anywhere=True) - (_size(*operands, anywhere=True) if starts else 0)


def _group_size(attributes: str, kind: str, devices: int) -> int:
    """Returns the number of devices in a group.

    The notations are `{{0,1},{2,3}}`, `[4,2]<=[8]`, `mesh['a'=4,'b'=2] {'b'}`, and the last one with an order of
    devices, `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}`.
    """
    if kind == "collective-permute":
        return 2
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(groups[1].split(",")) if groups and groups[1] else devices
