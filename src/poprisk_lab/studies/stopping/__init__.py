"""The claim that the twin tells when to stop."""
