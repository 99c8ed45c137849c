#!/usr/bin/env bash
# Exit code 0 when GET /ready on 127.0.0.1:PORT answers 200. Bash alone: a bare machine has no curl.
#   tools/ready.sh PORT
exec 2>/dev/null
exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
printf 'GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' >&3
read -r -t 2 -u 3 _ code _ || exit 1
while read -r -t 1 -u 3 _; do :; done # to the end, so that the server sees a clean close
[[ $code == 200 ]]
