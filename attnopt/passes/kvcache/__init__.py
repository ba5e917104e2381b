"""Rewrites of what a decoding model keeps of the tokens before."""
