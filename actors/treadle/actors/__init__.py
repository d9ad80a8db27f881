"""The four roles: thin Ray shells over plain classes."""
