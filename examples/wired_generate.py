"""Generate text with a model's memory kept resident, and see whether that gained anything.

python examples/wired_generate.py --model FOLDER [--prompt TEXT] [--max-tokens 100]
"""

import argparse

from mlx_lm import stream_generate

import mlx_tune as mt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--prompt", default="Once upon a time")
parser.add_argument("--max-tokens", type=int, default=100)
args = parser.parse_args()

model, tokenizer, *_ = mt.lm.load(args.model)


def generate() -> float:
    """Print the answer as it comes, and return the tokens per second."""
    response = None
    for response in stream_generate(model, tokenizer, args.prompt, max_tokens=args.max_tokens):
        print(response.text, end="", flush=True)
    print()
    return response.generation_tps if response is not None else 0.0


# Once without, which also warms up, and once with; every mlx-lm block inside nests in ours.
plain = generate()
with mt.wired_limit(model, headroom="20%") as wired:
    kept = generate()

print(f"\n{wired}")
print(f"{plain:.1f} tokens/s without, {kept:.1f} with" + ("" if wired.applied else " (nothing was wired)"))
