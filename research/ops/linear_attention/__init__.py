"""One recurrence for linear attention, lightning attention, Mamba-2, GLA, DeltaNet, Gated DeltaNet and KDA.

``linear_attention`` maps a sequence, ``linear_attention_step`` one token. See ``dispatch`` for the meaning of every
argument and ``recurrent`` for the definition that every other form is held to.
"""

from research.ops.linear_attention.dispatch import IMPLEMENTATIONS, linear_attention, linear_attention_step

__all__ = ["IMPLEMENTATIONS", "linear_attention", "linear_attention_step"]
