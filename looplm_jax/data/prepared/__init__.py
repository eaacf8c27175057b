"""Prepared corpora: documents that are tokenized and packed once, into files that support random access."""
