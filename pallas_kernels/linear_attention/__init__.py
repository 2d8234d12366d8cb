"""Kernels of the chunked linear recurrence: ``tpu`` for TPU, ``gpu`` for Hopper GPUs (all mechanisms but KDA).

Values and every gradient, from the states that forward saves.
"""
