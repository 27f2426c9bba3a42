#!/bin/sh
# The boot itself: what dracut's hooks call, and the order of the steps. What a failure leads to is in
# anchor-boot-failure.sh.
#
#   cmdline hook     anchor_boot_cmdline   parameters are read and checked, root=anchor is accepted
#   pre-mount hook   anchor_boot_main      network -> clock -> auth -> manifest -> image -> mount -> overlay on $NEWROOT
#                                          (or, as the image stage says: image -> root; image -> reboot or power off)
#   cleanup hook     anchor_boot_handoff   boot.json goes over to the booted root, which adds when it was ready

. "${ANCHOR_ROOT:-}/usr/lib/anchor/lib/anchor-report.sh"
. "${ANCHOR_ROOT:-}/usr/lib/anchor/lib/anchor-post.sh"
. "${ANCHOR_ROOT:-}/usr/lib/anchor/lib/anchor-params.sh"

# usage: anchor_boot_load
# Sources the libraries and stages, and makes the run directory.
anchor_boot_load() {
    local file
    LC_ALL=C
    export LC_ALL
    # The kernel makes variables of words that it does not know.
    anchor_boot__failures=0 anchor_boot__writer='' anchor_post__pid='' anchor_post__machine=''
    for file in "$ANCHOR_LIB"/*.sh; do
        case $file in
            */anchor-boot.sh | */anchor-report.sh | */anchor-post.sh | */anchor-params.sh) ;;
            *) . "$file" || return 1 ;;
        esac
    done
    anchor_boot_make && anchor_params_load
}

# usage: anchor_boot_make
# Makes the run directory, with room for the records of as many steps as a boot has and for what is mounted: in one call,
# because a program takes as long to start as a step takes to record.
anchor_boot_make() {
    local steps="$ANCHOR_RUN/steps"
    [ ! -d "$steps" ] || return 0
    # shellcheck disable=SC2174 # those above are named, but for the run directory itself, which anybody may look into
    mkdir -p -m 0700 "$ANCHOR_RUN/credentials" "$steps" "$steps/1000" "$steps/1001" "$steps/1002" "$steps/1003" \
        "$steps/1004" "$steps/1005" "$steps/1006" "$steps/1007" \
        "$ANCHOR_RUN/image" "$ANCHOR_RUN/lower" "$ANCHOR_RUN/overlay"
}

# usage: anchor_boot_wanted
# Whether the last root= of the command line is "anchor".
anchor_boot_wanted() {
    local anchor_root=''
    anchor_cmdline_each anchor_boot_root
    [ "$anchor_root" = anchor ]
}

# usage: anchor_boot_root NAME VALUE HAS_VALUE
anchor_boot_root() {
    [ "$1" != root ] || anchor_root=$2
}

# usage: anchor_boot_cmdline
# Status 0: this boot is ours and its parameters are right. Status 1: it is not ours.
anchor_boot_cmdline() {
    anchor_boot_load || return 1
    anchor_boot_wanted || return 1
    anchor_boot_start
    anchor_boot_parse
    # systemd-networkd comes up by itself; dracut's other network modules bring nothing up unless somebody asks.
    [ ! -e "${ANCHOR_ROOT:-}/etc/systemd/network/zz-anchor.network" ] || return 0
    mkdir -p "${ANCHOR_ROOT:-}/etc/cmdline.d" &&
        printf 'rd.neednet=1\n' >"${ANCHOR_ROOT:-}/etc/cmdline.d/50-anchor.conf"
}

# usage: anchor_boot_parse
# Reads the parameters, and returns only when they are right.
anchor_boot_parse() {
    until anchor_params_parse; do
        anchor_boot_failed parameters '' "$anchor_params_error" \
            "correct the kernel command line; \`anchor-build check\` explains it before a node sees it"
    done
}

# usage: anchor_boot_start
# Begins the report of this boot.
anchor_boot_start() {
    local name version kernel rest
    read -r name version kernel rest </proc/version
    anchor_recall "${ANCHOR_ROOT:-}/etc/anchor/version"
    anchor_boot_set anchor "$anchor_recall"
    anchor_boot_set kernel "$kernel"
    anchor_boot_set result running
}

# usage: anchor_boot_main
# Runs the steps until the new root is ready. Never returns without it: rd.anchor.on_failure decides what follows a
# failure, and leaving the emergency shell tries again.
anchor_boot_main() {
    # The cmdline hook begins the report, and only of a boot that is ours.
    anchor_recall "$ANCHOR_RUN/steps/result"
    case $anchor_recall in
        '' | ok) return 0 ;;
    esac
    anchor_boot_load || return 1
    anchor_boot_parse
    anchor_boot_run
}

# usage: anchor_boot_direct
# All hooks at once, where nothing is between them (anchor-direct.sh); steps/handed-off says to systemd that the last one
# need not run. Status 1: this boot is not ours.
anchor_boot_direct() {
    anchor_recall "$ANCHOR_RUN/steps/result"
    [ "$anchor_recall" != ok ] || return 0
    anchor_boot_load || return 1
    anchor_boot_wanted || return 1
    anchor_boot_start
    anchor_boot_parse
    anchor_boot_run direct
    : >"$ANCHOR_RUN/steps/handed-off"
}

# usage: anchor_boot_run [direct]
# Runs the steps, with parameters that are right. direct: with the hand-off, because no hook comes after them.
anchor_boot_run() {
    local direct="${1:-}"
    anchor_post_open
    anchor_recall "$ANCHOR_RUN/steps/anchor"
    anchor_json "$anchor_recall"
    set -- "$anchor_json"
    anchor_recall "$ANCHOR_RUN/steps/kernel"
    anchor_json "$anchor_recall"
    anchor_event "{\"event\":\"boot\",\"version\":$1,\"kernel\":$anchor_json}"
    # While the network is waited for.
    anchor_boot_leave_unit </dev/null &
    anchor_boot__unit=$!
    until anchor_boot_steps; do
        anchor_recall "$anchor_step_last/step"
        set -- "$anchor_recall"
        anchor_recall "$anchor_step_last/stage"
        set -- "$1" "$anchor_recall"
        anchor_recall "$anchor_step_last/error"
        set -- "$1" "$2" "${anchor_recall:-the $1 step failed without saying why}"
        anchor_recall "$anchor_step_last/hint"
        anchor_boot_failed "$@" "$anchor_recall"
        anchor_boot_forget
        anchor_boot_parse
    done
    anchor_count_reset
    anchor_boot_finish
    wait "$anchor_boot__unit" || anchor_warn "boot.json will not say when the booted system was ready"
    anchor_boot_set result ok
    anchor_boot_set error ''
    anchor_boot_set hint ''
    if [ -n "$direct" ]; then
        anchor_boot_handoff
    else
        anchor_boot_write
    fi
}

# usage: anchor_boot_finish
# Ends the boot here where the image stage has asked for that, and does not return then.
anchor_boot_finish() {
    local key action
    anchor_recall "$ANCHOR_RUN/steps/finish"
    action=$anchor_recall
    case $action in
        reboot | kexec) key=b ;;
        poweroff) key=o ;;
        *) return 0 ;;
    esac
    anchor_boot_set result ok
    anchor_boot_set error ''
    anchor_boot_set hint ''
    anchor_boot_write
    anchor_info "this node has done what it was booted for; next: $action"
    anchor_uptime_ms
    set -- "{\"event\":\"finished\",\"action\":\"$action\",\"at_ms\":$anchor_uptime_ms}"
    # Who watches the terminal may take this for the end and switch the node off: the server comes first.
    anchor_event_queue "$1"
    anchor_post_wait 5000
    anchor_event_show "$1"
    # A terminal's last line leaves it after the write has returned.
    sleep 1
    [ "$action" != kexec ] || kexec -e || anchor_warn "the kernel did not start the other one: it reboots instead"
    while :; do
        anchor_boot_sysrq "$key"
    done
}

# usage: anchor_boot_preload
# Loads the drivers that the last steps will need, while those before them use the network; not sooner, because udev
# would look at their devices before it looks at the network card. Whoever needs one that is not there when its turn comes
# asks for it once more.
anchor_boot_preload() {
    local drivers stage
    anchor_core_anchor_drivers
    drivers=$anchor_drivers
    for stage in $anchor_stages; do
        # Which image stage it will be is known now, unless a manifest says so later.
        case ${anchor_manifest:+manifest}:$stage in
            manifest:image_* | :"image_$anchor_image")
                "anchor_${stage}_drivers"
                drivers="$drivers $anchor_drivers"
                ;;
        esac
    done
    # shellcheck disable=SC2086 # names of drivers, one word each
    modprobe -q -a $drivers </dev/null >/dev/null 2>&1 &
}

# usage: anchor_boot_steps
# One try at all steps; each may be repeated.
anchor_boot_steps() {
    anchor_manifest_forget
    [ ! -e "$ANCHOR_RUN/steps/finish" ] || rm -f "$ANCHOR_RUN/steps/finish"
    anchor_step network '' anchor_net_run || return 1
    anchor_boot_preload
    anchor_boot_set node "$(anchor_net_hostname)"
    anchor_step clock '' anchor_clock_run || return 1
    anchor_post_start
    anchor_boot_auth_kept || anchor_step auth "auth/$anchor_auth" anchor_boot_auth || return 1
    # Its URL may hold a password, and this shell may be traced.
    if [ -n "${anchor_manifest:+1}" ]; then
        anchor_step manifest '' anchor_boot_manifest && anchor_manifest_use || return 1
    fi
    anchor_step image "image/$anchor_image" "anchor_${anchor_image}_run" || return 1
    if [ -e "${ANCHOR_ROOT:-}/etc/anchor/images.squashfs" ]; then
        anchor_step images '' anchor_embedded_run || return 1
    fi
    anchor_recall "$ANCHOR_RUN/steps/finish"
    case $anchor_recall in
        reboot | poweroff | kexec) return 0 ;;
        root)
            anchor_step root "image/$anchor_image" "anchor_${anchor_image}_root" "${NEWROOT:-/sysroot}"
            return
            ;;
    esac
    [ -d "$ANCHOR_RUN/lower" ] || mkdir -p "$ANCHOR_RUN/lower" || return 1
    anchor_step mount "image/$anchor_image" "anchor_${anchor_image}_mount" "$ANCHOR_RUN/lower" || return 1
    anchor_step overlay '' anchor_overlay_run "$ANCHOR_RUN/lower" "${NEWROOT:-/sysroot}"
}

# usage: anchor_step STEP STAGE FUNCTION [ARGUMENT...]
# Runs FUNCTION as a step: in a subshell, timed and reported. STAGE is <kind>/<name> or empty. Sets anchor_step_last
# to the step's record.
anchor_step() {
    local step="$1" stage="$2" status=0
    shift 2
    if ! anchor_step_begin "$step" "${stage#*/}"; then
        anchor_step_last=
        anchor_fail "the step $step cannot be recorded in $ANCHOR_RUN/steps" "is /run full?"
        return 1
    fi
    anchor_step_last=$anchor_step_dir
    (
        [ -z "$stage" ] || anchor_boot_source "$stage" || exit 1
        "$@"
    ) </dev/null || status=1
    if [ "$status" -eq 0 ]; then
        anchor_step_end ok
    else
        anchor_step_end failed
    fi
    anchor_recall "$anchor_step_last/duration"
    [ "$status" -ne 0 ] ||
        anchor_info "$step${stage:+ (${stage#*/})}: done in $((anchor_recall / 1000)).$((anchor_recall % 1000 / 100)) s"
    return "$status"
}

# usage: anchor_boot_manifest
# The manifest's step: like an image, it may come over any transport.
anchor_boot_manifest() {
    anchor_boot_transports && anchor_untraced anchor_manifest_run
}

# usage: anchor_boot_transports
# Sources the functions of every transport: a URL decides which one is needed.
anchor_boot_transports() {
    local file
    for file in "$ANCHOR_STAGES"/transport/*/stage.sh; do
        [ ! -f "$file" ] || . "$file" || return 1
    done
}

# usage: anchor_boot_source KIND/NAME
# Sources a stage's functions; NAME is as in function names, where _ may stand for a dash. An image stage gets those of
# every transport too.
anchor_boot_source() {
    local dir name
    case $1 in
        image/*) anchor_boot_transports || return 1 ;;
    esac
    for dir in "$ANCHOR_STAGES/${1%/*}"/[0-9][0-9]-*/; do
        name=${dir%/}
        name=${name##*/[0-9][0-9]-}
        if anchor_params_same_name "$name" "${1#*/}"; then
            . "$dir/stage.sh"
            return
        fi
    done
    anchor_fail "the stage $1 is not in this initramfs" "build it with --${1%/*} ${1#*/}"
}

# usage: anchor_boot_auth
# The auth step: what the stage leaves must be for root alone, even where the stage exits.
anchor_boot_auth() {
    # What an earlier try of this boot got is what has been refused, or is about to end: a stage must not find it again.
    [ ! -e "$ANCHOR_RUN/credentials.from" ] ||
        rm -f "$ANCHOR_RUN/credentials/client.crt" "$ANCHOR_RUN/credentials/client.key" "$ANCHOR_RUN/credentials/s3"
    anchor_remove "$ANCHOR_RUN/credentials.from" "$ANCHOR_REJECTED"
    ("anchor_${anchor_auth}_run") && anchor_boot_credentials &&
        anchor_keep "$ANCHOR_RUN/credentials.from" "$anchor_auth"
}

# usage: anchor_boot_credentials
# Makes sure that no credential is readable by others, and shows them under the names that older tools expect.
anchor_boot_credentials() {
    local file
    set --
    for file in "$ANCHOR_RUN"/credentials/*; do
        [ ! -f "$file" ] || set -- "$@" "$file"
    done
    if [ $# -gt 0 ] && ! file=$(chmod 0600 "$@" 2>&1); then
        anchor_fail "cannot keep the credentials from others: $file" "is /run a file system with permissions?"
        return 1
    fi
    anchor_boot_link client.crt client.cert
    anchor_boot_link client.key client.key
}

# usage: anchor_boot_link FILE NAME
# Nothing of this boot reads the link, so nothing waits for the program that makes it.
anchor_boot_link() {
    [ -e "$ANCHOR_RUN/credentials/$1" ] || return 0
    { ln -sfn "$ANCHOR_RUN/credentials/$1" "${ANCHOR_ROOT:-}/$2" || anchor_warn "older tools will not find /$2"; } &
}

# usage: anchor_boot_auth_kept
# Whether an earlier try of this boot left a certificate that is still good: a CA counts its orders. It is not where the
# stage is another one, a server refused it, or it ends within 5 minutes.
anchor_boot_auth_kept() {
    anchor_recall "$ANCHOR_RUN/credentials.from"
    [ "$anchor_recall" = "$anchor_auth" ] && [ ! -e "$ANCHOR_REJECTED" ] &&
        [ -s "$ANCHOR_RUN/credentials/client.crt" ] && [ -s "$ANCHOR_RUN/credentials/client.key" ] || return 1
    openssl x509 -in "$ANCHOR_RUN/credentials/client.crt" -noout -checkend 300 >/dev/null 2>&1 </dev/null || return 1
    anchor_info "auth (${anchor_auth}): the certificate of this boot is still good"
}

# usage: anchor_boot_leave_unit
# Leaves a unit below /run that notes when the booted system is ready, so that boot.json covers the whole boot whatever
# the image holds.
anchor_boot_leave_unit() {
    local units="${ANCHOR_ROOT:-}/run/systemd/system"
    anchor_keep "$ANCHOR_RUN/steps/events" "${anchor_events:-}" &&
        mkdir -p "$ANCHOR_RUN/lib" "$units/multi-user.target.wants" &&
        cp "$ANCHOR_LIB/anchor-report.sh" "$ANCHOR_LIB/anchor-post.sh" "$ANCHOR_LIB/anchor-ready.sh" \
            "$ANCHOR_RUN/lib/" &&
        { [ ! -p "$ANCHOR_REPORT/wake" ] || cp "${ANCHOR_ROOT:-}/etc/anchor/ca.pem" "$ANCHOR_REPORT/"; } &&
        cp "${ANCHOR_ROOT:-}/usr/lib/anchor/anchor-ready.service" "$units/" &&
        ln -sfn ../anchor-ready.service "$units/multi-user.target.wants/anchor-ready.service"
}

# usage: anchor_boot_handoff
# The last thing before switch_root, so it does no more than say when that was. The last reports get a moment.
anchor_boot_handoff() {
    anchor_recall "$ANCHOR_RUN/steps/result"
    [ "$anchor_recall" = ok ] || return 0
    anchor_recall "$ANCHOR_RUN/steps/events"
    anchor_events=$anchor_recall
    anchor_uptime_ms
    anchor_boot_set switch_root_ms "$anchor_uptime_ms"
    anchor_boot_write
    anchor_event "{\"event\":\"switch_root\",\"at_ms\":$anchor_uptime_ms}"
    anchor_post_wait 1000
    anchor_post_end
}
