"""`mixtura generate`: text on stdout as it comes, figures on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtura.cli.inspect import check_target
from mixtura.cli.loading import DtypeName, LoadOptions, load, quiet
from mixtura.cli.options import (
    Debug,
    Deterministic,
    Device,
    Kernel,
    Linears,
    Lora,
    Model,
    Weights,
)
from mixtura.cli.ranks import (
    Balance,
    CutRanks,
    DispatcherOption,
    ExpertRanks,
    Interval,
    PlacementOption,
    RankOptions,
    Redundant,
    check_alike,
    from_first,
    is_speaker,
    open_ranks,
    shared_seed,
)
from mixtura.config import GatePrecision, PlacementStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixtura.hf.generate import GenerateOptions, Generation
    from mixtura.observe import RoutingTrace
    from mixtura.parallel import ExpertParallel

STDIN = "-"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input.")
    ] = None,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
    device: Device = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Dtype of the weights; auto is the checkpoint's.")
    ] = DtypeName.AUTO,
    weights: Weights = None,
    linears: Linears = None,
    lora: Lora = None,
    kernel: Kernel = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail where a layer or kernel is not the preferred one."),
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Above 0, draw tokens; 0 takes the likeliest one.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Draw from the likeliest tokens up to this probability."
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draw the same tokens every time.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message to a chat model.")
    ] = False,
    gate: Annotated[
        GatePrecision, typer.Option(help="Router in fp32, or in the model's own arithmetic.")
    ] = GatePrecision.FP32,
    deterministic: Deterministic = False,
    ep: ExpertRanks = None,
    tp: CutRanks = None,
    dispatcher: DispatcherOption = None,
    placement: PlacementOption = PlacementStrategy.LINEAR,
    eplb: Balance = False,
    redundant: Redundant = None,
    eplb_interval: Interval = None,
    save_routing: Annotated[
        Path | None,
        typer.Option(help="Keep which experts each token went to, in a safetensors file."),
    ] = None,
    replay_routing: Annotated[
        Path | None,
        typer.Option(help="Send each token to the experts that such a file has for it."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Generate text, and say how fast it came.

    The text goes to standard output as it comes, all else to standard error. With --ep the experts
    are spread over processes, which torchrun starts: torchrun --nproc-per-node 2 -m mixtura
    generate TEXT --ep 2. The first of them prints.
    """
    if prompt is None:
        raise typer.TyperException(
            "A prompt is missing. Give one, as in mixtura generate 'Once upon a time', or - for "
            "standard input."
        )
    spread = RankOptions(
        ep=ep,
        tp=tp,
        dispatcher=dispatcher,
        placement=placement,
        eplb=eplb,
        redundant=redundant,
        interval=eplb_interval,
    ).config()
    check_target(save_routing)
    with quiet(debug):
        from mixtura.hf.generate import GenerateOptions
        from mixtura.observe import RoutingTrace
    replayed = None if replay_routing is None else RoutingTrace.load(replay_routing)
    options = GenerateOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        is_chat=chat,
    )
    with open_ranks(spread, device) as (ranks, own_device):
        text = prompt if prompt != STDIN else from_first(ranks, read_stdin)
        if temperature > 0:
            options = replace(options, seed=shared_seed(ranks, seed))
        check_alike(ranks, {"prompt": text, **asdict(options)})
        run(
            LoadOptions(
                model=model,
                device=own_device,
                dtype=dtype,
                weights=weights,
                linears=linears,
                kernel=kernel,
                strict=strict,
                gate=gate,
                deterministic=deterministic,
                debug=debug,
                ranks=ranks,
                lora=lora[0] if lora else None,
            ),
            text,
            options,
            RoutingFiles(save_routing, replayed),
        )


@dataclass(frozen=True, slots=True)
class RoutingFiles:
    """Where routing goes, and the routing that is forced on the tokens."""

    saved: Path | None
    replayed: RoutingTrace | None


@contextmanager
def with_routing(model: PreTrainedModel, routing: RoutingFiles) -> Iterator[None]:
    """Record and replay routing in the block; of several ranks the first one writes the file."""
    import mixtura

    with ExitStack() as stack:
        if routing.replayed is not None:
            stack.enter_context(mixtura.replay_routing(model, routing.replayed))
        if routing.saved is None or not is_speaker():
            yield
            return
        try:
            with mixtura.capture_routing(model) as capture:
                yield
        except KeyboardInterrupt:
            print(f"\nThe routing was not saved to {routing.saved}: stopped.", file=sys.stderr)
            raise
        capture.save(routing.saved)


def run(
    load_options: LoadOptions, text: str, options: GenerateOptions, routing: RoutingFiles
) -> None:
    """Load the model, continue the text and print; of several ranks the first one prints."""
    with quiet(load_options.debug):
        from mixtura.hf.generate import TextMeter, generate_text, prepare_experts
    loaded, tokenizer = load(load_options)
    kernels = prepare_experts(loaded)
    speaks = is_speaker()
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if is_terminal and not options.is_chat and speaks:
        print(text, end="", file=sys.stderr, flush=True)  # read on; a pipe gets the new text alone
    meter = TextMeter(tokenizer, write if speaks else None, loaded.device)
    was_interrupted = False
    try:
        with quiet(load_options.debug), with_routing(loaded, routing):
            generate_text(loaded, tokenizer, text, options, meter=meter)
    except KeyboardInterrupt:
        was_interrupted = True
    if meter.num_prompt_tokens and speaks:
        write("\n")
        print_summary(meter.result(), loaded, kernels, load_options)
    if was_interrupted:
        raise KeyboardInterrupt


def read_stdin() -> str:
    """Standard input without its last line break.

    Raises:
        InputError: it is not text.
    """
    from mixtura.errors import InputError

    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input must be {error.encoding} text; got other bytes. Convert it."
        ) from None


def write(text: str) -> None:
    """Show a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def words_of_formats(weights: str | None, linears: str | None) -> str | None:
    """What the weights are kept in, where that was asked for."""
    from mixtura.hf.loader import LoadFormats

    formats = LoadFormats.parse(weights, linears)
    found = {"experts": formats.weights, "linear layers": formats.linears}
    words = [f"{name} in {format.value}" for name, format in found.items() if format is not None]
    return ", ".join(words) or None


def print_summary(
    result: Generation, model: PreTrainedModel, kernels: dict[str, int], options: LoadOptions
) -> None:
    """Print the figures, one to a line; `options` are those that the model was loaded with."""
    from mixtura.hf import adapter_names, moe_layers

    layers = moe_layers(model)
    num_ours = sum(layer.kind != "none" for layer in layers)
    num_experts_only = sum(layer.kind == "experts" for layer in layers)
    experts_only = f", of {num_experts_only} the experts alone" if num_experts_only else ""
    kernel = ", ".join(
        name if len(kernels) == 1 else f"{name} ({count})" for name, count in kernels.items()
    )
    place = "GPU" if model.device.type == "cuda" else "process"
    rows = {
        "prompt": f"{result.num_prompt_tokens} tokens{_rate(result.prompt_rate)}",
        "generated": f"{result.num_new_tokens} tokens{_rate(result.decode_rate)}",
        "first token": f"{result.first_token_seconds:.3f} s",
        "peak memory": f"{result.peak_bytes / 2**20:,.0f} MiB ({place})",
        "kernel": f"{kernel} on {model.device}",
        "MoE layers": f"{num_ours} of {len(layers)} taken over{experts_only}",
    }
    formats = words_of_formats(options.weights, options.linears)
    if formats is not None:
        rows["weights"] = formats
    adapters = adapter_names(model)
    if adapters:
        rows["adapter"] = f"{', '.join(adapters)}, beside the weights"
    if options.ranks is not None:
        rows["ranks"] = words_of_ranks(options.ranks, model)
        balance = words_of_balance(model)
        if balance is not None:
            rows["balance"] = balance
    for name, value in rows.items():
        print(f"{name:<11}  {value}", file=sys.stderr)


def words_of_ranks(ranks: ExpertParallel, model: PreTrainedModel) -> str:
    """How many ranks share the experts, how rows meet them, and what this one holds."""
    from mixtura.experts import PackedExperts
    from mixtura.hf.experts import FamilyExperts
    from mixtura.layer import FusedMoE

    names, num_bytes = set(), 0
    for module in model.modules():
        if isinstance(module, (FusedMoE, FamilyExperts)):
            names.add(module.dispatcher.name)
        if isinstance(module, PackedExperts) and module.given is not None:
            num_bytes += module.given.num_bytes
    return (
        f"{ranks.config.num_ranks}, by {' and '.join(sorted(names))}; "
        f"{num_bytes / 2**20:,.1f} MiB of experts on the first"
    )


def words_of_balance(model: PreTrainedModel) -> str | None:
    """What balancing came to; None where the experts are not balanced."""
    from mixtura.hf.balance import find_balancer

    balancer = find_balancer(model)
    if balancer is None:
        return None
    report = balancer.report()
    plans = f"{report.num_plans} plans, {report.num_moved} slots moved"
    return f"{plans}; {report.activity.value}: {report.reason}"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f", {rate:.1f} tokens/s"
