"""Loading and saving: what is refused, where arrays come to lie, which bits they have."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from research.config import ConfigError
from research.interop import huggingface
from research.interop.opening import open_model
from research.interop.stored_tensors import StoredTensors
from research.models.families import family_of, model_config
from research.sharding.mesh import MeshConfig, make_mesh
from tests.interop.checkpoints import golden, stored_in, write_checkpoint

NAME = "qwen3_next"


@pytest.fixture(scope="module")
def g():
    return golden(NAME)


def test_every_key_is_read_or_refused_by_name(g):
    hub = {**g.hub, "rope_parameters": {**g.hub["rope_parameters"], "spin": 2}, "novelty": None, "hidden_act": "gelu"}
    with pytest.raises(ValueError, match=r"hidden_act must be 'silu', got 'gelu'; nothing here reads novelty, .*spin"):
        model_config(hub)
    with pytest.raises(ValueError, match=r"config\.json needs linear_num_key_heads"):
        model_config({name: value for name, value in g.hub.items() if name != "linear_num_key_heads"})


def test_values_of_another_type(g):
    with pytest.raises(ValueError, match=r"rope_parameters must be an object, got \[1\]"):
        model_config({**g.hub, "rope_parameters": [1]})
    with pytest.raises(ValueError, match="a value is of another type than it must be"):
        model_config({**g.hub, "num_hidden_layers": "4"})


def test_an_unknown_architecture():
    with pytest.raises(
        ValueError, match=r"model_type 'gru' with architectures \['GRU'\] is unknown; known are .*Llama"
    ):
        family_of({"model_type": "gru", "architectures": ["GRU"]})


def test_a_config_that_names_no_class(tmp_path):
    """Grok-1's: the programs know its directory all the same."""
    g = golden("grok_1")
    trained = open_model(write_checkpoint(tmp_path / "grok", g.hub, g.tensors), say=lambda line: None)
    assert trained.model.config == model_config(g.hub)
    with pytest.raises(
        ConfigError, match="must be the work directory of a training run, or a Hugging Face model's directory"
    ):
        open_model(tmp_path / "nothing")


def test_all_that_is_wrong_with_the_tensors_at_once(g, tmp_path):
    tensors = dict(g.tensors)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]
    write_checkpoint(tmp_path, g.hub, tensors)
    wrong = (
        "1 tensors are missing: model.norm.weight; 1 tensors are unknown: model.extra; "
        r"1 tensors are of another shape: lm_head.weight is \[5, 32\], must be \[61, 32\]"
    )
    with pytest.raises(ValueError, match=wrong):
        huggingface.load(tmp_path)


def test_what_the_model_has_no_use_for_is_said(g, tmp_path):
    said = []
    write_checkpoint(tmp_path, g.hub, {**g.tensors, "mtp.fc.weight": np.zeros((2, 2), np.float32)})
    huggingface.load(tmp_path, say=said.append)
    assert said == ["left out 1 tensors that the model has no use for: mtp.fc.weight"]


def test_damaged_files(g, tmp_path):
    path = write_checkpoint(tmp_path, g.hub, g.tensors) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="ends before its tensors do"):
        huggingface.load(tmp_path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        huggingface.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="holds no safetensors files"):
        huggingface.load(tmp_path)


def test_in_bfloat16_and_back(g, tmp_path):
    halves = {name: values.astype(ml_dtypes.bfloat16) for name, values in g.tensors.items()}
    model = huggingface.load(write_checkpoint(tmp_path / "original", g.hub, halves), jnp.bfloat16)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    huggingface.save(model, g.hub, tmp_path / "again")
    again = stored_in(tmp_path / "again")
    for name, values in halves.items():
        # Routers and rates are kept wider: the same values.
        np.testing.assert_array_equal(again[name].astype(np.float32), values.astype(np.float32), err_msg=name)
    assert again["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


def test_on_a_mesh(g, tmp_path):
    write_checkpoint(tmp_path, g.hub, g.tensors)
    whole = huggingface.load(tmp_path)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        spread = huggingface.load(tmp_path)
        experts = spread.stages[0].branches[1].mixer.w_in_EDF[...]
        assert experts.sharding.spec == jax.P(None, "expert", ("fsdp", "tensor"), None)
        huggingface.save(spread, g.hub, tmp_path / "from_mesh")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(one, other)
    huggingface.save(whole, g.hub, tmp_path / "from_one")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("from_mesh", "from_one")]
    assert files[0] == files[1]


# Loads a directory and says the bytes of its arrays, and by how much the most memory ever held rose.
PEAK = """
import sys, jax
from research.config import ConfigError
from research.interop import huggingface
from research.interop.opening import open_model
jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
def most(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = most()
model = jax.block_until_ready(huggingface.load(sys.argv[1], sys.argv[2]))
print(sum(leaf.nbytes for leaf in jax.tree.leaves(model)), most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says there what a process has held at most")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_held_while_loading(dtype, tmp_path):
    """Never as much as a file above the model: tensors are read one at a time."""
    hub = {
        **golden("llama").hub,
        "vocab_size": 1024,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
    }
    hub |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    shapes = {
        name: [{61: 1024, 32: 1024, 16: 1024, 48: 4096}[n] for n in array.shape]
        for name, array in golden("llama").tensors.items()
    }
    shapes |= {
        name.replace("layers.0", f"layers.{n}"): shape
        for name, shape in shapes.items()
        if "layers.0" in name
        for n in range(8)
    }
    write_checkpoint(tmp_path, hub, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}, files=4)
    told = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, dtype], check=True, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    arrays, rose = map(int, told.stdout.split())
    assert arrays > 200e6
    file = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    print(
        f"{dtype}: {arrays / 1e6:.0f} MB of arrays, {(rose - arrays) / 1e6:.0f} MB above them; a file has {file / 1e6:.0f} MB"
    )
    assert rose - arrays < file


def save_float8(tensors, path):
    """As safetensors, whose numpy front end knows no float8."""
    save_file({name: t.view(np.uint8) if t.dtype.itemsize == 1 else t for name, t in tensors.items()}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def test_a_model_in_scaled_float8(tmp_path):
    """DeepSeek-V3's published files: matrices in float8, a scale for every block of them; norms, router and embedding not."""
    g, rng, packed, values = golden("deepseek_v3"), np.random.default_rng(0), {}, {}
    for name, tensor in g.tensors.items():
        packed[name] = values[name] = tensor
        if name.endswith("_proj.weight"):
            packed[name] = tensor.astype(ml_dtypes.float8_e4m3fn)
            blocks = [-(-size // 16) for size in tensor.shape]
            packed[f"{name}_scale_inv"] = scales = rng.uniform(0.5, 2, blocks).astype(np.float32)
            spread = np.kron(scales, np.ones((16, 16), np.float32))[: tensor.shape[0], : tensor.shape[1]]
            values[name] = packed[name].astype(np.float32) * spread
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    write_checkpoint(tmp_path / "packed", {**g.hub, "quantization_config": quantization}, {})
    save_float8(packed, tmp_path / "packed" / "model.safetensors")
    huggingface.save(huggingface.load(tmp_path / "packed"), g.hub, tmp_path / "again")
    for name, again in stored_in(tmp_path / "again").items():
        np.testing.assert_array_equal(again, values[name], err_msg=name)
    quantization["weight_block_size"] = None
    write_checkpoint(tmp_path / "unscaled", {**g.hub, "quantization_config": quantization}, g.tensors)
    with pytest.raises(
        ValueError, match="quantization_config must be of quant_method 'mxfp4', or 'fp8' with a weight_block_size"
    ):
        huggingface.load(tmp_path / "unscaled")


def test_scaled_float8(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 130)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, size=(2, 2)).astype(np.float32)
    save_float8({"w": values, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path, (128, 128))
    assert stored.shapes() == {"w": (200, 130)}
    expected = values.astype(np.float32)
    for i in range(2):
        for j in range(2):
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j]
    np.testing.assert_array_equal(stored.read("w"), expected)


def test_four_bit_experts(tmp_path):
    """gpt-oss's published experts: blocks of 32 numbers along the input, two a byte, and an exponent each."""
    g, rng = golden("gpt_oss"), np.random.default_rng(0)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    E, D, N = g.tensors[name].shape
    codes = rng.integers(0, 16, (E, N, D // 32, 32), np.uint8)
    scales = rng.integers(122, 128, (E, N, D // 32), np.uint8)
    sign, magnitude = 1 - 2.0 * (codes >> 3), np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
    values = (sign * magnitude * 2.0 ** (scales[..., None] - 127.0)).reshape(E, N, D).swapaxes(1, 2).astype(np.float32)
    packed = {tensor: array for tensor, array in g.tensors.items() if tensor != name}
    packed |= {f"{name}_blocks": codes[..., ::2] | codes[..., 1::2] << 4, f"{name}_scales": scales}
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    model = huggingface.load(
        write_checkpoint(tmp_path / "packed", {**g.hub, "quantization_config": quantization}, packed)
    )
    huggingface.save(model, g.hub, tmp_path / "again")
    np.testing.assert_array_equal(stored_in(tmp_path / "again")[name], values)


def test_heads_ahead(tmp_path):
    """A config.json may announce heads ahead that the files lack, as DeepSeek-V3's does once transformers has saved it."""
    g = golden("deepseek_v3")
    hub, said = {**g.hub, "num_nextn_predict_layers": 1}, []
    plain = huggingface.load(write_checkpoint(tmp_path / "without", hub, g.tensors), say=said.append)
    assert plain.mtp is None
    assert said == [
        f"{tmp_path / 'without'} holds no multi-token prediction heads, which its config.json announces: loaded without"
    ]
    # The head is a layer after the last: that one's tensors once more, and its own.
    rng, depth, width = np.random.default_rng(0), hub["num_hidden_layers"], hub["hidden_size"]
    last = f"model.layers.{depth - 1}."
    like = {
        tensor.replace(last, f"model.layers.{depth}."): array for tensor, array in g.tensors.items() if last in tensor
    }
    shapes = {"enorm.weight": (width,), "hnorm.weight": (width,), "shared_head.norm.weight": (width,)}
    shapes |= {"eh_proj.weight": (width, 2 * width)}
    like |= {f"model.layers.{depth}.{tensor}": np.zeros(shape) for tensor, shape in shapes.items()}
    heads = {tensor: rng.normal(size=array.shape).astype(np.float32) for tensor, array in like.items()}
    copies = {
        f"model.layers.{depth}.embed_tokens.weight": g.tensors["model.embed_tokens.weight"],
        f"model.layers.{depth}.shared_head.head.weight": g.tensors["lm_head.weight"],
    }
    original = write_checkpoint(tmp_path / "with", hub, {**g.tensors, **heads, **copies})
    model = huggingface.load(original, say=said.append)
    assert said[1].startswith("left out 2 tensors")
    merge = model.mtp.heads[0].w_merge_ND[...]
    np.testing.assert_array_equal(merge.T, heads[f"model.layers.{depth}.eh_proj.weight"])
    huggingface.save(model, hub, tmp_path / "again")
    again = stored_in(tmp_path / "again")
    assert set(again) == {*g.tensors, *heads}
    for tensor, values in heads.items():
        np.testing.assert_array_equal(again[tensor], values, err_msg=tensor)


def test_only_a_config_that_describes_the_model_is_saved(g, tmp_path):
    model = huggingface.load(write_checkpoint(tmp_path / "original", g.hub, g.tensors))
    other = {**g.hub, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.per_token is 2 there, 3 here"):
        huggingface.save(model, other, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="must be an empty directory or not exist yet"):
        huggingface.save(model, g.hub, tmp_path / "original")
    with pytest.raises(ValueError, match=r"config.json/below can't be made: Not a directory"):
        huggingface.save(model, g.hub, tmp_path / "original/config.json/below")
