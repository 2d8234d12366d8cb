"""Golden files of published families, with PyTorch and transformers, in an environment of their own:

    python3.11 -m venv .golden && .golden/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    .golden/bin/python tests/interop/generate.py NAME ...            # writes tests/interop/golden/NAME/
    .golden/bin/python tests/interop/generate.py --round-trip .venv/bin/python [NAME ...]

The last has the project's own interpreter load every golden checkpoint and save it again, opens what it saved with
transformers, and compares logits and greedy continuations with those stored: the same to the bit in every family (transformers
5.23.0, one minute of two cores).

``golden/NAME/tiny.json`` is written by hand: ``model`` (class in transformers or in ``composed``), ``config`` (its class), ``arguments`` of the
configuration, ``seed``, ``atol`` for our logits (the family's noise floor), and where norms are stored as their distance from
1 ``centred``, a regular expression found in their names; ``fixed``, one of whole names, for buffers that the configuration
decides, which stay as they are and which our checkpoints lack; ``renamed``, pairs for ``re.sub``, where transformers saves under
other names than the hub's, which it also loads. What is written beside it: ``config.json``,
``tensors.json`` (names and shapes as the hub has them), ``logits.npz`` (float32, a document each) and ``new.json`` (greedy
continuations).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
import composed
from weights import NEW_TOKENS, PROMPTS, documents, weight

GOLDEN = Path(__file__).parent / "golden"
# The two likeliest tokens must be further apart, or rounding could choose between them.
MARGIN = 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="golden folders; all of them if none is named")
    parser.add_argument(
        "--round-trip", metavar="PYTHON", help="compare what the project saves; PYTHON is its interpreter"
    )
    options = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = options.names or sorted(folder.name for folder in GOLDEN.iterdir())
    if options.round_trip:
        round_trip(options.round_trip, names)
    else:
        for name in names:
            write(GOLDEN / name)


def write(folder: Path) -> None:
    tiny = json.loads((folder / "tiny.json").read_text())
    with tempfile.TemporaryDirectory() as made:
        config = named(tiny["config"])(**tiny["arguments"])
        named(tiny["model"])(config).save_pretrained(made)
        # The names of the hub, which are not those of the modules.
        with safe_open(f"{made}/model.safetensors", "np") as file:
            made_of = {hub_name(name, tiny): file.get_tensor(name) for name in sorted(file.keys())}
        fixed = {name: tensor for name, tensor in made_of.items() if is_fixed(name, tiny)}
        shapes = {name: list(tensor.shape) for name, tensor in made_of.items() if name not in fixed}
        options = (tiny["seed"], tiny.get("centred", "(?!)"))
        filled = {name: weight(name, tuple(shape), *options) for name, shape in shapes.items()}
        save_file(filled | fixed, f"{made}/model.safetensors", metadata={"format": "pt"})
        hub = json.loads(Path(made, "config.json").read_text())
        logits, new = run(made, tiny)
    (folder / "config.json").write_text(json.dumps(hub, indent=2) + "\n")
    (folder / "tensors.json").write_text(json.dumps(shapes, indent=0) + "\n")
    (folder / "new.json").write_text(json.dumps(new) + "\n")
    np.savez_compressed(folder / "logits.npz", **{f"document_{i}": x for i, x in enumerate(logits)})
    print(f"{folder.name}: {len(shapes)} tensors, logits of standard deviation {np.std(logits[0]):.2f}")


def is_fixed(name: str, tiny: dict) -> bool:
    return re.fullmatch(tiny.get("fixed", "(?!)"), name) is not None


def hub_name(name: str, tiny: dict) -> str:
    for pattern, replacement in tiny.get("renamed", []):
        name = re.sub(pattern, replacement, name)
    return name


def round_trip(python: str, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(__file__).parents[2]
        saved = subprocess.run([Path(python).absolute(), "-m", "tests.interop.saved", directory, *names], cwd=root)
        if saved.returncode:
            sys.exit(f"{python} could not save them")
        print(f"transformers {transformers.__version__} on what {python} saved, against what is stored:")
        differing = [name for name in names if not same(name, f"{directory}/{name}")]
    if differing:
        sys.exit(f"differ: {', '.join(differing)}")


def same(name: str, directory: str) -> bool:
    tiny = json.loads((GOLDEN / name / "tiny.json").read_text())
    stored = np.load(GOLDEN / name / "logits.npz")
    logits, new = run(directory, tiny)
    worst = max(np.abs(x - stored[f"document_{i}"]).max() for i, x in enumerate(logits))
    continued = new == json.loads((GOLDEN / name / "new.json").read_text())
    print(f"{name}: logits within {worst:.1e}, {'the same' if continued else 'ANOTHER'} continuation", flush=True)
    return worst <= tiny["atol"] and continued


def named(name: str):
    """A class of ``composed``, or of transformers."""
    return getattr(composed, name, None) or getattr(transformers, name)


@torch.no_grad()
def run(directory: str, tiny: dict) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of each document, and the greedy continuations."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    model, told = named(tiny["model"]).from_pretrained(directory, output_loading_info=True, **options)
    told["missing_keys"] = [name for name in told["missing_keys"] if not is_fixed(name, tiny)]
    wrong = {what: keys for what, keys in told.items() if keys}
    if wrong:
        sys.exit(f"{directory}: {wrong}")
    model.eval()
    texts = documents(model.config.vocab_size, tiny["seed"])

    def logits(ids):
        return model(torch.tensor(np.array(ids))[None].long(), use_cache=False).logits[0].float().numpy()

    new = []
    for document, length in PROMPTS:
        ids = texts[document][:length].tolist()
        for _ in range(NEW_TOKENS):
            last = logits(ids)[-1]
            low, high = np.sort(last)[-2:]
            if high - low < MARGIN:
                sys.exit(f"{directory}: two tokens are equally likely; choose another seed")
            ids.append(int(last.argmax()))
        new.append(ids[length:])
    return [logits(text) for text in texts], new


if __name__ == "__main__":
    main()
