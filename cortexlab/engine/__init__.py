"""Tokens in, tokens out, on MLX. Never imports replay, bench or what stands above them."""
