"""anchor-build: initramfs images for diskless nodes, from pluggable stages."""

__version__ = "0.2.0.dev0"
