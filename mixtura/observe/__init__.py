"""What a model's routers chose: traces, expert usage, a picture and a page of it."""

from mixtura.observe.capture import (
    LayerTrace,
    RoutingCapture,
    RoutingTrace,
    capture_routing,
)
from mixtura.observe.page import PageText, render_page
from mixtura.observe.picture import save_picture
from mixtura.observe.usage import ExpertUsage, LayerUsage

__all__ = [
    "ExpertUsage",
    "LayerTrace",
    "LayerUsage",
    "PageText",
    "RoutingCapture",
    "RoutingTrace",
    "capture_routing",
    "render_page",
    "save_picture",
]
