"""Caches of live transformers models that keep what a policy chooses."""
