"""Fewer bytes for a model's weights, and a report of what that costs."""

from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.judging.accuracy import LanguageAccuracy, LossAccuracy, OutputAccuracy
from mlx_tune.quantization.judging.report import LayerReport, QuantizationReport
from mlx_tune.quantization.planning.config import keeps_inputs, quantization_config, quantizes_inputs
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.quantization.quantize import quantization_report, quantize_model

__all__ = [
    "LanguageAccuracy",
    "LayerPlan",
    "LayerReport",
    "LossAccuracy",
    "OutputAccuracy",
    "QuantizationPlan",
    "QuantizationReport",
    "keeps_inputs",
    "plan_quantization",
    "quantization_config",
    "quantization_report",
    "quantize_model",
    "quantizes_inputs",
]
