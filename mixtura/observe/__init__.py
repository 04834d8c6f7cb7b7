"""What a model's routers chose: traces, expert usage, a picture and a page of it."""

from mixtura.observe.capture import LayersCapture, capture_layers
from mixtura.observe.page import PageText, render_page
from mixtura.observe.picture import save_picture
from mixtura.observe.tokens import TokenTable
from mixtura.observe.trace import LayerTrace, RoutingTrace
from mixtura.observe.usage import ExpertUsage, LayerUsage

__all__ = [
    "ExpertUsage",
    "LayerTrace",
    "LayerUsage",
    "LayersCapture",
    "PageText",
    "RoutingTrace",
    "TokenTable",
    "capture_layers",
    "render_page",
    "save_picture",
]
