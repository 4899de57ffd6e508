#!/usr/bin/env bash
# The servers that the tests start for themselves: redis-server, nginx and PostgreSQL. Taken from the
# PATH (Debian keeps PostgreSQL's programs in /usr/lib/postgresql/*/bin, where the tests look
# too), else installed with apt-get where that is allowed, else named with the command to run.
set -euo pipefail

packages=()
command -v redis-server > /dev/null || packages+=(redis-server)
command -v nginx > /dev/null || [ -x /usr/sbin/nginx ] || packages+=(nginx-light)
if ! command -v initdb > /dev/null && ! compgen -G '/usr/lib/postgresql/*/bin/initdb' > /dev/null; then
    packages+=(postgresql)
fi
[ "${#packages[@]}" -gt 0 ] || exit 0

refuse() {
    echo "The tests need ${packages[*]}, and $1. Run this, then make test again:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y ${packages[*]}" >&2
    exit 1
}
command -v apt-get > /dev/null || refuse "this machine has no apt-get (use its own package manager)"
sudo=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2> /dev/null || refuse "installing them takes root, or sudo without a password"
    sudo=(sudo -n)
fi

echo "installing ${packages[*]} with apt-get"
# Debian would start what it installs, on the usual ports; the tests start their own on free ones.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" > /dev/null
    "${sudo[@]}" chmod +x "$policy"
    trap '"${sudo[@]}" rm -f "$policy"' EXIT
fi
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -qq -y --no-install-recommends "${packages[@]}" > /dev/null
