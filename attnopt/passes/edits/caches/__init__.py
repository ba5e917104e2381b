"""Caches in another form: codes, blocks and pages as state of the graph of one decoding step."""
