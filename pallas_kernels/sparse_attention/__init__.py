"""Kernels of sparse attention: the selection of keys, and attention to what was selected."""
