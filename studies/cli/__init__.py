"""The command line. `app.py` lists the commands; each module holds a group of them as plain functions."""
