"""What a rewrite loses: metrics, bounds, budgets, losses of whole models and of sites, equality."""
