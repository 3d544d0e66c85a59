"""This machine: BLAS, fast functions, models, folders. Knows no request."""
