"""The embedded data set of chats about functions: their one-line docstrings, and their names."""
