"""What things cost on a machine: targets as data, and predictions from them."""
