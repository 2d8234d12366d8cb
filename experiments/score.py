"""Log-probabilities of given text, token by token: ``python -m experiments.score DIR --text "..." [--given "..."]``.

In nats, each given all before it; their sum, the perplexity of a token, and bits per byte.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.generate import logprob_table, piece
from research.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if (options.text is None) == (options.file is None):
        raise ConfigError("what to score must be given with --text or with --file, one of them")
    if options.given is not None and options.text is None:
        raise ConfigError("--given is the context of a --text: give that")
    from research.inference.text import score_continuations, score_texts
    from research.interop.opening import open_model

    content = None if options.file is None else read(options.file)
    trained = open_model(options.directory, say=lambda line: print(line, file=sys.stderr))
    try:
        if options.given is not None:
            # A context is cut to what the model reads, a text into pieces of it.
            kept = score_continuations(trained, [(options.given, options.text)], top=options.top)
        else:
            (kept,) = score_texts(trained, [options.text if content is None else content], top=options.top)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    size = len(options.text.encode()) if content is None else len(content)
    result = summary(trained.tokenizer, kept, size)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print(logprob_table(result["tokens"]))
        print(
            f"{len(result['tokens'])} tokens, {size} bytes: log-probability {result['logprob']:.4f} nats, perplexity "
            f"{result['perplexity']:.3f} a token, {result['bits_per_byte']:.4f} bits per byte"
        )
    return 0


def read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"--file must be a file to read: {error}") from error


def summary(tokenizer, parts, size: int) -> dict[str, Any]:
    """Of scored pieces: every token with its log-probability and the likeliest in its place; sum, perplexity, bits per byte."""

    def told(i: int, logprob: float) -> dict[str, Any]:
        return {"id": int(i), "text": piece(tokenizer, int(i)), "logprob": float(logprob)}

    tokens = []
    for part in parts:
        for n, (i, logprob) in enumerate(zip(part.ids, part.scores.logprobs_N, strict=True)):
            top = zip(part.scores.top_ids_NK[n], part.scores.top_logprobs_NK[n], strict=True)
            tokens.append({**told(i, logprob), "top": [told(*pair) for pair in top]})
    total = math.fsum(token["logprob"] for token in tokens)
    return {
        "logprob": total,
        "perplexity": math.exp(-total / len(tokens)) if tokens else None,
        "bits_per_byte": -total / math.log(2) / size if size else None,
        "bytes": size,
        "tokens": tokens,
    }


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m experiments.score",
        description=(
            "Says what a model makes of a text: the natural log-probability of every token given all before it, their sum,\n"
            "the perplexity of a token and bits per byte (its end is not counted; experiments.evaluate scores whole files)."
        ),
        epilog=(
            "examples:\n"
            '  python -m experiments.score runs/demo --text "import os"\n'
            '  python -m experiments.score runs/demo --given "import " --text "os" --top 5\n'
            "  python -m experiments.score Qwen3-0.6B --file README.md --json\n\n"
            "exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C"
        ),
    )
    parser.add_argument("directory", metavar="DIR", help=cli.MODEL_DIRECTORY)
    parser.add_argument("--text", metavar="TEXT", help="what to score")
    parser.add_argument("--file", metavar="PATH", help="what to score: the content of a file, cut where it is too long")
    parser.add_argument("--given", metavar="TEXT", help="what is read before --text and not scored")
    parser.add_argument("--top", metavar="N", type=int, default=0, help="also the N likeliest tokens in each place")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(cli.call(main))
