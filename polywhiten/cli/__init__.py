"""The command line `polywhiten`."""
