"""The ledger of a checkpoint with the contents of its packed matrices read; no model is built."""

from __future__ import annotations

from pathlib import Path

from mixtura.hf.ledger import WeightLedger, build_ledger, read_contents
from mixtura.hf.load import check_moe, find_checkpoint
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.progress import read_progress


def read_ledger(model: str | Path) -> WeightLedger:
    """Say what becomes of every tensor of a checkpoint, and check what its packed matrices hold.

    The files are streamed once; memory holds one matrix at a time.

    Args:
        model: a directory, a GGUF file, or a hub id, whose files are downloaded.

    Raises:
        CheckpointError: a tensor is missing, superfluous, of another shape than config.json gives,
            or holds what cannot be meant; the message names it.
        UnsupportedModel: there is no MoE layer.
    """
    config, checkpoint = find_checkpoint(model)
    load = PackedLoad(check_moe(config), checkpoint)
    total = sum(packed.num_bytes for packed in checkpoint.packed.values())
    with read_progress("packed matrices", total) as on_bytes:
        contents = read_contents(checkpoint, on_bytes)
    return build_ledger(checkpoint, load.stored, load.kept, contents)
