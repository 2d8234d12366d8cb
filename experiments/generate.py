"""Write text with a trained model: ``python -m experiments.generate DIR --prompt "..."``.

The prompt is read in the parallel form; new tokens come from the recurrent state and are printed as they are decoded.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from research.config import ConfigError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    # Only now: --help and a mistyped option need no JAX.
    from research.inference import stream
    from research.training.runs import CACHE_FOLDER, load_for_inference

    began = time.monotonic()
    trained = load_for_inference(options.directory, say=_tell)
    tokenizer = trained.tokenizer
    cache = Path(options.directory).expanduser() / CACHE_FOLDER
    if os.access(cache, os.W_OK):
        cli.keep_compiled(cache)
    prompts = options.prompt or [""]
    try:
        # Documents of the training data begin with the start token, and end with EOS where there is one.
        ids = [[tokenizer.start_id, *tokenizer.encode(os.fsencode(prompt))] for prompt in prompts]
        blocks = stream(
            trained.model,
            ids,
            options.max_new_tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            options.min_p,
            stop=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
            seed=options.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows = [Row(tokenizer, options.stop) for _ in prompts]
    counts, times = [0], [time.monotonic()]
    with Page(prompts) as page:
        for block in blocks:
            for number, (row, new) in enumerate(zip(rows, block, strict=True)):
                # A row that gained nothing has met EOS.
                text = row.push(new) if new else row.finish()
                page.write(number, text, row.ended)
            counts.append(counts[-1] + sum(map(len, block)))
            times.append(time.monotonic())
            if all(row.ended for row in rows):
                break
        for number, row in enumerate(rows):
            page.write(number, row.finish(), ended=True)
    _tell(speed(counts, [now - began for now in times]))
    return 0


class Row:
    """The text of one continuation, token by token, cut off behind the first of the stop texts."""

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self.text, self.ended = "", False
        self._stream, self._vocab_size = tokenizer.stream(), tokenizer.vocab_size
        self._stops = [stop for stop in stops if stop]

    def push(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` add; what is not yet a whole character waits."""
        # A model may have more ids than its tokenizer: those it was never taught.
        return "".join(self._add(self._stream.push(i) if i < self._vocab_size else UNKNOWN) for i in ids)

    def finish(self) -> str:
        """Whatever was still waiting; nothing comes after it."""
        text = self._add(self._stream.finish())
        self.ended = True
        return text

    def _add(self, text: str) -> str:
        if self.ended:
            return ""
        before, whole = len(self.text), self.text + text
        found = [(whole.find(stop, max(0, before - len(stop) + 1)), len(stop)) for stop in self._stops]
        ends = [start + length for start, length in found if start >= 0]
        if ends:
            self.ended, whole = True, whole[: min(ends)]
        self.text = whole
        return whole[before:]


class Page:
    """Several continuations on one terminal: the first as it comes, each later one once those before it have ended."""

    def __init__(self, prompts: Sequence[str]):
        self._prompts, self._shown = prompts, -1
        self._waiting, self._ended = ["" for _ in prompts], [False for _ in prompts]
        self._plain = not sys.stdout.isatty()

    def __enter__(self) -> "Page":
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._next()
        return self

    def __exit__(self, *_) -> None:
        self._print("\n")

    def write(self, number: int, text: str, ended: bool) -> None:
        self._waiting[number] += text
        self._ended[number] |= ended
        while number == self._shown:
            self._print(self._waiting[number])
            self._waiting[number] = ""
            if not self._ended[number] or number + 1 == len(self._prompts):
                return
            self._print("\n\n")
            self._next()
            number += 1

    def _next(self) -> None:
        self._shown += 1
        prompt = self._prompts[self._shown]
        if self._plain or not prompt:
            self._print(prompt)
        else:
            print(f"\x1b[1m{visible(prompt)}\x1b[0m", end="", flush=True)

    def _print(self, text: str) -> None:
        print(text if self._plain else visible(text), end="", flush=True)


def visible(text: str) -> str:
    """``text`` with control characters, line ends and tabs aside, as pictures: a model must not steer the terminal."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return text.translate(pictures | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD))


def speed(counts: Sequence[int], times: Sequence[float]) -> str:
    """A line on how fast it went, from tokens so far and seconds since the start: loaded, then after every block."""
    made = f"{counts[-1]} tokens in {times[-1]:.1f} s"
    # The first two blocks wait for the two programs to compile.
    if len(counts) > 3:
        rate = (counts[-1] - counts[2]) / max(times[-1] - times[2], 1e-9)
        made += f", {rate:.0f} tokens/s once compiled"
    return f"[{made}]"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m experiments.generate",
        description=(
            "Writes text with a trained model, printing it as it is decoded. Memory per token is constant but for the\n"
            "keys and values of attention layers, whose place is set aside at the start."
        ),
        epilog=(
            "examples:\n"
            '  python -m experiments.generate runs/demo --prompt "def main"\n'
            '  python -m experiments.generate runs/demo --prompt "import " --temperature 0     # the likeliest, always the same\n'
            '  python -m experiments.generate runs/demo --prompt "class A" --prompt "class B" --top-p 0.9 --seed 1\n\n'
            "exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C"
        ),
    )
    parser.add_argument("directory", metavar="DIR", help="work directory of a training run (or one of its checkpoints)")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="what to continue; may be repeated: all are continued together (default: a new document)",
    )
    number = parser.add_argument_group("how")
    number.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="for each prompt (default: 256)")
    number.add_argument(
        "--temperature", metavar="T", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)"
    )
    number.add_argument("--top-k", metavar="K", type=int, help="draw from the K most likely tokens")
    number.add_argument("--top-p", metavar="P", type=float, help="draw from the fewest tokens of total probability P")
    number.add_argument(
        "--min-p", metavar="P", type=float, help="draw from tokens at least P times as likely as the likeliest"
    )
    number.add_argument("--seed", metavar="N", type=int, default=0, help="another seed, another text (default: 0)")
    number.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end behind this text; may be repeated"
    )
    return parser


if __name__ == "__main__":
    sys.exit(cli.call(main))
