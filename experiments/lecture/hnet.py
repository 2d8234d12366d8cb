"""Claim: an H-Net trained on bytes alone learns to cut where words begin rather than within them. Draws its cuts.

    python -m experiments.train hnet --workdir runs/hnet                 about five minutes on two cores
    python -m experiments.lecture.hnet [DIR] [--picture FILE] [--json]   seconds

Reads the beginning of a held-out document byte by byte, as decoding does, and asks after each byte how many chunks there
are. The picture shows every chunk in one of two shades. Printed are the bytes per chunk and the share of bytes that begin a
chunk, by what the byte is: the first of a word, of an indentation or of a run of signs, or a later one.

Expected after 400 steps of ``configs/hnet``: 2.32 bits per held-out byte; 4.5 bytes per chunk; a chunk begins at 44 % of the first letters of words and at
14 % of later ones.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.benchmark import circumstances
from research.config import ConfigError
from research.models.hnet import HNetState
from research.models.language_model import LanguageModel

LENGTH = 1536
KINDS = (
    "first letter of a word",
    "later letter",
    "first space of a run",
    "later space",
    "first sign of a run",
    "later sign",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m experiments.lecture.hnet", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/hnet"), help="work directory of the run")
    parser.add_argument("--picture", type=Path, help="where the picture goes (DIR/chunks.png)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options: argparse.Namespace = parser.parse_args(argv)
    from research.data.pipeline import open_corpus
    from research.training.runs import CACHE_FOLDER, load_for_inference

    trained = load_for_inference(options.directory, say=lambda line: None)
    corpus = open_corpus(trained.config.data, tokenizer=trained.tokenizer, cache=options.directory / CACHE_FOLDER)
    name, text = next(
        (pair for pair in zip(corpus.held_out_names, corpus.held_out_documents, strict=True) if len(pair[1]) >= LENGTH),
        (None, b""),
    )
    if name is None:
        raise ConfigError(f"{options.directory} has no held-out document of {LENGTH} bytes")
    text = text[:LENGTH]
    ids_T = np.concatenate([[trained.tokenizer.start_id], trained.tokenizer.encode(text)])
    if len(ids_T) != LENGTH + 1:
        raise ConfigError(f"{options.directory} was not trained on bytes")
    cuts_LT = boundaries(trained.model, ids_T)[:, 1:]
    picture = options.picture or options.directory / "chunks.png"
    draw(text, cuts_LT[0], picture)
    results = {**trained_to(options.directory), "document": name, "bytes": LENGTH, **summary(text, cuts_LT)}
    if options.json:
        print(
            json.dumps(
                {**circumstances(f"python -m experiments.lecture.hnet {options.directory} --json"), **results}, indent=2
            )
        )
        return 0
    rows = [("held-out bits per byte", f"{results['held_out_bits_per_byte']:.3f}")]
    rows += [("bytes per chunk", ", ".join(f"{x:.2f}" for x in results["bytes_per_chunk"])), ("a chunk begins at", "")]
    rows += [(f"  {kind}", f"{share:.0%} of {count}") for kind, (share, count) in results["begins"].items()]
    print(f"{name}, the first {LENGTH} bytes\n{cli.table(rows)}\n\nthe chunks: {picture}")
    return 0


def trained_to(directory: Path) -> dict[str, Any]:
    """What the run says of itself: bits of its held-out bytes, and the mean of its last ten steps' tokens per chunk."""
    from research.training.loop import RESULT_FILE
    from research.training.metrics import METRICS_FILE, read_lines

    result_file = directory / RESULT_FILE
    if not result_file.exists():
        raise ConfigError(f"{directory} must hold a finished run, it has no {RESULT_FILE}")
    result, lines = json.loads(result_file.read_text()), list(read_lines(directory / METRICS_FILE))
    return {
        "steps": result["step"],
        "held_out_bits_per_byte": result["held_out"]["bits_per_byte"],
        "tokens_per_chunk": round(statistics.fmean(line["tokens_per_chunk"] for line in lines[-10:]), 3),
    }


def boundaries(model: LanguageModel, ids_T) -> np.ndarray:
    """[L, T]: whether a chunk begins at each token, at each level of chunking, outermost first.

    Raises:
      ConfigError: the model has no H-Net.
    """

    @jax.jit
    def read(model, ids_T):
        def step(cache, token):
            cache = model(token[None, None], cache=cache).cache
            return cache, jnp.stack(chunks_of(cache.stages)) if chunks_of(cache.stages) else jnp.zeros((0,))

        return jax.lax.scan(step, model.init_cache(1, len(ids_T)), ids_T)[1]

    chunks_TL = np.asarray(read(model, jnp.asarray(ids_T, jnp.int32)))
    if not chunks_TL.shape[1]:
        raise ConfigError("the model must have a branch of kind HNetConfig")
    return (np.diff(chunks_TL, axis=0, prepend=0) > 0).T


def chunks_of(states) -> list[jax.Array]:
    """Chunks of the first row so far, of every H-Net among the states of stages, outer before inner."""
    found = []
    for state in jax.tree.leaves(states, is_leaf=lambda leaf: isinstance(leaf, HNetState)):
        if isinstance(state, HNetState):
            found += [state.chunks_B.reshape(-1)[0], *chunks_of(state.stages)]
    return found


def kinds_of(text: bytes) -> list[str]:
    """One of ``KINDS`` for every byte."""

    def of(byte: int) -> int:
        return 0 if chr(byte).isalnum() or byte == ord("_") or byte > 127 else 1 if chr(byte).isspace() else 2

    kinds = [of(byte) for byte in text]
    return [KINDS[2 * kind + (i > 0 and kinds[i - 1] == kind)] for i, kind in enumerate(kinds)]


def summary(text: bytes, cuts_LT: np.ndarray) -> dict[str, Any]:
    kinds = np.asarray(kinds_of(text))
    begins = {kind: cuts_LT[0][kinds == kind] for kind in KINDS}
    return {
        "bytes_per_chunk": [round(len(text) / max(int(cuts_T.sum()), 1), 3) for cuts_T in cuts_LT],
        "begins": {kind: [round(float(c.mean()), 4), len(c)] for kind, c in begins.items() if len(c)},
    }


def draw(text: bytes, cuts_T: np.ndarray, path: Path, columns: int = 80, lines: int = 24) -> None:
    """The text in its lines, every chunk shaded unlike its neighbours; a line longer than ``columns`` goes on in the next."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shades = ("#dbe8f6", "#f7dfc3")
    with matplotlib.rc_context({"font.family": "monospace", "font.size": 8}):
        figure = Figure(figsize=(columns * 0.082, lines * 0.19), dpi=110)
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axes.set_xlim(0, columns)
        axes.set_ylim(lines, 0)
        axes.axis("off")
        row = column = 0
        chunk_T = np.cumsum(cuts_T)
        for byte, chunk in zip(text, chunk_T, strict=True):
            if column >= columns:
                row, column = row + 1, 0
            if row >= lines:
                break
            axes.add_patch(Rectangle((column, row), 1, 0.92, color=shades[chunk % 2], linewidth=0))
            shown = "↵" if byte == 10 else chr(byte) if 32 <= byte < 127 else "·"
            axes.text(
                column + 0.5, row + 0.5, shown, ha="center", va="center", color="#9aa5b1" if byte == 10 else "#1f2933"
            )
            row, column = (row + 1, 0) if byte == 10 else (row, column + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    sys.exit(cli.call(main))
