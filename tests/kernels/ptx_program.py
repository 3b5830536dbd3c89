"""Runs inline PTX on the CPU, for all threads of a program: what of the language the assembly of `kernels/` uses.

Threads run one after the other from barrier to barrier, which is right for code whose threads meet in shared memory by
atomics alone in between. Only what is known is run: any other instruction is a `NotImplementedError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

WORD = 0xFFFFFFFF


def _signed(number: int) -> int:
    return ((number & WORD) ^ 0x80000000) - 0x80000000


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
}
# by the beginning of the instruction's name
COMPUTE: dict[str, Callable[..., int]] = {
    "mov.": lambda a: a,
    "cvt.": lambda a: a,
    "mad.wide": lambda a, b, c: a * b + c,
    "add.u64": lambda a, b: a + b,
    "add.": lambda a, b: (a + b) & WORD,
    "sub.": lambda a, b: (a - b) & WORD,
    "shl.": lambda a, b: (a << b) & WORD,
    "shr.u32": lambda a, b: (a & WORD) >> b,
    "and.": lambda a, b: a & b & WORD,
}


class Program:
    """One program of `threads` threads; its shared memory stays from one run to the next, as on a GPU.

    words: global memory, by address. Shared memory begins as something other than zeros.
    """

    def __init__(self, text: str, threads: int) -> None:
        self.threads = threads
        self.words: dict[int, int] = {}
        self.shared: dict[int, int] = {}
        self.bases: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.code: list[str] = []
        for line in (line.strip().rstrip(";") for line in text.splitlines()):
            declared = re.match(r"\.shared \.align \d+ \.b32 (\w+)\[(\d+)\]", line)
            if declared:
                base = self.bases[declared[1]] = 4096 + 4 * len(self.shared)
                self.shared |= {base + 4 * word: 12345 for word in range(int(declared[2]))}
            elif line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line not in "{}" and not line.startswith(".reg"):
                self.code.append(line)

    def run(self, operands: list[list[int]]) -> None:
        """Once through the code; `operands`: of each thread the values of `$0`, `$1`, ..., outputs among them."""
        registers: list[dict[str, int]] = [{} for _ in range(self.threads)]
        at = [0] * self.threads
        while any(place < len(self.code) for place in at):
            at = [self._to_barrier(t, at[t], registers[t], operands[t]) for t in range(self.threads)]
            assert len(set(at)) == 1, "threads wait at different barriers"

    def _to_barrier(self, thread: int, at: int, registers: dict[str, int], operands: list[int]) -> int:
        while at < len(self.code):
            line = self.code[at]
            at += 1
            guard = re.match(r"@(!?)(\w+) (.*)", line)
            if guard:
                line = guard[3]
                if bool(registers[guard[2]]) == (guard[1] == "!"):
                    continue
            name, _, rest = line.partition(" ")
            if name == "bar.sync":
                break
            if name == "bra":
                at = self.labels[rest]
            else:
                self._execute(name, rest, thread, registers, operands)
        return at

    def _execute(self, name: str, rest: str, thread: int, registers: dict[str, int], operands: list[int]) -> None:
        def value(operand: str) -> int:
            operand = operand.strip()
            if re.fullmatch(r"-?\d+", operand):
                return int(operand)
            if operand.startswith("$"):
                return operands[int(operand[1:])]
            return thread if operand == "%tid.x" else self.bases.get(operand, registers.get(operand, 0))

        def keep(operand: str, result: int) -> None:
            if operand.startswith("$"):
                operands[int(operand[1:])] = result
            else:
                registers[operand] = result

        memory = re.fullmatch(r"(.*?),? *\[(.*)\],? *(.*)", rest)
        if memory:
            kind, space = name.split(".")[:2]
            place = sum(value(part) for part in memory[2].split("+"))
            words = self.shared if space == "shared" else self.words
            if space == "shared" and place not in words:
                raise IndexError(f"{name} {rest}: no shared memory at {place}")
            if kind == "ld":
                keep(memory[1], words[place])
            elif kind in ("st", "red"):
                words[place] = value(memory[3]) + (words.get(place, 0) if kind == "red" else 0)
            else:
                raise NotImplementedError(f"{name} {rest}")
            return
        target, *sources = (part.strip() for part in rest.split(","))
        numbers = [value(source) for source in sources]
        if name.startswith("setp."):
            parts = name.split(".")
            as_typed = _signed if parts[-1] == "s32" else lambda number: number & WORD
            holds = COMPARE[parts[1]](as_typed(numbers[0]), as_typed(numbers[1]))
            keep(target, int(holds and (parts[2] != "and" or bool(numbers[2]))))
            return
        for beginning, compute in COMPUTE.items():
            if name.startswith(beginning):
                keep(target, compute(*numbers))
                return
        raise NotImplementedError(f"{name} {rest}")
