"""The way of a value through a package: which files one has to open, in turn, to follow it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

Function = ast.FunctionDef | ast.AsyncFunctionDef

#: A definition: the file's dotted name, and the names of the definition inside it.
Place = tuple[str, str]

#: Names of the value itself, as fields hold it.
_NAMES = ("model", "_model")

#: Stands for the value itself among the classes that an expression may be of.
_ITSELF: Place = ("", "itself")


class Way:
    """The calls that hand a value on, followed in the order in which they are written.

    An argument hands it on where it is the value, or an object (or a collection of objects) of a class that has a field
    named `model` or a field of such a class. A call of a method hands on its object. Types are those of annotations.
    A function is read at its first call; a later call enters its file, and nothing below it. Calls inside nested
    functions and lambdas count where they are written, and `partial(f, ...)` as a call of `f`. Properties do not.

    Args:
        trees: The syntax trees of the package's files by their dotted names.
        file: Where the function is that the value comes in by.
        function: Its name.
        parameter: The name of the value there.

    Attributes:
        steps: The file of each such call, in order, each time that it is another than that of the call before.
    """

    def __init__(self, trees: Mapping[str, ast.Module], file: str, function: str, parameter: str) -> None:
        self._trees = trees
        self.known: dict[Place, ast.AST] = {}
        self.named: dict[str, dict[str, Place]] = {name: {} for name in trees}
        for name, tree in trees.items():
            self._collect(name, tree)
        self.holders = self._find_holders()
        self._read: set[Place] = set()
        self.steps: list[str] = []
        self.enter((file, function), {parameter: {_ITSELF}})

    @property
    def files(self) -> set[str]:
        """The files entered."""
        return set(self.steps)

    @property
    def returns(self) -> int:
        """The number of times that a file is entered which was left before."""
        return len(self.steps) - len(self.files)

    def _collect(self, file: str, tree: ast.Module) -> None:
        names = self.named[file]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    names[alias.asname or alias.name] = (node.module, alias.name)
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, *Function.__args__)):
                names[node.name] = (file, node.name)
                self.known[file, node.name] = node
            if isinstance(node, ast.ClassDef):
                for child in node.body:
                    if isinstance(child, Function):
                        self.known[file, f"{node.name}.{child.name}"] = child

    def _find_holders(self) -> set[Place]:
        """Classes with a field that holds the value, however indirectly."""
        fields: dict[Place, set[Place]] = {}
        for place, node in self.known.items():
            if isinstance(node, ast.ClassDef):
                stored = {
                    x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)
                }
                declared = {
                    x.target.id: x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
                }
                fields[place] = {_ITSELF} if (stored | set(declared)) & set(_NAMES) else set()
                for name in stored | set(declared):
                    fields[place] |= self.attribute(place, name)
        holders = {_ITSELF}
        while more := {place for place, kinds in fields.items() if kinds & holders} - holders:
            holders |= more
        return holders

    def attribute(self, place: Place, name: str) -> set[Place]:
        """The classes of a field, a property or what a method gives back, as annotated, of an object of a class."""
        node, (file, kind) = self.known.get(place), place
        if not isinstance(node, ast.ClassDef):
            return set()
        method = self.known.get((file, f"{kind}.{name}"))
        if isinstance(method, Function):
            return self.annotated(file, method.returns, place)
        for child in node.body:
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name) and child.target.id == name:
                return {_ITSELF} if name in _NAMES else self.annotated(file, child.annotation, place)
        if name in _NAMES and any(isinstance(x, ast.Attribute) and x.attr == name for x in ast.walk(node)):
            return {_ITSELF}
        maker = self.known.get((file, f"{kind}.__init__"))
        if isinstance(maker, Function):
            given = {a.arg: a.annotation for a in (*maker.args.args, *maker.args.kwonlyargs)}
            for child in ast.walk(maker):
                if isinstance(child, ast.AnnAssign) and getattr(child.target, "attr", None) == name:
                    return self.annotated(file, child.annotation, place)
                for target, value in _pairs(child):
                    if getattr(target, "attr", None) == name:
                        if isinstance(value, ast.Name) and value.id in given:
                            return self.annotated(file, given[value.id], place)
                        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                            return self.result(self.named[file].get(value.func.id))
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.named[file]:
                return self.attribute(self.named[file][base.id], name)
        return set()

    def annotated(self, file: str, annotation: ast.expr | None, own: Place | None = None) -> set[Place]:
        """The classes of the package that an annotation names, but for those that a function takes."""
        if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", None) == "Callable":
            return set()
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            return self.annotated(file, ast.parse(annotation.value, mode="eval").body, own)
        if isinstance(annotation, ast.Name):
            place = own if annotation.id == "Self" else self.named[file].get(annotation.id)
            return {place} if place and isinstance(self.known.get(place), ast.ClassDef) else set()
        below = ast.iter_child_nodes(annotation) if annotation is not None else ()
        return {place for child in below if isinstance(child, ast.expr) for place in self.annotated(file, child, own)}

    def result(self, place: Place | None) -> set[Place]:
        """The classes of what a call gives back."""
        node = self.known.get(place) if place else None
        if isinstance(node, ast.ClassDef):
            return {place}  # type: ignore[arg-type]
        own = (place[0], place[1].partition(".")[0]) if place else None
        return self.annotated(place[0], node.returns, own) if place and isinstance(node, Function) else set()

    def enter(self, place: Place, given: Mapping[str, set[Place]]) -> None:
        """Come to a definition by a call."""
        file, name = place
        if self.steps[-1:] != [file]:
            self.steps.append(file)
        node = self.known.get(place)
        if isinstance(node, ast.ClassDef):
            place = (file, f"{name}.__init__")
            node = self.known.get(place)
        if isinstance(node, Function) and place not in self._read:
            self._read.add(place)
            _Reader(self, file, node, given).read(node.body)


#: Functions from elsewhere that give back what they are given, or a collection of it.
_HANDING_ON = {
    "list",
    "tuple",
    "set",
    "dict",
    "sorted",
    "reversed",
    "zip",
    "map",
    "filter",
    "enumerate",
    "iter",
    "next",
}
_HANDING_ON |= {"min", "max", "replace", "cast", "enter_context", "fromkeys", "chain"}
_HANDING_ON |= {"keys", "values", "items", "get", "pop", "setdefault"}


class _Reader:
    """One function as it is read, from its first line to its last."""

    def __init__(self, way: Way, file: str, node: Function, given: Mapping[str, set[Place]]) -> None:
        self._way, self._file = way, file
        self._values: dict[str, set[Place]] = {}
        self._declare(node)
        for name, value in given.items():
            self._values[name] = self._values.get(name, set()) | value

    def _declare(self, node: Function | ast.Lambda) -> None:
        """Parameters, as they are annotated."""
        arguments = node.args
        for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            self._values[a.arg] = self._way.annotated(self._file, a.annotation)

    def read(self, body: Iterable[ast.stmt]) -> None:
        """Statements in order."""
        for statement in body:
            self._visit(statement)

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, Function):
            inner = dict(self._values)
            self._declare(node)
            self.read(node.body)
            self._values = inner
            return
        if isinstance(node, ast.ClassDef):
            return
        for target, value in _pairs(node):
            self._bind(target, self._value(value))
        if isinstance(node, (ast.Assign, ast.NamedExpr)):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._value(node.value)
            self._bind(node.target, self._way.annotated(self._file, node.annotation))
            return
        if isinstance(node, (ast.For, ast.AsyncFor)):
            self._run_through(node.target, node.iter)
            self.read([*node.body, *node.orelse])
            return
        if isinstance(node, ast.expr):
            self._value(node)
            return
        if isinstance(node, ast.withitem):
            value = self._value(node.context_expr)
            if node.optional_vars is not None:
                self._bind(node.optional_vars, value)
            return
        for child in ast.iter_child_nodes(node):
            self._visit(child)

    def _run_through(self, target: ast.expr, values: ast.expr) -> None:
        """Bind what a loop gives its names; of `zip`, each its own."""
        if isinstance(values, ast.Call) and isinstance(values.func, ast.Name) and isinstance(target, ast.Tuple):
            parts = {"zip": values.args, "enumerate": [ast.Constant(0), *values.args]}.get(values.func.id, [])
            if len(parts) == len(target.elts):
                for name, part in zip(target.elts, parts, strict=True):
                    self._bind(name, self._value(part))
                return
        self._bind(target, self._value(values))

    def _bind(self, target: ast.expr, value: set[Place]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._values[node.id] = set(value)

    def _value(self, node: ast.expr) -> set[Place]:
        """The classes that an expression may be of; the calls in it are entered on the way."""
        if isinstance(node, ast.Name):
            if node.id in self._values:
                return self._values[node.id]
            place = self._way.named[self._file].get(node.id)
            return {_reference(place)} if place in self._way.known else set()
        if isinstance(node, ast.Attribute):
            return {c for kind in self._value(node.value) for c in self._attribute_of(kind, node.attr)}
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Lambda):
            inner = dict(self._values)
            self._declare(node)
            self._value(node.body)
            self._values = inner
            return set()
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            inner = dict(self._values)
            for part in node.generators:
                self._run_through(part.target, part.iter)
                for test in part.ifs:
                    self._value(test)
            wanted = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            found = {kind for part in wanted for kind in self._value(part)}
            self._values = inner
            return found
        if isinstance(node, ast.NamedExpr):
            value = self._value(node.value)
            self._bind(node.target, value)
            return value
        if isinstance(node, (ast.Compare, ast.JoinedStr)):  # truth values and texts hold nothing
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._value(child)
            return set()
        if isinstance(node, ast.Subscript):
            self._value(node.slice)
            return self._value(node.value)
        below = [self._value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if isinstance(node, ast.IfExp):
            below = below[1:]
        return {kind for value in below for kind in value}

    def _attribute_of(self, kind: Place, name: str) -> set[Place]:
        """The classes of an attribute; of a method that is handed on, it and its object."""
        method = (kind[0], f"{kind[1]}.{name}")
        node = self._way.known.get(method)
        if isinstance(node, Function) and not any("property" in ast.unparse(d) for d in node.decorator_list):
            return {kind, _reference(method)}
        return self._way.attribute(kind, name)

    def _call(self, node: ast.Call) -> set[Place]:
        way, function, arguments = self._way, node.func, list(node.args)
        if isinstance(function, ast.Name) and function.id == "partial" and arguments:
            function = arguments.pop(0)
        targets: set[Place] = set()
        own: set[Place] = set()
        if isinstance(function, ast.Attribute):
            own = self._value(function.value)
            for file, kind in own:
                targets |= {(file, f"{kind}.{function.attr}")} & set(way.known)
        else:
            value = self._value(function)
            targets = {_place(kind) for kind in value if kind[0].startswith(">")}
            own = {kind for kind in value if not kind[0].startswith(">")}
        given = [self._value(a) for a in arguments]
        named = {k.arg: self._value(k.value) for k in node.keywords}
        everything = {kind for value in (own, *given, *named.values()) for kind in value}
        if not targets:
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            return everything if name in _HANDING_ON else set()
        found: set[Place] = set()
        for target in sorted(targets):
            if everything & way.holders:
                way.enter(target, self._bound(target, own, given, named))
            found |= way.result(target)
        return found

    def _bound(
        self, target: Place, own: set[Place], given: list[set[Place]], named: Mapping[str | None, set[Place]]
    ) -> dict[str, set[Place]]:
        """The values of a definition's parameters."""
        node = self._way.known.get(target)
        if isinstance(node, ast.ClassDef):
            own, node = {target}, self._way.known.get((target[0], f"{target[1]}.__init__"))
        if not isinstance(node, Function):
            return {}
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        if "." in target[1] or names[:1] == ["self"]:
            given = [own, *given] if names[:1] == ["self"] else given
        bound = dict(zip(names, given, strict=False))
        return bound | {name: value for name, value in named.items() if name is not None}


def _reference(place: Place) -> Place:
    """Stands for a definition itself where others stand for objects of a class."""
    return (f">{place[0]}", place[1])


def _place(reference: Place) -> Place:
    return (reference[0][1:], reference[1])


def _pairs(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Targets of an assignment and what each is given."""
    if not isinstance(node, ast.Assign):
        return []
    found: list[tuple[ast.expr, ast.expr]] = []
    for target in node.targets:
        if (
            isinstance(target, ast.Tuple)
            and isinstance(node.value, ast.Tuple)
            and len(target.elts) == len(node.value.elts)
        ):
            found += zip(target.elts, node.value.elts, strict=True)
        else:
            found.append((target, node.value))
    return found
