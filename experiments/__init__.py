"""Experiments: each module documents one experiment and runs it."""
