"""`modernbert bench`: every speed claim of this project comes from here.

Nothing is imported until the command runs; `benchmarks/README.md` explains method and reading.
"""
