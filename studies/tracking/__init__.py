"""MLflow: the data that is written, and when."""
