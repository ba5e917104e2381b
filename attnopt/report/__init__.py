"""What users read: the record of a run, as tables and as JSON."""
