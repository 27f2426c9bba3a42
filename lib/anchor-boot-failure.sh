#!/bin/sh
# What a failed step leads to: the report, and a reboot after a wait, power off, or dracut's emergency shell. Part of
# anchor-boot.sh; needs anchor-report.sh, anchor-post.sh and anchor-count.sh.

ANCHOR_BOOT_RECORDS=60    # of steps, before they are dropped
ANCHOR_BOOT_LOG_LINES=200 # of boot.log, that stay then
ANCHOR_BOOT_TRIES=4       # before a reboot, where the firmware cannot count failed boots

# usage: anchor_boot_failed STEP STAGE ERROR HINT
# Reports the failure and does what rd.anchor.on_failure says. Returns when the emergency shell is left.
anchor_boot_failed() {
    local event since action="${anchor_on_failure:-shell}"
    anchor_json "$2"
    event="{\"event\":\"failed\",\"step\":\"$1\",\"stage\":$anchor_json"
    anchor_json "$3"
    event="$event,\"error\":$anchor_json"
    anchor_json "$4"
    event="$event,\"hint\":$anchor_json,\"on_failure\":\"$action\""
    anchor_boot_set result failed
    anchor_boot_set error "$3"
    anchor_boot_set hint "$4"
    anchor_boot_write
    anchor_say '' "this node could not boot: step $1${2:+ ($2)} failed"
    anchor_say '  why:        ' "$3"
    [ -z "$4" ] || anchor_say '  what to do: ' "$4"
    anchor_say '  details:    ' "$ANCHOR_RUN/boot.log and boot.json"
    anchor_uptime_ms
    anchor_log_tail
    event="$event,\"at_ms\":$anchor_uptime_ms,\"log\":$anchor_log_tail}"
    # Who watches the terminal may take this for the end and switch the node off: the server comes first.
    anchor_event_queue "$event"
    anchor_post_wait 5000
    anchor_event_show "$event"
    case $action in
        reboot)
            anchor_boot_reboot
            return
            ;;
        poweroff)
            anchor_boot_sysrq o
            return
            ;;
    esac
    anchor_say '' "leave the shell to try again"
    anchor_uptime_ms
    since=$anchor_uptime_ms
    anchor_boot_shell "step $1 failed: see /run/anchor/boot.log"
    anchor_uptime_ms
    # Where there is no shell (rd.shell=0) this is the pace of the tries.
    [ $((anchor_uptime_ms - since)) -ge 5000 ] || anchor_boot_pause 30
}

# usage: anchor_boot_reboot
# Reboots after a random part of a window that doubles with each failure in a row, from rd.anchor.reboot_delay to
# rd.anchor.reboot_delay_max. Where the firmware cannot count them, the same happens in place: this returns, to try
# again, until the boot has failed ANCHOR_BOOT_TRIES times.
anchor_boot_reboot() {
    local failures window="${anchor_reboot_delay:-30}" most="${anchor_reboot_delay_max:-900}" n=1
    anchor_boot__failures=$((${anchor_boot__failures:-0} + 1))
    anchor_count_up
    failures=${anchor_count:-$anchor_boot__failures}
    while [ "$n" -lt "$failures" ] && [ "$window" -lt "$most" ]; do
        window=$((window * 2))
        n=$((n + 1))
    done
    [ "$window" -le "$most" ] || window=$most
    anchor_info "failure $failures in a row${anchor_count:+, as the firmware counts}"
    anchor_boot_pause "$window"
    [ -n "$anchor_count" ] || [ "$anchor_boot__failures" -ge "$ANCHOR_BOOT_TRIES" ] || return 0
    anchor_boot_sysrq b
}

# usage: anchor_boot_pause SECONDS
# Waits a random part of SECONDS, and says so: nodes that failed together must not come back together.
anchor_boot_pause() {
    local random
    random=$(od -An -N4 -tu4 /dev/urandom)
    random=$((${random##* } % ($1 + 1)))
    anchor_info "going on in $random s"
    sleep "$random"
}

# usage: anchor_boot_sysrq KEY
# Reboots (b) or powers off (o) at once: nothing is mounted for writing that would have to be saved. Where the kernel
# does not, the boot is tried again: these actions are for consoles that nobody may use, so there is no shell.
anchor_boot_sysrq() {
    printf '1\n' >"${ANCHOR_ROOT:-}/proc/sys/kernel/sysrq"
    printf '%s\n' "$1" >"${ANCHOR_ROOT:-}/proc/sysrq-trigger"
    sleep 30
    anchor_warn "the kernel did not act on sysrq $1"
}

# usage: anchor_boot_shell MESSAGE
# dracut's emergency shell, where rd.shell allows it.
anchor_boot_shell() {
    (
        # With rd.shell=0 dracut would halt the node instead of giving a shell.
        . /lib/dracut-lib.sh && getargbool 1 rd.shell && emergency_shell -n anchor "anchor: $1"
    )
}

# usage: anchor_boot_forget
# Drops the records of earlier tries, and all but the end of boot.log, once there are many: a node that tries for weeks
# must not fill its memory with them.
anchor_boot_forget() {
    [ -d "$ANCHOR_RUN/steps/$((1000 + ANCHOR_BOOT_RECORDS))" ] || return 0
    rm -rf "${ANCHOR_RUN:?}"/steps/[0-9]*
    tail -n "$ANCHOR_BOOT_LOG_LINES" "$ANCHOR_RUN/boot.log" >"$ANCHOR_RUN/boot.log.new" &&
        mv -f "$ANCHOR_RUN/boot.log.new" "$ANCHOR_RUN/boot.log"
    anchor_info "the records of earlier tries were dropped"
}
