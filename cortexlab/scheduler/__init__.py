"""Which tokens run, and in which blocks. Integers only; never imports MLX, nor the engine."""
