#!/bin/sh
# Sourced by dracut just before switch_root.
(. /usr/lib/anchor/lib/anchor-boot.sh && anchor_boot_handoff)
