"""Putting what a trace wrote out, checkpoints and custom gradients, back into what MLX really evaluates."""

from __future__ import annotations

from math import prod

from mlx_tune.graphs.graph import Graph, Mark, Node


def fold_written_out(graph: Graph) -> None:
    """Fold custom gradients and then checkpoints, and forget the operations that nothing needs afterwards.

    Args:
        graph: The traced step, as it was built; changed in place.
    """
    _fold_custom_gradients(graph)
    _fold_weights_first(graph)
    _fold_checkpoints(graph)
    graph.drop_unneeded()


def _fold_custom_gradients(graph: Graph) -> None:
    """Put cotangents and gradients where the marks say. The sums between the marks are needed by nothing afterwards."""
    if not graph.marks:
        return
    links = _Links(graph)
    placeholders = {(m.call, m.position): value for value, m in graph.marks.items() if m.end == "cotangent"}
    replaced: dict[int, int] = {}
    for value, mark in graph.marks.items():
        if mark.end == "input":
            replaced |= links.gradient(value, mark)
        elif mark.end == "output":
            replaced |= links.cotangent(value, mark, placeholders.get((mark.call, mark.position)))

    # Where the forward pass has the outputs too, they are those that the gradient gets.
    sums = _sums_with_nothing(graph)
    for node in (node for node in graph.nodes if node.name == "Depends"):
        outputs = {out: value for out, value in zip(node.outputs, node.inputs, strict=False) if value in sums}
        replaced |= {out: graph.nodes[sums[value]].outputs[0] for out, value in outputs.items()}

    graph.rename(replaced)  # the cotangent of one call can be the gradient of another


class _Links:
    """Who makes and who reads each value of a graph, and the ways from the marks to the arrays that belong there."""

    def __init__(self, graph: Graph) -> None:
        self.values = graph.values
        self.made_by = {value: node for node in graph.nodes for value in node.outputs}
        self.readers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)

    def gradient(self, number: int, mark: Mark) -> dict[int, int]:
        """The array that differentiation made for an input, and its gradient; empty where not asked for."""
        depends = self.readers[number][0]
        product = self._backward(depends.outputs[0])
        if product is None:
            return {}
        made = self._down(product.outputs[0], mark, "ExpandDims Reshape Unflatten Broadcast BroadcastAxes AsType")
        if made is None:
            return {}
        stopped = self.made_by.get(depends.inputs[1])
        # Where the exporter has dropped it, the gradient itself is there.
        return {made: stopped.inputs[0] if stopped and stopped.name == "StopGradient" else depends.inputs[1]}

    def cotangent(self, number: int, mark: Mark, placeholder: int | None) -> dict[int, int]:
        """The placeholder for an output's cotangent, and the cotangent; nothing where none arrives."""
        backward = self._backward(number)
        if backward is None or placeholder is None:
            return {}
        full = self.readers[placeholder][0]
        while full.name != "Full":
            full = self.readers[full.outputs[0]][0]
        value, summed = backward.inputs[1], prod(mark.shape) == 1
        while not (summed and self._fits(value, mark)):
            if value not in self.made_by:
                return {}
            summed = summed or self.made_by[value].name == "Reduce"
            value = self.made_by[value].inputs[0]
        return {full.outputs[0]: value}

    def _backward(self, number: int) -> Node | None:
        """The derivative of a product with a number: MLX writes the number first there. None where there is not one."""
        products = [n for n in self.readers.get(number, []) if n.name == "Multiply" and n.inputs[0] == number]
        return products[0] if len(products) == 1 else None

    def _down(self, value: int, mark: Mark, through: str) -> int | None:
        """The first value of the right shape and type behind some operations; None where nothing reads it."""
        while not self._fits(value, mark):
            readers = [node for node in self.readers.get(value, []) if node.name in through.split()]
            if not readers:
                return None
            value = readers[0].outputs[0]
        return value

    def _fits(self, value: int, mark: Mark) -> bool:
        return self.values[value].shape == mark.shape and self.values[value].dtype == mark.dtype


def _fold_weights_first(graph: Graph) -> None:
    """Have gradients of arguments wait for those of weights, with the operations by which a block sees to that.

    `weights_first` multiplies the inputs of a call, behind a Depends that makes them one group, by marks. A product
    with the input itself is that input, behind one more operation where it is an argument. A product with the input's
    gradient is there where that is asked for.
    """
    forward, backward = _products(graph, "argument", "weight")
    if not forward:
        return
    made_by = graph.producers()
    names: dict[int, int] = {}
    nodes: dict[int, list[Node]] = {}
    groups: dict[int, list[tuple[Mark, int]]] = {}
    for value, at in forward.items():
        product, mark = graph.nodes[at], graph.marks[value]
        group = made_by[product.inputs[1]]
        plain = graph.nodes[group].inputs[mark.position]
        nodes[at] = []
        if mark.end == "argument":
            nodes[at] = [Node("CustomTransforms", (plain, plain), product.outputs)]
        else:
            names[product.outputs[0]] = plain
        groups.setdefault(group, []).extend((mark, gradient) for gradient in backward.get(value, []))
    for group, gradients in groups.items():
        names |= zip(graph.nodes[group].outputs, graph.nodes[group].inputs, strict=True)
        gradients.sort(key=lambda found: found[0].position)
        for mark, at in gradients:
            product = graph.nodes[at]
            gradient, given = product.inputs[1], product.outputs[0]
            others = tuple(graph.nodes[other].inputs[1] for _, other in gradients if other != at)
            nodes[at] = []
            if mark.end == "argument" and others:
                given = len(graph.values)
                graph.values.append(graph.values[gradient])
                nodes[at] = [Node("Depends", (given, *others), product.outputs)]
            nodes[at].insert(0, Node("CustomTransforms", (gradient, gradient), (given,)))
    graph.nodes = [node for i, old in enumerate(graph.nodes) for node in nodes.get(i, [old])]
    graph.rename(names)
    graph.sort()


def _fold_checkpoints(graph: Graph) -> None:
    """Replace every written-out checkpoint by the primitive that `mx.checkpoint` makes.

    `traced_checkpoint` returns y + (z - z) next to a Depends on y; MLX makes one CustomTransforms instead, which
    passes y through, and a Depends on its output. The second evaluation stays only where the gradient uses it. Where
    it waits for the gradients of the outputs, those go through a Depends of their own, as in `mlx_tune.checkpoint`.
    """
    sums = _sums_with_nothing(graph)
    arriving = _arriving(graph)
    rewritten: dict[int, Node | None] = {}
    for i, node in enumerate(graph.nodes):
        if node.name != "Depends" or len(node.inputs) == len(node.outputs):
            continue
        primals, values = node.inputs[: len(node.outputs)], node.inputs[len(node.outputs) :]
        passed = [v for v in values if v in sums]
        if not passed:
            continue
        results = {v: graph.nodes[sums[v]].outputs[0] for v in passed}
        products = [arriving[zero] for v in passed if (zero := graph.nodes[sums[v]].inputs[1]) in arriving]
        wanted = [graph.nodes[at] for at in products]
        first, *others = sorted(sums[v] for v in passed)
        rewritten[first] = Node("CustomTransforms", (*primals, *passed), tuple(results[v] for v in passed), ())
        rewritten |= dict.fromkeys([*others, *products])
        arrived = tuple(product.outputs[0] for product in wanted)
        if wanted:
            rewritten[products[0]] = Node("Depends", tuple(product.inputs[1] for product in wanted), arrived, ())
        ends = (*(results.get(v, v) for v in values), *arrived)
        rewritten[i] = Node("Depends", (*primals, *ends), node.outputs, ())
    nodes = (rewritten.get(i, node) for i, node in enumerate(graph.nodes))
    graph.nodes = [node for node in nodes if node is not None]
    if arriving:
        graph.sort()


def _arriving(graph: Graph) -> dict[int, int]:
    """For each difference with a checkpoint's mark the product of that mark and the gradient of the output."""
    forward, backward = _products(graph, "checkpoint")
    return {
        graph.nodes[at].outputs[0]: backward[mark][0]
        for mark, at in forward.items()
        if len(backward.get(mark, [])) == 1
    }


def _products(graph: Graph, *ends: str) -> tuple[dict[int, int], dict[int, list[int]]]:
    """The operations that multiply some ends' marks with what they mark, and those that multiply its gradients."""
    marks = {value: value for value, mark in graph.marks.items() if mark.end in ends}
    forward: dict[int, int] = {}
    backward: dict[int, list[int]] = {}
    if not marks:
        return forward, backward
    marked = _differences(graph) | {v for node in graph.nodes if node.name == "Depends" for v in node.outputs}
    for i, node in enumerate(graph.nodes):
        if not node.inputs or node.inputs[0] not in marks:
            continue
        mark = marks[node.inputs[0]]
        if node.name in ("AsType", "Broadcast"):
            marks[node.outputs[0]] = mark
        elif node.name == "Multiply" and node.inputs[1] in marked and mark not in forward:
            forward[mark] = i
        elif node.name == "Multiply":
            backward.setdefault(mark, []).append(i)
    return forward, backward


def _differences(graph: Graph) -> set[int]:
    """The differences z - z that a trace made."""
    behind = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.name == "StopGradient"}
    return {
        node.outputs[0]
        for node in graph.nodes
        if node.name == "Subtract" and node.inputs[0] == behind.get(node.inputs[1], node.inputs[1])
    }


def _sums_with_nothing(graph: Graph) -> dict[int, int]:
    """For each value y of which a trace made y + (z - z) the node of that sum."""
    zeros = _differences(graph)
    zeros |= {node.outputs[0] for node in graph.nodes if node.name == "Multiply" and node.inputs[1] in zeros}
    sums: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        if node.name == "Add" and node.inputs[1] in zeros:
            sums.setdefault(node.inputs[0], i)
    return sums
