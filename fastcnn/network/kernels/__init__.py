"""Kernels of our own, where counting bytes showed that the library's leave much on the table."""
