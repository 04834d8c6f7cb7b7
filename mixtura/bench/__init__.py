"""Benchmarks: cases, contenders, and how far from the machine's measured limits they are."""
