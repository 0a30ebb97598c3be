"""`mlx-tune fits`: will a model fit, from its configuration, on a machine that need not be here."""

from __future__ import annotations

import argparse

from mlx_tune.cli.arguments import add_json, make_parser
from mlx_tune.cli.output import print_result, quiet_output

_EXAMPLES = """\
  mlx-tune fits Qwen/Qwen3-8B --bits 4 --machine "M3 Max 64GB"
  mlx-tune fits models/mine --memory 32GB --fine-tune full --max-seq-length 4096
  mlx-tune fits config.json --machine "RTX 4090" --context 8192 --json"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `fits` and its options."""
    parser = make_parser(
        subparsers,
        "fits",
        "predict if a model fits a machine, at which batch and how long a row, from its config.json alone",
        description="Predict if a model can be fine-tuned on a machine, at which batch, and how long its rows may be. "
        "Its config.json is all that is read, or fetched of a hub name; no weights are needed, and the machine may be "
        "another than this one. Every figure is predicted. The exit code is 1 where it does not fit.",
        examples=_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a model's folder, a config.json, or a name on the hub")
    where = parser.add_argument_group("the machine (default: this one, with what is free on it now)")
    where.add_argument("--machine", metavar="NAME", help='its name, such as "M3 Max 64GB" or "RTX 4090"')
    where.add_argument("--memory", metavar="SIZE", help="the memory of a Mac, such as 64GB; macOS keeps a part of it")
    where.add_argument("--memory-budget", metavar="SIZE", help="bytes that MLX may use, as they are, such as 24GB")
    group = parser.add_argument_group("the training run, in mlx_lm.lora's words")
    group.add_argument(
        "--fine-tune",
        "--fine-tune-type",
        dest="fine_tune_type",
        choices=["lora", "dora", "full"],
        default="lora",
        help="what is trained (default: lora)",
    )
    group.add_argument("--rank", type=int, default=8, metavar="N", help="rank of the adapters (default: 8)")
    group.add_argument("--num-layers", type=int, metavar="N", help="blocks to train; -1 for all (default: 16)")
    group.add_argument(
        "--optimizer",
        choices=["adam", "adamw", "muon", "sgd", "adafactor"],
        default="adam",
        help="the optimizer (default: adam)",
    )
    group.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows in a batch (default: 1)")
    group.add_argument(
        "--max-seq-length", type=int, default=2048, metavar="N", help="longest row, in tokens (default: 2048)"
    )
    packing = parser.add_argument_group("quantization before it (default: the weights as they are)")
    packing.add_argument("--bits", type=int, metavar="N", help="bits of a weight")
    packing.add_argument("--group-size", type=int, metavar="N", help="weights that share a scale (default: 64)")
    packing.add_argument(
        "--mode", choices=["affine", "mxfp4", "mxfp8", "nvfp4"], default="affine", help="format (default: affine)"
    )
    running = parser.add_argument_group("generating with it (default: not asked)")
    running.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer together")
    running.add_argument(
        "--generate-batch", type=int, default=1, metavar="N", help="rows that are generated at a time (default: 1)"
    )
    running.add_argument("--kv-bits", type=int, metavar="N", help="bits of keys and values (default: as the weights)")
    parser.add_argument(
        "--confirm",
        action="store_true",
        help="run one real step as well, and print what was predicted of it and what was measured; needs the weights",
    )
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Predict and print. Returns 1 where it does not fit, else 0."""
    from mlx_tune.lm.capacity.answer import fits

    with quiet_output():
        answer = fits(
            arguments.model,
            machine=arguments.machine,
            memory=arguments.memory,
            budget=arguments.memory_budget,
            fine_tune_type=arguments.fine_tune_type,
            rank=arguments.rank,
            num_layers=arguments.num_layers,
            optimizer=arguments.optimizer,
            batch_size=arguments.batch_size,
            max_seq_length=arguments.max_seq_length,
            bits=arguments.bits,
            group_size=arguments.group_size,
            mode=arguments.mode,
            context=arguments.context,
            generate_batch=arguments.generate_batch,
            kv_bits=arguments.kv_bits,
            confirm=arguments.confirm,
        )
    print_result(answer, as_json=arguments.json)
    runs = answer.generation is None or answer.generation.fits
    return 0 if answer.fits and runs else 1
