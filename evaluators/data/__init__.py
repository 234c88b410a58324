"""Rows of data sets, the embedded ones too."""
