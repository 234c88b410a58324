"""Tasks of EleutherAI's lm-evaluation-harness as metrics: their documents, and what candidates respond to them."""
