"""Quantize a model of mlx-lm by several methods and compare what each costs on text that you hold out.

python examples/quantize_report.py --model path/to/model --calibration a.txt --held-out b.txt --bits 4 --plot report.svg
"""

import argparse

import mlx_lm

import mlx_tune as mt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a folder or a name that mlx_lm.load takes")
parser.add_argument("--held-out", nargs="+", required=True, help="text files to judge on")
parser.add_argument("--calibration", nargs="+", default=[], help="other text files, for gptq and dwq")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group-size", type=int, default=64)
parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
parser.add_argument("--batches", type=int, default=6, help="batches of eight sequences to judge on")
parser.add_argument("--methods", nargs="+", default=["nearest", "optimal"])
parser.add_argument("--plot", help="an SVG or PNG file for the last method's report")
args = parser.parse_args()


reports = []
for method in args.methods:
    model, tokenizer = mlx_lm.load(args.model)
    if not reports:
        print(mt.plan_quantization(model, args.bits, args.group_size, method=method))
    report = mt.quantize_model(
        model,
        args.bits,
        args.group_size,
        method=method,
        calibration=mt.lm.token_batches(tokenizer, args.calibration, length=args.length, max_batches=16)
        if args.calibration
        else None,
        evaluation=mt.lm.token_batches(tokenizer, args.held_out, length=args.length, max_batches=args.batches),
    )
    reports.append(report)

print(reports[-1])
print("\nmethod     bits/weight   mean KL              same top   perplexity")
for method, report in zip(args.methods, reports, strict=True):
    a = report.accuracy
    print(
        f"{method:9}  {report.bits_per_weight:11.3f}   {a.mean_kl:.5f} ± {a.mean_kl_error:.5f}   "
        f"{a.same_top:8.2%}   {a.perplexity_after:.4f}"
    )
if args.plot:
    reports[-1].plot(args.plot)
