"""A whole site on the loopback interface: certificates, an ACME server, an image store and a root image."""
