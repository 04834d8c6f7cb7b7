"""LoRA adapters of PEFT: their files, where they go in a model, and which rows have which.

Weights are neither merged with adapters nor rebuilt.
"""
