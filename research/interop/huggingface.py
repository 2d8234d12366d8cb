"""Hugging Face checkpoints: a directory with config.json and safetensors files, to a model and back.

    model = huggingface.load("Qwen3-Next-80B-A3B", param_dtype=jnp.bfloat16)
    huggingface.save(model, json.loads(Path("Qwen3-Next-80B-A3B/config.json").read_text()), "tuned")

``research.models.families`` says what a family's config.json means and which tensor is which array.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.config import to_dict
from research.interop.assembly import Assembly
from research.interop.stored_tensors import StoredTensors, matches, write
from research.models.config import DType, ModelConfig
from research.models.families import family_of, model_config, text_part
from research.models.hub import Family, ModelViews, Tensor, View
from research.models.hub.tensors import variables_of
from research.models.language_model import LanguageModel
from research.training.runs import changes

CONFIG_FILE = "config.json"
# Fields of a model that a checkpoint says nothing of: where and how fast it computes, and how it is trained.
FREE = (
    "dtype", "param_dtype", "remat", "unroll", "implementation", "chunk_size", "form", "dispatch", "exchange", "chunks",
    "slack", "group_devices", "balance_loss", "balance_normalisation", "z_loss", "sequence_loss", "device_loss",
    "communication_loss", "importance_loss", "importance_of", "load_loss", "bias_rate", "jitter", "name", "loss", "ratio",
)  # fmt: skip


def load(
    directory: str | os.PathLike, param_dtype=jnp.float32, *, dtype=None, say: Callable[[str], None] = print
) -> LanguageModel:
    """The model of a Hugging Face directory.

    Of a multimodal model the language model. On the mesh that is set (``jax.set_mesh``), its parameters spread as they declare; with none, on one device. Tensors are
    read one at a time, in the order of the files. Routers, decay rates and step sizes stay in float32.

    Args:
      param_dtype: parameters are stored in.
      dtype: computed in; ``param_dtype`` if None.
      say: is told what the checkpoint lacks or holds besides, a line each.

    Raises:
      ValueError: an unknown architecture; keys of config.json that are missing, unknown or beyond the model; tensors that are
        missing, unknown, or of another shape than config.json implies: all of them in one message.
    """
    directory = Path(directory).expanduser()
    hub = read_config(directory)
    stored = StoredTensors(directory, _fp8_block(hub))
    family, config = family_of(hub), model_config(hub)
    stores = _dtype_name("param_dtype", param_dtype)
    computes = stores if dtype is None else _dtype_name("dtype", dtype)
    config = dataclasses.replace(config, param_dtype=stores, dtype=computes)
    found = {name: family.spelled(name) for name in stored.shapes()}
    if len(set(found.values())) != len(found):
        twice = sorted(name for name in found if list(found.values()).count(found[name]) > 1)
        raise ValueError(f"{directory} holds tensors under two names: {_few(twice)}")
    shapes = {found[name]: shape for name, shape in stored.shapes().items()}
    model, tensors = _described(family, config, shapes)
    if config.mtp is not None:
        plain, without = _described(family, dataclasses.replace(config, mtp=None), shapes)
        heads = [name for name in tensors if name not in without]
        if not any(name in shapes for name in heads):
            say(f"{directory} holds no multi-token prediction heads, which its config.json announces: loaded without")
            model, tensors = plain, without
    besides = _check(directory, family, tensors, shapes)
    if besides:
        say(f"left out {len(besides)} tensors that the model has no use for: {_few(besides)}")
    arrays = Assembly(model, tensors.values())
    for name, known in found.items():
        if known in tensors:
            for view, values in tensors[known].parts(stored.read(name)):
                arrays.write(view, values)
    return arrays.finish()


def save(
    model: LanguageModel, config: Mapping[str, Any], directory: str | os.PathLike, texts: Mapping[str, str] = {}
) -> None:
    """Writes a directory that ``transformers`` and ``load`` open, in the dtypes that the parameters are stored in.

    Args:
      config: the config.json to write, as JSON values. It must describe the model. Of a multimodal one the part of the language
        model is written.
      texts: further files by name, such as the tokenizer's.

    Raises:
      ValueError: config describes another model; names what differs. Or the directory exists and isn't empty.
    """
    config = text_part(config)
    check_describes(config, model.config)
    values = {name: variable[...] for name, variable in variables_of(model)}
    tensors = {tensor.name: tensor for tensor in family_of(config).tensors(ModelViews(model))}
    if "model_type" in config or "dtype" in config:  # others' own programs read theirs strictly
        config["dtype"] = model.config.param_dtype
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)

    def box(view: View) -> np.ndarray:
        # On the CPU this is the array's own memory.
        return np.asarray(values[view.leaf])[view.box]

    def size(tensor: Tensor) -> int:
        return int(np.prod(tensor.shape)) * values[tensor.views[0].leaf].dtype.itemsize

    write(
        Path(directory).expanduser().resolve(),
        ((name, tensor.read(box)) for name, tensor in tensors.items()),
        {name: size(tensor) for name, tensor in tensors.items()},
        {**texts, CONFIG_FILE: json.dumps(config, indent=2) + "\n"},
    )


def check_describes(hub: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises ValueError, naming what differs, unless ``hub`` (a config.json) describes a model of ``config``."""
    described = model_config(hub)
    if config.mtp is None:
        described = dataclasses.replace(described, mtp=None)
    differing = changes(_mathematics(described), _mathematics(config))
    if differing:
        told = [f"{path} is {theirs!r} there, {ours!r} here" for path, (theirs, ours) in differing.items()]
        raise ValueError(f"config.json describes another model: {_few(told, '; ')}")


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a directory, of a multimodal model its language model's; raises ValueError where there is none, no
    JSON object, or what ``text_part`` refuses."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{directory} holds no {CONFIG_FILE}: it must be a Hugging Face model's directory")
    try:
        hub = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(hub, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(hub).__name__}")
    return text_part(hub)


def _described(family: Family, config: ModelConfig, stored: Container[str]) -> tuple[LanguageModel, dict[str, Tensor]]:
    """The model with shapes for arrays, and the tensors it is made from by name, as the checkpoint has stored them."""
    model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))
    views = ModelViews(model)
    tensors = {tensor.name: tensor for tensor in family.tensors(views)}
    fused = [tensor for tensor in family.fused(views) if tensor.name in stored]
    of_leaf: dict[str, list[Tensor]] = {}
    for tensor in tensors.values() if fused else ():
        of_leaf.setdefault(tensor.views[0].leaf, []).append(tensor)
    for whole in fused:
        for part in of_leaf[whole.views[0].leaf]:
            if all(any(view.within(other) for other in whole.views) for view in part.views):
                tensors.pop(part.name, None)
        tensors[whole.name] = whole
    return model, tensors


def _check(
    directory: Path, family: Family, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Tensors that may be left out; raises ValueError that lists those missing, unknown and misshapen."""
    problems = []
    missing = [name for name in tensors if name not in shapes]
    unknown = [name for name in shapes if name not in tensors and not matches(name, family.ignored)]
    misshapen = [
        f"{name} is {list(shapes[name])}, must be {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in shapes and shapes[name] != tensor.shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen)):
        if names:
            problems.append(f"{len(names)} tensors are {what}: {', '.join(names)}")
    if problems:
        raise ValueError(f"{directory} does not hold the model of its config.json: {'; '.join(problems)}")
    return [name for name in shapes if name not in tensors]


def _fp8_block(hub: Mapping[str, Any]) -> tuple[int, int] | None:
    quantization = hub.get("quantization_config")
    if quantization is None or quantization.get("quant_method") == "mxfp4":
        return None
    if quantization.get("quant_method") != "fp8" or not quantization.get("weight_block_size"):
        raise ValueError(
            "config.json: quantization_config must be of quant_method 'mxfp4', or 'fp8' with a weight_block_size, got "
            f"{json.dumps(quantization)}"
        )
    rows, columns = quantization["weight_block_size"]
    return rows, columns


def _mathematics(config: ModelConfig) -> dict[str, Any]:
    """What a configuration says of the values that a model computes."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(item) for name, item in value.items() if name not in FREE}
        return [kept(item) for item in value] if isinstance(value, list) else value

    layers = [to_dict(layer) for layer in config.layers]
    whole = to_dict(config)
    ahead = to_dict(config.mtp) if config.mtp is not None else None
    whole |= {
        "branches": None,
        "pattern": None,
        "repeats": None,
        "layers": {str(i): layer for i, layer in enumerate(layers)},
    }
    if ahead is not None:
        named = {branch.name: to_dict(branch) for branch in config.branches}
        assert config.mtp is not None
        whole["mtp"] = {**ahead, "pattern": {str(i): named[name] for i, name in enumerate(config.mtp.pattern)}}
    return kept(whole)


def _dtype_name(argument: str, dtype) -> DType:
    name: Any = jnp.dtype(dtype).name
    if name not in get_args(DType):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(DType))}, got {name}")
    return name


def _few(names: list[str], between: str = ", ") -> str:
    return between.join(names[:4]) + (f"{between}and {len(names) - 4} more" if len(names) > 4 else "")
