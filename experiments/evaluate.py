"""Score a trained model: ``python -m experiments.evaluate DIR [--files GLOB ... | --choices FILE | --task NAME]``.

On text, in bits per byte: the length of a code for whole documents, ends included, comparable with compressors and between
tokenizers. On multiple-choice questions, and on synthetic tasks of recall, by accuracy.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from research.config import ConfigError

if TYPE_CHECKING:  # a mistyped option needs no JAX
    from research.data.pipeline import Corpus
    from research.training.runs import Trained


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.overlap < 0:
        raise ConfigError(f"--overlap must be at least 0, got {options.overlap}")
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.rows < 1:
        raise ConfigError(f"--rows must be at least 1, got {options.rows}")
    if sum(asked is not None for asked in (options.files, options.choices, options.task)) > 1:
        raise ConfigError("--files, --choices and --task are three evaluations: give one of them")
    if options.choices is not None or options.task is not None:
        result = answer(options)
        print(json.dumps(result, indent=2) if options.json else cli.table(list(_rows(result))))
        return 0
    from research.data.baselines import measure_baselines

    result, documents = score(options)
    result["baselines"] = dataclasses.asdict(measure_baselines(documents))
    print(json.dumps(result, indent=2) if options.json else report(result))
    return 0


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies on questions or on a synthetic task, on all devices there are."""
    import jax

    from research.inference.choices import multiple_choice, read_questions
    from research.inference.tasks import measure_task, task_options
    from research.interop.opening import open_model
    from research.sharding.mesh import MeshConfig, make_mesh

    name, *words = options.task or [""]
    unsplit = [word for word in words if "=" not in word]
    if unsplit:
        raise ConfigError(f"--task takes a name and then option=value words, got {unsplit[0]!r}")
    # Before the model is read: a mistyped question should not wait for it.
    questions = None if name else read_questions(options.choices)
    settings = task_options(name, dict(word.split("=", 1) for word in words)) if name else {}
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trained = open_model(options.directory, say=_tell)
        batch_size = -(-(options.batch_size or 8) // mesh.size) * mesh.size
        about = {"checkpoint": str(trained.path), "step": trained.step}
        if name:
            return about | measure_task(trained.model, name, settings, rows=options.rows, batch_size=batch_size)
        assert questions is not None
        told = multiple_choice(trained, questions, batch_size=batch_size, progress=_Progress("choices"))
        return about | {"file": options.choices, **told}


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in result.items():
        if isinstance(value, dict):
            value = " ".join(f"{key}={item}" for key, item in value.items())
        yield name, f"{value:.4f}" if isinstance(value, float) else str(value)


def score(options: argparse.Namespace) -> tuple[dict[str, Any], Sequence[bytes]]:
    """What the model makes of the documents, on all devices there are; and the documents."""
    import jax
    from flax import nnx

    from research.interop.opening import open_model
    from research.sharding.mesh import MeshConfig, batch_sharding, make_mesh
    from research.training.evaluation import evaluate
    from research.training.runs import CACHE_FOLDER
    from research.training.step import make_eval_step

    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trained = open_model(options.directory, say=_tell)
        cache = Path(options.directory).expanduser() / CACHE_FOLDER
        cache = cache if os.access(cache, os.W_OK) else None
        if cache is not None:
            cli.keep_compiled(cache)
        length = trained.config.data.sequence_length
        if options.overlap >= length:
            raise ConfigError(f"--overlap must be less than the {length} positions of a row, got {options.overlap}")
        corpus = open_files(trained, options.files) if options.files else open_held_out(trained, cache)
        _tell(f"scoring {len(corpus.held_out_documents)} documents, {corpus.held_out_bytes:,} bytes ...")
        graphdef, params, variables = nnx.split(trained.model, nnx.Param, ...)
        rows = options.batch_size or corpus.config.batch_size
        held_out = evaluate(
            make_eval_step(graphdef),
            params,
            variables,
            corpus,
            lambda batch: jax.device_put(batch, batch_sharding(mesh)),
            batch_size=-(-rows // mesh.size) * mesh.size,
            overlap=options.overlap,
            progress=_Progress("batches"),
        )
    assert held_out is not None  # nothing asked it to stop
    nats_per_token = held_out.nats / held_out.tokens
    result = {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "text": options.files or "held-out documents of the run",
        "documents": len(corpus.held_out_documents),
        "bytes": held_out.bytes,
        "tokens": held_out.tokens,
        "overlap": options.overlap,
        "bits_per_byte": held_out.bits_per_byte,
        "nats_per_token": nats_per_token,
        "perplexity": math.exp(nats_per_token),
    }
    return result, corpus.held_out_documents


def open_held_out(trained: "Trained", cache: Path | None) -> "Corpus":
    """The data that the model was trained on, with its held-out part.

    Raises:
      ConfigError: it is gone or has changed, or the run held nothing out.
    """
    from research.data.pipeline import open_corpus

    data = trained.config.data
    if trained.published is not None:
        raise ConfigError("the model is a published one, which holds no text out here: name the text with --files")
    if not data.held_out_bytes:
        raise ConfigError("the run held nothing out (data.held_out_bytes is 0): name the text to score with --files")
    try:
        corpus = open_corpus(data, tokenizer=trained.tokenizer, cache=cache)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; or name other text with --files") from error
    if corpus.hash != trained.corpus_hash:
        raise ConfigError(
            f"the data has changed since the model was trained on it (its hash was {trained.corpus_hash[:12]}..., now "
            f"{corpus.hash[:12]}...), so what was held out is not known: name the text to score with --files"
        )
    return corpus


def open_files(trained: "Trained", paths: Sequence[str]) -> "Corpus":
    """The files as the held-out part of a corpus with nothing else in it.

    Raises:
      ConfigError: no such file, an empty one alone, or not text to the model's tokenizer.
    """
    from research.data.packing import InMemoryStreams
    from research.data.pipeline import Corpus
    from research.data.sources import TextFiles

    source = TextFiles(tuple(paths), encoding="binary")
    try:
        documents = source.open()
        contents = tuple(documents[i] for i in range(len(documents)))
        streams = InMemoryStreams.from_documents(contents, trained.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error).replace("data.source.paths", "--files")) from error
    return Corpus(
        config=dataclasses.replace(trained.config.data, source=source),
        hash=documents.hash(),
        tokenizer=trained.tokenizer,
        train=InMemoryStreams.from_documents((), trained.tokenizer),
        held_out=streams,
        held_out_names=documents.names,
        held_out_documents=contents,
    )


def report(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    baselines = result["baselines"]
    text = result["text"] if isinstance(result["text"], str) else " ".join(result["text"])
    rows = [
        ("  this model", f"{result['bits_per_byte']:.4f}"),
        ("  xz -9, document by document", f"{baselines['xz_each']:.4f}"),
        ("  xz -9, all as one", f"{baselines['xz_whole']:.4f}"),
        ("  order-0 (byte frequencies)", f"{baselines['order_0']:.4f}"),
    ]
    return "\n".join(
        [
            f"{result['checkpoint']} (step {result['step']}) on {text}:",
            f"{result['bytes']:,} bytes in {result['documents']} documents, in bits per byte:",
            cli.table(rows),
            f"Per token: perplexity {result['perplexity']:.3f}, {result['nats_per_token']:.4f} nats, "
            f"{result['bytes'] / result['tokens']:.2f} bytes.",
        ]
    )


class _Progress:
    """A line every five seconds."""

    def __init__(self, what: str):
        self._what, self._last = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= 5:
            self._last = time.monotonic()
            _tell(f"scored {done}/{total} {self._what}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m experiments.evaluate",
        description=(
            "Scores held-out text with a trained model: bits per byte (every byte once, the ends of documents included)\n"
            "and perplexity per token, beside what xz -9 and byte frequencies alone reach on the same bytes.\n\n"
            'Or multiple-choice questions, a JSON object a line: {"context": "...", "choices": ["...", ...], "answer": 0}.\n'
            "acc takes the likeliest choice, acc_norm the likeliest per character, acc_bytes per byte (as EleutherAI's\n"
            "harness; experiments.harness runs its own tasks).\n\n"
            "Or a synthetic task on token ids, for models trained on it and any that knows as many ids: associative_recall,\n"
            "needle_retrieval, selective_copying, state_tracking, with options of research.data.synthetic."
        ),
        epilog=(
            "examples:\n"
            "  python -m experiments.evaluate runs/demo\n"
            "  python -m experiments.evaluate runs/demo --overlap 128\n"
            "  python -m experiments.evaluate runs/demo --files 'research/**/*.py' README.md --json\n"
            "  python -m experiments.evaluate Qwen3-0.6B --choices questions.jsonl\n"
            "  python -m experiments.evaluate runs/demo --task needle_retrieval length=512 depth=0.5\n\n"
            "exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C"
        ),
    )
    parser.add_argument("directory", metavar="DIR", help=cli.MODEL_DIRECTORY)
    parser.add_argument(
        "--files", metavar="GLOB", nargs="+", help="score these files (default: the documents that the run held out)"
    )
    parser.add_argument("--choices", metavar="FILE", help="answer the multiple-choice questions of this JSONL file")
    parser.add_argument(
        "--task", metavar="WORD", nargs="+", help="do a synthetic task: its name, then its options as name=value"
    )
    parser.add_argument("--rows", metavar="N", type=int, default=256, help="with --task: fresh rows (default: 256)")
    parser.add_argument(
        "--overlap",
        metavar="N",
        type=int,
        default=0,
        help="positions of context that each piece of a long document repeats; 0 is what training prints (default: 0)",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, help="rows scored at a time (default: the run's; 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(cli.call(main))
