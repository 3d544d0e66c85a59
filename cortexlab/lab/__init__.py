"""Theory, conformance, claims, CortexStream's API: not needed to serve."""
