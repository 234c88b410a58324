"""The embedded data set with domains: four kinds of text from the Python standard library, and three questions."""
