"""`capture_routing`: which experts a model chooses for every token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from mixtura.errors import InputError, UnsupportedModel
from mixtura.hf.convert import moe_layers
from mixtura.hf.forward_watch import ForwardWatch
from mixtura.hf.sequences import Rows
from mixtura.observe import RoutingTrace, TokenTable, capture_layers
from mixtura.observe.capture import LayerRecorder
from mixtura.observe.tokens import order_keys


def observed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The MoE layers of a converted model that show their routing, by name.

    Raises:
        UnsupportedModel: there is none.
    """
    names = [layer.name for layer in moe_layers(model) if layer.kind != "none"]
    if not names:
        raise UnsupportedModel(
            f"the model ({type(model).__name__}) must have an MoE layer that is ours; got none. "
            f"Pass it to mixtura.convert first."
        )
    return {name: model.get_submodule(name) for name in names}


class RoutingCapture(ForwardWatch):
    """The routing of a model seen so far, during the block or after it.

    Args:
        model: converted.
        recorders: the observers of its layers, by name.
    """

    def __init__(self, model: PreTrainedModel, recorders: Mapping[str, LayerRecorder]) -> None:
        super().__init__(model, tuple(recorders))
        self._recorders = recorders
        self._rows: Rows | None = None
        self._forwards: list[Rows] = []
        self._num_tokens = 0

    def opened(self, rows: Rows) -> None:
        """Note the rows that layers are to see."""
        self.check_layers()
        self._rows = rows

    def closed(self) -> None:
        """Keep what the layers have chosen."""
        assert self._rows is not None
        self._num_tokens += self._rows.num_rows
        self.check_layers()
        self._forwards.append(self._rows)

    def dropped(self) -> None:
        """Forget what layers have chosen in this forward."""
        for recorder in self._recorders.values():
            recorder.keep(self._num_tokens)

    def finish(self) -> None:
        """See `ForwardWatch.finish`.

        Raises:
            InputError: a layer was called outside of the model's forwards.
        """
        super().finish()
        self.check_layers()

    def trace(self) -> RoutingTrace:
        """What has been chosen until now; of a token that was run again, the last choice.

        Raises:
            InputError: an id is none that a router chooses.
            MixturaError: a forward could not be followed.
        """
        self.check()
        forwards = list(self._forwards)
        tokens = [rows.tokens() for rows in forwards]
        empty = torch.empty(0, dtype=torch.int64)
        sequence = torch.cat([empty, *(part for part, _ in tokens)])
        position = torch.cat([empty, *(part for _, part in tokens)])
        keys, order = order_keys(sequence, position).sort(stable=True)
        is_last = torch.ones(len(keys), dtype=torch.bool)
        is_last[:-1] = keys[1:] != keys[:-1]
        rows = order[is_last]
        layers = {}
        for name, recorder in self._recorders.items():
            layer = recorder.trace()
            if layer.num_tokens:
                layer = replace(layer, ids=layer.ids[rows])
            layers[name] = layer
        requests = tuple(self.follower.requests)
        table = TokenTable(sequence[rows].int(), position[rows].int(), requests)
        return RoutingTrace(layers, table)

    def save(self, path: str | Path) -> None:
        """Write the trace; see `RoutingTrace.save`."""
        self.trace().save(path)

    def check_layers(self) -> None:
        """Raise `InputError` unless each layer has seen every row, or none at all."""
        for name, recorder in self._recorders.items():
            if recorder.num_tokens not in (0, self._num_tokens):
                raise InputError(
                    f"the layer {name!r} must be called for all tokens of the model's forwards "
                    f"({self._num_tokens}), and for no others; got {recorder.num_tokens}. Record "
                    f"its calls alone with mixtura.observe.capture_layers."
                )


@contextmanager
def capture_routing(model: PreTrainedModel) -> Iterator[RoutingCapture]:
    """Record which experts a model chooses for every token inside the `with` block.

    ids[l][n, k] = the k-th logical expert that the router of layer l chose for row n, which is a
    token of a sequence (`TokenTable`): a row of a batch, a sequence of a packed row, or a request
    of a continuous batch. Recordings may be nested, and go along with a replay.

    Args:
        model: from `mixtura.from_pretrained` or `mixtura.convert`.

    Raises:
        UnsupportedModel: the model has no MoE layer of ours.
        InputError: tokens were run whose beginning was not (a cache from before the block, or
            blocks shared between requests); a layer was called outside of the model's forwards.
        CaptureUnsupported: a graph is compiled or captured, beams are searched, decoding is
            assisted, or the block ran no forward that calls hooks.

    Example:
        with mixtura.capture_routing(model) as routing:
            model.generate(**inputs)
        routing.save("routing.safetensors")
    """
    layers = observed_layers(model)
    with capture_layers(layers) as watched:
        capture = RoutingCapture(model, watched.recorders)
        with capture.watching():
            yield capture
