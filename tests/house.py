"""Counts of the house: how far its files depend on one another, and how it reads.

    python tests/house.py

Imports inside functions, and those for type checkers alone, count like all others.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from house_way import Way

ROOT = Path(__file__).parents[1]

#: How a docstring begins that says what a thing answers instead of what it is.
QUESTIONS = {"What", "Whether", "Nothing", "How", "That", "Where", "Who", "When", "Why"}


class House:
    """The files of a package and the arrows between them.

    Args:
        root: The folder that holds it.
        package: Its name.
    """

    def __init__(self, root: Path = ROOT, package: str = "mlx_tune") -> None:
        self.root = root
        self.files = {
            ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
            for path in sorted((root / package).rglob("*.py"))
        }
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}
        self.imports = {name: self._imported(name) - {name} for name in self.files}

    def _imported(self, name: str) -> set[str]:
        found = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                # `from package import file` takes the file, not the package.
                found |= inner & set(self.files)
                if inner - set(self.files):
                    found.add(node.module)
        return found & set(self.files)

    def circles(self) -> list[list[str]]:
        """The groups of files that import one another, however indirectly."""
        return [sorted(group) for group in self._groups() if len(group) > 1]

    def longest_chain(self) -> list[str]:
        """The longest way along imports, a circle counted as one file."""
        longest: dict[str, list[str]] = {}
        for group in self._groups():  # each after those that it imports
            beyond = [longest[other] for name in group for other in self.imports[name] if other not in group]
            best = max(beyond, key=len, default=[])
            longest |= {name: [min(group), *best] for name in group}
        return max(longest.values(), key=len)

    def way_of_model(self, file: str = "quantization.quantize", function: str = "quantize_model") -> Way:
        """The way of `model` through a function of the package, call by call as the code is written."""
        package = next(iter(self.files)).partition(".")[0]
        return Way(self.trees, f"{package}.{file}", function, "model")

    def _groups(self) -> list[set[str]]:
        """Strongly connected files, by Tarjan's algorithm."""
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        groups: list[set[str]] = []

        def visit(name: str) -> None:
            index[name] = low[name] = len(index)
            stack.append(name)
            for other in sorted(self.imports[name]):
                if other not in index:
                    visit(other)
                    low[name] = min(low[name], low[other])
                elif other in stack:
                    low[name] = min(low[name], index[other])
            if low[name] == index[name]:
                group = set(stack[stack.index(name) :])
                del stack[stack.index(name) :]
                groups.append(group)

        for name in self.files:
            if name not in index:
                visit(name)
        return groups

    def files_by_folder(self) -> Counter[str]:
        """The number of files in each folder."""
        return Counter(str(path.parent.relative_to(self.root)) for path in self.files.values())

    def lines(self) -> Counter[str]:
        """The number of lines of each file."""
        return Counter({name: len(path.read_text().splitlines()) for name, path in self.files.items()})

    def untested(self) -> list[str]:
        """The files, packages' own aside, without a test file of their name in the folder that mirrors theirs."""
        places = {name: path.relative_to(self.root).parts[1:] for name, path in self.files.items()}
        return [
            name
            for name, (*folder, file) in places.items()
            if file != "__init__.py" and not Path(self.root, "tests", *folder, f"test_{file}").exists()
        ]

    def questions(self) -> tuple[int, int]:
        """The docstrings that begin as a question would, and all of them."""
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [
            text
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, kinds) and (text := ast.get_docstring(node))
        ]
        return sum(text.split()[0] in QUESTIONS for text in texts), len(texts)

    def anys(self) -> float:
        """The word `Any` for each 1,000 lines."""
        count = sum(len(re.findall(r"\bAny\b", path.read_text())) for path in self.files.values())
        return 1000 * count / self.lines().total()


def main() -> None:
    """Print the counts."""
    house = House()
    chain, (asked, every), way = house.longest_chain(), house.questions(), house.way_of_model()
    checked = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    print(f"longest chain of imports: {len(chain)}\n  " + "\n  ".join(chain))
    print(f"circles: {house.circles() or 'none'}")
    print("files by folder: " + ", ".join(f"{folder} {n}" for folder, n in house.files_by_folder().most_common(8)))
    print(
        f"the way of `model` through quantize_model: {len(way.files)} files, {way.returns} returns to one left before"
    )
    print(f"lines: {house.lines().total():,} in {len(house.files)} files; the longest: {house.lines().most_common(3)}")
    print(f"files without a test file of their own: {len(house.untested())}")
    print(f"docstrings that begin as questions: {asked} of {every}")
    print(f"Any for each 1,000 lines: {house.anys():.1f}")
    print(f"mypy, strict: {checked.stdout.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
