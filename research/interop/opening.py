"""Any directory with a model in it, opened: a run's, or a published one's as it came from Hugging Face."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from research.config import ConfigError
from research.data.pipeline import DataConfig
from research.data.tokenization import Bytes, TokenizerJson, build_tokenizer
from research.interop import huggingface
from research.models.families import families
from research.training.config import ExperimentConfig
from research.training.optimizers import OptimizerConfig
from research.training.runs import CONFIG_FILE, NoRun, Trained, load_for_inference

# Small files of a Hugging Face directory that travel with its config.json.
BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
TOKENIZER_FILE = "tokenizer.json"


def open_model(directory: str | os.PathLike, say: Callable[[str], None] = print) -> Trained:
    """The newest model of a work directory, or the model of a Hugging Face directory in float32.

    Raises:
      ConfigError: there is neither; what ``load_for_inference`` or ``open_published`` refuses.
    """
    path = Path(directory).expanduser()
    if not is_published(path):
        try:
            return load_for_inference(directory, say)
        except NoRun as error:
            raise NoRun(f"{error}, or a Hugging Face model's directory") from error
    try:
        return open_published(path, say=say)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def is_published(directory: Path) -> bool:
    """Whether a directory's config.json is a Hugging Face model's."""
    try:
        told = json.loads((directory / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(told, dict):
        return False
    return "architectures" in told or "model_type" in told or any(f.matches(told) for f in families().values())


def open_published(directory: Path, dtype: str = "float32", say: Callable[[str], None] = print) -> Trained:
    """The model of a Hugging Face directory with its tokenizer and the small files beside it.

    Raises:
      ValueError: what ``huggingface.load`` refuses, or a tokenizer with more ids than the model.
    """
    hub = huggingface.read_config(directory)
    file = directory / TOKENIZER_FILE
    told = TokenizerJson(os.fspath(file)) if file.is_file() else Bytes(inside=hub.get("vocab_size") == 256)
    if isinstance(told, Bytes):
        say(f"{directory} holds no {TOKENIZER_FILE}: text is read as bytes")
    tokenizer = build_tokenizer(told)
    if tokenizer.vocab_size > hub.get("vocab_size", tokenizer.vocab_size) and not isinstance(told, Bytes):
        raise ValueError(
            f"{file} must have at most the vocab_size of config.json, {hub['vocab_size']}, got {tokenizer.vocab_size}"
        )
    model = huggingface.load(directory, dtype, say=say)
    length = min(hub.get("max_position_embeddings") or 2048, 2048)
    data = DataConfig(tokenizer=told, sequence_length=length, held_out_bytes=0)
    config = ExperimentConfig(model.config, data, OptimizerConfig())
    texts = {name: (directory / name).read_text("utf-8") for name in BESIDE if (directory / name).is_file()}
    return Trained(model, tokenizer, config, 0, "", directory, {"config": hub, "texts": texts})
