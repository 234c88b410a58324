"""The embedded data set: which part of the Python standard library does a docstring document?"""
