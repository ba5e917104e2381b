"""How passes change a graph: what several of them share, whichever of them decides where."""
