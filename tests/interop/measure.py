"""transformers on PyTorch, on the models that ``experiments.benchmark families`` measures; in the golden files' environment:

    python -m experiments.benchmarks.families DIR                          # writes the models
    python -m experiments.benchmark families --json > families.json        # ours
    .golden/bin/python tests/interop/measure.py DIR families.json          # adds theirs, and the ratios

Each implementation of the experts that transformers has is measured, and decoding both through ``generate`` and by calling
the model token by token with its cache; the best of each counts. Everything is warm: one pass of each before any is timed.
``batched_mm`` gathers a matrix for every row, which 1,024 tokens make hundreds of times slower than the others: it decodes
only, after a prompt read eagerly.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers

EXPERTS = ("eager", "grouped_mm", "batched_mm")
DECODES_ONLY = "batched_mm"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "result", metavar="FILE", type=Path, help="what `experiments.benchmark families --json` printed"
    )
    parser.add_argument("--only", metavar="NAME", nargs="+", help="of these families")
    parser.add_argument("--rounds", metavar="N", type=int, default=3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    result = json.loads(options.result.read_text())
    theirs = result.setdefault("transformers", {})
    result["theirs"] = (
        f"transformers {transformers.__version__} on torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    result["their_rounds"] = f"best of {options.rounds} medians of 3"
    new_tokens = result["shape"]["new_tokens"]
    for name, ours in result["ours"].items():
        if options.only and name not in options.only:
            continue
        measured = {how: measure(options.directory / name, how, new_tokens, options.rounds) for how in EXPERTS}
        for how, values in measured.items():
            if values.pop("continuation", ours["continuation"]) != ours["continuation"]:
                raise SystemExit(f"{name}: the greedy continuation of transformers ({how}) is another")
        theirs[name] = measured
        best = {key: min(m[key] for m in measured.values() if key in m) for key in ("forward_ms", "train_step_ms")}
        fastest = max(m["decode_tokens_per_second"] for m in measured.values())
        result.setdefault("times_faster", {})[name] = {
            "forward": round(best["forward_ms"] / ours["forward_ms"], 2),
            "train_step": round(best["train_step_ms"] / ours["train_step_ms"], 2),
            "decode": round(ours["decode_tokens_per_second"] / fastest, 2),
        }
        print(name, json.dumps(result["times_faster"][name]), flush=True)
        options.result.write_text(json.dumps(result, indent=2) + "\n")  # after each: it takes minutes


def measure(directory: Path, experts: str, new_tokens: int, rounds: int) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    ids_BT = torch.tensor([json.loads((directory / "prompt.json").read_text())])
    square = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)

    @torch.no_grad()
    def forward():
        return model(ids_BT, use_cache=False).logits

    @torch.no_grad()
    def generated(count):
        return model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, max_new_tokens=count,
            min_new_tokens=count, pad_token_id=0,
        )[0, ids_BT.shape[1] :]  # fmt: skip

    @torch.no_grad()
    def by_hand():
        """Tokens a second after the prompt, without what ``generate`` does around the model."""
        model.set_experts_implementation("eager")
        out = model(ids_BT, use_cache=True)
        model.set_experts_implementation(experts)
        start = time.perf_counter()
        for _ in range(new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return new_tokens / (time.perf_counter() - start)

    model.eval()
    if experts == DECODES_ONLY:
        by_hand()
        return {"decode_tokens_per_second": round(max(by_hand() for _ in range(rounds)), 1)}
    continuation = generated(1 + new_tokens).tolist()[:16]
    forward(), by_hand()
    seconds = {"forward": [], "first": [], "all": [], "matmul": []}
    hand = []
    for _ in range(rounds):
        seconds["forward"].append(timed(forward))
        seconds["first"].append(timed(lambda: generated(1)))
        seconds["all"].append(timed(lambda: generated(1 + new_tokens)))
        seconds["matmul"].append(timed(lambda: np.matmul(square, square)))
        hand.append(by_hand())
    best = {what: min(times) for what, times in seconds.items()}

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        logits = model(ids_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids_BT[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    train = [timed(step) for _ in range(rounds)]
    return {
        "forward_ms": round(1e3 * best["forward"], 2),
        "train_step_ms": round(1e3 * min(train), 2),
        "decode_tokens_per_second": round(max(new_tokens / (best["all"] - best["first"]), *hand), 1),
        "matmul_1024_ms": round(1e3 * best["matmul"], 2),
        "continuation": continuation,
    }


def timed(function) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
