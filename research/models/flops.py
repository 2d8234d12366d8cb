"""How much arithmetic a model's own matrix products are."""

from research.models.config import ModelConfig


def forward_flops(config: ModelConfig, context: float) -> dict[str, float]:
    """FLOPs per token of one forward pass: ``layers``, and the vocabulary projection apart as ``head``.

    Active experts only, nothing padded, nothing recomputed. ``context`` is the mean number of keys a token attends to:
    (T + 1) / 2 for one document of length T. A training step does three times as much.
    """
    layers = sum(branch.mixer.flops(config.width, context) for branch in config.layers)
    return {"layers": layers, "head": 2 * config.width * config.vocab_size}
