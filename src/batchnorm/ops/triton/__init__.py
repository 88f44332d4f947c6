"""Triton kernels for NVIDIA GPUs. Nothing here imports Triton before a tensor on a GPU comes."""
