"""A decoder of transformers as two graphs, prefill and decode, whose caches come and go as tensors of their own."""
