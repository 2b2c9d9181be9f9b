#!/usr/bin/env bash
# Three hosts on one machine for tests: network namespaces h0, h1 and h2 on one switch, a bridge in a namespace of
# its own. Nothing of it touches the machine's own network. Run it as root.
#   netns.sh up            h0, h1, h2 have the addresses 10.99.0.10, 10.99.0.11, 10.99.0.12
#   netns.sh run h1 COMMAND…
#   netns.sh cut h2        packets from and to h2 vanish: connections stay open, nobody is told
#   netns.sh mend h2
#   netns.sh down          ends what runs on the hosts, and removes them
set -euo pipefail
prefix=lsimtest-
switch=${prefix}switch

up() {
  ip netns add "$switch"
  ip -n "$switch" link add bridge type bridge
  ip -n "$switch" link set bridge up
  for i in 0 1 2; do
    ip netns add "${prefix}h$i"
    ip -n "${prefix}h$i" link set lo up
    ip -n "$switch" link add "port$i" type veth peer name eth0 netns "${prefix}h$i"
    ip -n "${prefix}h$i" addr add "10.99.0.$((10 + i))/24" dev eth0
    ip -n "${prefix}h$i" link set eth0 up
    ip -n "$switch" link set "port$i" master bridge up
  done
}

down() {
  for name in h0 h1 h2 switch; do
    [ -e "/run/netns/$prefix$name" ] || continue
    ip netns pids "$prefix$name" | xargs --no-run-if-empty kill -KILL || true
    ip netns del "$prefix$name"
  done
}

case ${1:-} in
up) up ;;
down) down ;;
# The port leaves the switch while both ends keep their carrier, as behind a switch that fails.
cut) ip -n "$switch" link set "port${2#h}" nomaster ;;
mend) ip -n "$switch" link set "port${2#h}" master bridge ;;
run) exec ip netns exec "$prefix$2" "${@:3}" ;;
*) sed -n 2,8p "$0" >&2; exit 2 ;;
esac
