"""`replay_routing`: recorded experts are forced on a model's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.errors import InputError, UnsupportedModel
from mixtura.hf.capture import RoutingCapture
from mixtura.hf.convert import moe_layers
from mixtura.hf.forward_watch import ForwardWatch
from mixtura.hf.sequences import Rows
from mixtura.observe import LayerTrace, RoutingTrace
from mixtura.observe.capture import is_in_backward, layer_sizes
from mixtura.types import TokenInputs


class RoutingReplay(ForwardWatch):
    """Finds the recorded row of every token of a model's forwards.

    Args:
        model: converted; the trace fits it.
        trace: with tokens.
        sequences: which sequence of the trace each one that begins is; None: see `replay_routing`.
    """

    def __init__(
        self, model: PreTrainedModel, trace: RoutingTrace, sequences: Sequence[int] | None
    ) -> None:
        super().__init__(model, tuple(trace.layers))
        assert trace.tokens is not None
        self._tokens = trace.tokens
        self._sequences = sequences
        self._numbers: list[int] = []
        self._found: Tensor | None = None
        self._found_for_grad: Tensor | None = None
        self._num_awaited = 0
        self._has_recomputed = False

    def opened(self, rows: Rows) -> None:
        """Find the rows of these tokens in the trace."""
        requests = self.follower.requests
        del self._numbers[self._num_begun :]
        while len(self._numbers) < len(requests):
            self._numbers.append(self._number_of(len(self._numbers)))
        sequence, position = rows.tokens()
        sequence = torch.tensor(self._numbers)[sequence]
        found = self._tokens.find(sequence, position)
        missing = ((found < 0) & (position >= 0)).nonzero().flatten().tolist()
        if missing:
            first = missing[0]
            others = f" (nor {len(missing) - 1} more of this forward)" if missing[1:] else ""
            raise InputError(
                f"the token at position {int(position[first])} of sequence {int(sequence[first])} "
                f"must have been recorded to be replayed; got a trace without it{others}. "
                f"Replay what was recorded; a generated "
                f"sequence's last token was never run: leave it out, or mark it as padding in "
                f"attention_mask."
            )
        self._found = found
        if torch.is_grad_enabled():
            self._num_awaited = 1 if self._has_recomputed else self._num_awaited + 1
            self._has_recomputed, self._found_for_grad = False, found

    def closed(self) -> None:
        """No rows are open."""
        self._found = None

    def dropped(self) -> None:
        """No rows are open."""
        self._found = None

    def rows_for(self, num_tokens: int) -> Tensor:
        """Rows of the trace (T,) for a layer that is called with T tokens; -1 for padding.

        Raises:
            InputError: the layer is called outside of the model's forwards, or with other tokens.
        """
        with self.noting_errors():
            found = self._found
            if is_in_backward():
                found, self._has_recomputed = self._found_for_grad, True
                if self._num_awaited > 1:
                    raise InputError(
                        f"activations that are computed again in the backward pass must be those "
                        f"of the last forward; got {self._num_awaited} forwards with gradients "
                        f"since. Run the backward pass after each, or turn gradient checkpointing "
                        f"off."
                    )
            if found is None or len(found) != num_tokens:
                raise InputError(
                    f"a layer whose routing is replayed must be called in a forward of the model, "
                    f"with all its tokens; got {num_tokens} for "
                    f"{'no forward' if found is None else len(found)}. Call the model."
                )
            return found

    def _number_of(self, begun: int) -> int:
        """The sequence of the trace that the one which began as number `begun` is."""
        recorded, request = self._tokens.requests, self.follower.requests[begun]
        if self._sequences is not None:
            if begun >= len(self._sequences):
                raise InputError(
                    f"sequences must name one for each that begins in the block; got "
                    f"{len(self._sequences)} for more. Name them all."
                )
            return self._sequences[begun]
        if request is None:
            if begun >= len(recorded) or recorded[begun] is not None:
                held = "no such sequence" if begun >= len(recorded) else repr(recorded[begun])
                raise InputError(
                    f"the row of a batch that begins as number {begun} must be the trace's "
                    f"sequence of that number; got {held} there. Say which sequences the rows are: "
                    f"replay_routing(..., sequences=...)."
                )
            return begun
        times = self.follower.requests[:begun].count(request)
        matching = [number for number, name in enumerate(recorded) if name == request]
        if times >= len(matching):
            raise InputError(
                f"the request {request!r} must have been recorded to be replayed; got "
                f"{len(matching)} of that id, and number {times + 1} of it now. Say which "
                f"sequences the requests are: replay_routing(..., sequences=...)."
            )
        return matching[times]


class ReplayedLayer:
    """The source that gives one layer's tokens the ids that were recorded.

    Args:
        replay: knows the rows. name: the layer's. layer: its trace. module: the layer.
    """

    def __init__(
        self, replay: RoutingReplay, name: str, layer: LayerTrace, module: nn.Module
    ) -> None:
        self.replay = replay
        self.name = name
        self.device = next(module.parameters()).device
        # Behind the recorded rows is one for padding, whose choice nobody sees: row -1.
        some = torch.arange(layer.top_k).to(layer.ids.dtype).unsqueeze(0)
        self.ids = torch.cat([layer.ids, some]) if layer.num_tokens else None

    def __call__(self, tokens: TokenInputs, num_tokens: int) -> TokenInputs:
        """The same inputs with `replayed_ids`.

        Raises:
            InputError: they have some already, or nothing was recorded of the layer.
        """
        if self.replay.is_idle:
            return tokens
        rows = self.replay.rows_for(num_tokens)
        if tokens.replayed_ids is not None or self.ids is None:
            got = "no call of it in the trace" if self.ids is None else "two replays at once"
            raise InputError(
                f"the layer {self.name!r} must be replayed from one record of its choices; got "
                f"{got}. Replay one recording of the whole model."
            )
        ids = self.ids[rows].to(self.device, torch.int32)
        return replace(tokens, replayed_ids=ids)


@contextmanager
def replay_routing(
    model: PreTrainedModel,
    routing: RoutingCapture | RoutingTrace | str | Path,
    *,
    sequences: Sequence[int | str] | None = None,
) -> Iterator[None]:
    """Force recorded experts on every token that a model runs inside the `with` block.

    topk_ids[n] = the recorded ids of row n's token; topk_weights[n] are computed from the logits of
    now at these ids, and gradients flow through them. A replay of a model's own recording is the
    same to the bit.

    Args:
        model: converted whole: a router that stays the family's own cannot be told.
        routing: what `capture_routing` has recorded, or its file.
        sequences: for each sequence that begins in the block, in that order, which one of the
            recording it is: its number, or the id of its request. By default a request is the
            recorded one of the same id, and a row of a batch the recorded sequence with its number.

    Raises:
        UnsupportedModel: routers stay the family's own; the message names the layers.
        InputError: the recording has other layers, experts or top-k, or knows no tokens; in the
            block, a token that was not recorded.
        TraceError: the file cannot be read.
        CaptureUnsupported: as `capture_routing`.

    Example:
        with mixtura.replay_routing(model, "routing.safetensors"):
            loss = model(input_ids=sequences[:, :-1], attention_mask=mask[:, :-1]).loss
    """
    if isinstance(routing, (str, Path)):
        routing = RoutingTrace.load(routing)
    trace = routing.trace() if isinstance(routing, RoutingCapture) else routing
    if not isinstance(trace, RoutingTrace):
        raise InputError(
            f"routing ({type(routing).__name__}) must be what capture_routing has recorded, or its "
            f"file; got another thing. Pass the recording or a path."
        )
    layers = check_fit(model, trace)
    replay = RoutingReplay(model, trace, find_sequences(trace, sequences))
    with ExitStack() as stack:
        for name, module in layers.items():
            source = ReplayedLayer(replay, name, trace.layers[name], module)
            module.sources = (*module.sources, source)
            stack.callback(_remove, module, source)
        with replay.watching():
            yield


def _remove(module: Any, source: ReplayedLayer) -> None:
    module.sources = tuple(one for one in module.sources if one is not source)


def check_fit(model: PreTrainedModel, trace: RoutingTrace) -> dict[str, Any]:
    """The layers of a model by name, all of which a trace can be forced on.

    Raises:
        UnsupportedModel, InputError: see `replay_routing`.
    """
    found = moe_layers(model)
    others = [f"{layer.name} ({layer.reason})" for layer in found if layer.kind != "block"]
    if others or not found:
        raise UnsupportedModel(
            f"routing must be replayed in layers that are taken over whole; got others: "
            f"{', '.join(others) or 'no MoE layer'}. Convert the model, or replay it elsewhere."
        )
    if trace.tokens is None:
        raise InputError(
            "a routing trace must say which token each row is to be replayed; got one of layers "
            "alone. Record it with mixtura.capture_routing."
        )
    layers: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in found}
    if layers.keys() != trace.layers.keys():
        unlike = sorted(layers.keys() ^ trace.layers.keys())
        raise InputError(
            f"the routing trace must have the model's {len(layers)} MoE layers; got "
            f"{len(trace.layers)}, and only one of the two has {', '.join(unlike[:4])}. Replay the "
            f"model that was recorded."
        )
    for name, module in layers.items():
        layer = trace.layers[name]
        sizes = (layer.num_experts, layer.num_no_compute, layer.top_k)
        if sizes != layer_sizes(module):
            raise InputError(
                f"the recorded experts, experts without arithmetic and top-k of {name} ({sizes}) "
                f"must be those of the layer; got {layer_sizes(module)}. Replay the model that was "
                f"recorded."
            )
    return layers


def find_sequences(
    trace: RoutingTrace, sequences: Sequence[int | str] | None
) -> tuple[int, ...] | None:
    """The numbers of sequences of a trace, given by number or by the id of their request.

    Raises:
        InputError: the trace has no such sequence, or several requests of that id.
    """
    if sequences is None or trace.tokens is None:
        return None
    requests = trace.tokens.requests
    found = []
    for one in sequences:
        numbers = [n for n, name in enumerate(requests) if one in (n, name)]
        if len(numbers) != 1:
            raise InputError(
                f"sequences must name sequences of the trace by number or by their request's id; "
                f"got {one!r}, which is {len(numbers)} of {len(requests)}. Correct it."
            )
        found += numbers
    return tuple(found)
