"""The weight coordinator: versioned, digest-checked publication to the engines."""
