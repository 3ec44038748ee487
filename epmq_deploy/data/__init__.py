"""Tasks' data: samples, labels, prompts, heads, and how closely models agree on them."""
