"""EleutherAI's tasks on a trained model: ``python -m experiments.harness DIR --tasks hellaswag,arc_easy``.

Needs lm-evaluation-harness (``pip install ".[lm_eval]"``), which downloads its tasks' data. In a program of your own:
``lm_eval.simple_evaluate(model=adapter(open_model(DIR)), tasks=[...])``.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from experiments import cli
from research.config import ConfigError

if TYPE_CHECKING:  # --help needs no JAX
    from research.training.runs import Trained

# Of the options that tasks give, those that change nothing here.
INERT = {"do_sample", "until", "max_gen_toks", "max_new_tokens", "num_beams", "num_return_sequences"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {options.batch_size}")
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is missing ({error}): pip install '.[lm_eval]'") from error
    from research.interop.opening import open_model

    manager = lm_eval.tasks.TaskManager(include_path=options.include_path)
    names = options.tasks.split(",")
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"--tasks: lm-evaluation-harness has no task {unknown[0]!r}")
    trained = open_model(options.directory, say=lambda line: print(line, file=sys.stderr))
    result = lm_eval.simple_evaluate(
        model=adapter(trained, options.batch_size),
        tasks=names,
        task_manager=manager,
        num_fewshot=options.fewshot,
        limit=options.limit,
        apply_chat_template=options.chat,
        log_samples=False,
    )
    if options.json:
        print(json.dumps({key: result[key] for key in ("results", "versions", "n-shot", "n-samples")}, indent=2))
    else:
        print(lm_eval.utils.make_table(result))
    return 0


class Requests:
    """What the harness asks of a model, on plain values: (context, continuation), texts, (context, options)."""

    def __init__(self, trained: "Trained", batch_size: int = 8):
        self.trained, self.batch_size = trained, batch_size

    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it."""
        from research.inference.text import score_continuations

        scored = score_continuations(self.trained, pairs, batch_size=self.batch_size)
        return [(part.scores.total, bool(part.scores.greedy_N.all())) for part in scored]

    def loglikelihood_rolling(self, texts: Iterable[str]) -> list[float]:
        """Log-probability of each text, every token of it scored once."""
        from research.inference.text import score_texts

        scored = score_texts(self.trained, texts, batch_size=self.batch_size)
        return [sum(part.scores.total for part in parts) for parts in scored]

    def generate_until(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Continuations, each up to the first of its stop texts; those of equal options are written together.

        Raises:
          ValueError: an option that nothing here knows.
        """
        from research.inference.text import context_length, continue_texts, prompt_ids

        answers: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for i, (_, how) in enumerate(asked):
            alike.setdefault(json.dumps(how, sort_keys=True), []).append(i)
        for indices in alike.values():
            how = asked[indices[0]][1]
            unknown = set(how) - INERT - set(SAMPLING)
            if unknown or how.get("num_beams", 1) != 1:
                raise ValueError(f"generation options must be among {', '.join(SAMPLING)}, got {json.dumps(how)}")
            until = how.get("until") or ()
            most = how.get("max_gen_toks") or how.get("max_new_tokens") or 256
            sampling = {name: how[name] for name in SAMPLING if how.get(name) is not None}
            if how.get("do_sample") is False:
                sampling = {}
            longest = max(1, context_length(self.trained) - most)
            # Of like length together: the shorter ones need not wait for the longest.
            prompts = {i: prompt_ids(self.trained, asked[i][0])[-longest:] for i in indices}
            order = sorted(indices, key=lambda i: len(prompts[i]))
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                stops = (until,) if isinstance(until, str) else tuple(until)
                texts = continue_texts(self.trained, [prompts[i] for i in batch], stops, most, **sampling)
                answers |= dict(zip(batch, texts, strict=True))
        return [answers[i] for i in range(len(asked))]


def adapter(trained: "Trained", batch_size: int = 8):
    """A model as lm-evaluation-harness's ``LM``.

    Raises:
      ImportError: lm_eval is missing.
    """
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class Adapter(LM):
        def __init__(self):
            super().__init__()
            self.requests = Requests(trained, batch_size)

        def loglikelihood(self, requests, disable_tqdm: bool = False):
            return self._kept("loglikelihood", requests, self.requests.loglikelihood([r.args for r in requests]))

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
            texts = [r.args[0] for r in requests]
            return self._kept("loglikelihood_rolling", requests, self.requests.loglikelihood_rolling(texts))

        def generate_until(self, requests, disable_tqdm: bool = False):
            return self._kept("generate_until", requests, self.requests.generate_until([r.args for r in requests]))

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            from research.inference.text import chat_text

            return chat_text(trained, chat_history, add_generation_prompt=add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            return str(trained.path).replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str:
            return tokenizer_template(trained)

        def _kept(self, name, requests, answers):
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial(name, request.args, answer)
            return answers

    return Adapter()


def tokenizer_template(trained: "Trained") -> str:
    """The source of the model's chat template, empty without one: the harness writes it beside its results."""
    from research.data.chat import chat_template

    found = chat_template({} if trained.published is None else trained.published["texts"])
    return "" if found is None else found.source


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m experiments.harness",
        description=(
            'Runs tasks of EleutherAI\'s lm-evaluation-harness on a model. It is an extra, pip install ".[lm_eval]",\n'
            "and downloads the data of its tasks. Without it: experiments.evaluate --choices."
        ),
        epilog=(
            "examples:\n"
            "  python -m experiments.harness runs/demo --tasks arc_easy,hellaswag --limit 100\n"
            "  python -m experiments.harness Qwen3-0.6B --tasks gsm8k --fewshot 5 --chat --json\n\n"
            "exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C"
        ),
    )
    parser.add_argument("directory", metavar="DIR", help=cli.MODEL_DIRECTORY)
    parser.add_argument("--tasks", metavar="NAMES", required=True, help="tasks of the harness: a,b,c")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N questions of each task")
    parser.add_argument("--fewshot", metavar="N", type=int, help="answered questions before each (default: the task's)")
    parser.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    parser.add_argument("--include-path", metavar="FOLDER", help="a folder with tasks of your own (YAML)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="rows at a time (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(cli.call(main))
