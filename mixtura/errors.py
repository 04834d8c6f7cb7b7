"""Exceptions that mixtura raises for what a user can mend.

Every message reads: what (value) must rule; got fact. Do this.
"""

from __future__ import annotations


class MixturaError(Exception):
    """Base of every error that mixtura raises on purpose."""


class ConfigError(MixturaError, ValueError):
    """A configuration value, alone or together with another, is not possible."""


class InputError(MixturaError, ValueError):
    """A tensor or argument of a call has the wrong shape, dtype, device or range."""


class CheckpointError(MixturaError):
    """A checkpoint file or directory is missing, broken, or of a kind that is not read."""


class TraceError(MixturaError):
    """A routing trace file is missing, broken, or of another version."""


class PlacementError(MixturaError):
    """A placement's file is missing, broken, or of another version."""


class UnsupportedModel(MixturaError):
    """A model has no MoE layer, or has one that mixtura cannot take over."""


class NoKernelFits(MixturaError):
    """No kernel accepts the problem; the message lists every candidate with its reason."""


class GradientUnsupported(MixturaError):
    """Gradients are needed where the chosen weights or kernel cannot give them."""


class CaptureUnsupported(MixturaError):
    """A CUDA graph is being captured of something that waits for the host."""


class PlugInError(MixturaError):
    """An installed plug-in was asked for, and cannot be used."""


class MissingDependency(MixturaError, ImportError):
    """An optional package is not installed, or not in a supported version."""


class DeviceMemoryError(MixturaError):
    """A buffer of a call does not fit in the device's memory; the message names it and its size."""


class ParallelError(MixturaError):
    """Ranks disagree about what they run, or a group of them cannot be formed."""


class RankLost(ParallelError):
    """A rank did not take part in an exchange: it is dead, stalled, or has left the group."""


class MigrationError(ParallelError):
    """An expert's weights did not arrive as they were sent; the old placement stays."""


class ExpertsLost(ParallelError):
    """The ranks that are left hold no copy of some experts."""
