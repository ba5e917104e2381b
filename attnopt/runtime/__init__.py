"""What runs at inference time: torch operators that optimised graphs call."""
