#!/bin/sh
# Runs in the booted root, from /run, once multi-user is reached: completes boot.json, and posts what reports are left
# where the image has curl.
#
# Needs anchor-report.sh and anchor-post.sh.

# usage: anchor_ready
anchor_ready() {
    local wait
    LC_ALL=C
    export LC_ALL
    anchor_recall "$ANCHOR_RUN/steps/events"
    anchor_events=$anchor_recall
    anchor_uptime_ms
    anchor_boot_set ready_ms "$anchor_uptime_ms"
    anchor_boot_write
    anchor_event "{\"event\":\"ready\",\"at_ms\":$anchor_uptime_ms,\"boot\":$anchor_boot_json}"
    [ -p "$ANCHOR_REPORT/wake" ] && command -v curl >/dev/null || return 0
    # The image may be setting the network up anew.
    for wait in 1 3 9; do
        ! anchor_post_once || return 0
        sleep "$wait"
    done
    anchor_recall "$ANCHOR_REPORT/error"
    anchor_warn "not all reports were taken: $anchor_recall"
}
