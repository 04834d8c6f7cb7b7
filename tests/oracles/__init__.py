"""Families once more: plain float64 loops over the tensors and keys that a checkpoint holds.

Each module has `shapes(config)`, the checkpoint's tensors by their original names, and
`logits(config, tensors, ids)`, (T,) ids -> (T,V). A configuration is what config.json holds.
"""
