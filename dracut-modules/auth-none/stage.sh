#!/bin/sh
# No authentication.

# usage: anchor_none_run
# Leaves no credentials: the image's digest is what makes it trusted.
anchor_none_run() {
    return 0
}
