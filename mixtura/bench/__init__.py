"""Benchmarks: cases, contenders, and how far from the machine's measured limits they are."""

from mixtura.bench.cases import SHAPES, Case, LayerShape, find_shape
from mixtura.bench.contenders import TRANSFORMERS, Contender, find_contenders
from mixtura.bench.experts import Result, machine_json, run_case, true_output
from mixtura.bench.machine import Machine, probe_machine
from mixtura.bench.measure import Timing, interleave
from mixtura.bench.report import machine_summary, results_table

__all__ = [
    "SHAPES",
    "TRANSFORMERS",
    "Case",
    "Contender",
    "LayerShape",
    "Machine",
    "Result",
    "Timing",
    "find_contenders",
    "find_shape",
    "interleave",
    "machine_json",
    "machine_summary",
    "probe_machine",
    "results_table",
    "run_case",
    "true_output",
]
