"""The axis glossary. Every array carries its axes as a suffix: ``q_BTGK`` is batch × time × key heads × key width.

====== =======================================================================================
letter axis
====== =======================================================================================
B      batch: rows that never see each other
T      time: tokens of a row, oldest first
S      time again, where two times meet: the source (key) side of attention
D      model width (the residual stream)
H      query or value heads
G      key heads (G divides H; value head i reads key head i // (H // G))
K      width of one query or key head
V      width of one value head; in ``logits_BTV`` the vocabulary
E      experts
F      hidden width of an MLP or of one expert
A      assignments of tokens to experts (A = T·K for top-K routing)
M, N   rows and columns of a grouped matrix product
C      tokens of one chunk (scans) or slots of one expert (capacity dispatch)
W      taps of a short convolution
R      rotated width of a head (rotary position embedding)
L      layers, or repeats of a stage
====== =======================================================================================

A trailing lower-case word (``state_BHKV``) names the thing, never an axis.
"""

from jax import Array
from jaxtyping import Bool, Float, Int, Shaped, UInt32

__all__ = ["Array", "Bool", "Float", "Int", "Shaped", "UInt32"]
