"""Kernels of the grouped matrix product: ``tpu`` for TPU, all three legs."""
