"""The table of MLX's errors, by symptom. The pages under Troubleshoot are made from it."""

from mlx_tune.diagnosis.explanations import (
    cuda,
    generation,
    gradients,
    installation,
    loading,
    memory,
    metal,
    operations,
    tracing,
)
from mlx_tune.diagnosis.explanations.known_error import KnownError, Symptom

__all__ = ["ENTRIES", "SYMPTOMS", "KnownError", "Symptom", "find"]

SYMPTOMS: tuple[Symptom, ...] = (
    Symptom("memory", "Running out of memory", "An array, a buffer or the machine is too small.", memory.ENTRIES),
    Symptom("metal", "The GPU of a Mac stops", "Metal or macOS ends the work or refuses it.", metal.ENTRIES),
    Symptom("cuda", "An NVIDIA GPU refuses", "The driver or the CUDA backend lacks something.", cuda.ENTRIES),
    Symptom("loading", "A model does not load", "Files and model do not fit each other.", loading.ENTRIES),
    Symptom(
        "gradients", "The backward pass fails", "The forward pass works, its gradient does not.", gradients.ENTRIES
    ),
    Symptom("generation", "Text, caches and data", "Tokenizer, cache, data or step do not fit.", generation.ENTRIES),
    Symptom("operations", "Shapes and dtypes", "An operation does not take these arrays.", operations.ENTRIES),
    Symptom(
        "tracing", "Compiled functions and threads", "A value is asked for too early, or elsewhere.", tracing.ENTRIES
    ),
    Symptom("installation", "Installing and importing", "An import fails.", installation.ENTRIES),
)

ENTRIES: tuple[KnownError, ...] = tuple(entry for symptom in SYMPTOMS for entry in symptom.entries)


def find(text: str) -> tuple[KnownError, ...]:
    """Every entry that matches a text, in the order of the table; none where the text is unknown."""
    return tuple(entry for entry in ENTRIES if entry.matches(text))
