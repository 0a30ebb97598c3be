"""mlx-lm's own tests, plain and with every block of every model checkpointed by this library.

    python tests/benchmarks/mlx_lm_tests.py [--tests DIR] [--json FILE] [file ...]

The tests are those of the installed version, out of its source package, which pip downloads; or those in a folder that
you have. Each set runs twice in a process of its own. The second time every `Model` of mlx-lm has its repeated blocks
checkpointed and is in training mode as soon as it is made, so that forward and backward passes, caches, adapters,
copies and casts of the tests all meet checkpointed blocks; mlx-lm's own `grad_checkpoint` is replaced too. The exit
code is 1 where a test that passes plain does not pass so.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

#: What checkpoints touch: models, the trainer, adapters, losses.
FILES = (
    "test_models.py",
    "test_tuner_trainer.py",
    "test_tuner_utils.py",
    "test_finetune.py",
    "test_losses.py",
)
#: Where the child process is told to write how much it checkpointed.
_COUNTS = "MLX_LM_TESTS_COUNTS"

_counts: Counter[str] = Counter()


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: have models checkpointed where the parent asks for it."""
    if _COUNTS in os.environ:
        checkpoint_every_model()


def pytest_sessionfinish(session: Any) -> None:
    """Tell the parent what was checkpointed."""
    if _COUNTS in os.environ:
        Path(os.environ[_COUNTS]).write_text(json.dumps(_counts))


def checkpoint_every_model() -> None:
    """Have every `Model` of mlx-lm checkpointed when it is made, and nothing checkpointed by mlx-lm itself."""
    import mlx.nn as nn
    from mlx_lm.tuner import trainer

    import mlx_tune

    def watch(cls: type, **_: Any) -> None:
        if cls.__name__ == "Model" and cls.__module__.startswith("mlx_lm.models."):
            _checkpoint_when_made(cls)

    nn.Module.__init_subclass__ = classmethod(watch)  # type: ignore[assignment]
    trainer.grad_checkpoint = mlx_tune.checkpoint


def _checkpoint_when_made(cls: Any) -> None:
    import mlx_tune

    plain = cls.__init__

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        plain(self, *args, **kwargs)
        if type(self) is not cls:
            return  # a subclass that is not ready yet
        _counts["models"] += 1
        try:
            handle = mlx_tune.checkpoint_blocks(self)
        except mlx_tune.CheckpointError:
            # One layer is no repeated block, and a few tests have models of one.
            layers = [layer for layer in self.layers if layer is not None]
            for layer in layers:
                mlx_tune.checkpoint(layer)
            _counts["blocks"] += len(layers)
        else:
            _counts["blocks"] += len(handle.paths)
        self.train()

    cls.__init__ = __init__


def outcomes(
    folder: Path, files: list[str], scratch: Path, checkpointed: bool
) -> tuple[dict[str, str], dict[str, int]]:
    """Run tests in a process of their own.

    Args:
        folder: Where they are.
        files: Their names.
        scratch: A folder for reports.
        checkpointed: Whether models are checkpointed.

    Returns:
        For each test "passed", "failed" or "skipped"; and what was checkpointed.
    """
    report, counts = scratch / f"{checkpointed}.xml", scratch / "counts.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    if checkpointed:
        environment[_COUNTS] = str(counts)
    words = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    words += ["--rootdir", str(folder), "-c", os.devnull, f"--junitxml={report}", *files]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit(f"The tests did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[f"{case.get('classname')}.{case.get('name')}"] = outcome
    return found, json.loads(counts.read_text()) if checkpointed else {}


def download(version: str, folder: Path) -> Path:
    """The tests out of mlx-lm's source package; returns their folder."""
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "mlx-lm", f"mlx-lm=={version}"]
    done = subprocess.run([*words, "-d", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip cannot download mlx-lm {version}; give a folder with --tests.\n{done.stderr[-1000:]}")
    (archive,) = folder.glob("mlx_lm-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


def main() -> int:
    """Run both, print the table, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(FILES), help=f"which files (default: {' '.join(FILES)})")
    parser.add_argument("--tests", type=Path, metavar="DIR", help="a folder with mlx-lm's tests")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    version = importlib.metadata.version("mlx-lm")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.tests.resolve() if options.tests else download(version, Path(scratch))
        plain, _ = outcomes(folder, options.files, Path(scratch), checkpointed=False)
        ours, counts = outcomes(folder, options.files, Path(scratch), checkpointed=True)
    worse = sorted(name for name, outcome in plain.items() if outcome == "passed" and ours.get(name) != "passed")
    print(f"mlx-lm {version}: {counts.get('models', 0)} models made, {counts.get('blocks', 0)} blocks checkpointed")
    for title, results in (("plain", plain), ("checkpointed", ours)):
        numbers = Counter(results.values())
        print(f"{title:13} {numbers['passed']} passed, {numbers['failed']} failed, {numbers['skipped']} skipped")
    print(f"failed plain: {', '.join(sorted(n for n, outcome in plain.items() if outcome == 'failed')) or 'none'}")
    print(f"passed plain and not checkpointed: {', '.join(worse) or 'none'}")
    if options.json:
        answer = {"mlx_lm": version, **counts, "plain": plain, "checkpointed": ours, "worse": worse}
        options.json.write_text(json.dumps(answer, indent=1))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
