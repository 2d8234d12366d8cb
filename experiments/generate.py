"""Write text with a trained model: ``python -m experiments.generate DIR --prompt "..."``, or ``--chat "..."``.

The prompt is read in the parallel form; new tokens come from the recurrent state and are printed as they are decoded.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from research.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.prompt and options.chat:
        raise ConfigError("--prompt and --chat are two ways to ask: give one of them")
    if options.system is not None and not options.chat:
        raise ConfigError("--system is the first message of a conversation: give the user's with --chat")
    if options.json and options.logprobs is None:
        raise ConfigError("--json is for --logprobs: give that too")
    # Only now: --help and a mistyped option need no JAX.
    from research.inference.generation import Continuation, stream_with_logprobs
    from research.inference.generation import stream as stream_ids
    from research.inference.text import Answer, chat_ids, prompt_ids, stop_ids
    from research.interop.opening import open_model
    from research.training.runs import CACHE_FOLDER

    began = time.monotonic()
    trained = open_model(options.directory, say=_tell)
    tokenizer = trained.tokenizer
    cache = Path(options.directory).expanduser() / CACHE_FOLDER
    if os.access(cache, os.W_OK):
        cli.keep_compiled(cache)
    prompts = [] if options.chat else options.prompt or [""]
    sampling: dict[str, Any] = {
        name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
    }
    try:
        if options.chat:
            ids = [chat_ids(trained, conversation(options.chat, options.system))]
        else:
            ids = [prompt_ids(trained, os.fsencode(prompt)) for prompt in prompts]
        sampling |= {"max_new_tokens": options.max_new_tokens, "stop": stop_ids(trained)}
        if options.logprobs is None:
            blocks = (
                [Continuation(new, [], []) for new in block] for block in stream_ids(trained.model, ids, **sampling)
            )
        else:
            blocks = stream_with_logprobs(trained.model, ids, top=options.logprobs, **sampling)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows = [Answer(tokenizer, options.stop) for _ in ids]
    told = [Continuation([], [], []) for _ in ids]
    counts, times = [0], [time.monotonic()]
    with contextlib.nullcontext() if options.json else Page(prompts or [""]) as page:
        for block in blocks:
            for number, (row, new) in enumerate(zip(rows, block, strict=True)):
                if not row.ended:
                    told[number].extend(new)
                # A row that gained nothing has met EOS.
                text = row.push(new.ids) if new.ids else row.finish()
                if page is not None:
                    page.write(number, text, row.ended)
            counts.append(counts[-1] + sum(len(new.ids) for new in block))
            times.append(time.monotonic())
            if all(row.ended for row in rows):
                break
        for number, row in enumerate(rows):
            text = row.finish()
            if page is not None:
                page.write(number, text, ended=True)
    if options.logprobs is not None:
        tables = [tokens_of(tokenizer, row) for row in told]
        asked = prompts or [options.chat[-1]]
        if options.json:
            whole = [
                {"prompt": p, "text": row.text, "tokens": t} for p, row, t in zip(asked, rows, tables, strict=True)
            ]
            print(json.dumps(whole, indent=2, ensure_ascii=False))
        else:
            print("\n\n".join(map(logprob_table, tables)))
    _tell(speed(counts, [now - began for now in times]))
    return 0


def conversation(turns: Sequence[str], system: str | None) -> list[dict[str, str]]:
    """Messages: the system's, if any, then turns of user and assistant, the user's first and last."""
    if len(turns) % 2 == 0:
        raise ConfigError(f"--chat takes turns, the user's first and last: an odd number of them, got {len(turns)}")
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def tokens_of(tokenizer, row) -> list[dict[str, Any]]:
    """Of each new token its id, text and log-probability, and the likeliest in its place."""

    def told(i: int, logprob: float) -> dict[str, Any]:
        return {"id": i, "text": piece(tokenizer, i), "logprob": logprob}

    return [
        {**told(i, logprob), "top": [told(*pair) for pair in top]}
        for i, logprob, top in zip(row.ids, row.logprobs, row.top, strict=True)
    ]


def piece(tokenizer, i: int) -> str:
    return tokenizer.decode([i]) if i < tokenizer.vocab_size else ""


def logprob_table(tokens: Sequence[dict[str, Any]]) -> str:
    """A line a token; log-probabilities in nats, then the likeliest tokens in its place with theirs."""

    def shown(token) -> str:
        return json.dumps(token["text"], ensure_ascii=False) if token["text"] else f"<{token['id']}>"

    rows = [
        (shown(token), f"{token['logprob']:8.4f}", "  ".join(f"{shown(t)} {t['logprob']:.4f}" for t in token["top"]))
        for token in tokens
    ]
    return cli.table([("token", " logprob", "likeliest" if tokens and tokens[0]["top"] else ""), *rows])


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
            '  python -m experiments.generate runs/demo --prompt "class A" --prompt "class B" --top-p 0.9 --seed 1\n'
            '  python -m experiments.generate Qwen3-0.6B --system "Be brief." --chat "Name three primes."\n'
            '  python -m experiments.generate runs/demo --prompt "import " --max-new-tokens 8 --logprobs 3\n\n'
            "exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C"
        ),
    )
    parser.add_argument("directory", metavar="DIR", help=cli.MODEL_DIRECTORY)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="what to continue; may be repeated: all are continued together (default: a new document)",
    )
    parser.add_argument(
        "--chat",
        metavar="TEXT",
        nargs="+",
        help="what the user says, written as the model's chat template has it; more turns: the answer, the user again ...",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system's message before it")
    parser.add_argument(
        "--logprobs",
        metavar="N",
        type=int,
        help="also print each token's log-probability (nats, before temperature) and the N likeliest in its place",
    )
    parser.add_argument("--json", action="store_true", help="with --logprobs: print one JSON list instead")
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
