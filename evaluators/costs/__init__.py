"""What candidates cost: measured, predicted, and how many fit side by side."""
