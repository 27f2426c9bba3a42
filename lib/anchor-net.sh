#!/bin/sh
# Wait for the network that dracut brings up, and read what its manager learned: name servers, time servers, host name.
#
# dracut has several managers: systemd-networkd, NetworkManager and its own scripts around dhclient. Each leaves files.
# They hold what a DHCP server said, so they are read as text and never sourced, and every value is validated.
# Needs anchor-report.sh, anchor-types.sh and anchor-cmdline.sh.
# shellcheck disable=SC2154 # anchor_value and anchor_uptime_ms are those libraries' results

anchor_net__newline='
'

# usage: anchor_net_run
# Waits until an interface has an address that works, then sees to it that /etc/resolv.conf names the name servers.
# Reads $anchor_network_timeout (seconds). Sets anchor_net_interface, anchor_net_address. Status 1 when the time is up.
anchor_net_run() {
    local seconds="${anchor_network_timeout:-60}" end
    # The kernel makes variables of words that it does not know.
    anchor_net__looks=0
    anchor_uptime_ms
    end=$((anchor_uptime_ms + seconds * 1000))
    until anchor_net__likely && anchor_net__address; do
        anchor_uptime_ms
        if [ "$anchor_uptime_ms" -ge "$end" ]; then
            anchor_fail "no network interface has an address after $seconds s" "$(anchor_net__diagnosis)"
            return 1
        fi
        anchor_net__nap
    done
    anchor_info "$anchor_net_interface has the address $anchor_net_address"
    anchor_note interface "$anchor_net_interface"
    anchor_note address "$anchor_net_address"
    anchor_net__settle
    anchor_net__resolver
}

# usage: anchor_net__nap
# A tenth of a second, or a second where sleep knows no fractions.
anchor_net__nap() {
    sleep 0.1 2>/dev/null || sleep 1
}

# usage: anchor_net__likely
# Whether it is worth a look at the addresses, which takes a program: there is a route, or an IPv6 address; or one look in
# five went by, since an address need not have a route.
anchor_net__likely() {
    local line name rest
    anchor_net__looks=$(((anchor_net__looks + 1) % 5))
    [ "$anchor_net__looks" -ne 0 ] || return 0
    while read -r name rest; do
        case $name in
            Iface | lo) ;;
            *) return 0 ;;
        esac
    done 2>/dev/null <"${ANCHOR_ROOT:-}/proc/net/route"
    # The address, and four numbers of two digits: index, prefix length, scope (00 is global, see addrconf.h), flags (40 is
    # set while it is tentative).
    while read -r line; do
        case $line in
            *' '??' '??' 00 '[!4-7c-f]?' '*) return 0 ;;
        esac
    done 2>/dev/null <"${ANCHOR_ROOT:-}/proc/net/if_inet6"
    return 1
}

# usage: anchor_net__address
# Finds the first global address that is ready for use. Sets anchor_net_interface, anchor_net_address (no prefix length)
# and anchor_net__index. Status 1 if there is none.
anchor_net__address() {
    local index name family address rest
    while read -r index name family address rest; do
        case "$name $family" in
            'lo '*) continue ;;
            *' inet' | *' inet6') ;;
            *) continue ;;
        esac
        # An IPv6 address cannot be used before duplicate address detection is done with it.
        case " $rest " in
            *' tentative '* | *' dadfailed '*) continue ;;
        esac
        anchor_net__index=${index%:}
        anchor_net_interface=${name%@*}
        anchor_net_address=${address%/*}
        return 0
    done <<EOT
$(ip -o addr show up scope global 2>/dev/null)
EOT
    return 1
}

# usage: anchor_net__diagnosis
# Prints one line: what each interface looks like, and what to check.
anchor_net__diagnosis() {
    local index name rest state carrier found=''
    while read -r index name rest; do
        name=${name%:}
        case $name in
            '' | lo | lo@*) continue ;;
        esac
        state=unknown carrier='no carrier'
        case $rest in
            *' state '*)
                state=${rest#* state }
                state=${state%% *}
                ;;
        esac
        case $rest in
            *,LOWER_UP[,\>]*) carrier='has a carrier' ;;
            '<'*,UP[,\>]*) ;;
            *) carrier='not brought up' ;;
        esac
        found="$found${name%@*}: $carrier, state $state; "
    done <<EOT
$(ip -o link show 2>/dev/null)
EOT
    if [ -z "$found" ]; then
        printf '%s\n' "there is no interface but lo: the initramfs lacks the network card's driver, or the card is off"
        return 0
    fi
    printf '%s\n' "${found}check the cable and the switch port (spanning tree), the DHCP server, and ip= on the command line"
}

# usage: anchor_net__settle
# systemd-networkd sets the address first, then routes, and writes name servers down last: gives it up to 2 s for that.
anchor_net__settle() {
    local link="${ANCHOR_ROOT:-}/run/systemd/netif/links/$anchor_net__index" tries=0
    [ -e "$link" ] || return 0
    while [ "$tries" -lt 20 ]; do
        anchor_net__value "$link" ADMIN_STATE
        case $anchor_net__value in
            configured | unmanaged | failed) return 0 ;;
        esac
        if anchor_net__value "$link" DNS && anchor_net__routed; then
            return 0
        fi
        anchor_net__nap
        tries=$((tries + 1))
    done
}

# usage: anchor_net__routed
# Whether there is a default route. Of the kernel's tables, the one for IPv4 has name, destination and mask in its second
# and eighth column; the one for IPv6 begins with destination and prefix length, and ends with the name: on lo is the one
# that refuses.
anchor_net__routed() {
    local name to gateway flags count use metric mask rest
    while read -r name to gateway flags count use metric mask rest; do
        [ "$to $mask" != '00000000 00000000' ] || return 0
    done 2>/dev/null <"${ANCHOR_ROOT:-}/proc/net/route"
    while read -r to mask rest; do
        case $to:$mask:${rest##* } in
            00000000000000000000000000000000:00:lo) ;;
            00000000000000000000000000000000:00:*) return 0 ;;
        esac
    done 2>/dev/null <"${ANCHOR_ROOT:-}/proc/net/ipv6_route"
    return 1
}

# usage: anchor_net__resolver
# Writes /etc/resolv.conf when it has no name server and somebody knows one. Status 1 when it cannot be written.
anchor_net__resolver() {
    local file="${ANCHOR_ROOT:-}/etc/resolv.conf" servers word text=''
    anchor_net__found=
    anchor_net__lines "$file" nameserver
    [ -z "$anchor_net__found" ] || return 0
    anchor_net__known DNS new_domain_name_servers domain-name-servers nameserver
    anchor_net__known '' new_dhcp6_name_servers dhcp6.name-servers ''
    anchor_net__hosts address
    servers=$anchor_net__hosts
    if [ -z "$servers" ]; then
        anchor_info "nobody gave this node a name server; host names will not resolve"
        return 0
    fi
    anchor_net__found=
    anchor_net__known DOMAINS new_domain_search domain-search search
    anchor_net__known DOMAINNAME new_domain_name domain-name ''
    anchor_net__hosts
    for word in $servers; do text="${text}nameserver $word$anchor_net__newline"; done
    if [ -n "$anchor_net__hosts" ]; then
        text="${text}search"
        for word in $anchor_net__hosts; do text="$text $word"; done
        text=$text$anchor_net__newline
    fi
    # Nobody reads it before it is there: programs that resolve names come later.
    printf '%s' "$text" >"$file.new" && mv -f "$file.new" "$file" && return 0
    anchor_fail "cannot write /etc/resolv.conf" "is the root file system of the initramfs full?"
    return 1
}

# usage: anchor_net_ntp
# Sets anchor_net_ntp to the NTP servers that the network manager was told of, one per line. Status 1 if there are none.
anchor_net_ntp() {
    anchor_net__found=
    anchor_net__known NTP new_ntp_servers ntp-servers ''
    anchor_net__known '' new_dhcp6_sntp_servers dhcp6.sntp-servers ''
    anchor_net__hosts
    anchor_net_ntp=$anchor_net__hosts
    [ -n "$anchor_net_ntp" ]
}

# usage: anchor_net_hostname
# Prints the node's name: from ip=, systemd.hostname=, DHCP or the kernel, whichever has one first. Status 1 if none has.
anchor_net_hostname() {
    local name domain
    anchor_net__ip_name=
    anchor_net__systemd_name=
    anchor_cmdline_each anchor_net__named
    anchor_net__found=
    anchor_net__known HOSTNAME new_host_name host-name ''
    anchor_net__hosts
    name=${anchor_net__hosts%%"$anchor_net__newline"*}
    case $name in
        '' | *.*) domain= ;;
        *)
            anchor_net__found=
            anchor_net__known DOMAINNAME new_domain_name domain-name ''
            anchor_net__hosts
            domain=${anchor_net__hosts%%"$anchor_net__newline"*}
            ;;
    esac
    for name in "$anchor_net__ip_name" "$anchor_net__systemd_name" "$name${domain:+.$domain}" /; do
        [ "$name" != / ] || name=$(cat "${ANCHOR_ROOT:-}/proc/sys/kernel/hostname" 2>/dev/null)
        case $name in
            '' | '(none)' | localhost | localhost.* | *.localdomain) continue ;;
        esac
        if anchor_type_host "$name"; then
            printf '%s\n' "$anchor_value"
            return 0
        fi
    done
    return 1
}

# usage: anchor_net__named NAME VALUE HAS_VALUE
# Called for each word of the command line: keeps the last host name in ip= and in systemd.hostname=.
anchor_net__named() {
    case $1 in
        ip) anchor_net__ip_field "$2" ;;
        systemd.hostname) anchor_net__systemd_name=$2 ;;
    esac
}

# usage: anchor_net__ip_field IP
# The host name is the fifth field of ip=<client>:<peer>:<gateway>:<netmask>:<name>:…; IPv6 fields stand in brackets.
anchor_net__ip_field() {
    local rest="$1" field number=1
    while :; do
        case $rest in
            '['*']:'*)
                field=${rest%%']:'*}]
                rest=${rest#*']:'}
                ;;
            *:*)
                field=${rest%%:*}
                rest=${rest#*:}
                ;;
            *)
                field=$rest
                rest=
                ;;
        esac
        case $number:$field in
            # ip=<interface>:<method>[:<mtu>[:<mac>]] has no name, and its address has colons.
            2:dhcp | 2:on | 2:any | 2:dhcp6 | 2:auto6 | 2:either6 | 2:link6 | 2:link-local | 2:auto) return 0 ;;
            5:?*) anchor_net__ip_name=$field ;;
        esac
        number=$((number + 1))
        [ -n "$rest" ] && [ "$number" -le 5 ] || return 0
    done
}

# usage: anchor_net__known KEY VARIABLE OPTION WORD
# Adds to anchor_net__found, as raw words, what the managers know of one fact. Each has its own name for it; '' means it has
# none: KEY= in systemd-networkd's and NetworkManager's files, VARIABLE= in what dracut keeps of dhclient's environment,
# `option OPTION …;` in a dhclient lease, and `WORD …` in a resolv.conf.
anchor_net__known() {
    local root="${ANCHOR_ROOT:-}" file
    for file in "$root"/run/systemd/netif/links/* "$root"/run/systemd/netif/leases/* \
        "$root"/run/NetworkManager/*.lease "$root"/var/lib/NetworkManager/*.lease; do
        [ -z "$1" ] || ! anchor_net__value "$file" "$1" || anchor_net__add "$anchor_net__value"
    done
    case $1 in
        HOSTNAME) anchor_net__lease 12 ;;
        DOMAINNAME) anchor_net__lease 15 ;;
    esac
    for file in "$root"/tmp/dhclient.*.dhcpopts; do
        ! anchor_net__value "$file" "$2" || anchor_net__add "$anchor_net__value"
    done
    for file in "$root"/tmp/dhclient.*.lease; do
        ! anchor_net__option "$file" "$3" || anchor_net__add "$anchor_net__value"
    done
    for file in "$root"/tmp/net.*.resolv.conf "$root"/run/NetworkManager/resolv.conf; do
        [ -z "$4" ] || anchor_net__lines "$file" "$4"
    done
    return 0
}

# usage: anchor_net__add TEXT
anchor_net__add() {
    anchor_net__found="$anchor_net__found$1$anchor_net__newline"
}

# usage: anchor_net__lease CODE
# Adds to anchor_net__found the value of a DHCP option in each lease of systemd-networkd from 261 on, which no longer writes
# leases to /run; what it writes about a link has no host name. Its lines are: code, name of one or more words, value.
anchor_net__lease() {
    local link code rest
    for link in "${ANCHOR_ROOT:-}"/run/systemd/netif/links/*; do
        # Nobody has asked for a lease for lo.
        anchor_net__value "$link" NETWORK_FILE || continue
        [ ! -e "${link%/links/*}/leases/${link##*/}" ] || continue
        command -v networkctl >/dev/null 2>&1 || return 0
        while read -r code rest; do
            [ "$code" != "$1" ] || anchor_net__add "${rest##* }"
        done <<EOT
$(timeout 5 networkctl --no-pager --no-legend --full dhcp-lease "${link##*/}" 2>/dev/null)
EOT
    done
    return 0
}

# usage: anchor_net__value FILE KEY
# Sets anchor_net__value to what KEY= has in FILE, without quotes around it. Status 1 when it has nothing.
anchor_net__value() {
    local line
    anchor_net__value=
    [ -f "$1" ] || return 1
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
            "$2="*) anchor_net__value=${line#*=} ;;
        esac
    done <"$1"
    anchor_net__unquote
}

# usage: anchor_net__option FILE OPTION
# Sets anchor_net__value to the last value of OPTION in a dhclient lease file. Status 1 when it has none.
anchor_net__option() {
    local first name value
    anchor_net__value=
    [ -f "$1" ] || return 1
    while read -r first name value; do
        [ "$first $name" = "option $2" ] && anchor_net__value=${value%;}
    done <"$1"
    anchor_net__unquote
}

# usage: anchor_net__unquote
# Takes a pair of quotes off anchor_net__value. Status 1 when nothing is left.
anchor_net__unquote() {
    case $anchor_net__value in
        \'*\' | \"*\")
            anchor_net__value=${anchor_net__value#?}
            anchor_net__value=${anchor_net__value%?}
            ;;
    esac
    [ -n "$anchor_net__value" ]
}

# usage: anchor_net__lines FILE WORD
# Adds to anchor_net__found what follows WORD in the lines of a resolv.conf that begin with it.
anchor_net__lines() {
    local first rest
    [ -f "$1" ] || return 0
    while read -r first rest || [ -n "$first" ]; do
        [ "$first" != "$2" ] || anchor_net__add "$rest"
    done <"$1"
    return 0
}

# usage: anchor_net__hosts [address]
# Sets anchor_net__hosts to the valid host names and addresses (or only addresses) in anchor_net__found, normalised, each
# once and on its own line.
anchor_net__hosts() {
    local rest="$anchor_net__found" word
    anchor_net__hosts=
    while :; do
        rest=${rest#"${rest%%[!,	 "$anchor_net__newline"]*}"}
        [ -n "$rest" ] || return 0
        word=${rest%%[,	 "$anchor_net__newline"]*}
        rest=${rest#"$word"}
        anchor_type_host "${word%.}" || continue
        case ${1:-}:$anchor_value in
            address:*:*) ;;
            address:*[!0-9.]*) continue ;;
        esac
        case $anchor_net__newline$anchor_net__hosts$anchor_net__newline in
            *"$anchor_net__newline$anchor_value$anchor_net__newline"*) continue ;;
        esac
        anchor_net__hosts="$anchor_net__hosts${anchor_net__hosts:+$anchor_net__newline}$anchor_value"
    done
}
