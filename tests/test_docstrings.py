"""Docstrings name what they describe: they, and the entries under Args or Attributes, begin with a noun or a verb."""

import ast
import re
from pathlib import Path

import mlx_tune

PACKAGE = Path(mlx_tune.__file__).parent
INDIRECT = re.compile(r"(What|Whether|Nothing|How)\b")
ENTRY = re.compile(r"^ +\*{0,2}[\w.`]+(?: \([^)]*\))?: (?=(?:What|Whether|Nothing|How)\b)", re.MULTILINE)


def docstrings(source):
    """Every docstring in a source text, with the line that it begins on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def indirect(source):
    return [
        (line, text.splitlines()[0]) for line, text in docstrings(source) if INDIRECT.match(text) or ENTRY.search(text)
    ]


def test_docstrings_begin_with_a_noun_or_a_verb():
    found = {str(file.relative_to(PACKAGE)): indirect(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    assert not {file: lines for file, lines in found.items() if lines}
    assert len(found) > 100


def test_a_docstring_that_begins_otherwise_is_found_wherever_it_stands():
    source = '''"""What a file does."""
class Store:
    """Whether it is one."""
    async def read(self):
        """Nothing yet."""
    def size(self):
        """How many there are."""
    def right(self):
        """The number of rows. What it is."""
    def whatever(self):
        """Whatever it is."""
    def of(self, rows):
        """The size of some rows.

        Args:
            rows: How many.
        """
    def again(self, rows):
        """The size of some rows.

        Args:
            rows: The number. Whether they are read is told by `read`.
        """
'''
    assert [line for line, _ in indirect(source)] == [1, 3, 5, 7, 13]
