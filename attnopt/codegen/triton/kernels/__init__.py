"""Kernel families as templates: ordinary Python files that run by themselves, each with an eager twin beside it."""
