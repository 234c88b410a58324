"""What is known of a model, and how it is found."""
