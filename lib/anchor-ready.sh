#!/bin/sh
# Runs in the booted root, from /run, once multi-user is reached: completes boot.json.

# usage: anchor_ready
anchor_ready() {
    anchor_recall "$ANCHOR_RUN/steps/events"
    anchor_events=$anchor_recall
    anchor_uptime_ms
    anchor_boot_set ready_ms "$anchor_uptime_ms"
    anchor_boot_write
    anchor_event "{\"event\":\"ready\",\"at_ms\":$anchor_uptime_ms,\"boot\":$anchor_boot_json}"
}
