"""Every exception that the library raises on purpose.

Catch `MlxTuneError` for all of them. Those that report a bad argument are also `ValueError`, those that
report something the machine cannot do are also `RuntimeError`, so that code that knows nothing of this
library still catches them under the name it expects.
"""

from __future__ import annotations


class MlxTuneError(Exception):
    """The root of every error raised on purpose by mlx_tune."""


class InvalidArgumentError(MlxTuneError, ValueError):
    """An argument has a value that cannot be meant: the text names it, its value and what is accepted."""


class MissingDependencyError(MlxTuneError, ImportError):
    """An optional package is needed for this call; the text holds the command that installs it."""


class BackendError(MlxTuneError, RuntimeError):
    """This machine's MLX backend cannot do what was asked for by name."""


class BudgetError(MlxTuneError, MemoryError):
    """Something does not fit its memory budget.

    Attributes:
        needed_bytes: The fewest bytes that would do, where known.
        budget_bytes: The bytes that were allowed.
    """

    def __init__(self, message: str, *, needed_bytes: int | None = None, budget_bytes: int | None = None) -> None:
        """Store the message and both figures."""
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class DiskError(MlxTuneError, OSError):
    """Something cannot be written: the disk is full, or the system refuses.

    Attributes:
        folder: Where it was to go.
        needed_bytes: The bytes that it takes, where known.
        free_bytes: The bytes that are free there.
    """

    def __init__(
        self, message: str, *, folder: str = "", needed_bytes: int | None = None, free_bytes: int | None = None
    ) -> None:
        """Store the message, the place and both figures."""
        super().__init__(message)
        self.folder = folder
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class CheckpointError(MlxTuneError, RuntimeError):
    """A block cannot be checkpointed, or a checkpointed block broke its contract."""


class TraceError(MlxTuneError, RuntimeError):
    """A step cannot be described without running it: it evaluates, has side effects or returns no arrays."""


class TrialError(MlxTuneError, RuntimeError):
    """A measured trial says nothing about memory: no work was done, or the result is not a loss."""


class QuantizationError(MlxTuneError, ValueError):
    """A model cannot be quantized as asked; nothing in it was changed."""
