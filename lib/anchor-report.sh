#!/bin/sh
# What the node says and keeps of its boot: lines on the console and in boot.log, one record per step in
# boot.json, and the same records as events: on a terminal (rd.anchor.events=) and to a server (rd.anchor.report=).
#
# A running step collects its facts below /run/anchor/steps/<number>/, one file per fact, because stages run in
# subshells: files are the only thing that comes out of one. boot.json is always rewritten whole and renamed into place.

ANCHOR_RUN="${ANCHOR_ROOT:-}/run/anchor"
ANCHOR_REPORT=$ANCHOR_RUN/report
ANCHOR_REJECTED=$ANCHOR_RUN/credentials.rejected
ANCHOR_REPORT_RING=100 # events
ANCHOR_REPORT_LOG=20   # lines of boot.log that go with a failure

# usage: anchor_uptime_ms
# Sets anchor_uptime_ms: milliseconds since the kernel started (resolution 10 ms).
anchor_uptime_ms() {
    local up rest
    read -r up rest </proc/uptime
    anchor_uptime_ms=${up%.*}${up#*.}0
    # Leading zeros would make the number octal in $(( )).
    anchor_uptime_ms=${anchor_uptime_ms#"${anchor_uptime_ms%%[!0]*}"}
    anchor_uptime_ms=${anchor_uptime_ms:-0}
}

# usage: anchor_pid
# Sets anchor_pid to the number of the process that runs this: $$ is the same in all subshells of a script.
anchor_pid() {
    local rest
    read -r anchor_pid rest </proc/self/stat
}

# usage: anchor_untraced FUNCTION [ARGUMENT...]
# Calls it, and nothing of it is traced: rd.debug has the shell show every command with its values, and some are secret.
anchor_untraced() {
    local traced='' status
    case $- in *x*) traced=1 ;; esac
    { set +x; } 2>/dev/null
    "$@"
    status=$?
    [ -z "$traced" ] || set -x
    return "$status"
}

# usage: anchor_printable TEXT
# Sets anchor_printable: TEXT with every byte that is not printable ASCII replaced by '?'. What is left can neither drive
# a terminal, not even an 8-bit one, nor be invalid UTF-8 in JSON.
anchor_printable() {
    local rest="$1" done='' plain LC_ALL=C
    case $rest in
        *[!\ -~]*) ;;
        *)
            anchor_printable=$rest
            return 0
            ;;
    esac
    while :; do
        plain=${rest%%[!\ -~]*}
        [ "$plain" != "$rest" ] || break
        done="$done$plain?"
        rest=${rest#"$plain"}
        rest=${rest#?}
    done
    anchor_printable=$done$rest
}

# usage: anchor_recall FILE
# Sets anchor_recall to the file's first line, or to nothing; a builtin, because a fork for each fact of each step
# would cost a node whole seconds. (Not for /proc/sys: there dash would read one character.)
anchor_recall() {
    anchor_recall=
    [ -r "$1" ] && IFS= read -r anchor_recall <"$1"
    return 0
}

# usage: anchor_remove FILE...
# Removes what is there of them, but no directory. A program that finds nothing to do would take as long to start as one
# that does.
anchor_remove() {
    local each
    for each; do
        [ ! -e "$each" ] && [ ! -L "$each" ] || rm -f "$each" || return 1
    done
}

# usage: anchor_keep FILE TEXT
# Writes one fact as one line of printable ASCII.
anchor_keep() {
    anchor_printable "$2"
    printf '%s\n' "$anchor_printable" >"$1"
}

# usage: anchor_say LEVEL TEXT
# Writes one line to boot.log and stderr (the console, and the journal where systemd runs).
anchor_say() {
    anchor_printable "$2"
    anchor_uptime_ms
    printf '[%6d.%02d] %s%s\n' $((anchor_uptime_ms / 1000)) $((anchor_uptime_ms % 1000 / 10)) "$1" "$anchor_printable" \
        2>/dev/null >>"$ANCHOR_RUN/boot.log"
    printf 'anchor: %s%s\n' "$1" "$anchor_printable" >&2
}

# usage: anchor_info TEXT...
anchor_info() {
    anchor_say '' "$*"
}

# usage: anchor_warn TEXT...
anchor_warn() {
    anchor_say 'warning: ' "$*"
}

# usage: anchor_fail WHAT [HINT]
# Says what failed and what to do about it, keeps both for boot.json. Always returns 1.
anchor_fail() {
    anchor_say 'error: ' "$1"
    [ -z "${2:-}" ] || anchor_say 'hint: ' "$2"
    if [ -n "${anchor_step_dir:-}" ]; then
        anchor_keep "$anchor_step_dir/error" "$1"
        anchor_keep "$anchor_step_dir/hint" "${2:-}"
    fi
    return 1
}

# usage: anchor_reject_credentials
# Notes that a server did not accept what the auth step left: another try gets new credentials.
anchor_reject_credentials() {
    : 2>/dev/null >"$ANCHOR_REJECTED" || :
}

# usage: anchor_note KEY VALUE
# Adds a string to the running step's record; KEY is a plain lower-case word.
anchor_note() {
    [ -z "${anchor_step_dir:-}" ] || anchor_keep "$anchor_step_dir/note-$1" "$2"
}

# usage: anchor_note_number KEY N
# Adds an integer to the running step's record; anything else is dropped, because it would break the JSON.
anchor_note_number() {
    local digits="${2#-}" sign=''
    [ "$digits" = "$2" ] || sign=-
    case $digits in
        '' | *[!0-9]*) return 0 ;;
    esac
    digits=${digits#"${digits%%[!0]*}"}
    [ -z "${anchor_step_dir:-}" ] || anchor_keep "$anchor_step_dir/number-$1" "${digits:+$sign}${digits:-0}"
}

# usage: anchor_finish reboot|poweroff|kexec|root
# For an image stage: the boot does not go on with a mounted image and an overlay. It ends with a reboot or power off, or
# with the kernel that the stage has loaded (`kexec -l`), or the stage mounts the root itself (anchor_<stage>_root DIR).
anchor_finish() {
    anchor_keep "$ANCHOR_RUN/steps/finish" "$1"
}

# usage: anchor_json TEXT
# Sets anchor_json: TEXT as a JSON string, quotes included; see anchor_printable.
anchor_json() {
    local rest out='' head
    anchor_printable "$1"
    rest=$anchor_printable
    while :; do
        case $rest in
            *[\"\\]*)
                head=${rest%%[\"\\]*}
                rest=${rest#"$head"}
                case $rest in
                    \"*) out="$out$head\\\"" ;;
                    *) out="$out$head\\\\" ;;
                esac
                rest=${rest#?}
                ;;
            *) break ;;
        esac
    done
    anchor_json="\"$out$rest\""
}

# usage: anchor_step_begin STEP [STAGE]
# Starts the record of a step. Sets anchor_step_dir, which the step's subshell inherits.
anchor_step_begin() {
    local n=1000 # always four digits, so that a glob lists steps in their order
    while [ -e "$ANCHOR_RUN/steps/$n/step" ]; do n=$((n + 1)); done
    anchor_step_dir="$ANCHOR_RUN/steps/$n"
    [ -d "$anchor_step_dir" ] || mkdir "$anchor_step_dir" || return 1
    anchor_uptime_ms
    anchor_keep "$anchor_step_dir/step" "$1"
    anchor_keep "$anchor_step_dir/stage" "${2:-}"
    anchor_keep "$anchor_step_dir/start" "$anchor_uptime_ms"
    anchor_event "{\"event\":\"begin\",\"step\":\"$1\",\"stage\":\"${2:-}\",\"at_ms\":$anchor_uptime_ms}"
}

# usage: anchor_step_end RESULT
# Ends the running step with "ok" or "failed", says so, and brings boot.json up to date.
anchor_step_end() {
    anchor_uptime_ms
    anchor_recall "$anchor_step_dir/start"
    anchor_keep "$anchor_step_dir/result" "$1"
    anchor_keep "$anchor_step_dir/duration" $((anchor_uptime_ms - anchor_recall))
    anchor_step_json "$anchor_step_dir"
    anchor_keep "$anchor_step_dir/json" "{$anchor_step_json}"
    anchor_event "{\"event\":\"end\",$anchor_step_json}"
    anchor_step_dir=
    anchor_boot_write aside
}

# usage: anchor_step_json DIR
# Sets anchor_step_json: the members of a step's record, without the braces.
anchor_step_json() {
    local dir="$1" file key members=''
    for key in step stage result; do
        anchor_recall "$dir/$key"
        anchor_json "$anchor_recall"
        members="$members\"$key\":$anchor_json,"
    done
    anchor_recall "$dir/start"
    members="$members\"start_ms\":$anchor_recall"
    anchor_recall "$dir/duration"
    members="$members,\"duration_ms\":$anchor_recall"
    for file in "$dir"/number-*; do
        [ -e "$file" ] || continue
        anchor_recall "$file"
        members="$members,\"${file##*/number-}\":$anchor_recall"
    done
    for file in "$dir"/note-* "$dir"/error "$dir"/hint; do
        anchor_recall "$file"
        [ -n "$anchor_recall" ] || continue
        anchor_json "$anchor_recall"
        key=${file##*/}
        members="$members,\"${key#note-}\":$anchor_json"
    done
    anchor_step_json=$members
}

# usage: anchor_boot_json
# Sets anchor_boot_json: the whole report of this boot on one line.
anchor_boot_json() {
    local file fact head='' steps=''
    for fact in anchor kernel node result; do
        anchor_recall "$ANCHOR_RUN/steps/$fact"
        anchor_json "$anchor_recall"
        head="$head\"$fact\":$anchor_json,"
    done
    for fact in error hint; do
        anchor_recall "$ANCHOR_RUN/steps/$fact"
        anchor_json "$anchor_recall"
        [ -z "$anchor_recall" ] || head="$head\"$fact\":$anchor_json,"
    done
    for fact in switch_root_ms ready_ms; do
        anchor_recall "$ANCHOR_RUN/steps/$fact"
        [ -z "$anchor_recall" ] || head="$head\"$fact\":$anchor_recall,"
    done
    for file in "$ANCHOR_RUN"/steps/*/json; do
        anchor_recall "$file"
        steps="$steps${steps:+,}$anchor_recall"
    done
    anchor_boot_json="{$head\"steps\":[$steps]}"
}

# usage: anchor_boot_set FACT VALUE
# Keeps a fact about the whole boot: anchor (the version), kernel, node, result, error, hint, switch_root_ms,
# ready_ms.
anchor_boot_set() {
    anchor_keep "$ANCHOR_RUN/steps/$1" "$2"
}

# usage: anchor_boot_write [aside]
# Writes boot.json whole, then renames it into place; aside: the next step need not wait for the program that does it.
anchor_boot_write() {
    [ -z "${anchor_boot__writer:-}" ] || wait "$anchor_boot__writer" 2>/dev/null || :
    anchor_boot__writer=
    anchor_boot_json
    printf '%s\n' "$anchor_boot_json" >"$ANCHOR_RUN/boot.json.new" || return 1
    if [ -n "${1:-}" ]; then
        mv -f "$ANCHOR_RUN/boot.json.new" "$ANCHOR_RUN/boot.json" &
        anchor_boot__writer=$!
        return 0
    fi
    mv -f "$ANCHOR_RUN/boot.json.new" "$ANCHOR_RUN/boot.json"
}

# usage: anchor_event JSON
# Hands one object to those who watch: the server that rd.anchor.report= names and the terminal that rd.anchor.events=
# does, if any. Always returns 0: who watches is no reason to fail.
anchor_event() {
    anchor_event_queue "$1"
    anchor_event_show "$1"
}

# usage: anchor_event_queue JSON
# Puts the object into the ring of anchor-post.sh, over the oldest one if nobody took that, and wakes the sender. Starts
# no program and waits for nobody.
anchor_event_queue() {
    local n
    [ -p "$ANCHOR_REPORT/wake" ] || return 0
    anchor_recall "$ANCHOR_REPORT/next"
    n=${anchor_recall:-0}
    anchor_recall "$ANCHOR_REPORT/sent"
    {
        printf '%s\n%s\n' "$n" "$1" >"$ANCHOR_REPORT/$((n % ANCHOR_REPORT_RING))" &&
            printf '%s\n' $((n + 1)) >"$ANCHOR_REPORT/next" &&
            # A pipe of 64 KiB that nobody empties would hold up the boot; with so many unsent, wakes enough lie in it.
            { [ $((n - ${anchor_recall:-0})) -gt 60000 ] || printf '\n' 1<>"$ANCHOR_REPORT/wake"; }
    } 2>/dev/null || :
}

# usage: anchor_event_show JSON
# Writes the object as one line to the terminal.
anchor_event_show() {
    [ -n "${anchor_events:-}" ] && [ -c "/dev/$anchor_events" ] || return 0
    printf '%s\n' "$1" 2>/dev/null >"/dev/$anchor_events" || :
}

# usage: anchor_log_tail
# Sets anchor_log_tail: the last lines of boot.log as a JSON array of strings.
anchor_log_tail() {
    local line lines=''
    while IFS= read -r line; do
        anchor_json "$line"
        lines="$lines${lines:+,}$anchor_json"
    done <<EOT
$(tail -n "$ANCHOR_REPORT_LOG" "$ANCHOR_RUN/boot.log" 2>/dev/null)
EOT
    anchor_log_tail="[$lines]"
}
