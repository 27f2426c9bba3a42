#!/bin/sh
# Loads the drivers of the network cards on PCI, before udev comes to them: the kernel tells of a link at once, or a second
# after it last told of one (net/core/link_watch.c), and a card's driver makes it tell. So a card whose link is set up right
# after its driver was loaded has no network for a second more. udev finds all other cards, and what is not found here.

# usage: anchor_cards_aliases FILE...
# Prints what the modalias files of network cards (class 02) hold.
anchor_cards_aliases() {
    local file class alias
    for file; do
        class=0x02
        [ ! -e "${file%/*}/class" ] || IFS= read -r class <"${file%/*}/class"
        case $class in
            0x02*) ! IFS= read -r alias <"$file" || printf '%s\n' "$alias" ;;
        esac
    done 2>/dev/null
}

# usage: anchor_cards_load FILE...
anchor_cards_load() {
    set -f
    # shellcheck disable=SC2046 # one alias each
    set -- $(anchor_cards_aliases "$@")
    set +f
    [ $# -eq 0 ] || modprobe -q -a -b -- "$@"
}

anchor_cards_load /sys/bus/pci/devices/*/modalias
# virtio's cards are behind a device on PCI; of its devices, type 1 is a card.
anchor_cards_load /sys/bus/virtio/devices/*/modalias
exit 0
