"""The command line: flags to configuration or one client call."""
