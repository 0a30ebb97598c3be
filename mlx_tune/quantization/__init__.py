"""Fewer bytes for a model's weights, and a report of what that costs."""

from mlx_tune.quantization.accuracy import LanguageAccuracy, LossAccuracy, OutputAccuracy
from mlx_tune.quantization.config import keeps_inputs, quantization_config, quantizes_inputs
from mlx_tune.quantization.layout import plan_quantization
from mlx_tune.quantization.plan import LayerPlan, QuantizationPlan
from mlx_tune.quantization.quantize import quantization_report, quantize_model
from mlx_tune.quantization.report import LayerReport, QuantizationReport

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
