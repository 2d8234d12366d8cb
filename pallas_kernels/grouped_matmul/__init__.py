"""Kernels of the grouped matrix product: ``tpu`` for TPU and ``gpu`` for Hopper GPUs, all three legs."""
