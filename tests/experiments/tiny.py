"""A run of configs/tiny that several tests open: trained by a real process on two devices, once per test process."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Compiled quickly: nothing here is about speed.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@functools.cache
def tiny_run() -> Path:
    """The work directory; its texts lie beside it. Read it, and leave it as it is."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    texts = folder / "texts"
    texts.mkdir()
    for number in range(12):
        lines = [f"def f{number}_{i}(x):\n    return x * {i} + {number}\n" for i in range(40)]
        (texts / f"{number}.py").write_text("\n".join(lines))
    words = [
        "model.pattern=deltanet,experts,attention",
        *("data.source=TextFiles", f"data.source.paths={texts}/*.py", "data.held_out_bytes=8000"),
        *("train.steps=20", "train.log_every=2", "train.progress_seconds=0"),
    ]
    command = [sys.executable, "-m", "experiments.train", "tiny", *words, "--workdir", str(folder / "run")]
    environment = os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"
