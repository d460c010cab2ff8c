"""The laboratory of poprisk: its command line, tasks, methods, studies and pages."""
