"""The doctor: `diagnose` finds what is wrong with an installation or a machine, `explain` says what an error means.

No file here imports MLX at module level, so that it works where `import mlx.core` does not.
"""

from mlx_tune.diagnosis.doctor import diagnose
from mlx_tune.diagnosis.explain import Explanation, explain
from mlx_tune.diagnosis.report import CheckResult, Diagnosis

__all__ = ["CheckResult", "Diagnosis", "Explanation", "diagnose", "explain"]
