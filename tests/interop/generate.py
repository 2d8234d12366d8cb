"""Golden files of published families, with PyTorch and transformers, in an environment of their own:

    python3.11 -m venv .golden && .golden/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    .golden/bin/python tests/interop/generate.py NAME ...            # writes tests/interop/golden/NAME/
    .golden/bin/python tests/interop/generate.py --flips [NAME ...]  # writes tests/interop/flips.npz and absences.json
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
import flips
from weights import NEW_TOKENS, PROMPTS, documents, weight

FOLDER = Path(__file__).parent
GOLDEN = FOLDER / "golden"
# The two likeliest tokens must be further apart, or rounding could choose between them.
MARGIN = 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="golden folders; all of them if none is named")
    parser.add_argument(
        "--round-trip", metavar="PYTHON", help="compare what the project saves; PYTHON is its interpreter"
    )
    parser.add_argument(
        "--flips", action="store_true", help="write flips.npz and absences.json anew, for the families of NAME ..."
    )
    options = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = options.names or sorted(folder.name for folder in GOLDEN.iterdir())
    if options.flips:
        write_flips(options.names or flips.families())
        write_absences(options.names or flips.families())
    elif options.round_trip:
        round_trip(options.round_trip, names)
    else:
        for name in names:
            write(GOLDEN / name)


def write(folder: Path) -> None:
    tiny = json.loads((folder / "tiny.json").read_text())
    with tempfile.TemporaryDirectory() as made:
        shapes = fill(made, named(tiny["config"])(**tiny["arguments"]), tiny)
        hub = json.loads(Path(made, "config.json").read_text())
        logits, new = run(made, tiny)
    (folder / "config.json").write_text(json.dumps(hub, indent=2) + "\n")
    (folder / "tensors.json").write_text(json.dumps(shapes, indent=0) + "\n")
    (folder / "new.json").write_text(json.dumps(new) + "\n")
    np.savez_compressed(folder / "logits.npz", **{f"document_{i}": x for i, x in enumerate(logits)})
    print(f"{folder.name}: {len(shapes)} tensors, logits of standard deviation {np.std(logits[0]):.2f}")


def fill(made: str, config, tiny: dict) -> dict[str, list[int]]:
    """Saves a model of our weights, and says its tensors' names and shapes."""
    named(tiny["model"])(config).save_pretrained(made)
    # The names of the hub, which are not those of the modules.
    with safe_open(f"{made}/model.safetensors", "np") as file:
        made_of = {hub_name(name, tiny): file.get_tensor(name) for name in sorted(file.keys())}
    fixed = {name: tensor for name, tensor in made_of.items() if is_fixed(name, tiny)}
    shapes = {name: list(tensor.shape) for name, tensor in made_of.items() if name not in fixed}
    options = (tiny["seed"], tiny.get("centred", "(?!)"))
    filled = {name: weight(name, tuple(shape), *options) for name, shape in shapes.items()}
    save_file(filled | fixed, f"{made}/model.safetensors", metadata={"format": "pt"})
    return shapes


def write_flips(families: list[str]) -> None:
    """``flips.npz``: a part of the logits of every flip of ``flips.json``, and what its checkpoint consists of."""
    stored, rows, wrong = FOLDER / "flips.npz", [], []
    if stored.exists():
        told = np.load(stored)
        rows = list(zip(told["labels"], told["logits"], told["tensors"], strict=True))
    rows = [row for row in rows if row[0].split()[0] not in families]
    for family in families:
        tiny = json.loads((GOLDEN / family / "tiny.json").read_text())
        plain = {}
        for flip in flips.flips(family):
            part, shapes = flipped(flip, tiny)
            plain.setdefault(flip.model, part)
            by = np.abs(part - plain[flip.model]).max()
            if flip.change and by < 100 * tiny["atol"]:
                wrong.append(f"{flip.label} changes the logits by {by:.1e} only")
            rows.append((flip.label, part, flips.digest(shapes)))
        for flip in flips.inert(family):
            # Some change the order of sums.
            if np.abs(flipped(flip, tiny)[0] - plain[flip.model]).max() > tiny["atol"]:
                wrong.append(f"{flip.label} is not inert")
        print(f"{family}: {sum(label.split()[0] == family for label, *_ in rows)} models", flush=True)
    if wrong:
        sys.exit("\n".join(wrong))
    labels, logits, tensors = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
    np.savez_compressed(stored, labels=labels, logits=logits, tensors=tensors)


def write_absences(families: list[str]) -> None:
    """``absences.json``: what the classes of transformers take a key of a golden config.json for where it is absent, unless that
    is what it says; "absent" where they can't do without."""
    file = FOLDER / "absences.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    for family in families:
        tiny = json.loads((GOLDEN / family / "tiny.json").read_text())
        hub = flips.golden_config(family)
        if hasattr(composed, tiny["config"]):
            continue
        told[family] = {}
        for key in hub:
            with tempfile.TemporaryDirectory() as made:
                Path(made, "config.json").write_text(json.dumps(flips.changed(hub, {key: flips.ABSENT})))
                try:
                    taken = json.loads(named(tiny["config"]).from_pretrained(made).to_json_string(use_diff=False))
                except Exception:
                    taken = {key: flips.ABSENT}
            if key not in ("architectures", "dtype") and taken.get(key) != hub[key]:
                told[family][key] = taken.get(key)
    lines = (f'  "{family}": {json.dumps(told[family])}' for family in sorted(told))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def flipped(flip: flips.Flip, tiny: dict) -> tuple[np.ndarray, dict[str, list[int]]]:
    """The stored part of the logits of a config.json that is ours to the letter."""
    with tempfile.TemporaryDirectory() as made:
        Path(made, "config.json").write_text(json.dumps(flip.hub))
        shapes = fill(made, named(tiny["config"]).from_pretrained(made), tiny)
        Path(made, "config.json").write_text(json.dumps(flip.hub))
        model = opened(made, tiny)
    return logits_of(model, documents(61, tiny["seed"])[0][: flips.LENGTH])[flips.PART], shapes


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


def run(directory: str, tiny: dict) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of each document, and the greedy continuations."""
    model = opened(directory, tiny)
    texts = documents(model.config.vocab_size, tiny["seed"])
    new = []
    for document, length in PROMPTS:
        ids = texts[document][:length].tolist()
        for _ in range(NEW_TOKENS):
            last = logits_of(model, ids)[-1]
            low, high = np.sort(last)[-2:]
            if high - low < MARGIN:
                sys.exit(f"{directory}: two tokens are equally likely; choose another seed")
            ids.append(int(last.argmax()))
        new.append(ids[length:])
    return [logits_of(model, text) for text in texts], new


def opened(directory: str, tiny: dict):
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    model, told = named(tiny["model"]).from_pretrained(directory, output_loading_info=True, **options)
    told["missing_keys"] = [name for name in told["missing_keys"] if not is_fixed(name, tiny)]
    wrong = {what: keys for what, keys in told.items() if keys}
    if wrong:
        sys.exit(f"{directory}: {wrong}")
    return model.eval()


@torch.no_grad()
def logits_of(model, ids) -> np.ndarray:
    return model(torch.tensor(np.array(ids))[None].long(), use_cache=False).logits[0].float().numpy()


if __name__ == "__main__":
    main()
