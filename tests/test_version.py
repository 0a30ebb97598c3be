import ast
import inspect
from importlib.metadata import version as installed

from mlx_tune import __version__, version


def test_it_is_the_installed_distributions():
    assert __version__ == version.__version__ == installed("mlx-tune-kit")


def test_the_file_imports_nothing():
    tree = ast.parse(inspect.getsource(version))
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
