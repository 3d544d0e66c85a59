"""The commands. Never computes, never renames what is saved."""
