"""Checkpoint families: from the tensors of a file to matrices, and back."""

from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat, Part, Sample
from mixtura.quant.codecs.decoding import decode
from mixtura.quant.codecs.registry import codec_class, codec_for, method_names

__all__ = [
    "ActivationExtra",
    "ActivationGroup",
    "ActivationScheme",
    "Codec",
    "Decoded",
    "Header",
    "MatrixFormat",
    "Part",
    "Sample",
    "codec_class",
    "codec_for",
    "decode",
    "method_names",
]
