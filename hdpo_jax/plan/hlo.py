"""What a compiled program does, read off its text: operations, bytes and collectives, loops multiplied out.

XLA's own cost analysis counts the body of a loop once and a kernel's operations not at all.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "copy-done", "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
"""What moves no bytes of its own."""
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What writes into its first operand where that lies, and which operand it writes there."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    """As written; of several arrays in parentheses."""
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """What stands behind `name=`, if it is one word."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def results(self) -> list[str]:
        """The shapes of what comes out, one by one."""
        return _top_level(self.shape) if self.shape.startswith("(") else [self.shape]

    @property
    def scope(self) -> str:
        """Where in the source's nesting it comes from: jit(update)/while/body/…"""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Cost:
    """Of one device, through one call."""

    flops: float = 0.0
    """Of matrix products and kernels; two a multiplication that is added up."""
    bytes: float = 0.0
    """Read from and written to HBM."""
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Bytes that the device sends, by kind."""

    def add(self, other: "Cost", times: float) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, sent in other.collectives.items():
            self.collectives[kind] += times * sent


class KernelCost(NamedTuple):
    """What one call of a custom kernel does, which its text does not tell."""

    flops: float = 0.0
    bytes: float | None = None
    """Read from and written to HBM; None: what it is given and what it gives, once."""


Kernels = Callable[[Instruction], KernelCost]


class Module:
    """A compiled module's computations, and what they cost."""

    def __init__(self, text: str, *, trips: Mapping[str, float], kernels: Kernels):
        """`trips`: how often a loop runs whose bound is not written down, by a scope that its name ends in."""
        self._trips = trips
        self._kernels = kernels
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._costs: dict[str, Cost] = {}
        self._entry = ""
        self._devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
        self.unknown_loops: set[str] = set()
        """Scopes of loops that no entry of `trips` names; they count once."""
        self._read(text)

    @cached_property
    def cost(self) -> Cost:
        return self._cost(self._entry)

    def _read(self, text: str) -> None:
        current: dict[str, Instruction] = {}
        last = None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current, last = self._computations.setdefault(found[1], {}), None
                if line.startswith("ENTRY"):
                    self._entry = found[1]
            elif found := _INSTRUCTION.match(line):
                root, last, rest = found.groups()
                current[last] = _instruction(last, rest, bool(root))
            elif last and line != "}":
                # A kernel's attributes may go on over several lines.
                current[last] = replace(current[last], attributes=f"{current[last].attributes}\n{line}")

    def _cost(self, name: str) -> Cost:
        if name not in self._costs:
            self._costs[name] = cost = Cost()
            for instruction in self._computations[name].values():
                self._add(instruction, self._computations[name], cost)
        return self._costs[name]

    def _add(self, one: Instruction, around: Mapping[str, Instruction], cost: Cost) -> None:
        kind = one.opcode.removesuffix("-start")
        if one.opcode == "while":
            cost.add(self._cost(one.attribute("body") or ""), self._trip_count(one))
        elif one.opcode in ("call", "async-start"):
            cost.add(self._cost(one.attribute("to_apply") or one.attribute("calls") or ""), 1)
        elif one.opcode == "conditional":
            # The dearest branch: the others are for what is not there.
            branches = [self._cost(name) for name in self._branches(one)]
            cost.add(max(branches, key=lambda branch: branch.flops + branch.bytes), 1)
        elif kind in COLLECTIVES:
            cost.collectives[kind] += self._sent(one, kind)
            cost.bytes += 2 * _bytes(_result(one))
        elif one.opcode == "fusion":
            called = one.attribute("calls") or ""
            cost.flops += self._fused_flops(called)
            cost.bytes += self._fused_bytes(one, around, called)
        elif one.opcode not in FREE and not one.opcode.endswith(("-done", "-update")):
            cost.flops += self._flops(one, around)
            cost.bytes += self._moved(one, around)

    def _branches(self, one: Instruction) -> Iterator[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names = (
            listed[1] if listed else " ".join(re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", one.attributes))
        )
        return (name.strip("% ,") for name in re.split(r"[,\s]+", names) if name)

    # Loops

    def _trip_count(self, loop: Instruction) -> float:
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        counted = self._counted(loop.attribute("condition") or "", loop.attribute("body") or "")
        if counted is not None:
            return counted
        for scope, count in self._trips.items():
            if re.search(rf"\b{scope}\)*/while$", loop.scope):
                return count
        self.unknown_loops.add(loop.scope)
        return 1

    def _counted(self, condition: str, body: str) -> float | None:
        """The bound that a counter is compared with, over what the body adds to it; None if it is no constant."""
        inside = self._computations[condition]
        root = _root(inside)
        if root.opcode == "fusion":
            called = self._computations[root.attribute("calls") or ""]
            test = _root(called)
            parameters = {one.name: int(one.operands[0]) for one in called.values() if one.opcode == "parameter"}
            operands = [root.operands[parameters[name]] if name in parameters else name for name in test.operands]
            inside = {**called, **inside}
        else:
            test, operands = root, list(root.operands)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (inside[name] for name in operands)
        limit = _constant(bound)
        if limit is None or counter.opcode != "get-tuple-element":
            return None
        return limit / self._added(body, counter.attribute("index") or "0")

    def _added(self, body: str, index: str) -> int:
        """What a body adds to an element of its tuple; 1 where that is not plain to see."""
        inside = self._computations[body]
        root = _root(inside)
        total, name = 0, root.operands[int(index)] if root.opcode == "tuple" else ""
        while (one := inside.get(name)) is not None and one.opcode in ("add", "copy", "fusion"):
            constants = [step for operand in one.operands if (step := _constant(inside.get(operand))) is not None]
            if one.opcode == "fusion" and not constants:
                return max(total, 1)
            total += constants[0] if constants else 0
            name = next((each for each in one.operands if _constant(inside.get(each)) is None), "")
        return max(total, 1)

    # Operations

    def _fused_flops(self, name: str) -> float:
        total = 0.0
        for one in self._computations[name].values():
            if one.opcode == "fusion":
                total += self._fused_flops(one.attribute("calls") or "")
            else:
                total += self._flops(one, self._computations[name])
        return total

    def _flops(self, one: Instruction, around: Mapping[str, Instruction]) -> float:
        if one.opcode == "custom-call":
            return self._kernels(one).flops if _is_kernel(one) else 0.0
        if one.opcode == "dot":
            left = dimensions(around[one.operands[0]].shape)
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
            depth = math.prod(left[int(axis)] for axis in (contracted[1] if contracted else "").split(",") if axis)
            return 2.0 * math.prod(dimensions(one.shape)) * depth
        if one.opcode == "convolution":
            return _convolution_flops(one, dimensions(around[one.operands[1]].shape))
        return 0.0

    # Bytes

    def _moved(self, one: Instruction, around: Mapping[str, Instruction]) -> float:
        result = _bytes(_result(one))
        if _is_kernel(one) and (moved := self._kernels(one).bytes) is not None:
            return moved
        if one.opcode in ("dynamic-slice", "gather", "slice", "copy-start"):
            return 2.0 * result
        if one.opcode in UPDATES:
            return 2.0 * _bytes(around[one.operands[UPDATES[one.opcode]]].shape)
        return result + sum(_bytes(around[name].shape) for name in one.operands if name in around)

    def _fused_bytes(self, one: Instruction, around: Mapping[str, Instruction], called: str) -> float:
        """What a fusion reads and writes: of what it only slices, the slices; of what it updates, the update."""
        inside = self._computations[called]
        total = 0.0
        for parameter in (each for each in inside.values() if each.opcode == "parameter"):
            whole = around.get(one.operands[int(parameter.operands[0])])
            if whole is not None and not _in_vmem(whole.shape):
                total += min(self._read_inside(parameter, inside), _bytes(whole.shape))
        return total + self._written_inside(_root(inside), inside, one.results)

    def _written_inside(self, one: Instruction, inside: Mapping[str, Instruction], shapes: list[str]) -> float:
        """Of what comes out of a fusion as `one`, which has these shapes outside: an update in place, or all of it."""
        if one.opcode == "tuple":
            parts = zip(one.operands, shapes, strict=True)
            return sum(self._written_inside(inside[name], inside, [shape]) for name, shape in parts)
        if len(shapes) == 1 and not _in_vmem(shapes[0]):
            if one.opcode in UPDATES:
                return _bytes(inside[one.operands[UPDATES[one.opcode]]].shape, everywhere=True)
            if one.opcode == "bitcast":
                return self._written_inside(inside[one.operands[0]], inside, shapes)
            if one.opcode == "fusion":
                within = self._computations[one.attribute("calls") or ""]
                return self._written_inside(_root(within), within, shapes)
        return sum(_bytes(shape) for shape in shapes)

    def _read_inside(self, one: Instruction, inside: Mapping[str, Instruction]) -> float:
        """Of what comes into a fusion as `one`: slices of it, also in fusions within, or all of it."""
        total = 0.0
        for use in (each for each in inside.values() if one.name in each.operands):
            if use.opcode in ("dynamic-slice", "gather", "slice"):
                total += _bytes(use.shape, everywhere=True)
            elif use.opcode == "bitcast":
                total += self._read_inside(use, inside)
            elif use.opcode == "fusion":
                within = self._computations[use.attribute("calls") or ""]
                parameters = (each for each in within.values() if each.opcode == "parameter")
                total += sum(
                    self._read_inside(each, within)
                    for each in parameters
                    if use.operands[int(each.operands[0])] == one.name
                )
            elif use.opcode not in UPDATES or use.operands[0] != one.name:
                total += _bytes(one.shape, everywhere=True)
        return total

    def _sent(self, one: Instruction, kind: str) -> float:
        group = self._group(one.attributes)
        size = _bytes(_result(one), everywhere=True)
        if kind == "collective-permute":
            return size
        if kind == "reduce-scatter":
            return size * (group - 1)
        return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)

    def _group(self, attributes: str) -> int:
        """How many devices take part with each other."""
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
            return int(found[2])
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
            return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']*)'", found[2]))
        if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
            return len(found[1].split(","))
        return self._devices


def _root(computation: Mapping[str, Instruction]) -> Instruction:
    """What a computation gives."""
    return next(one for one in computation.values() if one.is_root)


def _is_kernel(one: Instruction) -> bool:
    return one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.attributes


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    shape, rest = _split_shape(rest)
    opcode, _, rest = rest.partition("(")
    inner, attributes = _split_operands(rest)
    if opcode in ("parameter", "constant"):
        operands: tuple[str, ...] = (inner,)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    return Instruction(name, opcode.strip(), shape, operands, attributes, is_root)


def _split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text)
    return text[: end + 1], text[end + 2 :]


def _split_operands(text: str) -> tuple[str, str]:
    end = _closing("(" + text) - 1
    return text[:end], text[end + 1 :]


def _closing(text: str) -> int:
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.operands[0]):
        return None
    return int(one.operands[0])


def _result(one: Instruction) -> str:
    """The shape of what comes out; that of an asynchronous start stands second, behind what goes in."""
    if one.opcode.endswith("-start") and one.shape.startswith("("):
        parts = _top_level(one.shape)
        return parts[1] if len(parts) > 1 else one.shape
    return one.shape


def _top_level(shape: str) -> list[str]:
    parts, depth, begin = [], 0, 1
    for place, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(shape[begin:place].strip())
            begin = place + 1
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts]


def dimensions(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _in_vmem(shape: str) -> bool:
    return "S(1)" in shape


def _bytes(shape: str, *, everywhere: bool = False) -> float:
    """Of the arrays of a shape that lie in HBM, or of all."""
    total = 0.0
    for dtype, sizes, space in _SHAPE.findall(shape):
        if space and not everywhere:
            continue
        bits = BITS.get(dtype) or int(re.sub(r"\D*(\d+).*", r"\1", dtype) if re.search(r"\d", dtype) else 0)
        total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _convolution_flops(one: Instruction, kernel: list[int]) -> float:
    """A product of matrices is a convolution here: 2 x outputs x what is summed for each."""
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", one.attributes)
    if not labels:
        return 0.0
    window = (
        dict(re.findall(r"(\w+)=([^ }]+)", found[1]))
        if (found := re.search(r"window=\{([^}]*)\}", one.attributes))
        else {}
    )
    summed = kernel[labels[1].index("i")]
    sizes = [int(size) for size in window.get("size", "").split("x") if size]
    for axis, size in enumerate(sizes):
        # A dimension that is no sum slides over padding, or over what lies far apart: one place of it counts.
        padded = window["pad"].split("x")[axis] != "0_0" if "pad" in window else False
        apart = window["lhs_dilate"].split("x")[axis] != "1" if "lhs_dilate" in window else False
        summed *= 1 if padded or apart else size
    return 2.0 * math.prod(dimensions(one.shape)) * summed
