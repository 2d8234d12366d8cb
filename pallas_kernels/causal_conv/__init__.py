"""Kernels of the short causal convolution with its activation: ``tpu`` for TPU, forward and backward."""
