"""What cpu_attention.py measures: cases, contenders, and the table."""
