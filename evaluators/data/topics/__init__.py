"""The embedded data set: docstrings, labelled with the part of the Python standard library that they document."""
