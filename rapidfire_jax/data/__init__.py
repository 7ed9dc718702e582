"""From files to prompts: records, splits, tokens and batches."""
