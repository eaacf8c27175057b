"""Prepared corpora: documents that are tokenized and packed once, into files that are read at random."""
