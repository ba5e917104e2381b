"""What could be done to a model: groups that passes are shown, what they propose, and building it."""
