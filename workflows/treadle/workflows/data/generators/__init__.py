"""Tasks made on the fly, one small file per kind."""
