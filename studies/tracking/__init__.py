"""MLflow: what is written, and when."""
