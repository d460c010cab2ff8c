"""What a run can prove, as one file, and the documents that are made from it."""
