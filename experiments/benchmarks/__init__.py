"""Speed and memory, measured: every claim about them has its command here."""
