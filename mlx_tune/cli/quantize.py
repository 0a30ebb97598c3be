"""`mlx-tune quantize`: a smaller model in a new folder, and a report of what that cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_tune.cli.arguments import add_json, add_model, make_parser
from mlx_tune.cli.output import (
    check_picture,
    check_place,
    command_lines,
    folded,
    is_first_rank,
    print_result,
    quiet_output,
    save_plot,
    write_whole,
)
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.progress import progress_bar
from mlx_tune.units import format_bytes, format_count

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_tune.lm.tokens import Tokenizer
    from mlx_tune.quantization.judging.report import QuantizationReport

_EXAMPLES = """\
  mlx-tune quantize --model models/mine --mlx-path models/mine-4bit
  mlx-tune quantize --model models/mine --mlx-path models/mine-3bit --bits 3 \\
      --method gptq --calibration text/
  mlx-tune quantize --model models/mine --mlx-path models/small \\
      --target-bpw 3.5 --calibration text/ \\
      --evaluation held-out.txt --report report.json
  mlx-tune quantize --model models/mine --bits 4 \\
      --override '*.down_proj=bits:8' --skip '*.layers.0.*' --plan"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `quantize` and its options."""
    parser = make_parser(
        subparsers,
        "quantize",
        "quantize a model into a new folder, with a report of what that cost",
        description="Quantize a model that mlx-lm loads into a new folder that mlx-lm loads. The folder appears whole "
        "or not at all. A model that does not fit in memory is quantized layer by layer, by methods "
        "that need no text: where that was interrupted, the same command goes on.",
        examples=_EXAMPLES,
    )
    add_model(parser)
    parser.add_argument("--mlx-path", metavar="DIR", help="the new folder (needed unless --plan)")
    parser.add_argument("--plan", action="store_true", help="show what would happen to every layer, and do nothing")
    formats = parser.add_argument_group("format")
    formats.add_argument("--bits", "--q-bits", type=int, default=4, metavar="N", help="bits of a weight (default: 4)")
    formats.add_argument(
        "--group-size", "--q-group-size", type=int, default=64, metavar="N", help="weights to a scale (default: 64)"
    )
    formats.add_argument(
        "--mode", "--q-mode", choices=["affine", "mxfp4", "mxfp8", "nvfp4"], default="affine", help="default: affine"
    )
    formats.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="cast the model to this first, as mlx_lm.convert does; scales are kept in it too (default: as it is)",
    )
    formats.add_argument(
        "--target-bpw", type=float, metavar="X", help="choose widths layer by layer, at most X bits per weight in all"
    )
    formats.add_argument("--target-bytes", metavar="SIZE", help="the same, at most this many bytes in all, such as 4GB")
    formats.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="another format for layers by pattern, such as '*.down_proj=bits:8,group_size:32', or =true, =false",
    )
    formats.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="layers to leave alone")
    formats.add_argument("--activations", action="store_true", help="quantize layers' inputs too, where MLX can")
    formats.add_argument("--requantize", action="store_true", help="quantize layers that are quantized already anew")
    formats.add_argument(
        "--no-verify-kernels",
        dest="verify_kernels",
        action="store_false",
        help="pack layers without trying whether MLX computes them right on this machine, for use on another",
    )
    how = parser.add_argument_group("method")
    how.add_argument(
        "--method",
        choices=["nearest", "optimal", "gptq", "dwq"],
        default="optimal",
        help="gptq and dwq need --calibration (default: optimal)",
    )
    how.add_argument("--effort", choices=["fast", "best"], default="fast", help="default: fast")
    how.add_argument(
        "--calibration", metavar="FILE", help="text to learn from: a file, a folder, .jsonl or .npy tokens"
    )
    how.add_argument("--evaluation", metavar="FILE", help="other text, to measure accuracy and speed on")
    how.add_argument("--num-samples", type=int, default=128, metavar="N", help="rows to learn from (default: 128)")
    how.add_argument("--evaluation-samples", type=int, default=32, metavar="N", help="rows to measure on (default: 32)")
    how.add_argument("--sequence-length", type=int, default=512, metavar="N", help="tokens in a row (default: 512)")
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="rows in a batch (default: 4)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice of rows (default: 0)")
    parser.add_argument("--verbose", action="store_true", help="print every layer and every figure")
    parser.add_argument("--report", metavar="FILE", help="write every layer and every figure as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw each layer's error and bytes into an .svg or .png file")
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Quantize, save, and say what was made."""
    import mlx.core as mx

    from mlx_tune.lm.loading import cast_parameters, load
    from mlx_tune.lm.saving import save_quantized
    from mlx_tune.measuring.ranks import Ranks
    from mlx_tune.quantization.dry_run import plan_quantization
    from mlx_tune.quantization.quantize import quantize_model

    overrides = dict(parse_override(text) for text in arguments.override)
    target = None if arguments.mlx_path is None else Path(arguments.mlx_path)
    # The first rank writes, and looks whether it can; where it cannot, the others stop as well.
    Ranks().agree(lambda: _check_places(target, arguments) if is_first_rank() else None)
    if arguments.method in ("gptq", "dwq") and arguments.calibration is None and not arguments.plan:
        raise InvalidArgumentError(f"--method {arguments.method} learns from text: give it with --calibration FILE.")
    with quiet_output():
        with progress_bar(f"loading {arguments.model}"):
            model, tokenizer, config, folder = load(
                arguments.model,
                lazy=True,
                trust_remote_code=bool(arguments.trust_remote_code),
                verify_kernels=arguments.verify_kernels,
            )
        if arguments.dtype is not None:
            cast_parameters(model, arguments.dtype)
        shared: dict[str, Any] = {
            "mode": arguments.mode,
            "overrides": overrides or None,
            "skip": arguments.skip or None,
            "method": arguments.method,
            "effort": arguments.effort,
            "activations": arguments.activations,
            "requantize": arguments.requantize,
            "verify_kernels": arguments.verify_kernels,
            "target_bpw": arguments.target_bpw,
            "target_bytes": arguments.target_bytes,
            "calibration": _batches(tokenizer, arguments.calibration, arguments.num_samples, arguments),
        }
        mx.random.seed(arguments.seed)
        way = "in memory" if arguments.plan else _way(model, arguments, shared)
        result: Any
        if arguments.plan:
            result = plan_quantization(model, arguments.bits, arguments.group_size, **shared)
        elif way == "from folder to folder":
            del model
            result = _piecewise(arguments, shared, target) if is_first_rank() else None
        else:
            result = quantize_model(
                model,
                arguments.bits,
                arguments.group_size,
                evaluation=_batches(tokenizer, arguments.evaluation, arguments.evaluation_samples, arguments),
                **shared,
            )
            if is_first_rank():
                with progress_bar(f"saving {target}"):
                    save_quantized(str(target), model, tokenizer, config, source=folder)
        save_plot(result, arguments.plot)
    if is_first_rank():
        if arguments.report is not None:
            write_whole(arguments.report, json.dumps(result.to_dict(), indent=2) + "\n")
        if arguments.plan or arguments.verbose or arguments.json:
            print_result(result, as_json=arguments.json)
        if not (arguments.plan or arguments.json):
            print(folded(ending(result, str(target), verbose=arguments.verbose)))
            print(command_lines(["mlx_lm.generate", "--model", str(target), "--prompt", "TEXT"]))
    return 0


def _way(model: nn.Module, arguments: argparse.Namespace, shared: Mapping[str, Any]) -> str:
    """The way that this machine has the memory for, or the only one that there is."""
    from mlx_tune.lm.quantizing.quantize_folder import METHODS, fits_in_memory
    from mlx_tune.quantization.dry_run import plan_quantization

    if arguments.method not in METHODS or arguments.target_bpw is not None or arguments.target_bytes is not None:
        return "in memory"
    asked = {**shared, "verify_kernels": False}
    plan = plan_quantization(model, arguments.bits, arguments.group_size, **asked)
    return "in memory" if fits_in_memory(plan) else "from folder to folder"


def _piecewise(arguments: argparse.Namespace, shared: Mapping[str, Any], target: Path | None) -> QuantizationReport:
    """Quantize from folder to folder, and say so."""
    from mlx_tune.lm.quantizing.quantize_folder import quantize_folder

    assert target is not None
    report = quantize_folder(
        arguments.model,
        target,
        arguments.bits,
        arguments.group_size,
        dtype=arguments.dtype,
        trust_remote_code=bool(arguments.trust_remote_code),
        **{key: value for key, value in shared.items() if key not in ("target_bpw", "target_bytes")},
    )
    note = "The model does not fit in memory, so that it was quantized from folder to folder"
    note += "." if arguments.evaluation is None else ", and what that cost was not measured."
    return replace(report, notes=(*report.notes, note))


def ending(report: QuantizationReport, target: str, *, verbose: bool) -> str:
    """Say in a few lines what was made, what it cost, and what to do next.

    Args:
        report: The report of what was quantized.
        target: The new folder.
        verbose: True where the report itself was printed above.
    """
    left = f", {len(report.skipped)} left as they are" if report.skipped else ""
    lines = [
        f"Made {target}",
        f"  {format_bytes(report.size_after_bytes)} of {format_bytes(report.size_before_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, {format_count(len(report.layers), 'layer')} by "
        f"{report.method}{left}.",
    ]
    if report.accuracy is None:
        lines.append("Cost: not measured. --evaluation FILE measures it on text that --calibration does not hold.")
    else:
        lines.append(f"Cost: {report.accuracy.summary()}.")
    if not verbose:
        warnings = () if report.accuracy is None else report.accuracy.warnings
        lines += [f"Note: {text}" for text in (*report.notes, *warnings)]
    lines.append("Next:" if verbose else "Every layer: --verbose or --report FILE. Next:")
    return "\n".join(["", *lines] if verbose else lines)


def parse_override(text: str) -> tuple[str, Any]:
    """Read a pattern and what its layers get.

    Raises:
        InvalidArgumentError: Not of the form that the text of the error shows.

    Examples:
        >>> parse_override("*.lm_head=bits:8,group_size:32")
        ('*.lm_head', {'bits': 8, 'group_size': 32})
        >>> parse_override("model.layers.0.*=false")
        ('model.layers.0.*', False)
    """
    pattern, equals, value = text.rpartition("=")
    if equals and pattern and value in ("true", "false"):
        return pattern, value == "true"
    parts = dict(part.split(":", 1) for part in value.split(",") if part.count(":") == 1)
    whole = {name: int(number) for name, number in parts.items() if name != "mode" and number.isdecimal()}
    whole_or_mode: dict[str, object] = {**whole, **({"mode": parts["mode"]} if "mode" in parts else {})}
    known = set(whole_or_mode) <= {"bits", "group_size", "mode"}
    if not pattern or not whole_or_mode or not known or len(whole_or_mode) != len(value.split(",")):
        raise InvalidArgumentError(
            f"--override {text!r}: give PATTERN=bits:8,group_size:32,mode:affine with at least one of the three, "
            "or PATTERN=true, or PATTERN=false."
        )
    return pattern, whole_or_mode


def _check_places(target: Path | None, arguments: argparse.Namespace) -> None:
    """Find out before the work that there is somewhere to put it."""
    check_place("--report", arguments.report)
    check_picture(arguments.plot)
    if arguments.plan:
        if arguments.plot is not None:
            raise InvalidArgumentError("--plot draws what was measured, and --plan measures nothing: leave one out.")
        return
    if target is None:
        raise InvalidArgumentError("Name the new folder with --mlx-path, or ask for --plan alone.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidArgumentError(f"--mlx-path {str(target)!r} is there already and not empty: name a new folder.")
    check_place("--mlx-path", target)


def _batches(
    tokenizer: Tokenizer, source: str | None, samples: int, arguments: argparse.Namespace
) -> list[mx.array] | None:
    """Rows of text, at most so many, in batches; None where there is no text."""
    if source is None:
        return None
    from mlx_tune.lm.tokens import token_batches

    for name, value in (("--batch-size", arguments.batch_size), ("samples", samples)):
        if value < 1:
            raise InvalidArgumentError(f"{name} {value}: it must be at least 1.")
    batch_size = min(arguments.batch_size, samples)
    return token_batches(
        tokenizer,
        source,
        batch_size=batch_size,
        length=arguments.sequence_length,
        max_batches=max(1, samples // batch_size),
        seed=arguments.seed,
    )
