"""Layers on a GPU: CUDA graphs, cold weights, limits of the same run, resumable results."""
