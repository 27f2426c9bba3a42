#!/bin/sh
# Sourced by dracut; a mount hook would come too late where systemd runs in the initramfs.
(. /usr/lib/anchor/lib/anchor-boot.sh && anchor_boot_main)
