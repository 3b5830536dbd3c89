"""Benchmarks that print, check and store what they measure."""
