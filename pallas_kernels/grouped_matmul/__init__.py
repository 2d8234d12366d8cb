"""Kernels of the grouped matrix product: ``tpu`` for TPU and ``gpu`` for Hopper GPUs, all three legs; ``tpu_activated``, two legs with
an activation."""
