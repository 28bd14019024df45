"""The chosen network as files to ship."""
