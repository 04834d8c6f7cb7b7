"""Which token of which sequence each row of a model's forwards is.

One rule for recording and for replay, so that what was recorded is found again:

- A row of a batch is a sequence. It begins where the cache is empty or there is none, and goes on
  with every forward that brings the same cache. A token's position is its column in the cache less
  the padding before the sequence.
- Without cache and mask, sequences in one row begin where `position_ids` start anew.
- In a continuous batch a request is a sequence. One that was preempted begins at position 0 again
  and stays the same sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.continuous_batching.model_runner import ModelRunner

from mixtura.errors import CaptureUnsupported, InputError

SEARCHES: dict[str, Callable[..., Any]] = {
    "beam search, which moves sequences between rows": GenerationMixin._beam_search,
    "assisted decoding, which runs tokens that are given up": GenerationMixin._assisted_decoding,
}
"""Ways to generate that cannot be followed."""

UNKNOWN = -1
"""The end of a batch whose cache nobody can tell the contents of."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one forward, in the order in which layers see them: runs of columns.

    Attributes:
        sequences: (S,) int64, a run's sequence.
        starts: the column of each run's first row: of all, or (S,).
        lengths: rows of each run: of all, or (S,).
        offsets: (S,) columns of padding before each run's sequence.
        is_padding: (N,) bool; None where no row is padding but by its column.
    """

    sequences: Tensor
    starts: int | Tensor
    lengths: int | Tensor
    offsets: Tensor
    is_padding: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """N."""
        if isinstance(self.lengths, int):
            return len(self.offsets) * self.lengths
        return int(self.lengths.sum())

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Sequence and position of each row, (N,) int64 each; see `TokenTable`."""
        num_runs = len(self.sequences)
        lengths = torch.as_tensor(self.lengths).expand(num_runs)
        run = torch.arange(num_runs).repeat_interleave(lengths)
        first = torch.as_tensor(self.starts).expand(num_runs) - (lengths.cumsum(0) - lengths)
        columns = torch.arange(len(run)) + first[run]
        positions = columns - self.offsets[run]
        is_padding = positions < 0 if self.is_padding is None else self.is_padding
        return self.sequences[run], torch.where(is_padding, -1 - columns, positions)


@dataclass(slots=True)
class _Batch:
    """The rows of a batch whose cache holds `end` columns."""

    sequences: Tensor
    offsets: Tensor
    end: int = 0


@dataclass(slots=True)
class _Request:
    """A request of a continuous batch of which `end` tokens have been seen."""

    sequence: int
    end: int = 0


@dataclass(slots=True)
class SequenceFollower:
    """Follows the forwards of a model.

    Attributes:
        requests: of every sequence that has begun, the id of the request; None for the row of a
            batch.
    """

    requests: list[str | None] = field(default_factory=list)
    _batches: WeakKeyDictionary[Any, _Batch] = field(default_factory=WeakKeyDictionary)
    _served: WeakKeyDictionary[Any, dict[str, _Request]] = field(default_factory=WeakKeyDictionary)
    _open: _Batch | None = None

    def begin(self, inputs: Mapping[str, Any]) -> Rows:
        """The rows of a forward that is called with `inputs`.

        Raises:
            InputError: tokens before those of the forward have not been seen, or a padding mask has
                a form that is not read.
            CaptureUnsupported: a search that cannot be followed, or a continuous batch in graphs.
        """
        self._open = None
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"]
        num_rows, length = tokens.shape[:2]
        if inputs.get("cache") is not None and inputs.get("cu_seq_lens_q") is not None:
            return self._begin_requests(inputs["cache"], length)
        cache = inputs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        if start:
            batch = self._known(cache, num_rows, start)
        else:
            _refuse_searches()
            if cache is None and inputs.get("attention_mask") is None:
                packed = self._begin_packed(inputs.get("position_ids"), num_rows, length)
                if packed is not None:
                    return packed
            batch = self._begin_batch(cache, num_rows)
        is_padding = None
        if not start or length > 1:
            batch.offsets, is_padding = _read_padding(inputs, (num_rows, length), start)
        batch.end, self._open = start + length, batch
        return Rows(batch.sequences, start, length, batch.offsets, is_padding)

    def end(self, output: Any) -> None:
        """A forward is done; a cache that it has made belongs to its sequences."""
        cache = getattr(output, "past_key_values", None)
        if self._open is not None and cache is not None:
            self._batches[cache] = self._open

    def abort(self, num_begun: int) -> None:
        """A forward has failed; the sequences after the first `num_begun` have not begun."""
        del self.requests[num_begun:]
        if self._open is not None:
            self._open.end = UNKNOWN

    def _known(self, cache: Any, num_rows: int, start: int) -> _Batch:
        batch = self._batches.get(cache)
        if batch is None or start != batch.end:
            end = 0 if batch is None else batch.end
            raise InputError(
                f"a forward that goes on behind {start} tokens in a cache must come after these "
                f"tokens; got {max(end, 0)} of that cache in this block. Begin the block before "
                f"the cache is filled, and crop none."
            )
        if len(batch.sequences) != num_rows:
            raise InputError(
                f"a batch must keep its rows while its cache is used; got {num_rows} rows after "
                f"{len(batch.sequences)}. Generate each batch with a cache of its own."
            )
        return batch

    def _begin_batch(self, cache: Any, num_rows: int) -> _Batch:
        sequences = torch.arange(len(self.requests), len(self.requests) + num_rows)
        self.requests += [None] * num_rows
        batch = _Batch(sequences, torch.zeros(num_rows, dtype=torch.int64))
        if cache is not None:
            self._batches[cache] = batch
        return batch

    def _begin_packed(self, positions: Any, num_rows: int, length: int) -> Rows | None:
        """Sequences that lie one after the other in rows; None where each row is one."""
        if not isinstance(positions, Tensor) or positions.ndim != 2:
            return None
        positions = positions.cpu().expand(num_rows, length)
        begins = torch.ones(num_rows, length, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        firsts = begins.flatten().nonzero().flatten()
        if bool(positions.flatten()[firsts].any()):
            raise InputError(
                f"sequences without a cache must begin at position 0; got "
                f"{positions.flatten()[firsts].tolist()[:8]}. Give their first tokens too, or "
                f"the cache as past_key_values."
            )
        if len(firsts) == num_rows:
            return None
        sequences = torch.arange(len(self.requests), len(self.requests) + len(firsts))
        self.requests += [None] * len(firsts)
        lengths = torch.diff(firsts, append=torch.tensor([num_rows * length]))
        return Rows(sequences, 0, lengths, torch.zeros_like(sequences))

    def _begin_requests(self, cache: Any, num_rows: int) -> Rows:
        """The rows of a continuous batch; its arguments do not name requests, its runner does."""
        frame = _find_caller(ModelRunner._forward_process_and_sample)
        if frame is None:
            raise CaptureUnsupported(
                "a continuous batch must be run by Transformers' own runner, which knows its "
                "requests; got another caller. Use generate_batch."
            )
        runner = frame.f_locals["self"]
        if runner.pad_inputs:
            raise CaptureUnsupported(
                "a continuous batch must run without torch.compile and CUDA graphs, which run "
                "again without the host's part; got one that is padded for them. Turn them off in "
                "ContinuousBatchingConfig."
            )
        found = runner.inputs_and_outputs
        if hasattr(found, "io_pairs"):  # two batches in turn
            found = found.io_pairs[found.current_pair].host_io
        lengths = [future.query_length for future in found.requests_in_batch]
        assert sum(lengths) == num_rows
        served = self._served.setdefault(cache, {})
        sequences, starts = [], []
        for future, length in zip(found.requests_in_batch, lengths, strict=True):
            start = future.state.position_offset - length
            request = self._request(served, future.state, start)
            request.end = start + length
            sequences.append(request.sequence)
            starts.append(start)
        numbers = torch.tensor(sequences)
        return Rows(numbers, torch.tensor(starts), torch.tensor(lengths), torch.zeros_like(numbers))

    def _request(self, served: dict[str, _Request], state: Any, start: int) -> _Request:
        found = served.get(state.request_id)
        is_again = bool(state._true_initial_tokens)  # preempted, with what it had generated
        if start == 0 and (found is None or not is_again):
            found = served[state.request_id] = _Request(len(self.requests))
            self.requests.append(state.request_id)
        if found is None or start > found.end:
            raise InputError(
                f"the request {state.request_id!r} must run its tokens itself; got position "
                f"{start} first, as other requests' blocks hold what is before it. Set "
                f"allow_block_sharing=False in ContinuousBatchingConfig, and num_return_sequences "
                f"to 1."
            )
        return found


def _read_padding(
    inputs: Mapping[str, Any], shape: tuple[int, int], start: int
) -> tuple[Tensor, Tensor | None]:
    """Columns of padding before each row's sequence (B,), and which rows are padding (B * T,)."""
    num_rows, length = shape
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    none = torch.zeros(num_rows, dtype=torch.int64)
    if mask is None:
        return none, None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        is_token = mask.cpu().bool()
        return (is_token.cumsum(1) == 0).sum(1), ~is_token[:, -length:].flatten()
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        raise InputError(
            f"padding must be told by an attention_mask of (batch, tokens) or by position_ids of "
            f"that shape; got a mask ({type(mask).__name__}) of another form. Generate with a "
            f"dynamic cache."
        )
    # A mask that has been made for attention already: the last token's position tells.
    last = positions.cpu().expand(num_rows, length)[:, -1]
    return start + length - 1 - last, None


def _refuse_searches() -> None:
    """Raise where rows change their sequence, or tokens are run that are no part of one."""
    for name, search in SEARCHES.items():
        if _find_caller(search) is not None:
            raise CaptureUnsupported(
                f"routing must be recorded and replayed where a row keeps its sequence and its "
                f"tokens; got {name}. Generate without it."
            )


def _find_caller(function: Callable[..., Any]) -> FrameType | None:
    """The innermost call of a function that is under way in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame
