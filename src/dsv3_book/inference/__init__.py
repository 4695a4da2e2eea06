"""Writing text: the latent cache, and choosing the next token."""
