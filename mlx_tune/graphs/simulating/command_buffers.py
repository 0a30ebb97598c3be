"""Buffers that stay until the device is done with what reads them: command buffers, CUDA graphs, tasks of a CPU.

A kernel's inputs, the other outputs of its operation and its working memory are held until the command buffer that it
lies in has run (mlx/backend/{cuda,metal}/eval.cpp), and until then nothing can take their place.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mlx_tune.graphs.backends import TASKS_IN_FLIGHT, CommandRule

if TYPE_CHECKING:
    from mlx_tune.graphs.graph import Node
    from mlx_tune.graphs.simulating.allocator import Allocator


class CommandBuffers:
    """Command buffers that are being filled or on their way to the device.

    The device is taken to be so much slower than dispatch that as much as may be is always under way.

    `eval` is told that a buffer has run a moment before its arrays go back: on CUDA the task that tells comes before
    the one that lets go (`eval` in cuda/eval.cpp, `commit` in cuda/device.cpp), on Metal the last operation's arrays
    are held by the handler that tells (`eval` in metal/eval.cpp). So what the last operation read is still there when
    the next one begins, which cannot take it over, and is gone by the time that this one allocates, unless it is read
    again. It is a race: of the steps of one H200 that it decides, two were seen to win it at the beginning as well.

    Args:
        rule: When a buffer is handed over.
        limit_bytes: The memory limit, above which `eval` waits for what is under way; 0 makes it wait for each buffer.
    """

    def __init__(self, rule: CommandRule, limit_bytes: float) -> None:
        """Begin with nothing under way."""
        self.rule, self.limit_bytes = rule, limit_bytes
        self.sizes: list[int] = []
        self._held: list[int] = []
        self._under_way: deque[tuple[bool, list[int], list[int]]] = deque()  # with whether it counts as a task
        self._late: list[int] = []
        self._tasks = self._kernels = self._elements = 0
        self._seen: set[int] = set()

    def begin(self, machine: Allocator) -> None:
        """Let what is late and needed no more go back before the next operation allocates."""
        late, self._late = self._late, []
        for buffer in late:
            if machine.holders[buffer] == 1:
                machine.release(buffer)
            else:
                self._late.append(buffer)

    def add(self, machine: Allocator, node: Node) -> None:
        """Note what an operation holds, hand the buffer over if it is full, and wait as `eval_impl` does."""
        if machine.launches:
            self._let_go(machine, self._late)
        own = machine.buffer[node.outputs[0]]
        keep = [*{machine.buffer[v] for v in (*node.inputs, *node.outputs[1:])} - {own}]
        for buffer in keep:
            machine.holders[buffer] += 1
        keep += machine.temporaries
        machine.temporaries.clear()
        self._kernels += machine.launches + self.rule.waits_for_one
        if machine.launches:
            self._elements += self._read(machine, node)
        if self._kernels > self.rule.operations or self._elements >> 20 > self.rule.elements:
            self.sizes.append(self._kernels)
            self._tasks += 1
            self._commit(keep)
        else:
            self._held += keep
        if self._tasks > TASKS_IN_FLIGHT or (machine.live > self.limit_bytes and self._tasks):
            self._commit()
            self._wait_for_one(machine)
            while machine.live > self.limit_bytes and self._tasks:
                self._wait_for_one(machine)

    def finish(self, machine: Allocator) -> None:
        """Let everything that is under way come to its end."""
        self._commit()
        while self._under_way:
            self._complete(machine)
        self._let_go(machine, self._late)

    def _read(self, machine: Allocator, node: Node) -> int:
        """The elements that MLX counts for an operation."""
        if not self.rule.distinct:
            return sum(machine.layout[v].data_size for v in node.inputs)
        new = {machine.buffer[v]: machine.layout[v].data_size for v in (*node.inputs, *node.outputs)}
        fresh = new.keys() - self._seen
        self._seen |= fresh
        return sum(new[buffer] for buffer in fresh)

    def _commit(self, last: list[int] | None = None) -> None:
        """Hand over what there is; with what the last operation holds, where it is full and counts as a task."""
        if self._held or last is not None:
            self._under_way.append((last is not None, self._held, last or []))
        self._held, self._kernels, self._elements = [], 0, 0
        self._seen.clear()

    def _wait_for_one(self, machine: Allocator) -> None:
        while not self._complete(machine):
            pass

    def _complete(self, machine: Allocator) -> bool:
        """The oldest of what is under way has run; True where that was a task."""
        counts, held, last = self._under_way.popleft()
        self._let_go(machine, held)
        self._let_go(machine, self._late)
        self._late = last
        self._tasks -= counts
        return counts

    @staticmethod
    def _let_go(machine: Allocator, held: list[int]) -> None:
        while held:
            machine.release(held.pop())
