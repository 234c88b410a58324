"""What adapters are at run time: the only part of a space that imports torch."""
