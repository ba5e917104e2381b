"""The plan for a budget: what is measured first, the knapsack, tightening, the check of each step, reasons."""
