"""From a corpus to batches of tokens: sources of text, tokenizer, packing and order."""
