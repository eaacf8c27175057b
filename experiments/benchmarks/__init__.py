"""Benchmarks of speed and memory: every published figure has its command here."""
