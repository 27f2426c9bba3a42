"""Packages: of the dracut modules, as data, built, read back, signed and indexed; and of the tool, as source."""
