"""Arrays in, arrays out: attention, norms, sampling, shardings. No Flax, no files, no tokenizer."""
