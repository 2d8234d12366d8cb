# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A trained model, opened
#
# Opens the run that `make demo` leaves in `runs/demo` (or the one that `SCANROUTE_RUN` names), shows how it learned,
# writes text, and shows that the model's two forms, parallel and recurrent, are one function.
#
# Nothing here repeats the training configuration: the checkpoint carries it. Nor does it matter on how many devices the
# run was trained, or how many there are now.

# %%
# %matplotlib inline
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from IPython.display import display

from research.inference import generate, stream
from research.training import plots
from research.training.metrics import read_lines, run_files
from research.training.runs import load_for_inference

# The notebook may be started in the repository or in its own folder.
default = next((path for path in (Path("runs/demo"), Path("../runs/demo")) if path.exists()), Path("runs/demo"))
RUN = Path(os.environ.get("SCANROUTE_RUN", default))
print(f"{RUN.resolve()} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## What is in the checkpoint
#
# An Orbax checkpoint of arrays; beside them the tokenizer and, as readable JSON, the configuration. Each is enough to
# rebuild what it describes. Of the training state only the model's own variables are read, not the optimizer's.

# %%
trained = load_for_inference(RUN)
model, tokenizer = trained.model, trained.tokenizer

size = sum(leaf.size for leaf in jax.tree.leaves(model))
print(f"{trained.path}: {size:,} parameters after {trained.step:,} steps, {tokenizer.vocab_size:,} tokens\n")
for branch in trained.config.model.branches:
    print(f"{branch.name}: {branch.mixer}")
print(f"\n{trained.config.data}")

# %% [markdown]
# A model is a list of such branches around one residual stream. What repeats is one stage, compiled once and scanned over.

# %%
for stage in model.plan:
    print(f"{stage.repeats} x [{', '.join(branch.name for branch in stage.unit)}]")

# %% [markdown]
# ## How it learned
#
# `metrics.jsonl` has a line for every step. The loss is in bits per byte, which compares across tokenizers and with
# compressors: it is how long a code for the text would be.

# %%
metrics_file, evaluations_file = run_files(RUN)
records, evaluations = list(read_lines(metrics_file)), list(read_lines(evaluations_file))
with matplotlib.rc_context(plots.STYLE):
    display(plots.loss_figure(records, evaluations))

# %% [markdown]
# How many tokens each expert gets, over its fair share: white is balanced, blue is idle, red is crowded.

# %%
loads = [record for record in records if record.get("load")]
if loads:
    with matplotlib.rc_context(plots.STYLE):
        display(plots.load_figure(loads))

# %% [markdown]
# ## Writing
#
# `generate` takes token ids and returns the new ones alone. A document begins with the start token.

# %%
prompts = ["def main(", "import ", "class Test"]
ids = [[tokenizer.start_id, *tokenizer.encode(prompt)] for prompt in prompts]
how = {"max_new_tokens": 48, "temperature": 0.7, "top_p": 0.95, "seed": 0}
if tokenizer.eos_id is not None:
    how["stop"] = [tokenizer.eos_id]
new = generate(model, ids, **how)
for prompt, row in zip(prompts, new, strict=True):
    print(f"{prompt}{tokenizer.decode(row)}\n{'-' * 60}")

# %% [markdown]
# `stream` yields the same tokens block by block, as they are decoded. Here is the first of the three again, as it comes.

# %%
text, streamed = tokenizer.stream(), []
for block in stream(model, ids, **how):
    streamed += block[0]
    print("".join(map(text.push, block[0])), end="", flush=True)
print(text.finish())
assert streamed == new[0]

# %% [markdown]
# ## Two forms, one function
#
# Training reads a whole row at once (the parallel form). Decoding reads one token at a time and carries what it must
# remember from one to the next (the recurrent form): for linear attention a matrix per head, whatever the length.
# On these weights, for this text, both give the same logits up to the rounding of float32.

# %%
SOURCE = "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
tokens_BT = jnp.asarray([[tokenizer.start_id, *tokenizer.encode(SOURCE)][:64]], jnp.int32)


@jax.jit
def parallel(model, tokens_BT):
    return model(tokens_BT).logits_BTV


@jax.jit
def recurrent(model, tokens_BT):
    def step(cache, token_B):
        out = model(token_B[:, None], cache=cache)
        return out.cache, out.logits_BTV[:, 0]

    B, T = tokens_BT.shape
    _, logits_TBV = jax.lax.scan(step, model.init_cache(B, T), tokens_BT.T)
    return jnp.swapaxes(logits_TBV, 0, 1)


with jax.default_matmul_precision("highest"):
    parallel_BTV, recurrent_BTV = parallel(model, tokens_BT), recurrent(model, tokens_BT)
difference = float(jnp.max(jnp.abs(parallel_BTV - recurrent_BTV)))
scale = float(jnp.max(jnp.abs(parallel_BTV)))
print(f"{tokens_BT.size} tokens: logits up to {scale:.2f}, largest difference {difference:.1e}")
assert difference <= 1e-3 * scale, "the recurrent form must equal the parallel form"

# %% [markdown]
# What the recurrent form carries, for one row: the state of linear attention does not depend on the length of the text;
# the keys and values of softmax attention grow with it.

# %%
for length in (64, 1024):
    cache = jax.eval_shape(lambda: model.init_cache(1, length))  # noqa: B023
    for number, (stage, states) in enumerate(zip(model.plan, cache.stages, strict=True), 1):
        for branch, state in zip(stage.unit, states, strict=True):
            if state is not None:
                held = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))
                print(f"{length:5} tokens, stage {number}, {branch.name:10} {held:9,} bytes")
