"""Kernels for tensors on the CPU."""
