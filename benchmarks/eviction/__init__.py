"""Parts of benchmarks/kvcache.py."""
