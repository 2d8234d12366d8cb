"""``python -m tests.interop.saved NAME DIR``: loads a golden family's checkpoint and saves it again into DIR, for
``generate.py --check`` to open."""

import json
import sys
import tempfile
from pathlib import Path

from research.interop import huggingface
from tests.interop.checkpoints import golden, write_checkpoint

name, directory = sys.argv[1:]
made = golden(name)
with tempfile.TemporaryDirectory() as original:
    model = huggingface.load(write_checkpoint(Path(original), made.hub, made.tensors))
    huggingface.save(model, json.loads(Path(original, "config.json").read_text()), directory)
