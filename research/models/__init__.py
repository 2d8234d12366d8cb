"""Language models: an embedding, stages of residual branches scanned over their repeats, and a head."""
