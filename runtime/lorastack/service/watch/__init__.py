"""What operators read: metrics and the log."""
