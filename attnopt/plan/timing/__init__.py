"""What a rewrite takes: seconds, measured in turn or predicted."""
