"""`anchor-build inspect`: what is inside packages, initramfs and images, as data."""
