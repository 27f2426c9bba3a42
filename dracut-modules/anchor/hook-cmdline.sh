#!/bin/sh
# Sourced by dracut. Everything happens in a subshell: only dracut's own variables may change here.
if (. /usr/lib/anchor/lib/anchor-boot.sh && anchor_boot_cmdline); then
    # shellcheck disable=SC2034 # read by dracut
    root=anchor
    # shellcheck disable=SC2034 # read by dracut
    rootok=1
fi
