"""Kernels of the chunked linear recurrence: ``tpu`` for TPU. Values and every gradient, from the states that forward saves."""
