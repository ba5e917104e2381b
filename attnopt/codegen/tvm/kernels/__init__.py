"""Kernel families as templates: ordinary Python files of TVMScript, specialised by their text."""
