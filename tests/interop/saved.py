"""``python -m tests.interop.saved DIR NAME ...``: loads golden families' checkpoints and saves them again into DIR/NAME, which
``generate.py --round-trip`` opens."""

import json
import sys
import tempfile
from pathlib import Path

from research.interop import huggingface
from tests.interop.checkpoints import golden, write_checkpoint

directory, *names = sys.argv[1:]
for name in names:
    made = golden(name)
    with tempfile.TemporaryDirectory() as original:
        model = huggingface.load(write_checkpoint(Path(original), made.hub, made.tensors))
        huggingface.save(model, json.loads(Path(original, "config.json").read_text()), Path(directory, name))
