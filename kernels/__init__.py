"""Triton kernels, one file per op. Nothing here is imported until a Triton backend is asked for."""
