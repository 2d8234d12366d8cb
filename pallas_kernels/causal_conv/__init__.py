"""Kernels of the short causal convolution with its activation, forward and backward: ``tpu`` for TPU, ``gpu`` for Hopper GPUs."""
