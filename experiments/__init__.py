"""Experiments: each module is the record of one, and runs it."""
