"""Where models live: a host shows its model as a canonical graph, runs it, edits it and writes it."""
