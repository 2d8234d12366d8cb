"""Kernels of the chunked linear recurrence: ``tpu`` for TPU, ``gpu`` for Hopper GPUs (additive writes, no gate a channel).

Values and every gradient, from the states that forward saves.
"""
