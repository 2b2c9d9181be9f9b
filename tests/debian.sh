#!/usr/bin/env bash
# Install Debian packages that tests need, where they are not and we may; else say what is missing. Those tests are
# then skipped.
#   debian.sh PACKAGE…
set -euo pipefail
missing=()
for package in "$@"; do
  dpkg --status "$package" 2> /dev/null | grep -q '^Status: .* installed$' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "not here: ${missing[*]}; as root on Debian: apt-get install --no-install-recommends ${missing[*]}"
  exit 0
fi
exec 9> /run/lock/lsim-test-packages
flock 9  # one at a time, as apt has it
export DEBIAN_FRONTEND=noninteractive
install=(apt-get install --quiet=2 --yes --no-install-recommends "${missing[@]}")
"${install[@]}" > /dev/null 2>&1 || { apt-get update --quiet=2; "${install[@]}" > /dev/null; }
