"""Published checkpoints to runs and back, and dense runs to mixtures of experts:
``python -m experiments.convert [--to-huggingface | --upcycle NAMES] DIR OUT_DIR``.

What comes out but for a Hugging Face directory is a work directory that experiments.generate and experiments.evaluate open like any run's.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from research.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    source, target = (Path(path).expanduser().resolve() for path in (options.source, options.target))
    if options.to_huggingface and options.upcycle:
        raise ConfigError("--to-huggingface and --upcycle are two conversions: name one, then convert what it wrote")
    try:
        if options.to_huggingface:
            to_huggingface(source, target, options.like)
        elif options.upcycle:
            sizes = {name: getattr(options, name) for name in ("copies", "active", "granularity", "noise")}
            words = " ".join(upcycle_run(source, target, options.upcycle.split(","), **sizes))
            if "train.start_from" in words:
                print(f"to train it, a configuration of the dense model, data of its tokenizer and:\n  {words}")
            else:
                print(f"to train on, the dense run's own command and:\n  {words} --workdir {target}")
        else:
            from_huggingface(source, target, options.dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"wrote {target}")
    return 0


def from_huggingface(source: Path, target: Path, dtype: str) -> None:
    """Writes a work directory whose one checkpoint, of step 0, is the model of a Hugging Face directory.

    Raises:
      ValueError: what ``huggingface.load`` refuses, or ``target`` exists and isn't empty.
    """
    from flax import nnx

    from research.config import to_dict
    from research.interop.opening import open_published
    from research.interop.stored_tensors import whole_directory
    from research.training.checkpoints import Checkpoints
    from research.training.runs import write_config

    with whole_directory(target) as unfinished:
        opened = open_published(source, dtype, _tell)
        about = {"step": 0, "config": to_dict(opened.config), "corpus_hash": "", "huggingface": opened.published}
        _, params, variables = nnx.split(opened.model, nnx.Param, ...)
        parts, checkpoints = {"params": params, "variables": variables}, Checkpoints(unfinished)
        checkpoints.save(0, parts, about=about, tokenizer=opened.tokenizer.to_json())
        checkpoints.wait()
        write_config(unfinished, opened.config)


def to_huggingface(source: Path, target: Path, like: str | None) -> None:
    """Writes a Hugging Face directory with the model of a work directory's newest checkpoint.

    Args:
      like: a config.json that describes the model, or a directory with one; None is that which the run was converted from.

    Raises:
      ValueError: none of them, or it describes another model; or ``target`` exists and isn't empty.
    """
    from research.interop import huggingface
    from research.interop.opening import BESIDE, TOKENIZER_FILE
    from research.training.checkpoints import read_about
    from research.training.runs import find_checkpoint, load_for_inference

    checkpoint = find_checkpoint(source, _tell)
    held: Mapping[str, Any] = read_about(checkpoint).get("huggingface") or {}
    if like is None and not held:
        raise ConfigError(f"{source} was not converted from Hugging Face: name a config.json of its model with --like")
    folder = None if like is None else Path(like).expanduser().resolve()
    folder = folder.parent if folder is not None and folder.is_file() else folder
    hub = held["config"] if folder is None else huggingface.read_config(folder)
    texts = dict(held.get("texts", {}))
    if folder is not None:
        texts |= {name: (folder / name).read_text("utf-8") for name in BESIDE if (folder / name).is_file()}
    trained = load_for_inference(source, _tell)
    tokenizer = json.loads(trained.tokenizer.to_json()).get("tokenizer")
    if tokenizer is not None:
        texts[TOKENIZER_FILE] = json.dumps(tokenizer, ensure_ascii=False)
    huggingface.save(trained.model, hub, target, texts)


def upcycle_run(source: Path, target: Path, names: Sequence[str], **sizes: Any) -> list[str]:
    """Writes a work directory that training goes on from: the newest checkpoint of a dense run, with the MLPs of the branches
    ``names`` made mixtures of experts (``research.models.upcycling``), a fresh optimizer, and the data from its beginning.
    A model that came from Hugging Face has no data here: of it the model alone is written, for ``train.start_from``.

    Returns:
      The words that tell ``experiments.train`` of the new layers, and where to start from if not there itself.

    Raises:
      ValueError: what ``upcycle`` refuses; the run's texts have changed; or ``target`` exists and isn't empty.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from research.config import fields_of, to_dict
    from research.data.pipeline import build_loader, open_corpus
    from research.interop.stored_tensors import whole_directory
    from research.layers.moe import MoEConfig
    from research.models.upcycling import upcycle
    from research.training.checkpoints import Checkpoints
    from research.training.optimizers import make_optimizer
    from research.training.runs import CACHE_FOLDER, load_for_inference, write_config
    from research.training.state import TrainState

    trained = load_for_inference(source, _tell)
    with whole_directory(target) as unfinished:
        model = upcycle(trained.model, names, **sizes)
        config = dataclasses.replace(trained.config, model=model.config)
        _, params, variables = nnx.split(model, nnx.Param, ...)
        about = {"step": 0, "config": to_dict(config), "corpus_hash": trained.corpus_hash}
        tokenizer, checkpoints = trained.tokenizer.to_json(), Checkpoints(unfinished)
        if trained.corpus_hash:
            corpus = open_corpus(config.data, tokenizer=trained.tokenizer, cache=unfinished / CACHE_FOLDER)
            if trained.corpus_hash != corpus.hash:
                raise ValueError(f"the data has changed since {source} was trained on it: bring it back")
            optimizer = make_optimizer(config.optimizer, config.train.steps)
            key = jax.random.key(config.train.seed)
            state = TrainState(jnp.zeros((), jnp.int32), params, variables, jax.jit(optimizer.init)(params), key)
            checkpoints.save(0, vars(state), iter(build_loader(corpus)), about=about, tokenizer=tokenizer)
        else:
            checkpoints.save(0, {"params": params, "variables": variables}, about=about, tokenizer=tokenizer)
        checkpoints.wait()
        write_config(unfinished, config)
    words, usual = [], {path: value for path, _, value in fields_of(MoEConfig())}
    for branch in config.model.branches:
        if branch.name in names:
            at = f"model.branches.{branch.name}.mixer"
            own = [(path, value) for path, _, value in fields_of(branch.mixer) if usual.get(path) != value]
            words += [f"{at}=MoEConfig", *(f"{at}.{path}={value}" for path, value in own)]
    return words if trained.corpus_hash else [*words, f"train.start_from={target}"]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m experiments.convert",
        description=(
            "Reads a Hugging Face directory (config.json, safetensors files, tokenizer.json) and writes a work directory\n"
            "that generate and evaluate open; or the other way round; or a dense run into a mixture of experts."
        ),
        epilog=(
            "examples:\n"
            "  python -m experiments.convert Qwen3-0.6B runs/qwen3 --dtype bfloat16\n"
            '  python -m experiments.generate runs/qwen3 --prompt "Once"\n'
            "  python -m experiments.convert --to-huggingface runs/qwen3 tuned\n"
            "  python -m experiments.convert --upcycle mlp --copies 8 --active 2 runs/dense runs/experts\n\n"
            "exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C"
        ),
    )
    parser.add_argument(
        "source", metavar="HF_DIR", help="what to read; with --to-huggingface or --upcycle a work directory"
    )
    parser.add_argument("target", metavar="OUT_DIR", help="what to write: an empty directory, or none yet")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="to store parameters and compute in (default: float32)",
    )
    parser.add_argument("--to-huggingface", action="store_true", help="a work directory into a Hugging Face directory")
    parser.add_argument(
        "--upcycle",
        metavar="NAMES",
        help="the source is a dense run: its MLPs of these branches (a,b) become mixtures of experts to train on",
    )
    parser.add_argument("--copies", type=int, default=8, help="with --upcycle: of every MLP (default: 8)")
    parser.add_argument("--active", type=int, default=1, help="with --upcycle: copies a token visits (default: 1)")
    parser.add_argument("--granularity", type=int, default=1, help="with --upcycle: experts a copy is split into (1)")
    parser.add_argument("--noise", type=float, default=0.0, help="with --upcycle: on experts, as a share of their size")
    parser.add_argument(
        "--like",
        metavar="PATH",
        help="with --to-huggingface: the config.json to write, for a run that was not converted",
    )
    return parser


if __name__ == "__main__":
    sys.exit(cli.call(main))
