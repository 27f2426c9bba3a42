"""A token server: gives a node a certificate for a one-time join token. `python -m contrib.token --help`."""
