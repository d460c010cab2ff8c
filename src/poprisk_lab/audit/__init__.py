"""``poprisk audit``: find wrong labels in files, by one gated run and its own predictions."""
