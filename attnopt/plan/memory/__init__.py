"""What a model and a search hold: bytes of weights and caches, of this process, of what is measured."""
