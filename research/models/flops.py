"""How much arithmetic a model's own matrix products are."""

from research.models.config import ModelConfig


def forward_flops(config: ModelConfig, context: float) -> dict[str, float]:
    """FLOPs per token of one forward pass: ``layers``, and the vocabulary projection apart as ``head``; heads ahead, which run
    in training and speculative decoding only, apart as ``ahead``, each with its merge, layers and vocabulary projection.

    Active experts only, nothing padded, nothing recomputed. ``context`` is the mean number of keys a token attends to:
    (T + 1) / 2 for one document of length T. A training step does three times as much.
    """
    D, head = config.width, 2 * config.width * config.vocab_size
    layers = sum(branch.mixer.flops(D, context) for branch in config.layers)
    ahead = 0.0
    if config.mtp is not None:
        named = {branch.name: branch.mixer for branch in config.branches}
        one = 2 * (2 * D) * D + sum(named[name].flops(D, context) for name in config.mtp.pattern) + head
        ahead = config.mtp.depth * one
    return {"layers": layers, "head": head, "ahead": ahead}
