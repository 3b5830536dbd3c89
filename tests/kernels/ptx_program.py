"""Runs inline PTX on the CPU, for all threads of a program: what of the language the assembly of `kernels/` uses.

Threads run one after the other to the next instruction that a warp or all of them make together, which is right for
code whose threads meet in shared memory by atomics alone in between. Any instruction that is not known is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

WORD = 0xFFFFFFFF
WARP = 32


def _signed(number: int) -> int:
    return ((number & WORD) ^ 0x80000000) - 0x80000000


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & WORD))[0]


def as_bits(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


def _lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & WORD


def _on_floats(compute: Callable[..., float]) -> Callable[..., int]:
    return lambda *bits: as_bits(compute(*(as_float(each) for each in bits)))


COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
}
# by the beginning of the instruction's name, the first that fits
COMPUTE: dict[str, Callable[..., int]] = {
    "mov.": lambda a: a,
    "cvt.rn.f32.u32": lambda a: as_bits(a & WORD),
    "cvt.rn.f32.s32": lambda a: as_bits(_signed(a)),
    "mad.wide.u32": lambda a, b, c: (a & WORD) * b + c,
    "mad.wide.s32": lambda a, b, c: _signed(a) * b + c,
    "mad.lo.": lambda a, b, c: (a * b + c) & WORD,
    "mul.lo.": lambda a, b: a * b & WORD,
    "mul.f32": _on_floats(lambda a, b: a * b),
    "add.f32": _on_floats(lambda a, b: a + b),
    "sub.f32": _on_floats(lambda a, b: a - b),
    "fma.rn.f32": _on_floats(lambda a, b, c: a * b + c),
    "ex2.approx.ftz.f32": _on_floats(lambda a: 2.0**a),
    "add.": lambda a, b: (a + b) & WORD,
    "sub.": lambda a, b: (a - b) & WORD,
    "shl.b32": lambda a, b: (a << min(b & WORD, WARP)) & WORD,
    "shr.u32": lambda a, b: (a & WORD) >> min(b & WORD, WARP),
    "shr.s32": lambda a, b: _signed(a) >> min(b & WORD, WARP) & WORD,
    "shf.l.wrap.b32": lambda low, high, n: ((high & WORD) << 32 | low & WORD) << (n & 31) >> 32 & WORD,
    "and.": lambda a, b: a & b & WORD,
    "or.": lambda a, b: (a | b) & WORD,
    "xor.": lambda a, b: (a ^ b) & WORD,
    "not.": lambda a: ~a & WORD,
    "lop3.b32": _lop3,
    "popc.b32": lambda a: (a & WORD).bit_count(),
    "min.s32": lambda a, b: min(_signed(a), _signed(b)) & WORD,
    "max.s32": lambda a, b: max(_signed(a), _signed(b)) & WORD,
    "min.u32": lambda a, b: min(a & WORD, b & WORD),
    "selp.b32": lambda a, b, p: a if p else b,
}
REDUCE: dict[str, Callable[[list[int]], int]] = {
    "redux.sync.add.u32": lambda values: sum(values) & WORD,
    "redux.sync.max.s32": lambda values: max(_signed(each) for each in values) & WORD,
    "redux.sync.min.u32": lambda values: min(each & WORD for each in values),
}


class Line(NamedTuple):
    """An instruction: the predicate that guards it and whether it has to be set, its name, and its operands."""

    guard: str
    wanted: bool
    name: str
    operands: tuple[str, ...]

    @property
    def together(self) -> bool:
        return self.name.startswith(("bar.sync", "shfl.sync", "redux.sync"))


class Program:
    """One program of `threads` threads; its shared memory stays from one run to the next, as on a GPU.

    words: global memory of 4 bytes by address; any other one is read as `memory(address)`. Shared memory begins as
    something other than zeros.
    """

    def __init__(self, text: str, threads: int, memory: Callable[[int], int] | None = None) -> None:
        self.threads = threads
        self.memory = memory
        self.words: dict[int, int] = {}
        self.shared: dict[int, int] = {}
        self.bases: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.code: list[Line] = []
        for line in (line.strip().rstrip(";") for line in text.splitlines()):
            declared = re.match(r"\.shared \.align \d+ \.b32 (\w+)\[(\d+)\]", line)
            if declared:
                base = self.bases[declared[1]] = 4096 + 4 * len(self.shared)
                self.shared |= {base + 4 * word: 12345 for word in range(int(declared[2]))}
            elif line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line not in "{}" and not line.startswith(".reg"):
                guard, wanted, name, rest = re.fullmatch(r"(?:@(!?)(\w+) )?(\S+) ?(.*)", line).group(2, 1, 3, 4)
                operands = re.findall(r"\{.*?\}|\[.*?\]|[^,\s|]+", rest)
                self.code.append(Line(guard or "", wanted != "!", name, tuple(operands)))

    def run(self, operands: list[list[int]]) -> None:
        """Once through the code; `operands`: of each thread the values of `$0`, `$1`, ..., outputs among them."""
        self.operands = operands
        self.registers: list[dict[str, int]] = [{} for _ in range(self.threads)]
        self.at = [0] * self.threads
        end = len(self.code)
        while True:
            for thread in range(self.threads):
                self._run_alone(thread)
            moved = False
            for first in range(0, self.threads, WARP):
                warp = range(first, first + WARP)
                assert len({self.at[thread] for thread in warp}) == 1, "the threads of a warp wait at different places"
                if self.at[first] < end and not self.code[self.at[first]].name.startswith("bar"):
                    self._run_together(warp)
                    moved = True
            if moved:
                continue
            assert len(set(self.at)) == 1, "warps wait at different barriers"
            if self.at[0] == end:
                return
            self.at = [place + 1 for place in self.at]

    def _run_alone(self, thread: int) -> None:
        while self.at[thread] < len(self.code):
            line = self.code[self.at[thread]]
            if line.together:
                assert not line.guard
                return
            self.at[thread] += 1
            if line.guard and bool(self.registers[thread][line.guard]) != line.wanted:
                continue
            if line.name == "bra":
                self.at[thread] = self.labels[line.operands[0]]
            else:
                self._execute(line, thread)

    def _run_together(self, warp: range) -> None:
        line = self.code[self.at[warp[0]]]
        for thread in warp:
            self.at[thread] += 1
        if line.name in REDUCE:
            result = REDUCE[line.name]([self._value(line.operands[1], thread) for thread in warp])
            for thread in warp:
                self._keep(line.operands[0], thread, result)
            return
        kind = line.name.split(".")[2]
        *targets, source, step, _, _ = line.operands
        values = [self._value(source, thread) for thread in warp]
        for lane, thread in enumerate(warp):
            number = self._value(step, thread)
            origin = {"up": lane - number, "bfly": lane ^ number, "idx": number % WARP}[kind]
            self._keep(targets[0], thread, values[origin if 0 <= origin < WARP else lane])
            if len(targets) > 1:
                self._keep(targets[1], thread, int(0 <= origin < WARP))

    def _value(self, operand: str, thread: int) -> int:
        if re.fullmatch(r"-?\d+", operand):
            return int(operand)
        if operand.startswith("$"):
            return self.operands[thread][int(operand[1:])]
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        if operand == "%tid.x":
            return thread
        return self.bases[operand] if operand in self.bases else self.registers[thread].get(operand, 0)

    def _keep(self, operand: str, thread: int, result: int) -> None:
        if operand.startswith("$"):
            self.operands[thread][int(operand[1:])] = result
        else:
            self.registers[thread][operand] = result

    def _execute(self, line: Line, thread: int) -> None:
        kind, _, rest = line.name.partition(".")
        place = next((each for each in line.operands if each.startswith("[")), None)
        if place is not None:
            address = sum(self._value(part.strip(), thread) for part in place[1:-1].split("+"))
            self._access(kind, rest, address, line, thread)
        elif kind == "setp":
            self._compare(rest.split("."), line, thread)
        else:
            compute = next((each for name, each in COMPUTE.items() if line.name.startswith(name)), None)
            if compute is None:
                raise NotImplementedError(line)
            values = [self._value(each, thread) for each in line.operands[1:]]
            self._keep(line.operands[0], thread, compute(*values))

    def _compare(self, parts: list[str], line: Line, thread: int) -> None:
        as_typed = {"s32": _signed, "f32": as_float}.get(parts[-1], lambda number: number & WORD)
        target, *sources = line.operands
        first, second, *also = (self._value(each, thread) for each in sources)
        holds = COMPARE[parts[0]](as_typed(first), as_typed(second))
        if also:
            holds = {"and": holds and bool(also[0]), "or": holds or bool(also[0])}[parts[1]]
        self._keep(target, thread, int(holds))

    def _access(self, kind: str, rest: str, address: int, line: Line, thread: int) -> None:
        shared = rest.startswith("shared")
        words = self.shared if shared else self.words
        if shared and address not in words:
            raise IndexError(f"{line}: no shared memory at {address}")
        assert address % 4 == 0
        if kind == "ld":
            targets = line.operands[0].strip("{}").split(",")
            assert len(targets) == 1 or address % 16 == 0
            for i, target in enumerate(targets):
                there = address + 4 * i
                value = words[there] if shared or there in words or not self.memory else self.memory(there)
                self._keep(target.strip(), thread, value)
            return
        value = self._value(line.operands[-1], thread)
        if kind == "st":
            words[address] = value & WORD
        elif (kind, "add" in rest, "max" in rest) == ("red", True, False):
            words[address] = words.get(address, 0) + value
        elif (kind, "max.s32" in rest) == ("red", True):
            words[address] = max(_signed(words[address]), _signed(value)) & WORD
        else:
            raise NotImplementedError(line)
