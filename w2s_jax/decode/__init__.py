"""One model writing: prefill, chunks of tokens, scoring, batched generation."""
