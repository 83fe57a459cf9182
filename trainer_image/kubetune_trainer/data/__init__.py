"""From datasets as people have them to rows of tokens, and from rows to micro batches."""
